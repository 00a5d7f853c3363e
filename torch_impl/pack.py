"""python -m torch_impl.pack: see torch_impl/commands/pack.py."""

import sys

from torch_impl import api
from torch_impl.commands.pack import main

if __name__ == "__main__":
    sys.exit(main())

# Importing this module must not replace the library's function `torch_impl.pack`.
sys.modules[__name__] = api.pack  # type: ignore[assignment]
