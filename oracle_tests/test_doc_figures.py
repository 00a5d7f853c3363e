"""Figures in results.md, performance.md and the README are those of the results beside them."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from typing import Any

import pytest
from scipy import stats

from oracle_tests.programs import gpu_whole_run
from oracle_tests.small_runs import ROOT

RESULTS = ROOT / "docs" / "results"


def runs_of(name: str, **labels: str) -> list[dict[str, Any]]:
    """The runs of a comparison with these labels."""
    found: dict[str, dict[str, Any]] = json.loads((RESULTS / name / "results.json").read_text(encoding="utf-8"))
    return [run for run in found.values() if labels.items() <= run["labels"].items()]


def perplexities(name: str, **labels: str) -> list[tuple[float, float]]:
    """Perplexity of WikiText-2's second half, and of both halves, of each seed."""
    runs = runs_of(name, **labels)
    second = [math.exp(statistics.fmean(run["losses"]["WikiText-2"])) for run in runs]
    return [(value, math.sqrt(value * run["tuning"])) for value, run in zip(second, runs, strict=True)]


def test_results_and_readme_have_the_figures_of_the_runs() -> None:
    results, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/results.md", "README.md"))
    peers = {"sora": "SoRA", "sparse_lora": "sparse LoRA", "lora": "LoRA", "losa": "**LoSA, as in the paper**"}
    for recipe, title in peers.items():
        [(second, _)] = perplexities("tuning", recipe=recipe, learning_rate="0.002")
        stars = "**" if "**" in title else ""
        assert f"| {title} | {stars}{second:.1f}{stars} | 2e-3 |" in results
    shown: dict[str, list[str]] = {}
    for recipe, sparsity in itertools.product(("none", "lora", "sparse_lora", "losa"), ("0.5", "0.6", "0.7", "2:4")):
        [(second, both)] = perplexities("smollm2", recipe=recipe, sparsity=sparsity, prune_method="wanda")
        digits = 1 if both < 1000 else 0
        shown.setdefault(recipe, []).append(f"{both:.{digits}f}")
        if recipe in ("none", "losa"):
            assert f" {both:.{digits}f} ({second:.{digits}f}) |" in results
    both_loras = map("; ".join, zip(shown["lora"][:3], shown["sparse_lora"][:3], strict=True))
    for title, figures in (
        ("pruned at once", shown["none"][:3]),
        ("sparse LoRA", both_loras),
        ("(`--preset paper`)", shown["losa"][:3]),
    ):
        assert f"{title} | {' | '.join(figures)} |" in readme
    cells = []
    for sparsity in ("0.5", "0.6", "0.7", "2:4"):
        recipe = "best" if sparsity in ("0.6", "0.7") else "best_low"
        runs = perplexities("recovery", recipe=recipe, prune_method="wanda", sparsity=sparsity)
        second, both = (
            f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}" for values in zip(*runs, strict=True)
        )
        assert f"**{both} ({second})**" in results
        cells.append(f"**{both}**")
    assert " | ".join(cells[:3]) in readme
    [(second, both)] = perplexities("recovery", recipe="dense")
    assert f"Dense: {both:.1f} ({second:.1f})." in " ".join(results.split())
    assert readme.count(f" {both:.1f} |") >= 3
    best = float(cells[2].strip("*").split()[0])
    assert (
        f"from perplexity {shown['none'][2]}, pruned at once, to {best:.0f} (dense {both:.0f}; "
        f"LoSA as in the paper {float(shown['losa'][2]):.0f})" in readme
    )


def figure(value: float) -> str:
    """A perplexity as the tables show it."""
    return f"{value:.1f}" if value < 300 else f"{value:,.0f}"


def spread(name: str, **labels: str) -> str:
    """Perplexity of the second half, with the deviation over seeds if there are several; empty without a run."""
    values = [second for second, _ in perplexities(name, **labels)]
    if len(values) > 1:
        return f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"
    return figure(values[0]) if values else ""


def test_rates_and_masks_of_2_4_are_those_of_the_runs() -> None:
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("**", "")
    rules = {"rmi": "mutual information", "uniform": "uniform", "owl": "OWL", "atp": "ATP", "lamp": "LAMP"}
    for rule, title in {**rules, "gradient": "gradients"}.items():
        found = []
        for sparsity in ("0.5", "0.6", "0.7", "0.8"):
            [(second, _)] = perplexities("rates", recipe="none", layer_sparsity=rule, sparsity=sparsity)
            found.append(figure(second))
        found.append(spread("rates", recipe="losa", layer_sparsity=rule))
        assert f"| {title} | {' | '.join(found)} |" in results
    [(half, whole)] = perplexities("two_four", recipe="three_steps_seven_written")
    assert f" {whole:.1f} ({half:.1f})" in results
    for method in ("admm", "alps"):
        halves, wholes = zip(*perplexities("two_four", recipe=f"three_steps_{method}_seven_written"), strict=True)
        assert len(halves) == 3
        told = [f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}" for values in (wholes, halves)]
        assert f" {told[0]} ({told[1]})" in results
    for method in ("sparsegpt", "admm"):
        [(half, whole)] = perplexities("recovery", recipe="best", prune_method=method)
        assert f" {whole:.1f} ({half:.1f})" in results
    for recipe in ("reconstruction", "one_shot_best", "every_kept_weight"):
        [(half, whole)] = perplexities("recovery", recipe=recipe)
        assert f" | {whole:.1f} ({half:.1f}) | |" in results
    ablation = {
        "losa": "rates by mutual information, ranks by error",
        "uniform_rates": "uniform rates",
        "uniform_ranks": "uniform ranks",
        "uniform_both": "both uniform",
        "sparse_lora": "one shot, uniform (sparse LoRA)",
    }
    for recipe, title in ablation.items():
        assert f"| {title} | {spread('ablation', recipe=recipe, sparsity='0.7')} |" in results
    parts = (spread("ablation", recipe=recipe) for recipe in ("attention_alone", "mlp_alone"))
    assert f"in the MLP alone | {'; '.join(parts)} |" in results
    [(plain, _)], [(mixed, _)] = (
        perplexities("smollm2", recipe="losa", prune_method="wanda", sparsity=pattern)
        for pattern in ("2:4", "mixed-2:4")
    )
    assert f"{plain:.1f} at 2:4 and {mixed:.1f} at mixed 2:4" in " ".join(results.split())


def test_steps_and_texts_are_those_of_the_runs() -> None:
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("**", "")
    steps = [spread("steps", recipe="losa", steps=count) for count in ("1", "2", "3", "5", "8", "10")]
    assert f"| LoSA as in the paper | {' | '.join(steps)} |" in results
    [(five, _)] = perplexities("recovery", recipe="best", prune_method="wanda", sparsity="0.7", seed="0")
    one, three = (spread("steps", recipe="best", steps=count) for count in ("1", "3"))
    assert f"| best recipe | {one} | | {three} | {five:.1f} | | |" in results
    healed = {"alpaca_5000.json": "5,000 records of Alpaca", "c4_demo.jsonl": "300 documents of C4"}
    for text, title in healed.items():
        found = [
            spread("healing", recipe=recipe, finetune_data=text, sparsity=sparsity)
            for sparsity, recipe in itertools.product(("0.5", "0.7"), ("sparse_lora", "losa"))
        ]
        best = spread("healing", recipe="best", finetune_data=text) or f"{five:.1f}"
        assert f"| {title} | {' | '.join((*found, best))} |" in results
    texts = {"alpaca_5000.json": "128 of Alpaca", "tinystories.txt": "128 of TinyStories"}
    rows = [({"nsamples": count}, f"{count} of C4") for count in ("16", "32", "64", "128")]
    rows += [({"calibration_data": text}, title) for text, title in texts.items()]
    for labels, title in rows:
        found = [spread("calibration", recipe=recipe, **labels) for recipe in ("none", "reconstruction", "losa")]
        assert f"| {title} | {' | '.join(found)} |" in results
    plain, mixed = (spread("mixed", recipe="losa", sparsity=pattern) for pattern in ("4:8", "mixed-4:8"))
    assert f"4:8 {plain} and at mixed 4:8 {mixed}" in " ".join(results.split())


def cells(run: dict[str, Any]) -> str:
    """Perplexities on both texts and the mean accuracy in percent of a run, as cells of a table."""
    texts = [math.exp(statistics.fmean(run["losses"][text])) for text in ("WikiText-2", "C4")]
    return " | ".join(
        f"{value:.1f}" if value < 1000 else f"{value:,.0f}" for value in (*texts, 100 * run["zero_shot"]["mean"])
    )


SIZES = {"0.7": "70 %", "2:4": "2:4", "0.6": "60 %", "0.5": "50 %", "2:8": "2:8"}
SIZES |= {"mixed-2:4": "mixed 2:4", "mixed-2:8": "mixed 2:8"}
TREATMENTS = {
    "none": "pruned at once",
    "sora": "SoRA",
    "sparse_lora": "sparse LoRA",
    "lora": "LoRA",
    "adalora": "AdaLoRA",
    "losa": "LoSA as in the paper",
    "best": "best recipe",
    "best_low": "best recipe, lower rates",
}
METHODS = {
    "magnitude": "magnitude",
    "wanda": "Wanda",
    "pruner_zero": "Pruner-Zero",
    "sparsegpt": "SparseGPT",
    "admm": "ADMM",
    "alps": "ALPS",
}


def methods_table(sparsity: str) -> list[str]:
    """Rows of the table of results.md: perplexity, and the mean accuracy in brackets, of each method after each recipe."""
    runs = runs_of("smollm2", sparsity=sparsity)
    found = {(run["labels"]["prune_method"], run["labels"]["recipe"]): run for run in runs}
    columns = ["none", "lora", "adalora", "sora", "sparse_lora", "losa", "best"]
    if sparsity.startswith("mixed"):
        # One shot has the same rates everywhere, and so the pattern without "mixed".
        columns = ["losa", "best"]
    lines = [f"| {SIZES[sparsity]} | " + " | ".join(TREATMENTS[recipe] for recipe in columns) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for method, title in METHODS.items():
        row = [found.get((method, recipe), found.get((method, f"{recipe}_low"))) for recipe in columns]
        if any(row):
            texts = ["" if run is None else "{} ({})".format(*cells(run).split(" | ")[::2]) for run in row]
            lines.append(f"| {title} | {' | '.join(texts)} |".replace("  ", " "))
    return lines


@pytest.mark.parametrize("sparsity", SIZES)
def test_methods_and_recipes_are_those_of_the_runs(sparsity: str) -> None:
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("**", "")
    assert "\n".join(methods_table(sparsity)) in results


def leads_table() -> list[str]:
    """Rows of the table of results.md: LoSA's lead in percent over sparse LoRA and over the best adapter left unmerged.

    In brackets where a paired t-test over the windows has p of 0.01 or more; empty where a run is missing.
    """
    sizes = ["0.7", "0.6", "0.5", "2:4", "2:8"]
    lines = ["| LoSA's lead, % | " + " | ".join(SIZES[size] for size in sizes) + " |", "|---" * (1 + len(sizes)) + "|"]
    for method, title in METHODS.items():
        row = [title]
        for size in sizes:
            runs = runs_of("smollm2", prune_method=method, sparsity=size)
            losses = {run["labels"]["recipe"]: run["losses"]["WikiText-2"] for run in runs}
            unmerged = [losses[name] for name in ("lora", "adalora", "sora") if name in losses]
            told: list[str] = []
            others = (
                [losses["sparse_lora"], min(unmerged, key=statistics.fmean)] if unmerged and "losa" in losses else []
            )
            for theirs in others:
                lead = -100 * math.expm1(statistics.fmean(losses["losa"]) - statistics.fmean(theirs))
                chance = stats.ttest_rel(losses["losa"], theirs).pvalue
                told.append(f"{lead:.1f}".replace("-", "−") if chance < 0.01 else f"({lead:.1f})".replace("-", "−"))
            row.append(", ".join(told))
        lines.append(f"| {' | '.join(row)} |".replace("  ", " "))
    return lines


def test_leads_are_those_of_the_runs() -> None:
    assert "\n".join(leads_table()) in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def change(sparsity: str, ours: tuple[str, str], theirs: tuple[str, str], text: str = "WikiText-2") -> float:
    """How much lower, in percent, the perplexity of one (recipe, method) is than that of another; negative: higher."""
    losses = [
        statistics.fmean(run["losses"][text])
        for recipe, method in (ours, theirs)
        for run in runs_of("smollm2", recipe=recipe, prune_method=method, sparsity=sparsity)
    ]
    return -100 * math.expm1(losses[0] - losses[1])


def leads_over(
    recipes: tuple[str, ...], methods: tuple[str, ...], sparsity: str, text: str = "WikiText-2"
) -> list[float]:
    """LoSA's leads over these recipes with the masks of these methods, lowest first."""
    pairs = itertools.product(recipes, methods)
    return sorted(change(sparsity, ("losa", method), (recipe, method), text) for recipe, method in pairs)


ADAPTERS = ("lora", "adalora", "sora", "sparse_lora")


def test_what_steps_bring_is_told_as_it_was() -> None:
    told = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    tuned = {
        recipe: perplexities("tuning", recipe=recipe, learning_rate="0.002")[0][0]
        for recipe in (*ADAPTERS, "losa")
        if recipe != "adalora"
    }
    losa = tuned.pop("losa")
    low, high = (100 * (1 - losa / other) for other in (min(tuned.values()), max(tuned.values())))
    assert f"{low:.1f} to {high:.1f} % lower perplexity at 70 %" in told
    spans = {}
    for size in ("2:8", "0.6", "2:4"):
        spans[size] = leads_over(ADAPTERS, ("wanda",), size)
    bounds = [f"{spans[size][0]:.0f} to {spans[size][-1]:.0f} % at {SIZES[size]}" for size in spans]
    assert f"{', '.join(bounds)}; at 50 %" in told
    half = leads_over(("lora", "sparse_lora"), ("wanda",), "0.5")
    assert f"at 50 % {half[0]:.1f} to {half[1]:.1f} % against LoRA and sparse LoRA" in told
    assert leads_over(("adalora", "sora"), ("wanda",), "0.5")[0] > -1
    assert f"with Wanda's masks {low:.0f} to {high:.0f} % at 70 %, {', '.join(bounds[1:])}, at 50 % hardly" in told
    masks = leads_over(ADAPTERS, ("admm", "alps"), "0.7")
    assert f"[{masks[0]:.0f} to {masks[-1]:.0f} % at 70 %]" in told
    best = sorted(
        change(size, ("best_low" if size in ("0.5", "2:4", "mixed-2:4") else "best", "wanda"), ("losa", "wanda"))
        for size in SIZES
    )
    assert f"The best recipe is {best[0]:.0f} to {best[-1]:.0f} % below LoSA" in told


def test_what_masks_bring_is_told_as_it_was() -> None:
    told = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    good, lower = ("admm", "alps"), ("0.6", "0.5", "2:4")
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    spans, bounds = [], []
    for size in ("0.7", "2:4", "0.6", "0.5"):
        low, high = sorted(change(size, ("losa", method), ("losa", "wanda")) for method in good)
        bounds += [low, high]
        spans.append(
            f"{low:.0f} to {high:.0f} % {'lower perplexity than with Wanda ' if size == '0.7' else ''}at {SIZES[size]}"
        )
    whole = f"{min(bounds):.0f} to {max(bounds):.0f} % lower"
    assert f"ADMM or ALPS: {whole} perplexity than with Wanda in the paper's recipe" in told
    assert f"the paper's recipe ends {whole} in perplexity with admm or alps" in readme
    others = [
        change(size, (recipe, method), (recipe, "wanda"))
        for size, recipe, method in itertools.product(("0.7", *lower), ADAPTERS, good)
    ]
    after = f"after the paper's LoSA; {min(others):.0f} to {max(others):.0f} % after other adapters."
    assert f"{', '.join(spans)}, {after}" in told
    assert f"At 2:8 ALPS's LoSA is {change('2:8', ('losa', 'alps'), ('losa', 'wanda')):.0f} % lower." in told
    # Nothing that merges is better.
    assert all(leads_over(("sparse_lora",), tuple(METHODS), size)[0] > 0 for size in ("0.7", *lower))
    assert all(abs(leads_over(("adalora",), ("alps",), size)[0]) < 0.5 for size in lower)
    ahead = sorted(-leads_over(("adalora",), ("admm",), size)[0] for size in lower)
    assert f"and {ahead[0]:.0f} to {ahead[-1]:.0f} % better with ADMM's" in told
    of_lora = [-leads_over(("lora",), ("magnitude",), size)[0] for size in ("2:4", "0.6")]
    assert f"LoRA is {of_lora[0]:.0f} and {of_lora[1]:.0f} % better at 2:4 and 60 % with magnitude's" in told
    on_c4 = []
    for size in ("0.7", "0.6", "2:4"):
        least = [leads_over(ADAPTERS, (method,), size, "C4")[0] for method in ("sparsegpt", *good)]
        on_c4.append(f"{min(least):.0f} to {max(least):.0f} % at {SIZES[size]}")
    assert f"masks, by {on_c4[0]}, {on_c4[1]} and {on_c4[2]}." in told
    seconds = {
        method: runs_of("smollm2", recipe="losa", prune_method=method, sparsity="0.7")[0]["seconds"]["prune"]
        for method in METHODS
    }
    assert (
        "take {wanda:.0f} s with Wanda, {magnitude:.0f} with magnitude, {sparsegpt:.0f} with SparseGPT, {pruner_zero:.0f} with "
        "Pruner-Zero, {admm:.0f} with ADMM, {alps:.0f} with ALPS.".format(**seconds)
        in told
    )


def test_what_masks_bring_to_the_best_recipe_is_told_as_it_was() -> None:
    told = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    ends, begins = ([r[recipe] for r in map(of_masks, METHODS)] for recipe in ("best", "none"))
    span = f"between {min(begins):.0f} and {max(begins):,.0f} end between {min(ends):.1f} and {max(ends):.1f}: "
    lower = {
        (size, method): change(size, (recipe, method), (recipe, "wanda"))
        for size, recipe, methods in (
            ("0.7", "best", ("sparsegpt", "alps", "admm", "magnitude")),
            ("2:4", "best_low", ("sparsegpt", "alps", "admm")),
        )
        for method in methods
    }
    assert (
        f"{span}SparseGPT's, ALPS's and ADMM's end {lower['0.7', 'sparsegpt']:.1f}, {lower['0.7', 'alps']:.1f} and "
        f"{lower['0.7', 'admm']:.1f} % below Wanda's, magnitude's {-lower['0.7', 'magnitude']:.1f} % above. At 2:4 ALPS's and "
        f"ADMM's end {lower['2:4', 'alps']:.1f} and {lower['2:4', 'admm']:.1f} % below Wanda's, SparseGPT's as good"
        in told
    )
    assert abs(lower["2:4", "sparsegpt"]) < 0.5
    good = [lower[size, method] for size in ("0.7", "2:4") for method in ("admm", "alps")]
    span = f"{min(good):.0f} to {max(good):.0f} %"
    assert f"in the paper's recipe, {span} in the best one |" in told
    assert f"the best one {span} (" in readme
    again = [
        perplexities("recovery", recipe="best", prune_method=m, sparsity="0.7")[0][0] for m in ("sparsegpt", "admm")
    ]
    assert "once more ended at {:.1f} with SparseGPT's and {:.1f} with ADMM's".format(*again) in told
    seeds = [second for second, _ in perplexities("recovery", recipe="best", prune_method="wanda", sparsity="0.7")]
    assert len(seeds) == 3
    assert round(100 * statistics.stdev(seeds) / statistics.fmean(seeds)) == 1
    minutes = [
        runs_of("smollm2", recipe="best", prune_method=m, sparsity="0.7")[0]["seconds"]["prune"] / 60
        for m in ("alps", "admm", "sparsegpt")
    ]
    assert "ALPS take {:.0f} minutes at 70 %, with ADMM {:.0f}, with SparseGPT {:.0f} (".format(*minutes) in told
    others = sorted(
        change(size, (recipe, method), ("losa", method))
        for size, recipe in (("0.7", "best"), ("2:4", "best_low"))
        for method in METHODS
        if method != "wanda" and runs_of("smollm2", recipe=recipe, prune_method=method, sparsity=size)
    )
    assert f"and {others[0]:.0f} to {others[-1]:.0f} % with other masks." in told


def of_masks(method: str) -> dict[str, float]:
    """Perplexity at 70 % of every recipe with these masks."""
    return {
        run["labels"]["recipe"]: math.exp(statistics.fmean(run["losses"]["WikiText-2"]))
        for run in runs_of("smollm2", prune_method=method, sparsity="0.7")
    }


def schedules_table() -> list[str]:
    """Rows of the table of results.md: perplexity at 2:4 by schedule and steps."""
    lines = []
    for method in ("wanda", "sparsegpt", "alps"):
        row = [METHODS[method]]
        for recipe in ("sparse_lora", "losa", "one_schedule", "two_steps", "two_steps_one_schedule"):
            runs = runs_of("schedules", prune_method=method, recipe=recipe)
            values = [math.exp(statistics.fmean(run["losses"]["TinyStories"])) for run in runs]
            row.append(f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}")
        lines.append(f"| {' | '.join(row)} |")
    return lines


def test_schedules_are_those_of_the_runs() -> None:
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("**", "")
    assert "\n".join(schedules_table()) in results
    told = " ".join(results.split())
    better = {
        recipe: sorted(
            -100 * math.expm1(mean_loss(recipe, method) - mean_loss("losa", method))
            for method in ("wanda", "sparsegpt", "alps")
        )
        for recipe in ("one_schedule", "two_steps", "sparse_lora")
    }
    for sentence, recipe in (
        ("one schedule over all steps is {:.1f} to {:.1f} % better", "one_schedule"),
        ("two steps {:.1f} to {:.1f} %", "two_steps"),
        ("tokens on the final pattern, {:.1f} to {:.1f} %", "sparse_lora"),
    ):
        assert sentence.format(better[recipe][0], better[recipe][-1]) in told


def mean_loss(recipe: str, method: str) -> float:
    """The mean loss of a row of schedules.toml over its seeds and windows."""
    runs = runs_of("schedules", prune_method=method, recipe=recipe)
    return statistics.fmean(loss for run in runs for loss in run["losses"]["TinyStories"])


def test_zero_shot_accuracies_are_those_of_the_runs() -> None:
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("**", "")
    for run in runs_of("smollm2"):
        labels = run["labels"]
        if labels.get("prune_method", "wanda") != "wanda":
            continue
        if labels.get("sparsity", "").startswith("mixed") and labels["recipe"] not in ("losa", "best", "best_low"):
            # Blocks that all have the same pattern: the rows without "mixed".
            continue
        title = f"{SIZES[labels['sparsity']]}, {TREATMENTS[labels['recipe']]}" if "sparsity" in labels else "dense"
        others = [value for task, value in run["zero_shot"]["accuracy"].items() if task != "boolq"]
        assert f"| {title} | {cells(run)} | {100 * statistics.fmean(others):.1f} |" in results


def test_smaller_models_are_those_of_the_runs() -> None:
    runs = runs_of("structured")
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("**", "")
    titles = {
        "ends_reconstructed": "LoSA, ends dense, reconstruction",
        "ends_late": "LoSA, ends dense, most tokens last",
        "llm_pruner": "LLM-Pruner",
        "ends": "LoSA, ends dense",
        "ends_lora": "Wanda-SP, ends dense, LoRA",
        "flap": "FLAP",
        "reconstructed": "LoSA, reconstruction",
        "structured_lora": "Wanda-SP, LoRA",
        "structured": "LoSA",
        "sleb": "SLEB",
        "loraprune": "LoRAPrune",
        "slicegpt": "SliceGPT",
    }

    def of(recipe: str, sparsity: str) -> list[dict[str, Any]]:
        return [run for run in runs if run["labels"].items() >= {"recipe": recipe, "sparsity": sparsity}.items()]

    (dense,) = (run for run in runs if run["labels"]["recipe"] == "dense")
    assert f"| dense | {cells(dense)} |" in results
    for recipe, title in titles.items():
        (row,) = (line for line in results.splitlines() if line.startswith(f"| {title} |") and line.count("|") == 9)
        found = [cell.strip() for cell in row.split("|")[2:-1]]
        assert " | ".join(found[:3]) == seeds(of(recipe, "0.2"))
        pruned = {"structured_lora": "structured", "ends_late": "ends", "ends_lora": "ends"}.get(recipe, recipe)
        alone = of(pruned + "_alone", "0.2")
        assert found[3] == (f"{math.exp(statistics.fmean(alone[0]['losses']['WikiText-2'])):.1f}" if alone else "")
        later = of(recipe, "0.3")
        assert " | ".join(found[4:]) == (seeds(later) if later else " |  | ")


def seeds(runs: list[dict[str, Any]]) -> str:
    """`cells`, with the deviation over seeds of the perplexities if there are several."""
    columns = [[math.exp(statistics.fmean(run["losses"][text])) for run in runs] for text in ("WikiText-2", "C4")]
    texts = [
        f"{statistics.fmean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")
        for values in columns
    ]
    return " | ".join((*texts, f"{100 * statistics.fmean(run['zero_shot']['mean'] for run in runs):.1f}"))


def test_zeros_and_bits_are_those_measured() -> None:
    found = json.loads((ROOT / "docs" / "results" / "bits" / "bits.json").read_text())
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("**", "")
    values = {(row["zeros"], row["values"]): row for row in found}
    for (zeros, kind), row in values.items():
        bits, perplexity = row["bits"], row["perplexity"]
        title = f"{zeros:.0%}".replace("%", " %") if zeros else "dense"
        rise = perplexity / values[zeros, "bf16"]["perplexity"] - 1
        (line,) = (line for line in results.splitlines() if line.startswith(f"| {title}, {kind} | "))
        assert line.startswith(f"| {title}, {kind} | {f'{bits:.1f}'.removesuffix('.0')} | {perplexity:.1f}")
        assert kind != "int8" or abs(rise) < 0.003
    # Bitmap, codes, and a scale of 16 bits for 128 weights.
    for (zeros, kind), row in values.items():
        if zeros:
            wide = 1 + (1 - zeros) * (16 if kind == "bf16" else int(kind[3:])) + (kind != "bf16") / 8
            assert wide - 0.1 < row["bits"] < wide + 0.2, row


def test_the_whole_run_is_told_as_it_was() -> None:
    run = json.loads((ROOT / "docs/results/whole_run/llama-2-7b.json").read_text(encoding="utf-8"))
    result, steps = run["result"], run["steps"]
    assert gpu_whole_run.failures(result, minutes=20, gib=48) == []
    performance, results, readme = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("docs/performance.md", "docs/results.md", "README.md")
    )
    table = "\n".join(line.rstrip() for line in gpu_whole_run.report(result, steps))
    assert f"```\n{table}\n```" in performance
    assert f"{result['train_examples']:,} records" in performance.replace("\n", " ")
    whole = f"{result['seconds_in_all'] / 60:.1f} minutes and {result['peak_memory']['device'] / 2**30:.1f} GiB"
    assert whole in results
    assert whole in readme
    reconstruction = sum(step["seconds"]["reconstruct"] for step in steps) / 60
    assert f"took {reconstruction:.1f} minutes of [a whole run]" in results.replace("\n", " ")


def test_windows_are_of_one_kind_within_each_result() -> None:
    for path in RESULTS.glob("*/results.json"):
        runs = runs_of(path.parent.name)
        assert len({json.dumps(run["hashes"], sort_keys=True) for run in runs if run["hashes"]}) == 1, path
        for run, other in itertools.pairwise(run for run in runs if run["losses"]):
            assert {k: len(v) for k, v in run["losses"].items()} == {k: len(v) for k, v in other["losses"].items()}
