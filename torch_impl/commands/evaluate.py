"""Measure the perplexity of a packed or plain model: losa eval MODEL --text SOURCE."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch_impl import _checks, api
from torch_impl.commands.loading import load
from torch_impl.engine import files
from torch_impl.engine.checkpoints import pretrained
from torch_impl.experiment.command import Parser, command, say
from torch_impl.experiment.text.sources import SOURCES, check_source


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="losa eval", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="Folder of a packed model, or a plain folder or hub id.")
    parser.add_argument(
        "--text",
        default="wikitext2",
        help=f"Text to measure on: {', '.join(SOURCES)}, a file, a folder or hf:REPO[:CONFIG[:SPLIT]] (default wikitext2).",
    )
    parser.add_argument("--seqlen", type=int, default=2048, help="Tokens per window (default 2048).")
    parser.add_argument("--windows", type=int, help="Measure only the first N windows (default: all).")
    parser.add_argument("--batch_size", type=int, default=8, help="Windows to measure at once (default 8).")
    parser.add_argument("--device", default="auto", help="auto (a GPU if available), cpu, cuda or cuda:N.")
    parser.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16, float16 or float64.")
    pretrained.add_trust_remote_code(parser)
    parser.add_argument("--json", action="store_true", help="Print the result as one JSON object.")
    return parser


@command
def main(arguments: Sequence[str]) -> None:
    """Print perplexity, and the windows it was measured on."""
    options = _parser().parse_args(arguments)
    _checks.count("seqlen", options.seqlen, 2)
    _checks.count("batch_size", options.batch_size)
    if options.windows is not None:
        _checks.count("windows", options.windows)
    check_source(options.text, "text")
    model, tokenizer = load(options.model, options.device, options.dtype, options.trust_remote_code)
    found = api.evaluate(
        model,
        tokenizer,
        text=options.text,
        seqlen=options.seqlen,
        windows=options.windows,
        batch_size=options.batch_size,
    )
    if options.json:
        say(files.dumps({"model": options.model, "text": options.text, **found}, "result"))
        return
    name = Path(options.model).name or options.model
    say(
        f"{name}: perplexity {found['perplexity']:.4f} on {found['windows']} windows of {found['seqlen']} tokens of "
        f"{options.text} (token ids {found['sha256'][:12]})"
    )
