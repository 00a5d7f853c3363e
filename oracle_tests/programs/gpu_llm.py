"""Hold a packed LLM against its plain model on a GPU: greedy tokens of `losa generate`, logits, perplexity, tokens/s.

    python -m oracle_tests.programs.gpu_llm MODEL --text wiki.test.raw [--values same int8 int4] [--tokens 64] [--windows 16]

MODEL is the plain folder of a sparse model. It is packed with each kind of values, and loaded for one sequence (gaps, where its
weights have zeros enough) and for eight (panels). Each form continues the beginnings of the text, of 1 to 200 tokens, greedily.

In half precision two models with the same weights choose different tokens wherever the two best logits are closer than their
rounding, and from there on write different texts. So each choice is held against the logits of the same weights in float32, after
the same tokens: how far the chosen token's logit lies below the best one, its loss. A choice may lose twice the distance between
the plain model's logits and float32's. That distance is taken for each token as the largest over the vocabulary; of all tokens,
the value that nine in ten do not exceed, since after a few tokens, a first one for example, half precision is far off. A packed
form's median distance may be 1.5 times the plain model's, its perplexity on the text 0.5 % from it. Exits with 1 if not.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import torch_impl
from torch_impl.commands import generate
from torch_impl.commands.loading import load
from torch_impl.decode.packed_folder import unpack_folder
from torch_impl.decode.packed_linear import PackedLinear
from torch_impl.engine.checkpoints.pretrained import load_tokenizer

PROMPTS = (1, 5, 17, 64, 200)
SINGLE = 8
"""So many of a prompt's last tokens are read one by one."""
NEARLY_ALL = 0.9
FARTHER = 1.5
MOST_CHANGE = 0.005


@dataclass
class Form:
    """What one form of the model did: tokens of each continuation, logits of each prompt, perplexity, its speed in words."""

    tokens: list[torch.Tensor]
    logits: list[torch.Tensor]
    perplexity: float
    summary: str


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return float32 logits (n, vocabulary) of n tokens, the last eight of which are read one by one."""
    first = max(1, len(ids) - SINGLE)
    cache, found = DynamicCache(config=model.config), []
    for part in (ids[:first], *ids[first:][:, None]):
        given = part[None].to(model.device)
        found.append(model(input_ids=given, past_key_values=cache, use_cache=True).logits[0].float())
    return torch.cat(found)


def run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], options: Any) -> Form:
    """Continue the prompts greedily, twice, since the first time captures; read their logits and the text's perplexity."""
    tokens, logits, summary = [], [], ""
    for prompt in prompts:
        wanted = [options.model, "--prompt", prompt, "--max_new_tokens", str(options.tokens), "--compile", "off"]
        asked = generate._parser().parse_args(wanted)
        with contextlib.redirect_stdout(io.StringIO()):
            generate.generate(model, tokenizer, asked)
            ids, times = generate.generate(model, tokenizer, asked)
        summary = generate._summary(model, len(tokenizer(prompt)["input_ids"]), times)
        tokens.append(ids)
        logits.append(logits_of(model, tokenizer(prompt, return_tensors="pt")["input_ids"][0]))
    facts = torch_impl.evaluate(model, tokenizer, text=options.text, seqlen=options.seqlen, windows=options.windows)
    return Form(tokens, logits, facts["perplexity"], summary.replace("\n", "; "))


@torch.no_grad()
def losses(exact: PreTrainedModel, prompt: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return how far the logit of each of n tokens (n,) after a prompt lies below the best one."""
    ids = torch.cat([prompt, tokens])[None].to(exact.device)
    logits = exact(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    chosen: torch.Tensor = logits.gather(1, tokens[:, None].to(logits.device))[:, 0]
    return logits.max(1).values - chosen


def layouts(model: PreTrainedModel) -> str:
    """Name the layouts that the weights have, with their number."""
    found = [layer._on_gpu for layer in model.modules() if isinstance(layer, PackedLinear)]
    names = Counter("none" if layout is None else type(layout).__name__ for layout in found)
    return ", ".join(f"{number} {name}" for name, number in sorted(names.items()))


def compare(folder: Path, values: str, prompts: Sequence[str], options: Any) -> bool:
    """Pack the model with these values and hold both layouts against the plain model of the same, rounded, weights."""
    packed, plain = folder / f"packed-{values}", folder / f"plain-{values}"
    torch_impl.pack(options.model, packed, values=values)
    plain.mkdir()
    unpack_folder(packed, plain)
    exact, tokenizer = load(str(plain), options.device, "float32", False)
    ids = [tokenizer(prompt, return_tensors="pt")["input_ids"][0] for prompt in prompts]
    expected = [logits_of(exact, own) for own in ids]
    scale = max(float(own.abs().max()) for own in expected)

    def apart(form: Form, share: float = 0.5) -> float:
        distances = [(own - right).abs().amax(1) for own, right in zip(form.logits, expected, strict=True)]
        return float(torch.cat(distances).quantile(share))

    def lost(form: Form) -> float:
        return max(float(losses(exact, own, new).max()) for own, new in zip(ids, form.tokens, strict=True))

    theirs = run(load(str(plain), options.device, "auto", False)[0], tokenizer, prompts, options)
    most = 2 * apart(theirs, NEARLY_ALL)
    print(f"\n{values}: perplexity {theirs.perplexity:.3f}; logits up to {scale:.1f}", flush=True)
    print(f"  plain: logits {apart(theirs):.3f} from float32's, a choice loses {lost(theirs):.3f}; {theirs.summary}")
    passed = True
    for sequences in (1, 8):
        model = torch_impl.load_packed(packed, options.device, sequences=sequences)
        ours = run(model, tokenizer, prompts, options)
        same = sum(torch.equal(own, right) for own, right in zip(ours.tokens, theirs.tokens, strict=True))
        change = ours.perplexity / theirs.perplexity - 1
        right = apart(ours) <= FARTHER * apart(theirs) and lost(ours) <= most and abs(change) <= MOST_CHANGE
        passed &= right
        print(
            f"  packed for {sequences} ({layouts(model)}): {'right' if right else 'WRONG'}; logits {apart(ours):.3f} from "
            f"float32's, a choice loses {lost(ours):.3f} (allowed {most:.3f}), {same} of {len(prompts)} continuations the plain "
            f"model's; perplexity {change:+.2%}; {ours.summary}",
            flush=True,
        )
        del model
    return passed


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare every kind of values. Returns 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--text", required=True)
    parser.add_argument("--values", nargs="+", default=["same", "int8", "int4"])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    tokenizer = load_tokenizer(Path(options.model))
    lines = [line for line in Path(options.text).read_text(encoding="utf-8").splitlines() if len(line) > 80]
    prompts: list[str] = []
    for line, length in zip(lines, PROMPTS, strict=False):
        text = "".join(lines[lines.index(line) :])
        prompts.append(str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:length])))
    with tempfile.TemporaryDirectory() as folder:
        return int(not all([compare(Path(folder), values, prompts, options) for values in options.values]))


if __name__ == "__main__":
    sys.exit(main())
