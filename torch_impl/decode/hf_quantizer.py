"""Make transformers load packed folders: after `register`, which `import torch_impl` calls, `from_pretrained` does.

The classes are in packed_quantizer.py. They need torch and transformers, so they are imported when transformers imports its
own quantizers: importing this package alone costs nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

QUANTIZERS = "transformers.quantizers.auto"


def register() -> None:
    """Register the quantizer of packed models with transformers, now or as soon as its quantizers are imported."""
    loaded = sys.modules.get(QUANTIZERS)
    if loaded is not None and hasattr(loaded, "register_quantizer"):
        _add(loaded)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _add(quantizers: ModuleType) -> None:
    """Register with the imported module, once."""
    from torch_impl.decode import packed_quantizer as own

    if own.METHOD not in quantizers.AUTO_QUANTIZER_MAPPING:
        quantizers.register_quantization_config(own.METHOD)(own.PackedConfig)
        quantizers.register_quantizer(own.METHOD)(own.PackedQuantizer)


class _Finder(MetaPathFinder):
    """Lets the others find transformers' quantizers, and registers with them once they are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the quantizers' own specification with a loader that registers; None for any other module."""
        if fullname != QUANTIZERS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads as `own` does, then registers."""

    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as always."""
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Run the module, then register with it."""
        self._own.exec_module(module)
        _add(module)
