"""Pack a sparse model without its zeros, or unpack it: losa pack MODEL OUT [--unpack]."""

from __future__ import annotations

import argparse
import fnmatch
from collections.abc import Sequence
from pathlib import Path

from torch_impl import _checks
from torch_impl.decode import packed_folder
from torch_impl.decode.packed_folder import Saving
from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.checkpoints.contents import INDEX, PACKED, PACKED_INDEX, SINGLE
from torch_impl.engine.resume.run_folder import run_folder
from torch_impl.experiment.command import Parser, command, say

# The files of a model's folder. A folder with any other file is never replaced.
OF_A_MODEL = (
    "config.json", "generation_config.json", "model*.safetensors", "packed-*.safetensors", INDEX, PACKED, PACKED_INDEX,
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template.*",
    "modeling_*.py", "configuration_*.py", "tokenization_*.py", "README.md", "LICENSE*", "NOTICE*", ".gitattributes",
)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="losa pack", description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face folder of a sparse model")
    parser.add_argument("out", type=Path, metavar="OUT", help="Folder to write; it appears when complete.")
    parser.add_argument(
        "--unpack", action="store_true", help="Restore the plain folder of the packed MODEL, bit for bit."
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace OUT if it holds a model and no other files.")
    parser.add_argument(
        "--device", default="auto", help="Device to pack on: auto (a GPU if available), cpu, cuda or cuda:N."
    )
    pretrained.add_trust_remote_code(parser)
    return parser


def table(savings: Sequence[Saving]) -> str:
    """Show the sizes before and after packing, for each kind of tensor and in total."""
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
            f"{whole.negative_zeros:,} zeros are negative and stored, because unpacking restores every bit.",
        ]
    return "\n".join(lines)


def check_target(source: Path, target: Path) -> None:
    """Check that --overwrite may replace `target`.

    Errors: ValueError if it exists and holds other files than a model's, or contains `source`.
    """
    if not target.exists():
        return
    place = target.resolve()
    if place == source.resolve() or place in source.resolve().parents:
        raise ValueError(
            f"OUT {target} is or contains MODEL {source}, which --overwrite would delete; choose another folder"
        )
    names = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else [target.name]
    whole = "config.json" in names and any(name in names for name in (PACKED, SINGLE, INDEX))
    others = [name for name in names if not whole or not _of_a_model(target / name)]
    if others:
        raise ValueError(
            f"OUT {target} holds files that are not a model's ({_checks.few(others)}), so --overwrite does not replace it; "
            "choose another folder"
        )


def _of_a_model(path: Path) -> bool:
    return path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in OF_A_MODEL)


@command
def main(arguments: Sequence[str]) -> None:
    """Pack or unpack a model."""
    options = _parser().parse_args(arguments)
    if options.overwrite:
        check_target(options.model, options.out)
    with run_folder(options.out, options.overwrite, option="OUT", marker="config.json", kind="a model") as folder:
        if options.unpack:
            packed_folder.unpack_folder(options.model, folder)
            closing = f"{options.out}: plain Hugging Face folder"
        else:
            device = pretrained.choose_device(options.device)
            savings = packed_folder.pack_folder(options.model, folder, device, options.trust_remote_code)
            closing = (
                f"{table(savings)}\n\n{options.out}: packed model. Run it with losa generate; "
                "restore the plain folder with losa pack --unpack"
            )
    say(closing)
