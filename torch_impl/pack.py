"""A sparse model without its zeros, and back: python -m torch_impl.pack MODEL OUT [--unpack]."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from torch_impl.engine import checkpoint, packed_folder
from torch_impl.engine.packed_folder import Saving
from torch_impl.experiment.command import Parser, command, say
from torch_impl.experiment.folder import run_folder


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m torch_impl.pack", description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a sparse model, as Hugging Face saves it")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; it appears when all is done")
    parser.add_argument(
        "--unpack", action="store_true", help="MODEL is packed: write the plain folder again, bit for bit"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is the folder of a model")
    parser.add_argument(
        "--device", default="auto", help="where to pack: auto (a GPU if there is one), cpu, cuda, cuda:N"
    )
    return parser


def table(savings: Sequence[Saving]) -> str:
    """What packing saves, for each kind of tensor and in all."""
    cells = [["", "tensors", "packed", "zeros", "before", "after", "of before", "bits/weight"]]
    whole = Saving("in all")
    for saving in (*savings, whole):
        if saving is not whole:
            for name in ("tensors", "packed", "positions", "kept", "negative_zeros", "before", "after"):
                setattr(whole, name, getattr(whole, name) + getattr(saving, name))
        cells.append(
            [
                saving.kind,
                str(saving.tensors),
                str(saving.packed),
                f"{1 - saving.kept / max(1, saving.positions):.2%}",
                f"{saving.before / 1e6:,.2f} MB",
                f"{saving.after / 1e6:,.2f} MB",
                f"{saving.after / max(1, saving.before):.3f}",
                f"{8 * saving.after / max(1, saving.positions):.2f}",
            ]
        )
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells]
    if whole.negative_zeros:
        lines += [
            "",
            f"{whole.negative_zeros:,} of the zeros are negative and stored, since unpacking gives back every bit.",
        ]
    return "\n".join(lines)


@command
def main(arguments: Sequence[str]) -> None:
    """Pack or unpack."""
    options = _parser().parse_args(arguments)
    with run_folder(options.out, options.overwrite, option="OUT", marker="config.json", kind="a model") as folder:
        if options.unpack:
            packed_folder.unpack_folder(options.model, folder)
            closing = f"{options.out}: a plain Hugging Face folder"
        else:
            savings = packed_folder.pack_folder(options.model, folder, checkpoint.choose_device(options.device))
            closing = (
                f"{table(savings)}\n\n{options.out}: for python -m torch_impl.generate; "
                f"python -m torch_impl.pack --unpack gives back the plain folder"
            )
    say(closing)


if __name__ == "__main__":
    sys.exit(main())
