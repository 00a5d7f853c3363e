"""Each recipe of the contributors' guide, carried out as it stands there: what is added takes part in all that there is.

The code comes from the page. A recipe for a new file runs by itself, one for an existing file runs with that file's names.
"""

from __future__ import annotations

import ast
import copy
import importlib
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PhiConfig, PhiForCausalLM

from oracle_tests.small_runs import ROOT, arguments, fails, make_place
from oracle_tests.whole_runs import Case, run_production, special
from reference import losa as reference_losa
from reference import rates as reference_rates
from reference.masks import prune as reference_masks
from tiny_models.random_models import byte_tokenizer, random_model
from torch_impl.engine import families, rates
from torch_impl.engine.decoder import Decoder
from torch_impl.experiment.baselines import BASELINES
from torch_impl.experiment.config import parse
from torch_impl.experiment.material import load_material
from torch_impl.experiment.planning import checks
from torch_impl.experiment.planning.sizes import Sizes
from torch_impl.experiment.text import sources
from torch_impl.masks import prune as masks
from torch_impl.run import main

PAGE = ROOT / "docs" / "recipes.md"
ONE_SHOT = {"steps": 1, "finetune": "false", "eval_windows": 2, "sparsity_ratio": 0.5}


def recipe(path: str) -> dict[str, Any]:
    """Run the code that the page gives for a file. Returns the names that the file then has."""
    found = re.findall(rf"```python\n# {re.escape(path)}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(found) == 1, f"{len(found)} recipes for {path}"
    names: dict[str, Any] = {"__name__": "recipe"}
    if (ROOT / path).exists():
        names |= vars(importlib.import_module(path.removesuffix(".py").replace("/", ".")))
    exec(compile(found[0], path, "exec"), names)
    return names


@pytest.fixture
def method(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the recipe's method, registered in both packages."""
    for package, registry in (("reference", reference_masks.METHODS), ("torch_impl", masks.METHODS)):
        added = recipe(f"{package}/masks/energy.py")["METHOD"]
        monkeypatch.setitem(registry, added.name, added)
    return str(added.name)


@pytest.fixture
def rule(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the recipe's rate rule, registered in both packages."""
    for path, registry in (("reference/rates.py", reference_rates.RULES), ("torch_impl/engine/rates.py", rates.RULES)):
        added = recipe(path)["RULE"]
        monkeypatch.setitem(registry, added.name, added)
    return str(added.name)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return make_place(tmp_path)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def run_both(place: Path, **changes: object) -> dict[str, torch.Tensor]:
    """The weights of a run in memory, after comparing them with those of the same run block by block."""
    found = []
    for choice in ("off", "on"):
        options = arguments(place, **ONE_SHOT, **changes, offload=choice, output_dir=place / choice)
        assert main(options) == 0
        found.append(weights_in(place / choice / "model"))
    inside, offloaded = found
    assert inside.keys() == offloaded.keys()
    for name, weight in inside.items():
        assert torch.equal(weight, offloaded[name]), name
    return inside


def assert_same_decisions(case: Case) -> None:
    """The rates and masks of every step, in both packages."""
    _, expected = reference_losa.run(case.model(), case.calibration(), case.parts(), case.settings)
    for ours, theirs in zip(run_production(case).records, expected, strict=True):
        np.testing.assert_allclose(ours.importance, theirs.importance, rtol=1e-9)
        np.testing.assert_allclose(ours.sparsity, theirs.sparsity, rtol=1e-9)
        for block, others in zip(ours.layers, theirs.layers, strict=True):
            for name, layer in block.items():
                np.testing.assert_array_equal(layer.mask, others[name].mask, name)


def test_a_method_prunes_by_its_own_score(method: str) -> None:
    """|W_ij| · Σ X_j², by hand: the lower half of every row, and two of every four."""
    generator = np.random.default_rng(0)
    X, W = generator.standard_normal((7, 8)), generator.standard_normal((3, 8))
    score = [[abs(W[i, j]) * sum(X[t, j] ** 2 for t in range(7)) for j in range(8)] for i in range(3)]

    def lowest(columns: range, i: int) -> list[int]:
        return sorted(columns, key=lambda j: score[i][j])[: len(columns) // 2]

    for how, groups in (({"sparsity": 0.5}, [range(8)]), ({"nm": (2, 4)}, [range(4), range(4, 8)])):
        expected = np.ones(W.shape, dtype=bool)
        for i in range(3):
            for columns in groups:
                expected[i, lowest(columns, i)] = False
        kept = np.ones(W.shape, dtype=bool)
        statistic = reference_masks.METHODS[method].statistic(X, 1)
        np.testing.assert_array_equal(reference_masks.prune(method, W, statistic, kept, **how)[1], expected)
        ours = masks.METHODS[method].statistic
        total = ours.finish(sum(ours.part(torch.from_numpy(X[rows]), 1) for rows in (slice(3), slice(3, None))))
        found = masks.prune(method, torch.from_numpy(W), total, torch.from_numpy(kept), **how)[1]
        np.testing.assert_array_equal(found.numpy(), expected)


def test_a_method_is_the_same_in_both_packages(method: str) -> None:
    assert_same_decisions(special(prune_method=method, steps=2))


def test_a_method_takes_part_in_runs(method: str, place: Path) -> None:
    ours = run_both(place, prune_method=method)
    assert main(arguments(place, **ONE_SHOT, prune_method="wanda", output_dir=place / "wanda")) == 0
    wanda = weights_in(place / "wanda" / "model")
    parted = [name for name, weight in ours.items() if not torch.equal(weight == 0, wanda[name] == 0)]
    assert len(parted) == sum(".layers." in name and "proj" in name for name in ours), "every projection"


@pytest.mark.parametrize("choice", ["off", "on"])
def test_a_method_is_planned_with_its_own_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, place: Path, method: str, choice: str
) -> None:
    """3 GiB to prune a projection, and 2²⁶ numbers in float32 for each of a block's four inputs."""
    added, argv = (
        masks.METHODS[method],
        arguments(place, **ONE_SHOT, prune_method=method, offload=choice, dry_run="true"),
    )

    def plan(**changes: Any) -> str:
        monkeypatch.setitem(masks.METHODS, method, replace(added, **changes))
        assert main(argv) == 0
        return str(capsys.readouterr().out)

    assert added.statistic is not None
    statistic = replace(added.statistic, entries=lambda inputs: 2**26)
    assert "3.00 GiB" not in plan()
    assert "3.00 GiB" in plan(workspace=lambda rows, columns, itemsize: 3 * 2**30)
    assert "4.00 GiB" in plan(workspace=lambda rows, columns, itemsize: 3 * 2**30, statistic=statistic)


def test_a_method_that_moves_weights_needs_room_for_them(
    monkeypatch: pytest.MonkeyPatch, place: Path, method: str
) -> None:
    """A checkpoint of a base weight is one bit where it is the dense one under a mask, and the weight itself where it moves."""
    config, sizes = (
        parse(arguments(place, prune_method=method)),
        Sizes.of(Decoder(random_model("llama")), torch.float32),
    )
    plain = checks.disk(config, sizes, offloaded=False).checkpoints
    monkeypatch.setitem(masks.METHODS, method, replace(masks.METHODS[method], moves_weights=True))
    moved = checks.disk(config, sizes, offloaded=False).checkpoints
    # Of the largest block, for three blocks in two sets and three more that change meanwhile: 4 bytes for each bit.
    assert moved - plain == 9 * (4 * sizes.largest_prunable - sizes.largest_prunable // 8)


def test_a_name_that_nobody_registered(capsys: pytest.CaptureFixture, place: Path, method: str, rule: str) -> None:
    """The messages list what is registered."""
    argv = arguments(place, **ONE_SHOT, prune_method="energetic")
    fails(capsys, place, argv, [f"prune_method is 'energetic'; allowed: {', '.join(masks.METHODS)}", method])
    argv = arguments(place, **ONE_SHOT, layer_sparsity="influential")
    fails(capsys, place, argv, [f"layer_sparsity is 'influential'; allowed: {', '.join(rates.RULES)}", rule])


def test_a_rule_measures_what_it_says(rule: str) -> None:
    """1 − cos between what a block takes in and puts out, by hand."""
    from reference import llama

    case = special(layer_sparsity=rule)
    model, ids = case.model(), case.calibration()
    states = [model.embedding[ids], *(block.output for block in llama.forward(model, ids).blocks)]
    expected = []
    for before, after in itertools.pairwise(states):
        cosines = [
            float(x @ y / np.sqrt((x @ x) * (y @ y)))
            for xs, ys in zip(before, after, strict=True)
            for x, y in zip(xs, ys, strict=True)
        ]
        expected.append(1 - sum(cosines) / len(cosines))
    measure = reference_rates.RULES[rule].measure
    assert measure is not None
    np.testing.assert_allclose(measure(model, ids, 0.5), expected, rtol=1e-12)


@pytest.mark.parametrize("pattern", ["unstructured", "mixed-2:4"])
def test_a_rule_is_the_same_in_both_packages(rule: str, pattern: str) -> None:
    assert_same_decisions(special(layer_sparsity=rule, steps=2, sparsity_type=pattern))


def test_a_rule_takes_part_in_runs(rule: str, place: Path) -> None:
    run_both(place, layer_sparsity=rule)
    steps = [json.loads((place / choice / "steps.json").read_text()) for choice in ("off", "on")]
    assert steps[0][0]["importance"] == steps[1][0]["importance"] != []
    assert len(set(steps[0][0]["sparsity"])) > 1


def test_a_rule_without_a_measure(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """All that may be pruned of the later blocks goes first."""

    def backwards(importance: object, target: float, weights: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
        assert importance is None
        places = torch.arange(len(weights), dtype=torch.float64)
        return (target + 0.1 * (places - places.mean())).maximum(floor)

    monkeypatch.setitem(rates.RULES, "backwards", rates.RateRule("backwards", backwards))
    ours = run_both(place, layer_sparsity="backwards", prune_method="magnitude")
    for index, share in enumerate((0.4, 0.5, 0.6)):
        weight = ours[f"model.layers.{index}.mlp.up_proj.weight"]
        assert int((weight == 0).sum()) == int(share * weight.numel() + 1e-9)
    rows = json.loads((place / "on" / "losa_result.json").read_text())
    assert rows["pruned_at_once"]["perplexity"] != rows["losa"]["perplexity"], "pruned at one rate for all"


def test_a_rule_that_needs_the_whole_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, place: Path, rule: str
) -> None:
    monkeypatch.setitem(rates.RULES, rule, replace(rates.RULES[rule], works_offloaded=False))
    argv = arguments(place, **ONE_SHOT, layer_sparsity=rule, offload="on")
    fails(capsys, place, argv, [f"layer_sparsity {rule} needs the whole model", "--offload off", "rmi, uniform, owl"])
    assert not parse(arguments(place, **ONE_SHOT, layer_sparsity=rule)).plain


def test_a_family(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """The half of every projection that is smallest goes, and nothing else changes."""
    sizes = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**sizes, num_hidden_layers=3, num_attention_heads=4, initializer_range=0.2))
    model.save_pretrained(place / "phi")
    byte_tokenizer().save_pretrained(place / "phi")
    argv = {"model": place / "phi", "prune_method": "magnitude", "layer_sparsity": "uniform"}
    assert main(arguments(place, **ONE_SHOT, **argv)) == 2, "not a family yet"

    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, recipe("torch_impl/engine/families.py")["FAMILY"]))
    ours, dense = run_both(place, **argv), weights_in(place / "phi")
    pruned = 0
    for name, weight in dense.items():
        expected = weight.clone()
        if ".layers." in name and weight.dim() == 2:
            expected.view(-1)[weight.abs().view(-1).argsort()[: weight.numel() // 2]] = 0
            pruned += 1
        assert torch.equal(ours[name], expected), name
    assert pruned == 3 * 6


def test_a_text_source(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    [(name, source)] = recipe("torch_impl/experiment/text/sources.py")["SOURCE"].items()
    monkeypatch.setitem(sources.SOURCES, name, source)
    train, measured = (sources.load_documents(name, purpose) for purpose in ("train", "measure"))
    assert (train.part, measured.part) == (sources.ALL, sources.HELD_OUT)
    learned, held_out = ({document.text for document in found.documents} for found in (train, measured))
    assert learned | held_out == set(topics.values())
    assert not learned & held_out
    argv = {"calibration_data": name, "eval_data": name, "prune_method": "magnitude", "layer_sparsity": "uniform"}
    assert main(arguments(place, **ONE_SHOT, **argv)) == 0
    facts = json.loads((place / "out" / "losa_result.json").read_text())["evaluation"]
    assert (facts["source"], facts["split"]) == (name, sources.HELD_OUT)


def test_nothing_compares_a_registered_name() -> None:
    """Only then does a record have all that a method, rule or source is asked for.

    Ranks may be uniform, too; and the benchmark names its parts after what they measure.
    """
    names = {*masks.METHODS, *rates.RULES, *sources.SOURCES, *(family.name for family in families.FAMILIES)}
    found = []
    for file in sorted([*(ROOT / "reference").rglob("*.py"), *(ROOT / "torch_impl").rglob("*.py")]):
        if file.is_relative_to(ROOT / "torch_impl" / "bench"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Compare | ast.match_case):
                continue
            words = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
            if words & names and "rank_allocation" not in ast.unparse(node):
                found.append(f"{file.relative_to(ROOT)}: {ast.unparse(node)}")
    assert not found


def test_a_baseline_trains_what_it_says(place: Path) -> None:
    added = recipe("torch_impl/experiment/baselines/norms.py")["BASELINE"]
    config = parse(arguments(place, output_dir=None), data_required=True)
    material = load_material(config)
    results = {
        baseline.name: baseline.run(copy.deepcopy(material.model), material.model, material, config)
        for baseline in (added, BASELINES["none"])
    }
    pruned = results["none"].model.state_dict()
    parted = {n for n, tensor in results["norms"].model.state_dict().items() if not torch.equal(tensor, pruned[n])}
    assert parted == {name for name in pruned if "norm" in name}
    assert results["norms"].trainable == sum(pruned[name].numel() for name in parted)
    assert results["norms"].optimizer_steps == config.training.optimizer_steps(len(material.examples))
