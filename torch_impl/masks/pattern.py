"""Sparsity patterns: zeros anywhere, n kept weights of every m consecutive inputs of a row, or whole heads and channels.

Spec: reference/masks/pattern.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Pattern:
    """One sparsity pattern.

    group: (n, m), to keep n weights of every m; otherwise None. mixed: each block has its own n, and their mean is this n.
    structured: whole heads and MLP channels go, see structured.py.
    """

    group: tuple[int, int] | None = None
    mixed: bool = False
    structured: bool = False

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read a pattern as users write it: unstructured, N:M, mixed-N:M or structured.

        Errors: ValueError for any other text, or an N that is not from 1 to M.
        """
        if text in ("unstructured", "structured"):
            return cls(structured=text == "structured")
        found = re.fullmatch(r"(mixed-)?(\d+):(\d+)", text)
        if found is None:
            raise ValueError(f"sparsity_type is {text!r}; allowed: unstructured, N:M, mixed-N:M, structured")
        n, m = int(found[2]), int(found[3])
        if not 0 < n <= m:
            raise ValueError(f"sparsity_type is {text!r}; allowed: N from 1 to M")
        return cls((n, m), mixed=found[1] is not None)
