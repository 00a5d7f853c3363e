"""The CUDA kernels as a C++ library for the CPU: inline assembly and launches become calls of device.h, which says what they do."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import mmap
import re
import subprocess
from pathlib import Path

import torch

from torch_impl.decode import cuda

FOLDER = Path(cuda.__file__).parent
HEADERS = ("cuda_panels.h", "cuda_decode.h", "cuda_tiles.h", "cuda_entries.h", "cuda_gaps.h")
SOURCES = ("cuda.cu", "cuda_rows.cu", "cuda_coded.cu", "cuda_gaps.cu", "cuda_coded_gaps.cu")
_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 {{%0,%1,%2,%3}}, {{%4,%5,%6,%7}}, {{%8,%9}}, {{%0,%1,%2,%3}};"
_BULK = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
_READ = "ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
_WAIT = "{.reg .pred p; again: mbarrier.try_wait.parity.shared.b64 p, [%0], %1; @!p bra again;}"
INSTRUCTIONS = {
    "": "",
    "mov.u32 %0, %%laneid;": "%0 = emulated::lane_number()",
    "ld.shared.u32 %0, [%1];": "%0 = emulated::load<uint32_t>(%1)",
    "ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];": "emulated::load_four(%0, %1, %2, %3, %4)",
    "ld.shared.v2.u32 {%0,%1}, [%2];": "{ const uint2 v = emulated::load<uint2>(%2); %0 = v.x, %1 = v.y; }",
    "st.shared.v4.u32 [%0], {%1,%2,%3,%4};": "emulated::store(%0, uint4{%1, %2, %3, %4})",
    "st.shared.u16 [%0], %1;": "emulated::store<uint16_t>(%0, %1)",
    _READ: "{ const uint4 v = emulated::read<uint4>(%4); %0 = v.x, %1 = v.y, %2 = v.z, %3 = v.w; }",
    "ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];": "{ const uint2 v = emulated::read<uint2>(%2); %0 = v.x, %1 = v.y; }",
    "ld.global.L1::no_allocate.u32 %0, [%1];": "%0 = emulated::read<uint32_t>(%1)",
    "{.reg .u16 h; ld.shared.u16 h, [%1+%2]; cvt.u32.u16 %0, h;}": "%0 = emulated::load<uint16_t>(%1 + %2)",
    "st.shared.u32 [%0], %1;": "emulated::store<uint32_t>(%0, %1)",
    "{.reg .u16 h; cvt.u16.u32 h, %1; st.shared.u8 [%0], h;}": "emulated::store<uint8_t>(%0, %1)",
    "prmt.b32 %0, %1, %2, %3;": "%0 = emulated::permute(%1, %2, %3)",
    "dp2a.lo.u32.u32 %0, %1, %2, %3;": "%0 = emulated::dot_two(%1, %2, %3)",
    "dp2a.hi.u32.u32 %0, %1, %2, %3;": "%0 = emulated::dot_two(%1, %2 >> 16, %3)",
    "fma.rn.bf16x2 %0, %0, %1, %2;": "%0 = emulated::fma_two(%0, %1, %2)",
    _MMA.format("bf16"): "emulated::mma<__nv_bfloat16>(%0, %1, %2, %3, %4, %5, %6, %7, %8, %9)",
    _MMA.format("f16"): "emulated::mma<__half>(%0, %1, %2, %3, %4, %5, %6, %7, %8, %9)",
    "{.reg .pred p; elect.sync _|p, -1; selp.u32 %0, 1, 0, p;}": "%0 = emulated::elect()",
    "mbarrier.init.shared.b64 [%0], 1;": "emulated::init_barrier(%0)",
    "fence.mbarrier_init.release.cluster;": "",
    "mbarrier.arrive.expect_tx.shared.b64 _, [%1], %0;": "emulated::expect(%1, %0)",
    _BULK: "emulated::copy_bulk(%0, %1, %2, %3)",
    _WAIT: "emulated::wait_parity(%0, %1)",
    "cp.async.cg.shared.global [%0], [%1], 16;": "emulated::copy_async(%0, %1)",
    "cp.async.ca.shared.global [%0], [%1], 4;": "emulated::copy_word(%0, %1)",
    "cp.async.commit_group;": "",
    "cp.async.wait_group 0;": "emulated::finish_copies()",
    "griddepcontrol.wait;": "",
    "griddepcontrol.launch_dependents;": "",
}
"""Inline assembly, in full, and the C++ for it; %n: operand n. Another text is an error: its meaning must be stated here first."""


def _end(text: str, start: int) -> int:
    """Return where the parenthesis closes that opens just before `start`; those in strings do not count."""
    depth = 1
    for match in re.compile(r'"(?:[^"\\]|\\.)*"|[()]').finditer(text, start):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    raise ValueError(f"no end of {text[start : start + 80]!r}")


def _assembly(statement: str) -> str:
    """Return the C++ for the parentheses of an asm statement. Errors: KeyError for an unknown instruction."""
    code = re.match(r'(?:\s*"(?:[^"\\]|\\.)*")*', statement)
    assert code is not None
    lines = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', code[0])).replace("\\n", " ")
    operands = []
    for match in re.finditer(r'"[+=]?[a-z]"\s*\(', statement[code.end() :]):
        start = code.end() + match.end()
        operands.append(f"({statement[start : _end(statement, start)]})")
    return re.sub(r"%(\d)", lambda match: operands[int(match[1])], INSTRUCTIONS[" ".join(lines.split())])


def translate(source: str) -> str:
    """Return a kernel source as C++ that device.h precedes."""
    source = re.sub(r"^ *(#include|#pragma|extern __shared__).*", "", source, flags=re.MULTILINE)
    # kernel<<<blocks, threads, shared, stream>>>(arguments)
    source = re.sub(r"(\w+(?:<[\w, ]+>)?)<<<(.*?)>>>\(", r"emulated::launch(\1, emulated::Shape{\2}, ", source)
    parts, done = [], 0
    for match in re.finditer(r"\basm(?: volatile)?\s*\(", source):
        end = _end(source, match.end())
        parts += [source[done : match.start()], _assembly(source[match.end() : end])]
        done = end + 1
    return "".join(parts) + source[done:]


def whole_source(architecture: int) -> str:
    """Return all kernels as one source, for a compute capability: 800 or 900. Each file has a namespace of its own."""
    device = Path(__file__).with_name("device.h").read_text(encoding="utf-8")
    headers = [translate((FOLDER / name).read_text(encoding="utf-8")) for name in HEADERS]
    sources = [
        f"namespace file_{number} {{\n{translate((FOLDER / name).read_text(encoding='utf-8'))}\n}}"
        for number, name in enumerate(SOURCES)
    ]
    return "\n".join([f"#define __CUDA_ARCH__ {architecture}", device, *headers, *sources])


class Kernels:
    """The functions of the kernels' library, compiled in a folder unless it is there already.

    Errors: CalledProcessError if it does not compile.
    """

    def __init__(self, compiler: str, architecture: int, folder: Path) -> None:
        source = whole_source(architecture)
        library = folder / f"kernels_{hashlib.sha256(source.encode()).hexdigest()[:16]}.so"
        with (folder / "kernels.lock").open("w") as lock:
            # One process compiles, others wait for it.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.is_file():
                flags = ["-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
                subprocess.run([compiler, *flags], input=source, text=True, check=True)
        self._library = ctypes.CDLL(str(library))
        self._library.emulated_failure.restype = ctypes.c_char_p

    def __call__(self, name: str, *arguments: torch.Tensor | float | None) -> None:
        """Call a function without its last argument, the stream. Errors: RuntimeError says what the kernel did wrong."""
        kinds = {torch.Tensor: lambda tensor: ctypes.c_void_p(tensor.data_ptr()), float: ctypes.c_float}
        given = [kinds.get(type(a), lambda other: other)(a) for a in arguments]
        if getattr(self._library, name)(*given, None):
            raise RuntimeError(f"{name}: {self._library.emulated_failure().decode()}")


def guarded(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to the end of memory that may be accessed; one without numbers is none of that memory."""
    if not tensor.numel():
        return tensor.clone()
    pages = -(-tensor.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    area = mmap.mmap(-1, pages + mmap.PAGESIZE)
    copied = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=pages - tensor.nbytes)
    beyond = ctypes.c_void_p(copied.data_ptr() + tensor.nbytes)
    if ctypes.CDLL(None).mprotect(beyond, ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError("mprotect failed")
    return copied.view(tensor.shape).copy_(tensor)
