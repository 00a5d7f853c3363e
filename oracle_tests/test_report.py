"""Every figure that a user reads, recomputed from hand-made results or from the saved model."""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import torch_impl
from oracle_tests.small_runs import arguments, events, make_place
from tiny_models.random_models import byte_tokenizer, random_model
from torch_impl.decode.packed_folder import pack_folder
from torch_impl.engine.record import StepRecord
from torch_impl.experiment import job, model_card, plots, provenance, report, report_page, samples
from torch_impl.experiment.config import parse
from torch_impl.experiment.footprint import Footprint, Footprints
from torch_impl.experiment.result import Result, Row, Verification
from torch_impl.run import main

RESULT = Result(
    model="some/where/tiny <model>",
    family="llama",
    method="wanda",
    sparsity_type="unstructured",
    target_sparsity=0.7,
    dense=Row(perplexity=5.123, sparsity=0.0, seconds=0.0, bytes=1_234_567, packed_bytes=1_234_567),
    pruned_at_once=Row(perplexity=1234.5, sparsity=0.69996, seconds=12.34, bytes=1_234_567, packed_bytes=999_999),
    losa=Row(perplexity=10.876, sparsity=0.7012, seconds=99.96, bytes=1_234_567, packed_bytes=2_345_678_901),
    perplexity_after_step=[7.25, 10.9],
    evaluation={
        "source": "/some/where/some.txt", "split": "held out", "windows": 17, "seqlen": 32, "sha256": "0123456789abcdef" * 4,
        "end_of_document": False, "documents": 3, "documents_of_source": 3, "first_windows_only": False,
        "documents_left_out": {}, "protocol": "c4", "joined_by": " ", "begin_of_text": "before the text", "stride": 32,
        "predicted_tokens": 1054,
    },
    train_examples=24,
    lr_schedule="whole_run",
    loss="kl",
    step_shares=[0.25, 0.75],
    verification=Verification("with transformers alone", 1.24e-6, 21, {}),
    seconds_in_all=123.0,
    seed=3,
    learning_rate=2e-3,
    ranks=[5, 9],
    reconstruct_epochs=0,
    rates="rmi",
    finetuned=True,
    steps=2,
    peak_memory={"host": 3 * 2**30, "device": 5 * 2**29},
    samples={"dense": {"prompt": "once <", "text": " upon & a"}, "losa": {"prompt": "once <", "text": " a time"}},
    software={"name": "losa-oracle", "version": "9.8.7", "commit": "abc123"},
    texts={"calibration": "c4", "evaluation": "some.txt", "fine-tuning": "records.json"},
    dtype="float16",
)  # fmt: skip
CELLS = [
    ["", "perplexity", "sparsity", "on disk", "if packed", "time"],
    ["dense", "5.12", "0.00%", "1.23 MB", "1.23 MB", ""],
    ["pruned at once", "1,234.50", "70.00%", "1.23 MB", "1.00 MB", "12.3 s"],
    ["LoSA", "10.88", "70.12% (asked: 70.00%)", "1.23 MB", "2.35 GB", "100.0 s"],
]
RECORDS = [
    StepRecord(
        1, 0.5, [1.0, 2.0], [0.41, 0.59], [0.4, 0.6], [0.011, 0.0222], [6, 7], [3.0, 2.0], {"prune": 1.25, "train": 2}
    ),
    StepRecord(2, 0.7, [1.0, 2.0], [0.65, 0.75], [0.66, 0.76], [0.033, 0.0444], [5, 9], [1.5], {"prune": 0.5}),
]


def write(folder: Path, records: list[StepRecord]) -> None:
    config = {"training": {"learning_rate": 2e-3, "limit": None}}
    report_page.write(folder, RESULT, records, config, {"device": "CPU <x>"})


def said(text: str) -> None:
    """What the notes have to say of `RESULT`."""
    for words in (
        "17 windows of 32 tokens", "some.txt", "held out", "sha256 0123456789ab. Protocol c4, documents joined by ' ',",
        "begin-of-text token: before the text, stride 32, 1,054 tokens predicted.",
        "Trained on 24 sequences in parts of 25%, 75%; loss kl, learning rate 0.002, scheduled over all steps.",
        "Reloaded with transformers alone: every pruned weight of 21 projections is zero, logits within 1.2e-06 of",
    ):  # fmt: skip
        assert words in text


def test_the_table_holds_each_figure_in_its_row() -> None:
    lines = report.table(RESULT).splitlines()[1:5]
    assert [re.split(r"  +", line.strip()) for line in lines] == [[c for c in row if c] for row in CELLS]
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    said(report.table(RESULT))
    assert report.table(replace(RESULT, dense=replace(RESULT.dense, bytes=10**9))).count("1.00 GB") == 1


@pytest.mark.parametrize(
    ("found", "pattern", "why"),
    [
        (
            0.6904,
            "unstructured",
            "Requested 70.00% zeros, got 69.04%: the number of pruned weights is rounded down",
        ),
        (0.7012, "unstructured", "Requested 70.00% zeros, got 70.12%: parts of the model were already sparser."),
        (
            0.7012,
            "mixed-3:10",
            "Requested 70.00% zeros, got 70.12%: blocks differ in size, or parts of the model already had",
        ),
        (
            0.6904,
            "structured",
            "Requested 70.00% zeros, got 69.04%: whole heads and a multiple of channels go, or parts of the model already had",
        ),
        (0.7004, "unstructured", ""),
        (0.6996, "unstructured", ""),
    ],
)
def test_a_share_of_zeros_that_is_not_the_one_asked_for(found: float, pattern: str, why: str) -> None:
    result = replace(RESULT, sparsity_type=pattern, losa=replace(RESULT.losa, sparsity=found))
    for text in (report.table(result), model_card.of_saved(result)):
        assert (f"{found:.2%} (asked: 70.00%)" in text) == bool(why)
        assert why in text
        assert ("Requested" in text) == bool(why)


def test_what_a_smaller_model_takes() -> None:
    dense = Footprint(2000, 400, 8000, 64, 50.4, 900.2)
    saved = Footprint(1500, 200, 6000, 32, 75.4, 1200.2)
    text = report.table(replace(RESULT, footprints=Footprints(dense, saved, "")))
    assert (
        "The saved model is a plain, smaller one: 1,500 of 2,000 parameters (75.0%), 50.0% of the operations of a token, 50.0% of "
        "the cache; 75 tokens/s in decoding (dense: 50), 1,200 tokens/s in reading a prompt (dense: 900).\n"
    ) in f"{text}\n"
    assert "losa pack" not in text
    assert "every pruned weight of 21 projections is gone, logits within 1.2e-06 of" in text
    less = replace(RESULT, footprints=Footprints(dense, saved, ""), losa=replace(RESULT.losa, sparsity=0.6904))
    assert "Requested 70.00% smaller blocks, got 69.04%: " in report.table(less)
    known = Footprints(replace(dense, peak_bytes=9_000_000), replace(saved, peak_bytes=7_500_000), "")
    assert (
        "(dense: 900), 7.50 MB of memory in both (dense: 9.00 MB).\n"
        in f"{report.table(replace(RESULT, footprints=known))}\n"
    )
    text = report.table(
        replace(RESULT, footprints=Footprints(dense, replace(saved, tokens_per_second=None), "the heads stay"))
    )
    assert "of the cache; 1,200 tokens/s in reading a prompt (dense: 900). The heads stay." in text
    text = report.table(replace(RESULT, sparsity_type="structured"))
    assert text.endswith("Whole heads and channels are zeros: run in one process for a smaller model.")
    card = model_card.of_saved(replace(RESULT, footprints=Footprints(dense, saved, "")))
    assert "\ntags: [pruned, losa]\n---\n# tiny <model>, without 70.1% of its blocks' weights\n" in card
    text = report.table(replace(RESULT, footprints=Footprints(dense, dense, "")))
    assert text.endswith("The saved model stores its zeros, so it is as large and as fast as the dense one.")


def test_packing_is_offered_where_it_pays() -> None:
    """A run of no zeros said to pack its model. Sizes are those of the run's precision, whatever the base model's files hold."""
    zeros = "The saved model stores its zeros, so it is as large and as fast as the dense one. losa pack"
    for size, pays, words in (
        (1_234_566, True, "stores a bitmap and the kept values instead"),
        (1_234_567, False, "would not make it smaller"),
    ):
        found = replace(RESULT, losa=replace(RESULT.losa, packed_bytes=size))
        assert report.packing_pays(found) == pays
        assert report.notes_of(found)[-2:] == [
            "Sizes are of float16 weights, as the run computed with and saved.",
            f"{zeros} {words}.",
        ]


def test_the_model_card_holds_the_same_table() -> None:
    card = model_card.of_saved(RESULT)
    assert card.startswith(
        '---\nlibrary_name: transformers\nbase_model: "some/where/tiny <model>"\ntags: [sparse, pruned, losa]\n---\n'
        "# tiny <model>, pruned to 70.1% zeros\n"
    )
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in card.splitlines() if line.startswith("|")]
    assert rows == [CELLS[0], ["---"] * 6, *CELLS[1:]]
    for words in (
        "wanda masks, unstructured, rmi rates, 2 steps; trained by low-rank adapters on 24 sequences (learning rate 0.002, ",
        "loss kl, ranks 5 to 9), which are merged.", "calibration: c4, evaluation: some.txt, fine-tuning: records.json. Seed 3.",
        "losa-oracle 9.8.7", "Its licence applies", "arxiv.org/abs/2502.14816",
        "@inproceedings{huang2025dynamic,", 'from_pretrained("THIS FOLDER")',
    ):  # fmt: skip
        assert words in card
    said(card)


@pytest.mark.parametrize(
    ("front", "found"),
    [
        ("license: mit", "mit"),
        ("license: other\nlicense_name: llama3.2", "llama3.2"),
        ("tags: [a]", None),
        ("license: [a: b", None),
        ("license: 3", None),
    ],
)
def test_the_licence_is_the_base_model_s(tmp_path: Path, front: str, found: str | None) -> None:
    assert provenance.license_in(tmp_path) is None
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n# A model\n", encoding="utf-8")
    assert provenance.license_in(tmp_path) == found
    card = model_card.of_saved(replace(RESULT, license=found))
    assert (f'\nlicense: "{found}"\n' in card.split("\n---\n")[0] + "\n") == bool(found)
    assert f"Its licence{f', {found},' if found else ''} applies to this model too." in card


def test_a_model_card_names_no_local_path(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    card = model_card.of_saved(replace(RESULT, model=str(tmp_path / "my-model")))
    assert "my-model" in card
    assert str(tmp_path) not in card
    assert "/some/where/" not in card
    assert "base_model" not in card, "no name of the hub"


@pytest.mark.parametrize(
    ("changes", "title"),
    [
        ({}, "LoSA"),
        ({"finetuned": False}, "pruned in 2 steps, rmi rates"),
        ({"finetuned": False, "steps": 1, "rates": "uniform"}, "pruned, uniform rates"),
        ({"finetuned": False, "steps": 1, "rates": "uniform", "dense_blocks": [2, 1]}, "pruned, uniform rates"),
        ({"finetuned": False, "steps": 1, "reconstruct_epochs": 8}, "pruned and reconstructed, rmi rates"),
    ],
)
def test_a_row_says_what_was_done(changes: dict[str, Any], title: str) -> None:
    """Plain pruning is not LoSA, and nothing is said of training where there was none."""
    result = replace(RESULT, **changes, learning_rate=None if changes else 2e-3, ranks=[] if changes else [5, 9])
    shown = report.table(result)
    assert f"{title}  " in shown.splitlines()[4 - result.is_at_once]
    assert ("pruned at once" in shown) != result.is_at_once, "the same model is one row"
    assert ("The first 2 and the last 1 blocks were not pruned" in shown) == ("dense_blocks" in changes)
    assert ("Nothing was trained." in shown) == bool(changes)
    assert ("Trained on" in shown) != bool(changes)
    card = model_card.of_saved(result)
    assert ("not trained." in card) == bool(changes)
    assert ("each block reconstructed in 8 epochs" in card) == ("reconstruct_epochs" in changes)


def test_the_page_holds_the_table_and_every_step(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write(tmp_path, RECORDS)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h1>some/where/tiny &lt;model&gt;: 70.1% zeros, wanda, unstructured</h1>" in page
    assert "<title>LoSA: some/where/tiny &lt;model&gt;</title>" in page
    tables = re.findall("<table>(.*?)</table>", page, re.DOTALL)
    closing, steps, blocks, *details = (
        [
            [html.unescape(cell) for cell in re.findall("<t[hd]>(.*?)</t[hd]>", row)]
            for row in table.split("</tr>")
            if "<t" in row
        ]
        for table in tables
    )
    assert closing == CELLS
    assert steps == [
        ["step", "sparsity asked", "of blocks", "ranks", "largest error", "perplexity", "seconds"],
        ["1", "50.00%", "41.00% – 59.00%", "6 – 7", "0.0222", "7.25", "3.2"],
        ["2", "70.00%", "65.00% – 75.00%", "5 – 9", "0.0444", "10.90", "0.5"],
    ]
    assert blocks == [
        ["block", "importance", "sparsity asked", "zeros", "error", "rank"],
        ["0", "1.0000", "65.00%", "66.00%", "0.0330", "5"],
        ["1", "2.0000", "75.00%", "76.00%", "0.0444", "9"],
    ]
    assert details == [
        [["option", "value"], ["learning_rate", "0.002"], ["limit", ""]],
        [["option", "value"], ["device", "CPU <x>"]],
        [
            ["option", "value"], ["name", "losa-oracle"], ["version", "9.8.7"], ["commit", "abc123"],
            ["peak memory, host", "3.00 GiB"], ["peak memory, device", "2.50 GiB"],
        ],
    ]  # fmt: skip
    said(html.unescape(page))
    quotes = re.findall("<p>([^<]*)</p><blockquote><span class=prompt>(.*?)</span>(.*?)</blockquote>", page)
    assert quotes == [("dense", "once &lt;", " upon &amp; a"), ("LoSA", "once &lt;", " a time")]
    names = ["sparsity", "ranks", "errors", "loss", "perplexity"]
    pictures = re.findall('<img src="data:image/png;base64,(.*?)" alt="(.+?)"><figcaption>(.+?)</figcaption>', page)
    assert [base64.b64decode(data) for data, *_ in pictures] == [(tmp_path / f"{n}.png").read_bytes() for n in names]
    assert all(len(data) > 1000 and alt == caption for data, alt, caption in pictures)
    write(tmp_path, [replace(record, ranks=[], losses=[]) for record in RECORDS])
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(re.findall("<img src=", page)) == 3
    assert "<td>41.00% – 59.00%</td><td></td><td>0.0222</td>" in page
    assert not re.search(r"src=\"(?!data:)", page), "one file"


def test_the_pictures_show_what_was_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    drawn: dict[str, Any] = {}

    def save(self: Any, path: Path, **_: Any) -> None:
        drawn[path.stem] = self.axes[0]
        path.write_bytes(b"a picture")

    monkeypatch.setattr(figures.Figure, "savefig", save)
    losses = [float(k) for k in range(100, 0, -1)]
    write(tmp_path, [replace(RECORDS[0], losses=losses[:60]), replace(RECORDS[1], losses=losses[60:])])

    def curves(name: str) -> dict[str, tuple[list[float], list[float]]]:
        return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in drawn[name].lines}

    for name in ("sparsity", "ranks", "errors"):
        assert curves(name) == {f"step {record.step}": ([0, 1], getattr(record, name)) for record in RECORDS}
        assert drawn[name].get_xlabel() == "block"
    assert drawn["sparsity"].get_ylabel() == "share of zeros"
    assert drawn["errors"].get_ylabel() == "reconstruction error"
    [(every, (_, shown)), (mean, (places, smooth)), (_, (step, _))] = curves("loss").items()
    assert (every, shown, mean) == ("every optimizer step", losses, "mean of 2")
    assert (places, smooth) == (list(range(1, 100)), [loss - 0.5 for loss in losses[:-1]])
    assert step == [60, 60], "where the model is pruned further"
    parts = [replace(RECORDS[0], losses=part) for part in (losses[:10], losses[10:30], losses[30:])]
    plots._losses(tmp_path, RESULT, parts)
    assert [line.get_xdata()[0] for line in drawn["loss"].lines[2:]] == [10, 30]
    assert drawn["loss"].get_ylabel() == "training loss (kl), per token"
    perplexity = curves("perplexity")
    assert perplexity["LoSA"] == ([1, 2], [7.25, 10.9])
    assert perplexity["dense: 5.12"][1] == [5.123, 5.123]
    assert perplexity["pruned at once: 1,234.50"][1] == [1234.5, 1234.5]
    assert drawn["perplexity"].get_yscale() == "log"
    assert [(text.get_text(), text.xy) for text in drawn["perplexity"].texts] == [
        ("7.25\n50%", (1, 7.25)), ("10.90\n70%", (2, 10.9))
    ]  # fmt: skip


def test_without_matplotlib_the_page_says_how_to_get_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    write(tmp_path, RECORDS)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<code>pip install "losa-oracle[report]"</code>' in page
    assert "<img" not in page
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_the_commit_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a + where files differ from it; none without a checkout."""

    def git(*words: str) -> str:
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *name, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() is None
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-q", "-m", "one")
    assert provenance.commit() == git("rev-parse", "HEAD").strip()
    (tmp_path / "a").write_text("2")
    assert provenance.commit() == git("rev-parse", "HEAD").strip() + "+"
    # A run of hours recorded what the checkout had become.
    monkeypatch.setattr(provenance, "software", functools.cache(provenance.software.__wrapped__))
    began = job.run_job(parse(["--output_dir", str(tmp_path / "out")]), lambda *_: (git("commit", "-aqm", "two"), 0)[1])
    assert began[0] == 0
    assert provenance.software()["commit"] != provenance.commit()


def test_peak_memory_is_that_of_this_process() -> None:
    held = torch.ones(30_000_000)
    found = provenance.peak_memory(torch.device("cpu"))
    assert set(found) == {"host"}
    assert held.nbytes < psutil.Process().memory_info().rss <= found["host"] * 1.01


@pytest.mark.parametrize(("positions", "length"), [(30, 6), (24, 0), (128, 40)])
def test_a_sample_stays_within_learned_positions(positions: int, length: int) -> None:
    model = random_model("opt", max_position_embeddings=positions).eval()
    model.generation_config.eos_token_id = None
    [letter] = byte_tokenizer()("A", add_special_tokens=False)["input_ids"]
    found = samples.sample(model, byte_tokenizer(), torch.full((2, 40), letter))
    assert found.get("prompt", "A" * 24) == "A" * 24
    assert bool(found) == bool(length)
    if found:
        prompt = torch.full((1, 24), letter)
        [row] = model.generate(prompt, max_new_tokens=length, do_sample=False, pad_token_id=0)
        assert found["text"] == byte_tokenizer().decode(row[24:], skip_special_tokens=True)


def test_a_sample_is_greedy_whatever_the_model_s_settings_are() -> None:
    model, windows = random_model("llama", num_hidden_layers=1).eval(), torch.full((2, 40), 65)
    plain = samples.sample(model, byte_tokenizer(), windows)
    model.generation_config.update(do_sample=True, temperature=9.0, num_beams=3, repetition_penalty=5.0, max_length=30)
    theirs = model.generation_config.to_dict()
    assert samples.sample(model, byte_tokenizer(), windows) == plain
    assert model.generation_config.to_dict() == theirs, "it is saved with the model"


def test_a_sample_continues_its_prompt_also_with_a_space() -> None:
    """The page shows one right after the other; SentencePiece tokens that are decoded alone lose the first space."""
    words = Tokenizer(models.WordLevel({f"▁w{n}": n for n in range(257)}, unk_token="▁w0"))
    words.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    found = samples.sample(random_model("llama"), tokenizer, torch.full((1, 40), 3))
    assert found["prompt"].startswith("w3 w3")
    assert found["text"].startswith(" w")


def test_a_run_does_not_fail_for_its_sample(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = random_model("llama")
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    assert samples.sample(model, byte_tokenizer(), torch.full((2, 40), 65)) == {}
    assert "no text sample in the report: division by zero" in caplog.text


# --- a whole run, against its model on disk ---


@torch.no_grad()
def naive_perplexity(folder: Path, windows: torch.Tensor) -> float:
    """exp of the mean of −log p(token | all before it), a token at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").double()
    losses = []
    for row in windows:
        probabilities = torch.softmax(model(row[None]).logits[0], -1)
        losses += [-math.log(probabilities[k - 1, row[k]]) for k in range(1, len(row))]
    return math.exp(sum(losses) / len(losses))


def sampled(folder: Path, windows: torch.Tensor) -> dict[str, str]:
    """Prompt and text, a greedy token at a time."""
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    row = windows[:1, :24]
    for _ in range(40):
        row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
    return {
        name: tokenizer.decode(part, skip_special_tokens=True)
        for name, part in (("prompt", row[0, :24]), ("text", row[0, 24:]))
    }


def by_block(tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """All prunable weights of each block, in one vector."""
    names = [name for name in tensors if name.endswith("_proj.weight")]
    blocks = sorted({int(name.split(".")[2]) for name in names})
    return [torch.cat([tensors[n].flatten() for n in names if n.startswith(f"model.layers.{b}.")]) for b in blocks]


def packed_size(model: Path, target: Path) -> int:
    """The bytes of what `losa pack` writes, without the last offset of each packed weight."""
    target.mkdir()
    savings = pack_folder(model, target, torch.device("cpu"))
    stored = [tensor for file in target.glob("packed-*.safetensors") for tensor in load_file(file).values()]
    assert sum(saving.after for saving in savings) == sum(tensor.nbytes for tensor in stored)
    return sum(tensor.nbytes for tensor in stored) - 8 * sum(saving.packed for saving in savings)


@pytest.mark.parametrize("sparsity", [0.05, 0.6])
def test_an_offloaded_run_says_what_packing_makes_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture, sparsity: float
) -> None:
    """At 5 % a packed weight would be larger, and stays as it is: rows are short, and each has an offset."""
    place = make_place(tmp_path)
    plain = {"layer_sparsity": "uniform", "steps": 1, "finetune": "false", "offload": "on", "sparsity_ratio": sparsity}
    assert main(arguments(place, **plain)) == 0
    found = json.loads((place / "out" / "losa_result.json").read_text())["losa"]
    assert found["packed_bytes"] == packed_size(place / "out" / "model", tmp_path / "packed")
    assert (found["packed_bytes"] < found["bytes"]) == (sparsity == 0.6)
    assert ("To store and run it without its zeros" in capsys.readouterr().out) == (sparsity == 0.6)


def zeros(weights: torch.Tensor) -> float:
    return float((weights == 0).double().mean())


def test_a_run_s_figures_are_those_of_the_model_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, measured = make_place(tmp_path), []
    perplexity = job.perplexity

    def noted(model: Any, windows: torch.Tensor, *rest: Any, **named: Any) -> float:
        measured.append(windows)
        return perplexity(model, windows, *rest, **named)

    monkeypatch.setattr(job, "perplexity", noted)
    # Windows of 24 in batches of 2: the last batch is a single one.
    options = {"eval_seqlen": 24, "eval_batch_size": 2, "eval_windows": 5, "loss": "kl", "lr_schedule": "whole_run"}
    assert main(arguments(place, **options)) == 0
    plain = {"layer_sparsity": "uniform", "steps": 1, "finetune": "false"}
    assert main(arguments(place, **options, **plain, output_dir=place / "at_once")) == 0
    out = place / "out"
    result, steps = (json.loads((out / name).read_text()) for name in ("losa_result.json", "steps.json"))
    tensors = load_file(out / "model" / "model.safetensors")
    blocks, windows = by_block(tensors), measured[0]

    assert windows.shape == (5, 24)
    assert result["evaluation"]["windows"] == 5
    assert result["evaluation"]["sha256"] == hashlib.sha256(windows.long().numpy().tobytes()).hexdigest()
    for row, folder in (
        ("dense", place / "model"),
        ("losa", out / "model"),
        ("pruned_at_once", place / "at_once" / "model"),
    ):
        found = load_file(folder / "model.safetensors")
        assert result[row]["perplexity"] == pytest.approx(naive_perplexity(folder, windows), rel=1e-4), row
        assert result[row]["sparsity"] == pytest.approx(zeros(torch.cat(by_block(found))), abs=1e-9), row
        assert result[row]["bytes"] == sum(tensor.nbytes for tensor in found.values()), row
    assert result["perplexity_after_step"][-1] == pytest.approx(result["losa"]["perplexity"], rel=1e-4)

    assert result["dense"]["packed_bytes"] == result["dense"]["bytes"]
    assert result["losa"]["packed_bytes"] == packed_size(out / "model", tmp_path / "packed")
    assert result["pruned_at_once"]["packed_bytes"] == pytest.approx(result["losa"]["packed_bytes"], rel=0.02)

    assert steps[-1]["realised"] == pytest.approx([zeros(block) for block in blocks], abs=1e-9)
    assert steps[-1]["sparsity"] == pytest.approx(steps[-1]["realised"], abs=0.03), "short rows round down"
    for number, (step, mean_rank, target) in enumerate(zip(steps, (6, 7), (0.6125, 0.7), strict=True), 1):
        assert (step["step"], step["target"]) == (number, pytest.approx(target))
        assert sum(step["sparsity"]) / 3 == pytest.approx(target)
        assert sum(step["ranks"]) == 3 * mean_rank
    assert all(before <= after for before, after in zip(*(step["realised"] for step in steps), strict=True))

    trained = [event for event in events(place) if event["event"] == "train"]
    assert [event["loss"] for event in trained] == [loss for step in steps for loss in step["losses"]]
    # 24 sequences, of them 2 at the first step: one optimizer step and three; the first of four warms up.
    warmup = [(k + 1) / 3 for k in range(2)]
    assert [event["learning_rate"] for event in trained] == pytest.approx([1e-2 * f for f in (*warmup, 1.0, 0.5)])
    assert (result["train_examples"], result["step_shares"]) == (24, [0.1, 0.9])

    assert (result["seed"], result["learning_rate"], result["steps"]) == (0, 1e-2, 2)
    assert result["ranks"] == steps[-1]["ranks"]
    assert result["software"]["version"] == torch_impl.__version__
    assert result["peak_memory"]["host"] > 10**8
    assert result["texts"] == dict.fromkeys(("calibration", "evaluation", "fine-tuning"), "text.txt")
    expected = sampled(out / "model", windows)
    assert result["samples"]["losa"] == expected
    assert result["samples"]["dense"] == sampled(place / "model", windows) != expected
    again = parse(["--config", str(out / "losa_config.toml"), "--output_dir", "elsewhere"])
    assert again.settings == parse(arguments(place, **options)).settings
    assert again.text == parse(arguments(place, **options)).text

    checks = result["verification"]["sparsity_pruned_and_saved"]
    assert result["verification"]["projections"] == len(checks) == 3 * 7
    for name, (pruned, saved) in checks.items():
        assert pruned == saved == pytest.approx(zeros(tensors[f"{name}.weight"]), abs=1e-6)
    assert 0 <= result["verification"]["largest_logit_difference"] < 1e-4

    parts = [step["seconds"] for step in steps]
    assert all(set(laps) == {"importance", "prune", "train"} and min(laps.values()) >= 0 for laps in parts)
    assert result["losa"]["seconds"] == pytest.approx(sum(sum(laps.values()) for laps in parts))
    assert result["dense"]["seconds"] == 0
    assert 0 < result["pruned_at_once"]["seconds"] < result["seconds_in_all"] - result["losa"]["seconds"]
