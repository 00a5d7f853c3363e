"""A sparse model without its zeros, and back: python -m torch_impl.pack MODEL OUT [--unpack]."""

from __future__ import annotations

import argparse
import fnmatch
import sys
from collections.abc import Sequence
from pathlib import Path

from torch_impl.decode import packed_folder
from torch_impl.decode.packed_folder import Saving
from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.checkpoints.contents import INDEX, PACKED, SINGLE, few
from torch_impl.engine.resume.run_folder import run_folder
from torch_impl.experiment.command import Parser, command, say

# Files of which a model's folder consists: a folder with any other is never replaced.
OF_A_MODEL = (
    "config.json", "generation_config.json", "model*.safetensors", "packed-*.safetensors", INDEX, PACKED,
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template.*",
    "modeling_*.py", "configuration_*.py", "tokenization_*.py", "README.md", "LICENSE*", "NOTICE*", ".gitattributes",
)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m torch_impl.pack", description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a sparse model, as Hugging Face saves it")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write; it appears when all is done")
    parser.add_argument(
        "--unpack", action="store_true", help="MODEL is packed: write the plain folder again, bit for bit"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace OUT if it is the folder of a model and nothing else"
    )
    parser.add_argument(
        "--device", default="auto", help="where to pack: auto (a GPU if there is one), cpu, cuda, cuda:N"
    )
    pretrained.add_trust_remote_code(parser)
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


def check_target(source: Path, target: Path) -> None:
    """Errors: ValueError if `target` is there and is not the folder of a model and nothing else, or has `source` in it."""
    if not target.exists():
        return
    place = target.resolve()
    if place == source.resolve() or place in source.resolve().parents:
        raise ValueError(
            f"OUT {target} is or holds MODEL {source}, which --overwrite would remove; name another folder"
        )
    names = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else [target.name]
    whole = "config.json" in names and any(name in names for name in (PACKED, SINGLE, INDEX))
    others = [name for name in names if not whole or not _of_a_model(target / name)]
    if others:
        raise ValueError(
            f"OUT {target} is not the folder of a model and nothing else, which --overwrite may replace "
            f"({few(others)}); name another folder"
        )


def _of_a_model(path: Path) -> bool:
    return path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in OF_A_MODEL)


@command
def main(arguments: Sequence[str]) -> None:
    """Pack or unpack."""
    options = _parser().parse_args(arguments)
    if options.overwrite:
        check_target(options.model, options.out)
    with run_folder(options.out, options.overwrite, option="OUT", marker="config.json", kind="a model") as folder:
        if options.unpack:
            packed_folder.unpack_folder(options.model, folder)
            closing = f"{options.out}: a plain Hugging Face folder"
        else:
            device = pretrained.choose_device(options.device)
            savings = packed_folder.pack_folder(options.model, folder, device, options.trust_remote_code)
            closing = (
                f"{table(savings)}\n\n{options.out}: for python -m torch_impl.generate; "
                f"python -m torch_impl.pack --unpack gives back the plain folder"
            )
    say(closing)


if __name__ == "__main__":
    sys.exit(main())
