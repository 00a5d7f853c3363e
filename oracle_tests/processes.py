"""Run a function in several processes of one group, as torchrun starts them, without repeating imports."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

# Processes fork from a server that has already imported these.
PRELOADED = ["oracle_tests.spread_runs", "torch_impl.run", "torch.distributed.checkpoint", "torch._dynamo"]
SECONDS = 180


def in_processes(count: int, work: Callable[..., Any], *arguments: Any, env: dict[str, str] | None = None) -> list[Any]:
    """Run `work(*arguments)` in `count` processes; return their results in order. `distributed.process_group` forms the group.

    Errors: RuntimeError with the tracebacks of failed processes, once all have ended by themselves.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers, results = [], []
    for number in range(count):
        receive, send = context.Pipe(duplex=False)
        variables = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **(env or {})}
        # The server was started for another test; record calls for this one.
        variables |= {name: value for name, value in os.environ.items() if name.startswith("LOSA_REACH")}
        workers.append(context.Process(target=_start, args=(send, variables, work, arguments), daemon=True))
        workers[-1].start()
        send.close()
        results.append(receive)
    try:
        return _collect(results)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _collect(results: list[Connection]) -> list[Any]:
    found: dict[int, Any] = {}
    failures: dict[int, str] = {}
    while len(found) < len(results):
        open_ends = [end for number, end in enumerate(results) if number not in found]
        ready = wait(open_ends, timeout=SECONDS)
        if not ready:
            raise RuntimeError(f"processes {[results.index(end) for end in open_ends]} are silent for {SECONDS} s")
        for end in ready:
            number = results.index(end)  # type: ignore[arg-type]
            try:
                failure, value = end.recv()  # type: ignore[union-attr]
            except EOFError:
                failure, value = "it died", None
            found[number] = value
            if failure is not None:
                failures[number] = failure
    if failures:
        raise RuntimeError("\n".join(f"process {number}: {failures[number]}" for number in sorted(failures)))
    return [found[number] for number in range(len(results))]


def _start(send: Connection, variables: dict[str, str], work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(variables)
    import torch

    from torch_impl.engine import distributed

    torch.set_num_threads(1)
    try:
        with distributed.process_group(torch.device("cpu")):
            send.send((None, work(*arguments)))
    except BaseException:
        send.send((traceback.format_exc(), None))
