"""The dense loop of the CPU's decode benchmark is a dense product; the first use of the kernels says that it compiles."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from torch_impl.bench import decode_cpu
from torch_impl.decode import cpu, cuda


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_dense_loop_is_a_dense_product(batch: int) -> None:
    loop = decode_cpu.dense_loop()
    if loop is None:
        pytest.skip("this CPU has no VDPBF16PS")
    x, weight = torch.randn(batch, 384).bfloat16(), torch.randn(9, 384).bfloat16()
    torch.testing.assert_close(loop(x, weight).float(), x.float() @ weight.float().T, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_compiling_is_announced(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Before it begins, and only if torch has nothing compiled that is newer than the source."""
    sources = [cpu.SOURCE] if kind == "cpu" else [cpu.SOURCE.with_name(n) for n in ("cuda.cu", "cuda_operators.cpp")]
    source, newest = sources[0], max(source.stat().st_mtime for source in sources)
    start = {"cpu": lambda: cpu.build(cpu.SOURCE), "cuda": cuda._library.__wrapped__}[kind]
    said = []

    def load(name: str, *_: object, extra_ldflags: list[str] | None = None, **__: object) -> None:
        said.append((name, capsys.readouterr().err))
        if extra_ldflags is not None:
            # As torch does.
            extra_ldflags.append("-ltorch")
        raise OSError("no compiler")

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpu.cpp_extension, "load", load)
    line = f"compiling {source.name}: once on this machine, up to a minute\n"
    for age, expected in ((None, line), (10, ""), (-10, line)):
        if age is not None:
            library = tmp_path / said[0][0] / f"{said[0][0]}.so"
            library.touch()
            when = newest + age
            os.utime(library, (when, when))
        with pytest.raises(OSError, match="no compiler"):
            start()
        assert said[-1][1] == expected
    # Whatever was built before, a source has one name.
    assert len({name for name, _ in said}) == 1
    lock = tmp_path / said[0][0] / "lock"
    lock.touch()
    with pytest.raises(OSError, match="no compiler"):
        start()
    assert said[-1][1] == f"waiting for another process that compiles {source.name}; if there is none, delete {lock}\n"
