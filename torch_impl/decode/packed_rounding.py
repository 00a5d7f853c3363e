"""Round a model's projections while it is packed: to nearest, or on calibration text, block by block from disk to disk."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from torch_impl import _checks, packed
from torch_impl.engine.checkpoints.offload import open_offloaded
from torch_impl.engine.checkpoints.safetensors_files import save_tensors
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.rounding import bits_by_information, check_ids, round_blocks
from torch_impl.packed import CODED
from torch_impl.quantise import FEWEST_BITS, MOST_BITS, quantise_rows

SAME, MIXED = "same", "mixed"
INTEGERS = tuple(f"int{bits}" for bits in range(FEWEST_BITS, MOST_BITS + 1))
VALUES = (SAME, *INTEGERS, MIXED)
MEAN_BITS = 4.0


@dataclass(frozen=True)
class Rounding:
    """How to round. values: int2 to int8, or mixed: bits by block with the mean `mean_bits`. ids: calibration token ids (n, t).

    Without ids, weights are rounded to nearest. Errors: ValueError naming values or mean_bits.
    """

    values: str
    ids: torch.Tensor | None = None
    mean_bits: float = MEAN_BITS
    batch_size: int = 8

    def __post_init__(self) -> None:
        _checks.choice("values", self.values, (*INTEGERS, MIXED))
        _checks.number("mean_bits", self.mean_bits, FEWEST_BITS, MOST_BITS)
        if self.values == MIXED and self.ids is None:
            raise ValueError("values is 'mixed', whose bits are chosen on calibration text; give calibration text")


@dataclass
class Rounded:
    """The rounded projections of one model.

    bits: of each block; importance: of each block, if it decided. places: (block, projection) by stored name. folder: with
    the parts of each weight that is rounded on calibration text.
    """

    rounding: Rounding
    bits: list[int]
    places: dict[str, tuple[int, str]]
    folder: Path | None = None
    importance: list[float] = field(default_factory=list)

    def parts(self, key: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the packed parts of a projection, by their stored names, on the CPU."""
        if self.folder is None:
            bits = self.bits[self.places[key][0]]
            found = parts_of(*quantise_rows(weight, bits), bits)
        else:
            found = load_file(self.folder / file_of(*self.places[key]))
        return {f"{key}.{name}": found[name] for name in CODED}

    def facts(self) -> dict[str, Any]:
        """Describe the rounding for packed.json: bits and, if it decided, importance of each block; the calibration text."""
        ids = self.rounding.ids
        text = None if ids is None else {"sequences": len(ids), "tokens": ids.shape[1]}
        return {"values": self.rounding.values, "bits": self.bits, "importance": self.importance, "calibration": text}


def parts_of(codes: torch.Tensor, scales: torch.Tensor, bits: int) -> dict[str, torch.Tensor]:
    """Pack codes (out, in) and scales; return the parts by name, on the CPU."""
    bitmap, stream, offsets = packed.pack_codes(codes, bits)
    parts = dict(zip(CODED, (bitmap, stream, scales, offsets), strict=True))
    return {name: part.cpu().contiguous() for name, part in parts.items()}


def file_of(index: int, name: str) -> str:
    """Return the name of the file with the parts of one projection."""
    return f"{index}.{re.sub('[^a-zA-Z0-9_.]', '_', name)}.safetensors"


@contextmanager
def rounded(
    rounding: Rounding | None,
    places: dict[str, tuple[int, str]],
    source: Path,
    target: Path,
    device: torch.device,
    trust_remote_code: bool = False,
) -> Iterator[Rounded | None]:
    """Round the model in `source`; within this context, its parts are at hand, on disk inside `target` if calibrated.

    places: (block, projection) by the stored name of its weight. Errors: as `check_ids`; of `allocate_bits`.
    """
    if rounding is None:
        yield None
        return
    blocks = 1 + max(index for index, _ in places.values())
    bits = [MOST_BITS if rounding.values == MIXED else int(rounding.values.removeprefix("int"))] * blocks
    if rounding.ids is None:
        yield Rounded(rounding, bits, places)
        return
    decoder = Decoder(open_offloaded(source, device, None, trust_remote_code))
    check_ids(decoder, rounding.ids)
    importance: list[float] = []
    if rounding.values == MIXED:
        bits, importance = bits_by_information(decoder, rounding.mean_bits, rounding.ids, rounding.batch_size)
    with tempfile.TemporaryDirectory(dir=target, prefix=".rounded") as place:
        for index, name, codes, scales in round_blocks(decoder, bits, rounding.ids, rounding.batch_size):
            save_tensors(parts_of(codes, scales, bits[index]), Path(place) / file_of(index, name))
        del decoder
        yield Rounded(rounding, bits, places, Path(place), importance)
