"""What transformers finds in a packed folder besides the packed files: an index of them, and two entries of config.json.

`quantization_config` names the quantizer that `import torch_impl` registers. Without it transformers only warns about an
unknown method and continues; `transformers_weights`, which must name a file, then stops it with the sentence `ADVICE`. The
quantizer puts the index in its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch_impl.engine.checkpoints.contents import METHOD, PACKED_INDEX, without_packed

ADVICE = "this model is packed by LoSA; install the package losa-oracle and run `import torch_impl` before loading it"


def mark(folder: Path, weight_map: Mapping[str, str], size: int) -> None:
    """Add the entries to a packed folder's config.json and write the index. weight_map: file by stored name; size: bytes."""
    path = folder / "config.json"
    config = without_packed(json.loads(path.read_text(encoding="utf-8")))
    _write(path, {**config, "quantization_config": {"quant_method": METHOD}, "transformers_weights": ADVICE})
    _write(folder / PACKED_INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})


def unmark(folder: Path) -> None:
    """Remove the entries from the config.json of an unpacked folder."""
    path = folder / "config.json"
    marked = json.loads(path.read_text(encoding="utf-8"))
    if without_packed(marked) != marked:
        _write(path, without_packed(marked))


def _write(path: Path, content: Mapping[str, object]) -> None:
    """Write JSON as transformers does, which may hold infinities."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
