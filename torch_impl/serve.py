"""python -m torch_impl.serve: see torch_impl/commands/serve.py."""

import sys

from torch_impl.commands.serve import main

if __name__ == "__main__":
    sys.exit(main())
