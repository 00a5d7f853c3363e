"""Figures of the paper (ICLR 2025, arXiv 2502.14816, and its public review page). They are of other models than ours.

Tables show them in a body of their own, and every row is marked.
"""

from __future__ import annotations

from dataclasses import dataclass

MARK = "published"
TASKS = ("HellaSwag", "WinoGrande", "BoolQ", "OBQA", "PIQA", "ARC-e", "ARC-c")


@dataclass(frozen=True)
class Published:
    """A row: WikiText-2 perplexity, None if not given, accuracy in percent on TASKS, and their average as printed.

    structured: whole heads and channels are gone, not single weights.
    """

    model: str
    sparsity: str
    method: str
    treatment: str
    perplexity: float | None
    accuracy: tuple[float, ...]
    average: float
    structured: bool = False


def _rows(model: str, sparsity: str, text: str, structured: bool = False) -> tuple[Published, ...]:
    """Read lines of: method; treatment; perplexity or -, accuracies, average."""
    found = []
    for line in text.strip().splitlines():
        method, treatment, figures = line.split(";")
        first, *others = figures.split()
        *accuracy, average = map(float, others)
        given = None if first == "-" else float(first)
        names = (method.strip(), treatment.strip())
        found.append(Published(model, sparsity, *names, given, tuple(accuracy), average, structured))
    return tuple(found)


ROWS = (
    *_rows(
        "LLaMA-2-7B",
        "0.7",
        """
        dense; ; 5.12 57.17 68.90 77.74 31.40 78.07 76.39 43.52 61.88
        SparseGPT; no training; 27.42 33.08 58.41 64.89 17.40 62.46 43.22 22.01 43.07
        SparseGPT; sparse LoRA; 11.26 43.63 62.06 63.46 22.80 70.84 57.22 29.01 49.86
        SparseGPT; LoRA (unmerged); 11.06 44.80 62.90 63.36 24.20 71.22 58.71 30.12 50.76
        SparseGPT; LoSA; 10.82 46.06 63.85 70.15 24.80 71.93 60.44 30.35 52.51
        Wanda; no training; 79.67 27.92 49.33 52.87 12.60 55.33 30.60 18.69 35.33
        Wanda; sparse LoRA; 12.74 40.53 56.84 64.08 22.20 68.53 55.77 26.37 47.76
        Wanda; LoRA (unmerged); 12.57 40.77 57.22 64.19 22.40 68.55 57.32 26.79 48.18
        Wanda; AdaLoRA (unmerged); 12.08 41.01 57.78 64.73 23.00 69.09 57.77 26.90 48.61
        Wanda; SoRA (unmerged); 11.89 41.37 57.87 64.95 23.40 68.78 58.25 27.17 48.83
        Wanda; LoSA; 10.94 45.10 60.93 67.65 25.20 71.06 62.50 29.10 51.65
        Pruner-Zero; no training; 103.15 27.56 50.99 41.93 13.00 56.90 34.47 18.60 34.78
        Pruner-Zero; LoRA (unmerged); 11.56 43.43 60.46 67.19 21.00 70.40 59.60 27.47 49.94
        Pruner-Zero; LoSA; 10.78 45.56 62.10 69.15 25.00 71.73 61.08 29.45 52.01
        ALPS; no training; 19.31 38.35 61.96 64.59 22.20 66.82 48.37 24.95 46.75
        ALPS; LoRA (unmerged); 10.83 47.54 62.88 69.11 27.00 73.23 61.70 29.78 53.03
        ALPS; LoSA; 10.28 49.90 64.34 71.38 28.10 75.24 63.78 31.27 54.86
        """,
    ),
    *_rows(
        "LLaMA-2-7B",
        "2:4",
        """
        Wanda; no training; 11.02 40.92 62.43 67.65 24.20 70.84 61.78 31.20 51.29
        Wanda; LoRA (unmerged); 8.27 50.37 64.80 72.81 27.60 75.19 69.40 35.58 56.54
        Wanda; LoSA; 7.91 51.24 65.79 73.97 29.00 76.17 70.76 36.62 57.65
        """,
    ),
    *_rows("LLaMA-2-7B", "mixed-2:4", "Wanda; LoSA; 7.72 51.85 66.01 74.51 29.70 76.54 71.08 37.26 58.14"),
    *_rows(
        "OPT-13B",
        "0.7",
        """
        Wanda; LoSA; 19.75 45.20 59.91 60.96 24.80 73.39 57.65 29.01 50.13
        Wanda; LoSA, uniform rates; 20.72 44.21 59.32 59.34 24.20 72.45 57.10 28.15 49.24
        Wanda; LoSA, uniform ranks; 20.55 44.84 59.66 59.24 24.40 72.69 57.07 28.41 49.47
        Wanda; LoSA, uniform rates and ranks; 21.48 43.35 58.78 58.65 23.90 72.09 56.45 27.56 48.68
        """,
    ),
    # The review page takes LoRAPrune's accuracies and LoRAShear's row from LoRAShear's paper (arXiv 2310.18356).
    *_rows(
        "LLaMA-7B",
        "0.2",
        """
        dense; ; 5.69 72.99 67.01 73.18 42.40 78.35 67.45 41.38 63.25
        SliceGPT; ; 8.71 45.67 62.75 37.89 33.20 64.09 53.62 31.74 46.99
        LLM-Pruner; LoRA; 8.14 68.11 65.11 69.54 40.00 76.44 63.43 37.88 60.07
        LoRAPrune; LoRA; 7.63 70.00 62.76 65.82 39.14 79.31 65.87 37.69 60.05
        LoRAShear; LoRA; - 68.69 65.83 70.17 39.97 76.89 64.11 38.77 60.63
        Wanda-SP; LoSA; 7.07 71.56 65.86 71.67 40.50 78.17 66.93 40.66 62.19
        """,
        structured=True,
    ),
)

# Seconds on one A100 80GB by billions of parameters: rates by mutual information, ranks by error, of one step.
OVERHEAD = {7: (48, 46), 8: (34, 32), 13: (74, 71), 30: (140, 132), 70: (332, 321)}
# LLaMA-2-7B: seconds of a mask by Wanda, of a training micro-batch, and their number.
MASK, MICRO_BATCH, MICRO_BATCHES = 66, 0.76, 2500


def rows(sparsity: str, structured: bool = False) -> tuple[Published, ...]:
    """Return the rows at a sparsity, as a comparison labels it: of smaller models if structured, else of sparse ones."""
    return tuple(row for row in ROWS if (row.sparsity, row.structured) == (sparsity, structured))
