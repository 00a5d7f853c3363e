"""Round a model's projections while it is packed: to nearest, or on calibration text, block by block from disk to disk."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from torch_impl import _checks, packed
from torch_impl.engine.checkpoints.offload import open_offloaded
from torch_impl.engine.checkpoints.safetensors_files import save_tensors
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.rounding import BITS_BY, ERROR, Chosen, check_ids, choose_bits, round_blocks
from torch_impl.packed import CODED
from torch_impl.quantise import FEWEST_BITS, MOST_BITS, quantise_rows

SAME, MIXED = "same", "mixed"
INTEGERS = tuple(f"int{bits}" for bits in range(FEWEST_BITS, MOST_BITS + 1))
VALUES = (SAME, *INTEGERS, MIXED)
MEAN_BITS = 4.0


@dataclass(frozen=True)
class Rounding:
    """How to round. values: int2 to int8, or mixed: chosen bits with the mean `mean_bits`. ids: calibration token ids (n, t).

    bits_by: what mixed bits are chosen by, one of `rounding.BITS_BY`. Without ids, weights are rounded to nearest. Errors:
    ValueError naming values, mean_bits or bits_by.
    """

    values: str
    ids: torch.Tensor | None = None
    mean_bits: float = MEAN_BITS
    batch_size: int = 8
    bits_by: str = ERROR

    def __post_init__(self) -> None:
        _checks.choice("values", self.values, (*INTEGERS, MIXED))
        _checks.number("mean_bits", self.mean_bits, FEWEST_BITS, MOST_BITS)
        _checks.choice("bits_by", self.bits_by, BITS_BY)
        if self.values == MIXED and self.ids is None:
            raise ValueError("values is 'mixed', whose bits are chosen on calibration text; give calibration text")


@dataclass
class Rounded:
    """The rounded projections of one model.

    places: (block, projection) by stored name. folder: with the parts of each weight that is rounded on calibration text.
    """

    rounding: Rounding
    chosen: Chosen
    places: dict[str, tuple[int, str]]
    folder: Path | None = None

    @property
    def bits(self) -> list[int]:
        """Return the different numbers of bits, in increasing order."""
        return sorted({bits for of_block in self.chosen.bits for bits in of_block.values()})

    def parts(self, key: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the packed parts of a projection, by their stored names, on the CPU."""
        if self.folder is None:
            index, name = self.places[key]
            bits = self.chosen.bits[index][name]
            found = parts_of(*quantise_rows(weight, bits), bits)
        else:
            found = load_file(self.folder / file_of(*self.places[key]))
        return {f"{key}.{name}": found[name] for name in CODED}

    def facts(self) -> dict[str, Any]:
        """Describe the rounding for packed.json: bits by projection and, if they follow it, importance of each block."""
        ids, chosen = self.rounding.ids, self.chosen
        text = None if ids is None else {"sequences": len(ids), "tokens": ids.shape[1]}
        facts = {"values": self.rounding.values, "bits": chosen.bits, "importance": chosen.importance}
        by = {"bits_by": self.rounding.bits_by} if self.rounding.values == MIXED else {}
        return {**facts, **by, "calibration": text}


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
    if rounding.ids is None:
        yield Rounded(rounding, _equal(rounding.values, places), places)
        return
    decoder = Decoder(open_offloaded(source, device, None, trust_remote_code))
    check_ids(decoder, rounding.ids)
    if rounding.values == MIXED:
        chosen = choose_bits(decoder, rounding.bits_by, rounding.mean_bits, rounding.ids, rounding.batch_size)
    else:
        chosen = _equal(rounding.values, places)
    with tempfile.TemporaryDirectory(dir=target, prefix=".rounded") as place:
        for index, name, codes, scales in round_blocks(decoder, chosen.bits, rounding.ids, rounding.batch_size):
            save_tensors(parts_of(codes, scales, chosen.bits[index][name]), Path(place) / file_of(index, name))
        del decoder
        yield Rounded(rounding, chosen, places, Path(place))


def _equal(values: str, places: dict[str, tuple[int, str]]) -> Chosen:
    """Give every projection the bits of values int2 to int8."""
    bits: list[dict[str, int]] = [{} for _ in range(1 + max(index for index, _ in places.values()))]
    for index, name in places.values():
        bits[index][name] = int(values.removeprefix("int"))
    return Chosen(bits)
