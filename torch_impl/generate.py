"""python -m torch_impl.generate: see torch_impl/commands/generate.py."""

import sys

from torch_impl.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())
