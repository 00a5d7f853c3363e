"""Draw perplexity against bits per weight from docs/results/bits/bits.json, which docs/results.md explains.

python docs/bits.py
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

FOLDER = Path(__file__).parent / "results" / "bits"


def main() -> None:
    """Write perplexity.png beside the results."""
    found = json.loads((FOLDER / "bits.json").read_text())
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for zeros in sorted({row["zeros"] for row in found}):
        rows = [row for row in found if row["zeros"] == zeros]
        bits, perplexity = [row["bits"] for row in rows], [row["perplexity"] for row in rows]
        axes.plot(bits, perplexity, marker="o", label=f"{zeros:.0%} zeros" if zeros else "dense")
        for row in rows:
            axes.annotate(row["values"], (row["bits"], row["perplexity"]), xytext=(5, 4), textcoords="offset points")
    axes.set(xlim=(1.9, 19), xscale="log", yscale="log", xlabel="bits per weight", ylabel="perplexity on WikiText-2")
    for axis, ticks in ((axes.xaxis, (2, 3, 4, 6, 8, 12, 16)), (axes.yaxis, (25, 30, 40, 50, 70, 100))):
        axis.set_ticks(ticks)
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(FOLDER / "perplexity.png", dpi=110)


if __name__ == "__main__":
    main()
