"""The command line: python -m torch_impl.run [options]; --help teaches."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import transformers

from torch_impl.experiment import plan, report
from torch_impl.experiment.config import parse
from torch_impl.experiment.job import run_in_memory, run_job
from torch_impl.experiment.streamed_job import run_streamed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the job that the arguments ask for. Returns the exit status: 0, or 2 after one line on what was wrong."""
    transformers.utils.logging.set_verbosity_error()
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments)
        if config.output.dry_run:
            if _whose():
                return 0
            print(plan.show_plan(plan.make_plan(config)))
            return 0
        result, folder = run_job(config, run_streamed if plan.streams(config) else run_in_memory)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        print(f"error: {_whose()}{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    if not _whose():
        print(report.table(result))
        print(f"\n{folder}: merged model in model/, report in report.html, figures in losa_result.json")
        print(f"Smaller and faster without its zeros: python -m torch_impl.pack {folder / 'model'} {folder / 'packed'}")
    return 0


def _whose() -> str:
    """Which process speaks, if it is not the first of several."""
    number = os.environ.get("RANK", "0")
    return "" if number == "0" else f"process {number}: "


if __name__ == "__main__":
    sys.exit(main())
