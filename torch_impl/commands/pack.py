"""Pack a sparse model without its zeros, or unpack it.

losa pack MODEL OUT                                       kept values as they are; unpacking restores every bit
losa pack MODEL OUT --values int8                         rounded to nearest
losa pack MODEL OUT --values int4 --calibration_data c4   rounded so that the output changes least on this text
losa pack MODEL OUT --values mixed --mean_bits 4 --calibration_data c4   more bits where rounding harms the loss more
losa pack --unpack PACKED OUT                             the plain folder again
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch_impl import _checks
from torch_impl.decode import packed_folder
from torch_impl.decode.packed_folder import Saving
from torch_impl.decode.packed_rounding import MEAN_BITS, MIXED, SAME, VALUES, Rounding
from torch_impl.decode.packed_target import check_target
from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.checkpoints.contents import PACKED
from torch_impl.engine.resume.run_folder import MODEL, run_folder
from torch_impl.engine.rounding import BITS_BY, ERROR
from torch_impl.experiment.command import Parser, command, say
from torch_impl.experiment.text.given import windows_of
from torch_impl.experiment.text.sources import SOURCES, check_source
from torch_impl.quantise import FEWEST_BITS, MOST_BITS


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="losa pack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    rounding = parser.add_argument_group("rounding")
    rounding.add_argument(
        "--values",
        default=SAME,
        metavar="KIND",
        help="How kept values are stored: same, in the model's dtype (default); int8, int4 or any from int2, as codes of that many "
        "bits with a scale for every 128 columns; mixed, with bits chosen by --bits_by.",
    )
    rounding.add_argument("--mean_bits", type=float, metavar="B", help="Mean bits of mixed (default 4).")
    rounding.add_argument(
        "--bits_by",
        metavar="RULE",
        help="What the bits of mixed are chosen by: error, for each projection, so that the estimated harm of rounding to the loss "
        "is smallest (default); gradient or rmi, for each block, by first-order importance or mutual information.",
    )
    rounding.add_argument(
        "--calibration_data",
        metavar="SOURCE",
        help=f"Text on which later weights compensate for the error of each: {', '.join(SOURCES)}, a file, a folder or "
        "hf:REPO[:CONFIG[:SPLIT]] (default: none; weights are rounded to nearest).",
    )
    rounding.add_argument("--nsamples", type=int, metavar="N", help="Windows of this text (default 128).")
    rounding.add_argument("--seqlen", type=int, metavar="N", help="Tokens per window (default 2048).")
    rounding.add_argument("--seed", type=int, metavar="N", help="Seed of the choice of windows (default 0).")
    return parser


def _rounding(options: argparse.Namespace) -> Rounding | None:
    """Return how to round, with the calibration text. Errors: ValueError naming an option that is wrong or has no effect."""
    _checks.choice("values", options.values, VALUES)
    of_text = {
        name: getattr(options, name) for name in ("nsamples", "seqlen", "seed") if getattr(options, name) is not None
    }
    for name, given, needed, why in (
        ("calibration_data", options.calibration_data, options.values != SAME, "--values int8"),
        ("mean_bits", options.mean_bits, options.values == MIXED, "--values mixed"),
        ("bits_by", options.bits_by, options.values == MIXED, "--values mixed"),
        *((name, value, options.calibration_data, "--calibration_data") for name, value in of_text.items()),
    ):
        if given is not None and not needed:
            raise ValueError(f"{name} is {given} and has no effect without {why}; leave it out")
    if options.values == SAME:
        return None
    mean_bits = MEAN_BITS if options.mean_bits is None else options.mean_bits
    _checks.number("mean_bits", mean_bits, FEWEST_BITS, MOST_BITS)
    bits_by = ERROR if options.bits_by is None else options.bits_by
    _checks.choice("bits_by", bits_by, BITS_BY)
    ids = None
    if options.calibration_data is not None:
        check_source(options.calibration_data, "calibration_data")
        text = {"nsamples": 128, "seqlen": 2048, "seed": 0, **of_text}
        _checks.count("nsamples", text["nsamples"], 2)
        _checks.count("seqlen", text["seqlen"])
        _checks.count("seed", text["seed"], 0, most=2**63 - 1)
        tokenizer = pretrained.load_tokenizer(options.model, options.trust_remote_code)
        ids = windows_of(options.calibration_data, tokenizer, **text, name="calibration_data")
    return Rounding(options.values, ids, mean_bits, bits_by=bits_by)


def _rounded(folder: Path) -> str:
    """Describe the rounding of a packed folder: how, and the bits if they were chosen."""
    facts = json.loads((folder / PACKED).read_text(encoding="utf-8")).get("rounding")
    if facts is None:
        return ""
    how = "rounded to nearest; give --calibration_data to lose less"
    if facts["calibration"] is not None:
        how = "rounded with compensation on {sequences} windows of {tokens} tokens".format(**facts["calibration"])
    if facts["values"] != MIXED:
        return f"\n{how}\n"
    return f"\n{how}; bits by {facts['bits_by']}\n\n{_table_of_bits(facts['bits'], facts['importance'])}\n"


def _table_of_bits(bits: Sequence[Mapping[str, int]], importance: Sequence[float]) -> str:
    """Show the bits of each block: of each projection, or one number with the importance that it follows."""
    heads = ["block", "importance", "bits"] if importance else ["block", *(name.rpartition(".")[2] for name in bits[0])]
    rows = [
        [f"{importance[block]:.6g}", str(next(iter(own.values())))] if importance else [str(b) for b in own.values()]
        for block, own in enumerate(bits)
    ]
    return _aligned([heads, *([str(block), *row] for block, row in enumerate(rows))])


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells)


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
    lines = [_aligned(cells)]
    if whole.negative_zeros:
        lines += [
            "",
            f"{whole.negative_zeros:,} zeros are negative and stored, because unpacking restores every bit.",
        ]
    return "\n".join(lines)


@command
def main(arguments: Sequence[str]) -> None:
    """Pack or unpack a model."""
    options = _parser().parse_args(arguments)
    rounding = _rounding(options)
    if options.unpack and rounding is not None:
        raise ValueError(f"values is {options.values} and has no effect with --unpack; leave it out")
    if options.overwrite:
        check_target(options.model, options.out)
    with run_folder(options.out, options.overwrite, kind=MODEL) as folder:
        if options.unpack:
            packed_folder.unpack_folder(options.model, folder)
            closing = f"{options.out}: plain Hugging Face folder"
        else:
            device = pretrained.choose_device(options.device)
            savings = packed_folder.pack_folder(options.model, folder, device, options.trust_remote_code, rounding)
            closing = (
                f"{table(savings)}\n{_rounded(folder)}\n{options.out}: packed model. Run it with losa generate; "
                "get a plain folder with losa pack --unpack"
            )
    say(closing)
