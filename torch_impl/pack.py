"""python -m torch_impl.pack: see torch_impl/commands/pack.py."""

import sys

from torch_impl import api
from torch_impl.commands.pack import main

if __name__ == "__main__":
    sys.exit(main())

# `torch_impl.pack` stays the library's function, whoever imports this module.
sys.modules[__name__] = api.pack  # type: ignore[assignment]
