"""Serve a packed or plain model over HTTP with OpenAI's API, by transformers' server: losa serve MODEL."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from torch_impl.commands.loading import load, warm_up
from torch_impl.experiment.command import Parser, command, say

# What transformers' server imports, apart from what this package needs anyway.
NEEDED = ("fastapi", "uvicorn", "openai", "pydantic")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="losa serve", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="Folder of a packed model, or a plain folder or hub id.")
    parser.add_argument(
        "--host", default="127.0.0.1", help="Address to listen on (default 127.0.0.1: only this machine can connect)."
    )
    parser.add_argument("--port", type=int, default=8000, help="Port to listen on (default 8000); 0: any free port.")
    parser.add_argument("--device", default="auto", help="auto (a GPU if available), cpu, cuda or cuda:N.")
    parser.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16, float16 or float64.")
    return parser


@command
def main(arguments: Sequence[str]) -> None:
    """Load the model, then answer requests until Ctrl-C."""
    options = _parser().parse_args(arguments)
    if not 0 <= options.port < 2**16:
        raise ValueError(f"port is {options.port}; allowed: 0 to {2**16 - 1}")
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f'serving needs {", ".join(missing)}; install them: pip install "losa-oracle[serve]"')
    from torch_impl.commands import server

    # Before loading, which takes long: an address that is in use ends the command at once.
    with _listen(options.host, options.port) as listening:
        model, tokenizer = load(options.model, options.device, options.dtype)
        name = Path(options.model).resolve().name if Path(options.model).exists() else options.model
        app = server.build(name, model, tokenizer)
        warm_up(model)
        host, port = listening.getsockname()[:2]
        url = f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
        say(f"{name} at {url}: /chat/completions, /completions, /models. Ctrl-C ends it.")
        server.run(app, listening)


def _listen(host: str, port: int) -> socket.socket:
    """Bind and listen. Errors: OSError naming the address."""
    try:
        kind = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=kind)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}; choose another --port"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
