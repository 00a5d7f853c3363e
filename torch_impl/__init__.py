"""LoSA: prune a language model, restore its quality, and run it without its zeros. See torch_impl/api.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch_impl.decode import hf_quantizer

if TYPE_CHECKING:
    from torch_impl.api import PruneResult, Saving, StepRecord, evaluate, load_packed, pack, prune

__all__ = ["PruneResult", "Saving", "StepRecord", "evaluate", "load_packed", "pack", "prune"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Import the library on first use: the mirrored functions, which share this package, need none of it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from torch_impl import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


# So that transformers loads packed folders; this imports neither torch nor transformers.
hf_quantizer.register()
