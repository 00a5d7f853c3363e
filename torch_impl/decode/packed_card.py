"""The README.md of a packed folder: the plain model's own would say that it is a dense file, loadable by transformers alone."""

from __future__ import annotations

from pathlib import Path

CARD, PLAIN = "README.md", "README.plain.md"
TITLE = "# A language model packed without its zeros"


def write(folder: Path, zeros: float, bits: float, rounded: list[int] | None = None) -> None:
    """Write the card of a packed folder, and keep the plain model's beside it.

    zeros: share of zeros; bits: per weight; rounded: the numbers of bits of the codes, None if values are exact.
    """
    values, restores = "the kept values", "restores the plain Hugging Face folder, bit for bit"
    if rounded is not None:
        range_of = str(rounded[0]) if min(rounded) == max(rounded) else f"{min(rounded)} to {max(rounded)}"
        values = f"the kept values, rounded to codes of {range_of} bits with a scale for every 128 columns"
        restores = "writes a plain Hugging Face folder with the rounded weights"
    plain = ""
    if (folder / CARD).is_file():
        (folder / CARD).rename(folder / PLAIN)
        plain = f" {PLAIN} is the card of the plain model."
    (folder / CARD).write_text(
        f"""---
tags: [sparse, packed, losa]
---
{TITLE}

The projections of the decoder blocks have {zeros:.1%} zeros. They are stored as a bitmap and {values},
{bits:.2f} bits a weight. The licence of the base model applies.{plain}

The folder needs the package `losa-oracle`:

```python
import torch_impl  # without it, the folder does not load
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
```

`losa generate FOLDER --prompt TEXT` writes text, `losa serve FOLDER` answers OpenAI's clients, and
`losa pack --unpack FOLDER PLAIN` {restores}.
""",
        encoding="utf-8",
        errors="backslashreplace",
    )


def restore(folder: Path) -> None:
    """Replace the card of a folder that was unpacked by the plain model's, if it had one."""
    # An older packed folder has the plain model's card.
    if (folder / CARD).is_file() and TITLE in (folder / CARD).read_text(encoding="utf-8", errors="replace"):
        (folder / CARD).unlink()
    if (folder / PLAIN).is_file():
        (folder / PLAIN).rename(folder / CARD)
