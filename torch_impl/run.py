"""python -m torch_impl.run: see torch_impl/commands/run.py."""

import sys

from torch_impl.commands.run import main

if __name__ == "__main__":
    sys.exit(main())
