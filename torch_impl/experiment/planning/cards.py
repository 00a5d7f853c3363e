"""Cards that a plan may be for: their memory and their speed."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

GIB = 2**30
# Share of a card's memory that its driver and context leave.
USABLE = 0.97


@dataclass(frozen=True)
class Card:
    """A kind of GPU. memory: GB as it is sold by; tflops: TFLOP/s of dense bfloat16 products by its data sheet, None unknown."""

    name: str
    memory: int
    tflops: int | None

    @property
    def free(self) -> int:
        """Bytes that a run may use."""
        return int(USABLE * self.memory * GIB)


CARDS = (
    Card("H200 141GB", 141, 989),
    Card("H100 80GB", 80, 989),
    Card("A100 80GB", 80, 312),
    Card("A100 40GB", 40, 312),
    Card("L40S 48GB", 48, 362),
    Card("RTX 4090 24GB", 24, 165),
)


def find_card(name: str) -> Card:
    """The card of this name, with or without its memory, or any card of so much memory: "80GB".

    Errors: ValueError if there is none, or more than one.
    """
    wanted = name.strip().casefold()
    found = [card for card in CARDS if card.name.casefold() == wanted]
    found = found or [card for card in CARDS if card.name.casefold().rpartition(" ")[0] == wanted]
    if len(found) == 1:
        return found[0]
    if amount := re.fullmatch(r"(\d{1,4}) ?gb", wanted):
        return Card(f"{int(amount[1])}GB", int(amount[1]), None)
    names = [card.name for card in CARDS]
    near = [card.name for card in found] or difflib.get_close_matches(name, names, n=2)
    meant = f"; did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(
        f"plan_for is {name!r}; give one of {', '.join(names)}, or an amount of memory such as 80GB{meant}"
    )


def card_of_device(name: str) -> Card | None:
    """The card that calls itself so, as torch says; None if it is not one of CARDS."""
    return next((card for card in CARDS if card.name.rpartition(" ")[0].split()[-1] in name), None)
