"""The one command, `losa`: see HELP. Each command's modules are imported only when it runs."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch_impl


@dataclass(frozen=True)
class Command:
    """A command: its line of --help, and the module whose `main` it runs."""

    summary: str
    module: str


COMMANDS = {
    "run": Command("prune a model, train it to restore quality, save and report", "torch_impl.commands.run"),
    "plan": Command("show what a run would do and need, and stop", "torch_impl.commands.plan"),
    "pack": Command("store a sparse model without its zeros, or unpack it", "torch_impl.commands.pack"),
    "generate": Command("generate text with a packed or plain model", "torch_impl.commands.generate"),
    "serve": Command("serve a model over HTTP, with OpenAI's API", "torch_impl.commands.serve"),
    "eval": Command("measure perplexity and accuracy on tasks", "torch_impl.commands.evaluate"),
    "compare": Command("compare methods, baselines and recipes, with tables and curves", "torch_impl.commands.compare"),
    "bench": Command("benchmark speed and memory", "torch_impl.bench.__main__"),
}
_LIST = "\n".join(f"  {name:<10}{command.summary}" for name, command in COMMANDS.items())
HELP = f"""usage: losa COMMAND [options]

Prune a language model with LoSA, restore its quality, and run it without its zeros.

commands:
{_LIST}

losa COMMAND --help shows the options of a command; losa --version the version.

Try it on the embedded tiny model, in three minutes on two cores:
  losa run --output_dir out                     prune 70 % of its weights, in two steps
  losa pack out/model packed                    store it without its zeros
  losa generate packed --prompt "def main("     generate text with it

Then take your own model and text:
  losa plan --model DIR --preset best --calibration_data c4 --finetune_data alpaca-gpt4 --eval_data wikitext2
  losa run with the same options; --config llama_7b has the paper's settings for a 7B LLaMA
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first word names. Return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if name == "--version":
        print(f"losa {torch_impl.__version__}")
        return 0
    if name not in COMMANDS:
        found = difflib.get_close_matches(name, COMMANDS, n=2, cutoff=0.6)
        meant = f"; did you mean {' or '.join(found)}?" if found else ""
        print(f"error: {name} is not a command of losa{meant}; see losa --help", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        if error.name != command.module:
            raise
        print(f"error: this version has no losa {name}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    status: int = module.main(words[1:])
    return status


if __name__ == "__main__":
    sys.exit(main())
