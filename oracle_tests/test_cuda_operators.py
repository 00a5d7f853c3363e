"""The operators of cuda_operators.cpp, compiled for the CPU with stand-ins for the kernels: all but the launches."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils import cpp_extension

from torch_impl.decode import cpu

SOURCE = cpu.SOURCE.with_name("cuda_operators.cpp")
# The kernels' stand-ins read a dense weight in place of a layout, and return `slot` as CUDA's error.
KERNELS = """
#include <ATen/ops/from_blob.h>
#include <cstring>
int64_t launches = 0;
static at::Tensor of(const void* at, int rows, int columns, int half) {
  return at::from_blob(const_cast<void*>(at), {rows, columns}, at::TensorOptions().dtype(half ? at::kHalf : at::kBFloat16));
}
extern "C" int losa_matvec(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows, int columns,
                           int, int slot, int half, int batch, int share, int groups, int, void*) {
  if (batch < 1 || batch > 8 || !share || groups != 6) return 99;
  launches++;
  at::Tensor sums = of(x, batch, columns, half).to(at::kFloat).matmul(of(data, rows, columns, half).to(at::kFloat).t());
  if (bias) sums += of(bias, 1, rows, half);
  of(y, batch, rows, half).copy_(sums);
  return slot;
}
extern "C" int losa_expand(const void* data, const void*, void* dense, int rows, int columns, int, int slot, void*) {
  std::memcpy(dense, data, 2 * rows * columns);
  return slot;
}
// More rows at once count 10000.
extern "C" int losa_matvec_rows(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows,
                                int columns, int panels, int slot, int half, int batch, int strips, int share, int groups,
                                int overlap, void* stream) {
  if (batch <= 8 || batch > 32 || strips != 2 || share != 3 || groups != 4 || reinterpret_cast<uintptr_t>(x) % 16) return 97;
  launches += 10000;
  at::Tensor sums = of(x, batch, columns, half).to(at::kFloat).matmul(of(data, rows, columns, half).to(at::kFloat).t());
  if (bias) sums += of(bias, 1, rows, half);
  of(y, batch, rows, half).copy_(sums);
  return slot;
}
// With codes a launch counts 100, and unpacking a million.
extern "C" int losa_matvec_coded(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows,
                                 int columns, int panels, int slot, int half, int bits, int batch, int share, int groups,
                                 int overlap, void* stream) {
  if (bits != 4) return 98;
  launches += 99;
  return losa_matvec(data, starts, x, bias, y, rows, columns, panels, slot, half, batch, share, groups, overlap, stream);
}
extern "C" int losa_expand_coded(const void* data, const void* starts, void* dense, int rows, int columns, int panels, int slot,
                                 int half, int bits, void* stream) {
  if (bits != 4) return 98;
  launches += 1000000;
  return losa_expand(data, starts, dense, rows, columns, panels, slot, stream);
}
// With gaps a launch counts ten, and unpacking a thousand.
extern "C" int losa_matvec_gaps(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows,
                                int columns, int panels, int slot, int half, int batch, int groups, int overlap, void* stream) {
  launches += 9;
  return losa_matvec(data, starts, x, bias, y, rows, columns, panels, slot, half, batch, 1, groups, overlap, stream);
}
extern "C" int losa_expand_gaps(const void* data, const void* starts, void* dense, int rows, int columns, int panels, int slot,
                                int width, void* stream) {
  if (width != 1024) return 96;
  launches += 1000;
  return losa_expand(data, starts, dense, rows, columns, panels, slot, stream);
}
// With codes and gaps both.
extern "C" int losa_matvec_coded_gaps(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows,
                                      int columns, int panels, int slot, int half, int bits, int batch, int groups, int overlap,
                                      void* stream) {
  launches += 9;
  return losa_matvec_coded(data, starts, x, bias, y, rows, columns, panels, slot, half, bits, batch, 1, groups, overlap, stream);
}
extern "C" int losa_expand_coded_gaps(const void* data, const void* starts, void* dense, int rows, int columns, int panels,
                                      int slot, int half, int bits, int width, void* stream) {
  if (width != 1024) return 96;
  launches += 1000;
  return losa_expand_coded(data, starts, dense, rows, columns, panels, slot, half, bits, stream);
}
// Other endings of a product write their number everywhere, with codes ten more, and their parameters to the sums of squares.
extern "C" int losa_ending(const void*, const void*, const void*, const void* bias, void* y, int rows, int, int, int slot,
                           int batch, int share, int overlap, int ending, void* squares, int parts, float eps, void* total,
                           const void* gain, void*) {
  of(y, batch, ending % 10 == 2 ? rows / 2 : rows, 0).fill_(ending);
  if (total) of(total, batch, rows, 0).fill_(share);
  float* sums = static_cast<float*>(squares);
  sums[0] = parts, sums[1] = eps, sums[2] = share + 10 * overlap + 100 * (bias != nullptr) + 1000 * (gain != nullptr);
  return slot;
}
extern "C" int losa_ending_coded(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows,
                                 int columns, int panels, int slot, int bits, int batch, int share, int overlap, int ending,
                                 void* squares, int parts, float eps, void* total, const void* gain, void* stream) {
  if (bits != 4) return 98;
  return losa_ending(data, starts, x, bias, y, rows, columns, panels, slot, batch, share, overlap, ending + 10, squares,
                     parts, eps, total, gain, stream);
}
extern "C" int losa_ending_gaps(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows,
                                int columns, int panels, int slot, int batch, int overlap, int ending, void* squares, int parts,
                                float eps, void* total, const void* gain, void* stream) {
  return losa_ending(data, starts, x, bias, y, rows, columns, panels, slot, batch, 7, overlap, ending + 20, squares, parts, eps,
                     total, gain, stream);
}
extern "C" int losa_ending_coded_gaps(const void* data, const void* starts, const void* x, const void* bias, void* y, int rows,
                                      int columns, int panels, int slot, int bits, int batch, int overlap, int ending,
                                      void* squares, int parts, float eps, void* total, const void* gain, void* stream) {
  if (bits != 4) return 98;
  return losa_ending_gaps(data, starts, x, bias, y, rows, columns, panels, slot, batch, overlap, ending + 10, squares, parts,
                          eps, total, gain, stream);
}
TORCH_LIBRARY_FRAGMENT(NAME, library) { library.def("launches() -> int", [] { return launches; }); }
"""
STREAM = """
namespace c10::cuda { struct Stream { void* stream() { return nullptr; } }; inline Stream getCurrentCUDAStream(int) { return {}; } }
"""
GUARD = "#include <c10/core/Device.h>\nnamespace c10::cuda { struct CUDAGuard { explicit CUDAGuard(c10::Device) {} }; }"


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("operators")
    (folder / "c10" / "cuda").mkdir(parents=True)
    (folder / "c10" / "cuda" / "CUDAStream.h").write_text(STREAM)
    (folder / "c10" / "cuda" / "CUDAGuard.h").write_text(GUARD)
    name = "losa_operators_test"
    text = SOURCE.read_text() + KERNELS
    for old, new in (
        ("losa_cuda_decode", name),
        ("NAME", name),
        ("AutogradCUDA", "AutogradCPU"),
        (", CUDA,", ", CPU,"),
    ):
        text = text.replace(old, new)
    source = folder / "operators.cpp"
    source.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        # Find ninja even if the virtual environment is not activated.
        patch.setenv("PATH", os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", ""))))
        try:
            cpp_extension.load(
                name,
                [str(source)],
                extra_cflags=["-O0"],
                extra_include_paths=[str(folder)],
                build_directory=str(folder),
                is_python_module=False,
            )
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            # A library that was built and cannot be loaded lacks a kernel's stand-in.
            if "error:" in str(error) or list(folder.glob("*.so")):
                raise
            pytest.skip(f"no compiler: {str(error)[:200]}")
    return getattr(torch.ops, name)


class Weight:
    """A dense weight in place of a layout, with a bias, and the plan of 24 rows by the kernel."""

    def __init__(
        self,
        dtype: torch.dtype,
        share: int = 1,
        error: int = 0,
        bits: int = 0,
        at_once: int = 8,
        rows: int = 20,
        gated: int = 2,
        gaps: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.dense = torch.randn(rows, 32, generator=generator).to(dtype)
        self.bias = torch.randn(rows, generator=generator).to(dtype)
        shape = [rows, 32, 1, error, int(dtype == torch.float16)]
        plan = [*shape, share, 1, 24, bits, at_once, 2, 3, 4, 6, 5 * bool(share), gated, gaps]
        self.layout = (self.dense.view(torch.uint8), torch.zeros(1, dtype=torch.int32), plan)


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.dtype == expected.dtype and torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=2**-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("biased", "bits"), [(False, 0), (True, 0), (True, 4)])
def test_up_to_most_rows_are_slices_of_eight(operators: Any, dtype: torch.dtype, biased: bool, bits: int) -> None:
    """More rows, or rows too long for the kernel, unpack the weight. The shape of x is that of y; x may have strides."""
    for lead, share, launches in (
        ((), 1, 1),
        ((1, 8), 1, 1),
        ((3, 3), 1, 2),
        ((24,), 1, 3),
        ((5, 5), 1, 0),
        ((2,), 0, 0),
        ((2, 0), 1, 0),
    ):
        weight = Weight(dtype, share, bits=bits)
        bias = weight.bias if biased else None
        x = torch.randn(*lead, 64).to(dtype)[..., ::2]
        before = operators.launches()
        y = operators.linear(x, *weight.layout, bias)
        assert y.shape == (*lead, 20)
        assert near(y, functional.linear(x, weight.dense, bias))
        parts = operators.linear_parts(x, *weight.layout, bias, [7, 1, 12])
        assert all(torch.equal(*pair) for pair in zip(parts, y.split([7, 1, 12], -1), strict=True))
        assert torch.equal(operators.expand(*weight.layout), weight.dense)
        unpacked = 1 if launches or not x.numel() else 3
        assert operators.launches() - before == (2 * launches if not bits else 200 * launches + 1000000 * unpacked)


def test_more_rows_at_once(operators: Any) -> None:
    """A last slice of up to eight rows is one of the other kernel, as are all where x cannot be read as vectors."""
    cases = ((8, 32, 1), (9, 32, 10000), (24, 32, 10000), (24, 16, 10001), (17, 16, 10001), (8, 8, 1))
    for rows, at_once, launches in cases:
        weight = Weight(torch.bfloat16, at_once=at_once)
        x = torch.randn(rows + 1, 32).bfloat16()
        before = operators.launches()
        for there, expected in ((x[1:], launches), (x.flatten()[1 : 1 + 32 * rows].view(rows, 32), -(-rows // 8))):
            y = operators.linear(there, *weight.layout, weight.bias)
            assert near(y, functional.linear(there, weight.dense, weight.bias))
            assert operators.launches() - before == expected
            before = operators.launches()


@pytest.mark.parametrize(("bits", "launched", "unpacked"), [(0, 10, 1000), (4, 109, 1001000)])
def test_gaps_take_up_to_at_once_rows(operators: Any, bits: int, launched: int, unpacked: int) -> None:
    """However x lies; more than the plan's most are multiplied with the unpacked weight, as are rows too long for a block."""
    for rows, at_once, share, launches in (
        (1, 8, 1, launched),
        (9, 8, 1, 2 * launched),
        (9, 4, 1, 3 * launched),
        (25, 8, 1, unpacked),
        (3, 0, 0, unpacked),
    ):
        weight = Weight(torch.bfloat16, share=share, at_once=at_once, gaps=1, bits=bits)
        for x in (torch.randn(rows, 32).bfloat16(), torch.randn(32 * rows + 1).bfloat16()[1:].view(rows, 32)):
            before = operators.launches()
            y = operators.linear(x, *weight.layout, weight.bias)
            assert near(y, functional.linear(x, weight.dense, weight.bias))
            assert operators.launches() - before == launches
    before = operators.launches()
    assert torch.equal(operators.expand(*weight.layout), weight.dense)
    assert operators.launches() - before == unpacked


@pytest.mark.parametrize(("bits", "base"), [(0, 20), (4, 30)])
def test_other_endings_of_gaps(operators: Any, bits: int, base: int) -> None:
    """The sums of squares are of 32 rows each."""
    x, squares = torch.ones(3, 32, dtype=torch.bfloat16), torch.zeros(3, 5)
    weight = Weight(torch.bfloat16, gaps=1, rows=64, bits=bits)
    assert operators.linear_normed(x, squares, 0.5, *weight.layout, None).eq(base + 1).all()
    assert squares[0].tolist() == [5, 0.5, 17, 0, 0]
    assert operators.linear_gated(x, squares, 0.5, *weight.layout, None).eq(base + 2).all()
    total = torch.zeros(3, 64, dtype=torch.bfloat16)
    scaled, sums = operators.linear_added(x, total, weight.bias, *weight.layout, None)
    assert sums.shape == (3, 2)
    assert scaled.eq(base + 3).all()


def test_other_endings(operators: Any) -> None:
    x, squares = torch.ones(3, 32, dtype=torch.bfloat16), torch.zeros(3, 5)
    for bits, more in ((0, 0), (4, 10)):
        weight = Weight(torch.bfloat16, bits=bits)
        y = operators.linear_normed(x, squares, 0.5, *weight.layout, weight.bias)
        assert torch.equal(y, torch.full((3, 20), 1.0 + more).bfloat16())
        assert squares[0].tolist() == [5, 0.5, 115, 0, 0]
        total = torch.zeros(3, 20, dtype=torch.bfloat16)
        scaled, sums = operators.linear_added(x, total, weight.bias, *weight.layout, None)
        assert scaled.dtype == total.dtype
        assert float(scaled[0, 0]) == 3 + more
        assert sums.shape == (3, 2)
        assert sums.flatten()[:3].tolist() == [2, 0, 1015]
        assert total.eq(5).all()
        y = operators.linear_gated(x, squares, 0.5, *Weight(torch.bfloat16, bits=bits, rows=64).layout, None)
        assert torch.equal(y, torch.full((3, 32), 2.0 + more).bfloat16())
        assert squares[0].tolist() == [5, 0.5, 12, 0, 0]


def test_other_endings_refuse_what_does_not_fit(operators: Any) -> None:
    weight = Weight(torch.bfloat16)
    x, squares = torch.ones(3, 32, dtype=torch.bfloat16), torch.zeros(3, 5)
    normed = partial(operators.linear_normed, x, squares, 0.5)
    none = (*weight.layout, None)
    total = torch.zeros(3, 20, dtype=torch.bfloat16)
    half, long = Weight(torch.float16).layout, Weight(torch.bfloat16, share=0).layout
    unfit, failing = Weight(torch.bfloat16, rows=64, gated=0).layout, Weight(torch.bfloat16, error=7).layout
    many = torch.ones(9, 32, dtype=torch.bfloat16)
    for call, kind, message in (
        (lambda: operators.linear_normed(x[:, 1:], squares, 0.5, *none), ValueError, r"^x has shape \[3, 31\]"),
        (
            lambda: operators.linear_normed(x.t().contiguous().t(), squares, 0.5, *none),
            ValueError,
            "allowed: 1 to 8 rows, c",
        ),
        (lambda: operators.linear_normed(many, torch.zeros(9, 5), 0.5, *none), ValueError, "allowed: 1 to 8 rows"),
        (
            lambda: operators.linear_normed(x, squares[1:], 0.5, *none),
            ValueError,
            r"^squares is Float \[2, 5\] .*allowed: Float \[3, 5\]",
        ),
        (lambda: operators.linear_normed(x, squares[0], 0.5, *none), ValueError, r"^squares has shape \[5\]"),
        (lambda: operators.linear_normed(x, squares.double(), 0.5, *none), ValueError, "^squares is Double"),
        (lambda: operators.linear_normed(x.half(), squares, 0.5, *half, None), TypeError, "^the weight has dtype Half"),
        (lambda: normed(*long, None), ValueError, "^a block's panels do not fit in shared memory"),
        (lambda: normed(*failing, None), RuntimeError, "^losa_ending failed with CUDA error 7"),
        (
            lambda: operators.linear_gated(x, squares, 0.5, *none),
            ValueError,
            "^the weight has 20 rows; allowed: a multiple",
        ),
        (lambda: operators.linear_gated(x, squares, 0.5, *unfit, None), ValueError, "^a block's panels do not fit"),
        (
            lambda: operators.linear_added(x, total[:, 1:], weight.bias, *none),
            ValueError,
            r"^total is BFloat16 \[3, 19\]",
        ),
        (lambda: operators.linear_added(x, total.float(), weight.bias, *none), ValueError, "^total is Float"),
        (lambda: operators.linear_added(x, total, weight.bias[1:], *none), ValueError, r"^gain is BFloat16 \[19\]"),
    ):
        with pytest.raises(kind, match=message):
            call()


def test_no_gradient_passes(operators: Any) -> None:
    for rows, share in ((2, 1), (30, 1), (2, 0)):
        weight = Weight(torch.bfloat16, share)
        x = torch.randn(rows, 32, dtype=torch.bfloat16, requires_grad=True)
        assert not operators.linear(x, *weight.layout, None).requires_grad
        assert not any(part.requires_grad for part in operators.linear_parts(x, *weight.layout, None, [8, 12]))


def test_what_does_not_fit_is_refused(operators: Any) -> None:
    weight = Weight(torch.bfloat16)
    data, starts, plan = weight.layout
    x = torch.ones(1, 32, dtype=torch.bfloat16)
    for arguments, kind, message in (
        ((x[:, 1:], data, starts, plan, None), ValueError, r"^x has shape \[1, 31\]; allowed: \[..., 32\]"),
        ((x[0, 0], data, starts, plan, None), ValueError, "^x has shape"),
        ((x.half(), data, starts, plan, None), TypeError, "^x has dtype Half; allowed: BFloat16, the weight's"),
        ((x, data, starts, plan[1:], None), ValueError, "^plan has 16 numbers"),
        ((x, data, starts, plan, weight.bias[1:]), ValueError, "^bias does not match the weight; allowed: 20 entries"),
        ((x, data, starts, plan, weight.bias.float()), ValueError, "^bias does not match"),
        ((x.to("meta"), data, starts, plan, None), NotImplementedError, "Meta"),
    ):
        with pytest.raises(kind, match=message):
            operators.linear(*arguments)
    failing = Weight(torch.bfloat16, error=7).layout
    with pytest.raises(RuntimeError, match=r"^losa_matvec failed with CUDA error 7"):
        operators.linear(x, *failing, None)
    with pytest.raises(RuntimeError, match=r"^losa_expand failed with CUDA error 7"):
        operators.expand(*failing)
