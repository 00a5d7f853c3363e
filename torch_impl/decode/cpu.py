"""Products with a packed weight on the CPU, by C++ kernels built on first use; without a compiler, by torch."""

from __future__ import annotations

import functools
import hashlib
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils import cpp_extension

from torch_impl import packed
from torch_impl.engine.progress import note

SOURCE = Path(__file__).with_name("cpu.cpp")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLAGS = ["-O3"]
# For a prompt, about this many bytes of a weight are unpacked at a time: a whole number of `TILE` rows, as torch's product pads
# the last ones, for each thread, as far as `WIDEST` times as many bytes allow.
SLAB = 4 * 2**20
TILE = 64
WIDEST = 4
# Without this flag torch's parallel_for, a template, compiles to a single-threaded loop.
THREADS = ["-fopenmp"] if sys.platform == "linux" else []


def announce(name: str, *sources: Path) -> None:
    """Say on standard error that an extension will be compiled now, unless torch has it compiled already.

    torch waits in silence for a process that compiles it, also if that process was killed: its lock file stays.
    """
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    library, lock = folder / f"{name}{cpp_extension.LIB_EXT}", folder / "lock"
    newest = max(source.stat().st_mtime for source in sources)
    if lock.exists():
        line = f"waiting for another process that compiles {sources[0].name}; if there is none, delete {lock}"
        note(line)
    elif not library.is_file() or library.stat().st_mtime < newest:
        note(f"compiling {sources[0].name}: once on this machine, up to a minute")


def build(source: Path) -> None:
    """Compile and load a C++ file of this package; if it is not compiled yet, say so.

    The extension's name contains a hash, so that another checkout or version does not replace a library in use.

    Errors: RuntimeError, OSError, ImportError or SubprocessError if there is no compiler or no ninja.
    """
    headers = b"".join(path.read_bytes() for path in sorted(source.parent.glob(f"{source.stem}_*.h")))
    content = (
        source.read_bytes()
        + headers
        + str(source.resolve()).encode()
        + " ".join([torch.__version__, *FLAGS, *THREADS]).encode()
    )
    name = f"losa_{source.stem}_{hashlib.sha256(content).hexdigest()[:12]}"
    before = os.environ.get("PATH", "")
    try:
        # Find ninja even if the virtual environment is not activated.
        os.environ["PATH"] = os.pathsep.join((sysconfig.get_path("scripts"), before))
        announce(name, source)
        # Copies: torch adds its own flags to the list that it is given.
        cpp_extension.load(
            name, [str(source)], extra_cflags=[*FLAGS, *THREADS], extra_ldflags=[*THREADS], is_python_module=False
        )
    finally:
        os.environ["PATH"] = before


@functools.cache
def paths() -> tuple[str, ...]:
    """List the instruction sets that both the kernels and this CPU support, fastest first.

    If the kernels do not build, print why in one line and return none. The first call compiles for about half a minute;
    torch caches the result.
    """
    try:
        build(SOURCE)
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        reason = " ".join(str(error).split())[:160]
        note(f"packed weights: CPU kernels are not available, so decoding is slower ({reason})")
        return ()
    return tuple(torch.ops.losa_cpu_decode.paths())


def linear(
    x: torch.Tensor,
    bitmap: torch.Tensor,
    values: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
    path: str | None = None,
) -> torch.Tensor:
    """Compute x Wᵀ + b (..., out) of x (..., in) and a checked packed W, with float32 sums.

    path: one of `paths()`, default the first.
    """
    if x.dtype not in DTYPES or not paths():
        with torch.no_grad():
            return nn.functional.linear(x, packed.expand(bitmap, values, x.shape[-1]), bias)
    result: torch.Tensor = torch.ops.losa_cpu_decode.linear.default(
        x, bitmap, values, offsets, bias, path or paths()[0]
    )
    return result


def linear_coded(
    x: torch.Tensor,
    bitmap: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
    path: str | None = None,
) -> torch.Tensor:
    """Compute x Wᵀ + b (..., out) of x (..., in) and a checked W of codes and scales, with float32 sums of their exact products.

    path: one of `paths()`, default the first. Without kernels, W is rounded to the dtype of x.
    """
    if x.dtype not in DTYPES or not paths():
        with torch.no_grad():
            return nn.functional.linear(x, packed.expand_coded(bitmap, codes, scales, x.shape[-1], x.dtype), bias)
    result: torch.Tensor = torch.ops.losa_cpu_decode.linear_coded.default(
        x, bitmap, codes, scales, offsets, bias, path or paths()[0]
    )
    return result


def unpack(parts: Sequence[torch.Tensor], columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Unpack a checked weight (out, in), bit for bit as `packed.expand` or `packed.expand_coded`.

    parts: bitmap, values and offsets, or bitmap, codes, scales and offsets, with the dtype that codes are rounded to.
    """
    if not _by_kernels(parts, dtype):
        if len(parts) == len(packed.PARTS):
            return packed.expand(parts[0], parts[1], columns)
        return packed.expand_coded(parts[0], parts[1], parts[2], columns, dtype)
    weight = torch.empty(len(parts[0]), columns, dtype=dtype)
    _fill(weight, parts, 0)
    return weight


def linear_unpacked(
    x: torch.Tensor, parts: Sequence[torch.Tensor], bias: torch.Tensor | None = None, slab: int = SLAB
) -> torch.Tensor:
    """Compute x Wᵀ + b (n, out) of many rows x (n, in), by torch's product with the weight that `unpack` returns.

    About `slab` bytes of it are unpacked at a time, to the same memory: new memory, which the system clears first, takes far
    longer to fill than the cache.
    """
    rows, columns = len(parts[0]), x.shape[1]
    tile = TILE * columns * x.element_size()
    threads = max(1, min(torch.get_num_threads(), WIDEST * slab // tile))
    height = TILE * threads * max(1, round(slab / (threads * tile)))
    if not _by_kernels(parts, x.dtype) or rows <= height:
        return nn.functional.linear(x, unpack(parts, columns, x.dtype), bias)
    y = x.new_empty(len(x), rows)
    memory = x.new_empty(height, columns)
    for first in range(0, rows, height):
        weight = memory[: rows - first]
        _fill(weight, parts, first)
        own = slice(first, first + len(weight))
        if bias is None:
            torch.mm(x, weight.T, out=y[:, own])
        else:
            torch.addmm(bias[own], x, weight.T, out=y[:, own])
    return y


def _by_kernels(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> bool:
    return parts[0].device.type == "cpu" and dtype in DTYPES and bool(paths())


def _fill(weight: torch.Tensor, parts: Sequence[torch.Tensor], first: int, path: str | None = None) -> None:
    """Fill `weight` with the rows from `first` on, as many as it has."""
    fill = (
        torch.ops.losa_cpu_decode.unpack_
        if len(parts) == len(packed.PARTS)
        else torch.ops.losa_cpu_decode.unpack_coded_
    )
    fill.default(weight, *parts, first, path or paths()[0])
