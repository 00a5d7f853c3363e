"""Measure a packed or plain model: perplexity on a text, accuracy on tasks, or both.

losa eval MODEL                                       WikiText-2, as in the papers
losa eval MODEL --text c4 --seqlen 4096               C4, as in the papers
losa eval MODEL --tasks paper                         the seven tasks of the paper, from the hub
losa eval MODEL --tasks paper --tasks_data FOLDER     the same from FOLDER/piqa.jsonl and so on, without a network
losa eval MODEL --tasks piqa boolq --limit 100        a quick look
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch_impl import _checks, api
from torch_impl.commands.loading import load
from torch_impl.engine import files
from torch_impl.engine.checkpoints import pretrained
from torch_impl.experiment import report, zero_shot
from torch_impl.experiment.command import Parser, command, say
from torch_impl.experiment.text.protocols import DOCUMENTS, PROTOCOLS, protocol_named
from torch_impl.experiment.text.sources import SOURCES, check_source

# Options about the text, and about the tasks.
OF_TEXT = ("seqlen", "windows", "protocol")
OF_TASKS = ("tasks_data", "limit", "num_fewshot")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="losa eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="Folder of a packed model, or a plain folder or hub id.")
    text = parser.add_argument_group("perplexity")
    text.add_argument(
        "--text",
        metavar="SOURCE",
        help=f"Text to measure on: {', '.join(SOURCES)}, a file, a folder or hf:REPO[:CONFIG[:SPLIT]] (default wikitext2, "
        "unless there are tasks).",
    )
    text.add_argument("--seqlen", type=int, metavar="N", help="Tokens per window (default 2048).")
    text.add_argument("--windows", type=int, metavar="N", help="Measure only the first N windows (default: all).")
    text.add_argument(
        "--protocol",
        metavar="NAME",
        help=f"How the text becomes windows: {', '.join(PROTOCOLS)} (default: that of the text). wikitext2 and c4 are the "
        "papers'; documents puts the begin-of-text token before each document. Use c4 with a local file of C4.",
    )
    tasks = parser.add_argument_group("accuracy")
    tasks.add_argument(
        "--tasks",
        nargs="+",
        metavar="NAME",
        help='Tasks to measure on, by lm-eval (pip install "losa-oracle[eval]"): paper, which is '
        f"{', '.join(zero_shot.PAPER)}; or any of lm-eval's tasks that has an acc.",
    )
    tasks.add_argument(
        "--tasks_data",
        metavar="FOLDER",
        help="Read the documents of the paper's tasks from FOLDER/piqa.jsonl and so on instead of the hub; a name may go on, "
        "as in piqa_validation.jsonl.",
    )
    tasks.add_argument("--limit", type=int, metavar="N", help="Use only the first N documents of each task.")
    tasks.add_argument(
        "--num_fewshot", type=int, metavar="N", help="Examples in each prompt (default: none, or what the task says)."
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        metavar="N",
        default=8,
        help="Windows, or longest prompts, to measure at once (default 8); shorter prompts come in larger batches.",
    )
    parser.add_argument("--device", default="auto", help="auto (a GPU if available), cpu, cuda or cuda:N.")
    parser.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16, float16 or float64.")
    pretrained.add_trust_remote_code(parser)
    parser.add_argument("--json", action="store_true", help="Print the result as one JSON object.")
    return parser


@command
def main(arguments: Sequence[str]) -> None:
    """Print what was measured, and on what."""
    options = _parser().parse_args(arguments)
    if options.text is None and options.tasks is None:
        options.text = "wikitext2"
    _check(options)
    tasks = None
    if options.tasks is not None:
        tasks = zero_shot.load_tasks(options.tasks, options.tasks_data, options.num_fewshot)
    model, tokenizer = load(options.model, options.device, options.dtype, options.trust_remote_code)
    found: dict[str, Any] = {"model": options.model}
    if options.text is not None:
        found |= {"text": options.text} | api.evaluate(
            model,
            tokenizer,
            text=options.text,
            seqlen=2048 if options.seqlen is None else options.seqlen,
            windows=options.windows,
            protocol=options.protocol,
            batch_size=options.batch_size,
        )
    if tasks is not None:
        found |= zero_shot.measure(
            model, zero_shot.Tokens(tokenizer), tasks, options.limit, options.batch_size
        ).by_task()
    say(files.dumps(found, "result") if options.json else _text(found))


def _check(options: argparse.Namespace) -> None:
    """Check the options before any work. Errors: ValueError or FileNotFoundError naming the option."""
    for names, of in ((OF_TEXT, "text"), (OF_TASKS, "tasks")):
        for name in names:
            if getattr(options, name) is not None and getattr(options, of) is None:
                raise ValueError(f"{name} is about {of}, which is not measured here; add --{of}")
    for name, least in (("seqlen", 2), ("windows", 1), ("limit", 1), ("num_fewshot", 0), ("batch_size", 1)):
        if getattr(options, name) is not None:
            _checks.count(name, getattr(options, name), least)
    protocol_named(options.protocol, DOCUMENTS)
    if options.text is not None:
        check_source(options.text, "text")


def _text(found: dict[str, Any]) -> str:
    name = Path(found["model"]).name or found["model"]
    lines = []
    if "perplexity" in found:
        lines.append(
            f"{name}: perplexity {found['perplexity']:.4f} on {found['windows']} windows of {found['seqlen']} tokens of "
            f"{found['text']} (token ids {found['sha256'][:12]}). {report.protocol_of(found)}."
        )
    if "tasks" in found:
        lines += [f"{name}: zero-shot accuracy", report.accuracies(found)]
    return "\n".join(lines)
