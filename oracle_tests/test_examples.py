"""What README and examples show works: every example and the notebook, the ten lines, every architecture that is listed."""

from __future__ import annotations

import json
import re
import runpy
import sys
import textwrap
from pathlib import Path

import matplotlib
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import torch_impl
from oracle_tests.small_runs import ROOT, make_place
from torch_impl.engine import calibration
from torch_impl.engine.decoder import Decoder

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SMALL = {
    "vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(
    example: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    place = ROOT / "tiny_models" / "stdlib_llama"
    monkeypatch.setattr(sys, "argv", [str(example), str(place), str(tmp_path / "out")])
    runpy.run_path(str(example), run_name="__main__")
    said = capsys.readouterr().out
    if example.stem == "prune_and_pack":
        assert re.search(r"step 2: 60% zeros", said)
        assert (tmp_path / "out" / "packed" / "packed.json").is_file()
    elif example.stem == "train_on":
        assert set(re.findall(r"([\d.]+)% zeros in the first", said)) == {
            re.findall(r"([\d.]+)% zeros in the first", said)[0]
        }
    else:
        figures = [float(line.split()[-1]) for line in said.splitlines()]
        assert figures[2] < figures[1]
        assert figures[4] < figures[3], "reconstruction helps"


def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib.use("Agg")
    cells = json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    state: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), state)
    before, after = (state[name]["perplexity"] for name in ("before", "after"))  # type: ignore[index]
    assert before < after
    matplotlib.pyplot.close("all")


def test_the_ten_lines_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a small model, its folder as MODEL, and small sizes."""
    place = make_place(tmp_path)
    code = re.findall(r"```python\n(import torch_impl.*?)```", README, flags=re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").rename(tmp_path / "MODEL")
    prune = torch_impl.prune
    small = {"nsamples": 4, "seqlen": 16, "train_examples": 16, "train_seqlen": 16, "steps": 2, "rmi_samples": 4}
    monkeypatch.setattr(torch_impl, "prune", lambda *given, **named: prune(*given, **named, **small), raising=False)
    texts = (place / "text.txt").read_text().split("<|endoftext|>")
    exec(code, {"texts": texts, "records": [{"text": text} for text in texts]})
    assert (tmp_path / "sparse" / "config.json").is_file()
    assert (tmp_path / "packed" / "packed.json").is_file()


def architectures() -> list[str]:
    table = README[README.index("## Supported models") : README.index("Refused in one line")]
    return re.findall(r"`(\w+ForCausalLM)`", table)


def test_the_table_of_models_is_one() -> None:
    assert len(architectures()) == len(set(architectures())) > 20


@pytest.mark.parametrize("name", architectures())
def test_a_supported_model_is_pruned_and_writes(name: str) -> None:
    """Block by block it computes what the whole model does; pruned, trained and merged, it is a plain model."""
    kind = next(kind for kind, found in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if found == name and kind != "gemma3")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.CONFIG_MAPPING[kind](**SMALL)).eval()
    assert type(model).__name__ == name
    generator = torch.Generator().manual_seed(0)
    ids, learned = (torch.randint(3, 257, (rows, 12), generator=generator) for rows in (6, 16))
    decoder = Decoder(model)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        stream = calibration.start_stream(decoder, ids, 4)
        for index, block in enumerate(decoder.blocks):
            stream.advance(block, index)
        found = calibration.finish(decoder, ids, stream.hidden)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    result = torch_impl.prune(
        model, calibration=ids, train=learned, sparsity=0.5, steps=2, rmi_samples=4, loss="kl", learning_rate=1e-2
    )
    assert 0.45 < result.sparsity <= 0.5
    assert len(result.steps[-1].losses) == 2
    written = model.generate(input_ids=ids[:1], max_new_tokens=3, do_sample=False)
    assert written.shape[1] == 15


def test_the_picture_is_there() -> None:
    [picture] = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert (ROOT / picture).read_text(encoding="utf-8").startswith("<svg")


def test_a_shown_command_knows_its_options() -> None:
    from torch_impl.experiment.config import parse

    commands = re.findall(r"losa run (--model MODEL.*?)\n(?:losa|```)", README, flags=re.DOTALL)
    assert commands
    for command in commands:
        config = parse(textwrap.dedent(command).replace("\\\n", " ").split())
        assert config.text.eval_data == "wikitext2"
