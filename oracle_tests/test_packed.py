"""Products with a packed weight: every path of the kernels against the spec and the dense product, on hard inputs."""

from __future__ import annotations

import copy
import ctypes
import functools
import mmap
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import cpp_extension

from oracle_tests import tolerances
from oracle_tests.assertions import assert_close
from reference import packed as spec
from torch_impl import gaps, packed, tiles
from torch_impl.decode import cpu, cuda, packed_linear
from torch_impl.decode.packed_linear import DECODE_ROWS, PackedGroup, PackedLinear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((1, 1), (3, 31), (7, 33), (64, 96), (5, 257), (33, 1000), (200, 320))
SPARSITIES = (0.0, 0.5, 0.7, 0.97, 1.0)
BITS = {torch.bfloat16: torch.uint16, torch.float16: torch.uint16, torch.float32: torch.uint32}


def sparse(rows: int, columns: int, sparsity: float, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A weight with an empty row, a full one if there is room, and numbers from tiny to large."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight *= torch.exp(3 * torch.randn(1, columns, generator=generator)).clamp(1e-3, 1e2)
    kept = torch.rand(rows, columns, generator=generator) >= sparsity
    kept[rows // 2] = False
    if rows > 2:
        kept[0] = sparsity < 1
    return (weight * kept).to(dtype)


def assert_product(
    what: str, y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """y = x Wᵀ + b of the weight that the spec unpacks, each entry within the roundings of its own terms."""
    bits = weight.view(BITS[weight.dtype]).numpy()
    unpacked = spec.unpack(*spec.pack(bits), columns=bits.shape[1])
    exact = torch.from_numpy(unpacked).view(weight.dtype).double().numpy()
    inputs = x.double().numpy()
    expected, terms = inputs @ exact.T, np.abs(inputs) @ np.abs(exact).T
    if bias is not None:
        expected, terms = expected + bias.double().numpy(), terms + np.abs(bias.double().numpy())
    assert y.dtype == x.dtype
    bound = tolerances.packed_product(weight.dtype, expected, terms)
    error = np.abs(y.double().numpy() - expected)
    assert (error <= bound).all(), f"{what}: off by {error.max():.3e}, {(error / bound).max():.2f} of what is allowed"


@pytest.fixture(scope="session")
def paths() -> tuple[str, ...]:
    """The paths of this CPU; the kernels are built once."""
    found = cpu.paths()
    assert found, "the kernels did not build"
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", SPARSITIES)
def test_every_path_is_the_dense_product(paths: tuple[str, ...], sparsity: float, dtype: torch.dtype) -> None:
    for number, (rows, columns) in enumerate(SHAPES):
        weight = sparse(rows, columns, sparsity, dtype, number)
        parts = packed.pack(weight)
        bias = torch.randn(rows, generator=torch.Generator().manual_seed(1)).to(dtype) if number % 2 else None
        for batch in range(1, 10):
            x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch)).to(dtype)
            for path in paths:
                y = cpu.linear(x, *parts, bias, path)
                assert_product(f"{path}, {(rows, columns)}, batch {batch}", y, x, weight, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_share_the_rows(paths: tuple[str, ...], dtype: torch.dtype) -> None:
    weight = sparse(300, 2048, 0.6, dtype)
    x = torch.randn(2, 2048).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([cpu.linear(x, *packed.pack(weight), None, path) for path in paths])
    finally:
        torch.set_num_threads(before)
    assert_product("threads", results[0][0], x, weight)
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e30])
def test_large_and_tiny_values(paths: tuple[str, ...], size: float) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        weight = (sparse(9, 100, 0.5, torch.float32) * size).to(dtype)
        x = torch.randn(3, 100).to(dtype)
        for path in paths:
            assert_product(f"{path} at {size}", cpu.linear(x, *packed.pack(weight), None, path), x, weight)


def test_infinite_and_nan_weights_reach_their_row_alone(paths: tuple[str, ...]) -> None:
    for dtype in DTYPES:
        weight = sparse(4, 40, 0.5, dtype)
        weight[0, 3], weight[1, 39] = float("inf"), float("nan")
        for path in paths:
            y = cpu.linear(torch.ones(1, 40, dtype=dtype), *packed.pack(weight), None, path)[0]
            assert y[0] == float("inf")
            assert y[1].isnan()
            assert y[2:].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_read_behind_the_end_of_what_is_there(paths: tuple[str, ...], dtype: torch.dtype) -> None:
    """Every array ends where a page ends whose successor may not be read, at an odd address if it can."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 12 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for number in (2, 5, 8, 11):
        assert libc.mprotect(ctypes.c_void_p(address + number * page), ctypes.c_size_t(page), 0) == 0
    try:
        for rows, columns in ((3, 33), (8, 64), (1, 5)):
            weight = sparse(rows, columns, 0.3, dtype)
            x = torch.randn(1, columns).to(dtype)
            placed = []
            for number, value in zip((2, 5, 8, 11), (*packed.pack(weight), x), strict=True):
                count = max(1, value.numel())
                begin = number * page - count * value.element_size()
                there = torch.frombuffer(memory, dtype=value.dtype, count=count, offset=begin)[: value.numel()]
                placed.append(there.copy_(value.flatten()).view(value.shape))
            for path in paths:
                y = cpu.linear(placed[3], placed[0], placed[1], placed[2], None, path)
                assert_product(path, y, x, weight)
                cpu._fill(torch.empty(rows, columns, dtype=dtype), placed[:3], 0, path)
    finally:
        libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(12 * page), 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shift", [1, 2, 3, 7])
def test_storage_may_begin_anywhere(paths: tuple[str, ...], shift: int, dtype: torch.dtype) -> None:
    weight = sparse(6, 130, 0.5, dtype)
    x = torch.randn(5, 130).to(dtype)

    def shifted(value: torch.Tensor) -> torch.Tensor:
        place = torch.zeros(value.numel() * value.element_size() + 16, dtype=torch.uint8).numpy()
        there = torch.frombuffer(place, dtype=value.dtype, count=value.numel(), offset=shift)
        return there.copy_(value.flatten()).view(value.shape)

    parts = [shifted(part) for part in packed.pack(weight)]
    for path in paths:
        assert_product(path, cpu.linear(shifted(x), *parts, None, path), x, weight)
        place = torch.empty(6, 130, dtype=dtype)
        cpu._fill(place, parts, 0, path)
        assert torch.equal(place, weight)


def test_kernels_refuse_what_does_not_fit(paths: tuple[str, ...]) -> None:
    bitmap, values, offsets = packed.pack(sparse(4, 40, 0.5, torch.float32))
    x = torch.ones(1, 40)
    for arguments, path, message in (
        ((x, bitmap, values[1:], offsets), paths[0], "values has"),
        ((x, bitmap, values, offsets[1:]), paths[0], "offsets has"),
        ((x[:, 9:], bitmap, values, offsets), paths[0], "which does not match"),
        ((x.bfloat16(), bitmap, values, offsets), paths[0], "x has dtype"),
        ((x, bitmap, values, offsets), "neon", "path is neon; allowed: "),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            cpu.linear(*arguments, None, path)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (7, 33), (64, 96), (5, 257), (9, 1000)])
def test_every_path_unpacks_bit_for_bit(paths: tuple[str, ...], rows: int, columns: int, dtype: torch.dtype) -> None:
    """Whole and from any row on, with an empty row at the end, and an infinity among the values."""
    weight = sparse(rows, columns, 0.6, dtype)
    weight[-1] = 0
    weight[0, 0] = -torch.inf
    parts = packed.pack(weight)
    assert torch.equal(cpu.unpack(parts, columns, dtype), weight)
    for path in paths:
        for first in {0, rows // 2, rows - 1}:
            place = torch.full((rows - first, columns), torch.nan, dtype=dtype)
            cpu._fill(place, parts, first, path)
            assert torch.equal(place, weight[first:])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("lead", [(1,), (2, 3), (4, 9), (), (0,)])
def test_the_layer_takes_any_number_of_rows(lead: tuple[int, ...], dtype: torch.dtype) -> None:
    """One token, a batch, a prompt longer than what is decoded, one vector, none."""
    assert DECODE_ROWS < 4 * 9
    # One in a hundred draws has sums that two orders round further apart than the bound: the same numbers every time.
    torch.manual_seed(39)
    linear = nn.Linear(48, 20).to(dtype)
    with torch.no_grad():
        linear.weight[torch.rand(20, 48) < 0.6] = 0
    layer = PackedLinear.of(linear)
    assert torch.equal(layer.unpacked(), linear.weight)
    x = torch.randn(*lead, 48).to(dtype)
    assert_close("layer", linear(x), layer(x), tolerances.same_product(dtype), floor=1e-30)


def test_compiled_code_finds_the_layer_by_its_handle() -> None:
    """A copy does not share the operation that the layer calls."""
    linear = nn.Linear(48, 20)
    layer = PackedLinear.of(linear)
    other = copy.deepcopy(layer)
    other.load_state_dict(PackedLinear.of(nn.Linear(48, 20)).state_dict())
    x = torch.randn(2, 3, 48)
    for each in (layer, other):
        torch.library.opcheck(torch.ops.losa.packed_linear.default, (x, each.handle, 20))
        assert torch.equal(torch.compile(each, backend="aot_eager", fullgraph=True)(x), each(x))
    assert not torch.equal(layer(x), other(x))
    assert "handle" not in layer.state_dict()


def test_the_layer_refuses_what_contradicts_itself() -> None:
    bitmap, values, offsets = packed.pack(sparse(4, 40, 0.5, torch.float32))
    with pytest.raises(ValueError, match=r"^values has"):
        PackedLinear(bitmap, values[1:], offsets, 40)


@pytest.fixture
def fresh_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets what was built, for one test; built again, torch would load a second library of the same operations, and abort."""
    cpu.paths()
    monkeypatch.setattr(cpu, "paths", functools.cache(cpu.paths.__wrapped__))


@pytest.mark.usefixtures("fresh_paths")
def test_without_a_compiler_a_slower_path_says_so_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler\n  here")

    weight = sparse(20, 70, 0.5, torch.float32)
    x = torch.randn(3, 70)
    # Where nothing is compiled yet.
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cpp_extension, "load", broken)
    for _ in range(2):
        assert_product("no compiler", cpu.linear(x, *packed.pack(weight)), x, weight)
    assert cpu.paths() == ()
    said = capsys.readouterr().err
    assert said == (
        "compiling cpu.cpp: once on this machine, up to a minute\n"
        "packed weights: CPU kernels are not available, so decoding is slower (no compiler here)\n"
    )


@pytest.mark.usefixtures("fresh_paths")
def test_a_compiler_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert cpu.paths() == ()
    assert capsys.readouterr().err.count("\n") == 2


def gpu_pair(dtype: torch.dtype) -> tuple[nn.Linear, PackedLinear]:
    linear = nn.Linear(70, 41).to(dtype)
    with torch.no_grad():
        linear.weight[torch.rand(41, 70) < 0.7] = 0
    linear.to(DEVICE)
    return linear, PackedLinear.of(linear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_few_rows_multiply_and_more_unpack(
    as_on_a_gpu: list[str], kind: type[cuda.Layout], dtype: torch.dtype
) -> None:
    linear, layer = gpu_pair(dtype)
    assert as_on_a_gpu == ["pack_rows" if kind is cuda.Layout else "pack_gaps_rows"]
    assert type(layer.layout) is kind
    assert layer.bitmap is layer.values is layer.offsets is None
    assert {name for name, _ in layer.named_buffers()} == {f"layout_{n}" for n in layer.layout.tensors()} | {"bias"}
    for lead, expected in (
        ((1,), "matvec"),
        ((2, 2), "matvec"),
        ((), "matvec"),
        ((8,), "matvec"),
        ((kind.MOST_ROWS,), "matvec"),
        ((kind.MOST_ROWS + 1,), "unpack"),
        ((3, kind.MOST_ROWS // 2), "unpack"),
    ):
        as_on_a_gpu.clear()
        x = torch.randn(*lead, 70, device=DEVICE).to(dtype)
        y = layer(x)
        # On the CPU the stand-in for `matvec` unpacks too.
        assert as_on_a_gpu[0] == expected
        assert not [call for call in as_on_a_gpu if call.startswith("pack")]
        assert_close("layer", linear(x).detach().cpu(), y.cpu(), tolerances.same_product(dtype), floor=1e-30)
    assert layer(x[:0]).shape == (0, kind.MOST_ROWS // 2, 41)


def test_on_a_gpu_the_state_is_the_packed_form(as_on_a_gpu: list[str], kind: type[cuda.Layout]) -> None:
    linear, layer = gpu_pair(torch.bfloat16)
    parts = packed.pack(linear.weight.detach())
    state = layer.state_dict()
    assert list(state) == ["bias", "bitmap", "values", "offsets"]
    assert all(torch.equal(state[name], part) for name, part in zip(packed_linear.PARTS, parts, strict=True))
    # Where it is already, nothing is built again.
    as_on_a_gpu.clear()
    assert layer.to(DEVICE).to(torch.bfloat16) is layer
    assert as_on_a_gpu == []
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert type(other.layout) is kind
        assert other.layout.data.data_ptr() == other.layout_data.data_ptr() != layer.layout_data.data_ptr()
        assert torch.equal(other.unpacked(), linear.weight)
    # Another dtype without kernels goes back to the bitmap, and from there to the layout again.
    other.float()
    assert other.layout is None
    assert [name for name, _ in other.named_buffers()] == ["bitmap", "values", "offsets", "bias"]
    assert torch.equal(other.unpacked(), linear.weight.float())
    x = torch.randn(2, 70, device=DEVICE)
    assert_close("float", linear.float()(x).detach().cpu(), other(x).cpu(), 1e-6, floor=1e-30)
    other.half()
    assert (type(other.layout), other.layout.dtype) == (kind, torch.float16)
    assert torch.equal(other.unpacked(), linear.weight.half())
    # Loaded into a layer of the same sparsity, on the GPU or not.
    layer.load_state_dict({**state, "values": -state["values"]})
    assert torch.equal(layer.unpacked().float(), -linear.weight)
    assert layer.layout is not None
    assert f"sparsity={1 - len(parts[1]) / (41 * 70):.4f}" in repr(layer)


def gpu_group(
    dtype: torch.dtype = torch.bfloat16, sizes: tuple[int, ...] = (41, 33, 5)
) -> tuple[list[nn.Linear], list[PackedLinear]]:
    """Layers with the same input, the second without a bias, and what they are as a group."""
    linears = [nn.Linear(70, rows, bias=rows != sizes[1]).to(dtype) for rows in sizes]
    with torch.no_grad():
        for linear in linears:
            linear.weight[torch.rand_like(linear.weight) < 0.7] = 0
    layers = [PackedLinear.of(linear.to(DEVICE)) for linear in linears]
    packed_linear.join(layers)
    return linears, layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_group_is_one_product_of_few_rows(
    as_on_a_gpu: list[str], kind: type[cuda.Layout], dtype: torch.dtype
) -> None:
    linears, layers = gpu_group(dtype)
    assert type(layers[0].group.layout) is kind
    assert all(torch.equal(layer.unpacked(), linear.weight) for linear, layer in zip(linears, layers, strict=True))
    many = kind.MOST_ROWS
    for lead, products in (((1,), 1), ((2, 2), 1), ((), 1), ((many,), 1), ((many + 1,), 0), ((3, many), 0)):
        as_on_a_gpu.clear()
        x = torch.randn(*lead, 70, device=DEVICE).to(dtype)
        for linear, layer in zip(linears, layers, strict=True):
            y = layer(x)
            assert y.shape == (*lead, layer.out_features)
            assert_close("layer", linear(x).detach().cpu(), y.cpu(), tolerances.same_product(dtype), floor=1e-30)
        assert as_on_a_gpu.count("matvec") == products
        # With more rows each layer works alone.
        assert as_on_a_gpu.count("unpack") == (0 if products else 3)
        assert not [call for call in as_on_a_gpu if call.startswith("pack")]
    assert layers[1](x[:0]).shape == (0, many, 33)


@pytest.mark.usefixtures("kind")
def test_a_share_is_of_the_numbers_that_were_given(as_on_a_gpu: list[str]) -> None:
    """Written to, asked for again, another of the same numbers, in inference mode: whatever is not certain is worked out."""
    linears, layers = gpu_group()
    x = torch.randn(1, 70, device=DEVICE).bfloat16()

    def right(layer: int, x: torch.Tensor, products: int) -> None:
        as_on_a_gpu.clear()
        expected, y = linears[layer](x).detach(), layers[layer](x)
        assert_close("layer", expected.cpu(), y.cpu(), tolerances.same_product(x.dtype), floor=1e-30)
        # Nobody else may see that.
        y.zero_()
        assert as_on_a_gpu.count("matvec") == products

    with torch.no_grad():
        right(0, x, 1)
        right(1, x, 0)
        right(1, x, 1)
        right(2, x, 0)
        x.neg_()
        right(0, x, 1)
        right(2, x, 0)
        right(1, x.clone(), 1)
        right(0, x, 1)
        right(1, x[:], 1)
        copied = copy.deepcopy(layers)
        assert all(layer.group is copied[0].group is not layers[0].group for layer in copied)
        assert copied[0].group._shares is None
    with torch.inference_mode():
        y = x.clone()
        for layer in range(3):
            right(layer, y, 1)


def test_in_inference_mode_or_of_many_rows_a_layer_reads_its_own_rows(
    as_on_a_gpu: list[str], kind: type[cuda.Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If they are whole strips; all rows for each layer would be everything several times."""
    strip = tiles.ROWS if kind is cuda.Layout else gaps.LANES
    linears, layers = gpu_group(sizes=(3 * strip, 2 * strip, strip, 7))
    rows = []
    for name in ("matvec", "unpack"):
        function = getattr(cuda, name)
        noted = lambda layout, *given, f=function: rows.append(layout.rows) or f(layout, *given)  # noqa: E731
        monkeypatch.setattr(cuda, name, noted)
    expected = [3 * strip, 2 * strip, strip, 7 if layers[0].group.layout.part(6 * strip, 7) else 6 * strip + 7]
    for group in (layers, copy.deepcopy(layers), [layer.to(DEVICE) for layer in layers]):
        for count, mode in ((2, torch.inference_mode), (kind.MOST_ROWS + 1, torch.no_grad)):
            with mode():
                x = torch.randn(count, 70, device=DEVICE).bfloat16()
                for linear, layer in zip(linears, group, strict=True):
                    y = linear(x).cpu()
                    assert_close("layer", y, layer(x).cpu(), tolerances.same_product(x.dtype), floor=1e-30)
            assert rows == expected
            rows.clear()
    nn.ModuleList(layers)._apply(torch.clone)
    assert torch.equal(layers[0].unpacked(), linears[0].weight)
    held = layers[0].group
    assert held._layout_of(0).data is held.layout.data


def test_a_packed_layer_refuses_to_lose_a_gradient(as_on_a_gpu: list[str]) -> None:
    """What is before it would be trained by the gradient of the shortcuts around it alone."""
    _, layers = gpu_group()
    alone = PackedLinear.of(nn.Linear(70, 41, dtype=torch.bfloat16))
    for count in (1, cuda.MOST_ROWS + 1):
        x = torch.randn(count, 70, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for layer in (*layers, gpu_pair(torch.bfloat16)[1], alone):
            with pytest.raises(RuntimeError, match=r"passes no gradient on.*unpack the model to train it"):
                layer(x)
            with torch.no_grad():
                expected = layer(x)
            found = layer(x.detach())
            assert torch.equal(found, expected)
            assert not found.requires_grad


def test_a_group_has_the_weights_once_and_the_state_of_its_layers(
    as_on_a_gpu: list[str], kind: type[cuda.Layout]
) -> None:
    linears, layers = gpu_group()
    alone = nn.ModuleList(PackedLinear.of(linear) for linear in linears)
    model = nn.ModuleList(layers)
    state, expected = model.state_dict(), alone.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert [name for name, _ in layers[2].named_buffers()] == [
        "bias",
        *(f"group.layout_{name}" for name in layers[0].group.layout.tensors()),
        "group.bias",
    ]
    # Where it is already, nothing is built again, and what computes is what the buffers are.
    as_on_a_gpu.clear()
    model.to(DEVICE).to(torch.bfloat16)
    assert as_on_a_gpu == []
    group = layers[0].group
    assert all(layer.group is group for layer in layers)
    model._apply(torch.clone)
    assert group.layout.data.data_ptr() == group.layout_data.data_ptr()
    x = torch.randn(2, 70, device=DEVICE)
    # A copy that is cast works alone without kernels, and as a group again with kernels.
    other = copy.deepcopy(model)
    for dtype, bound in ((torch.float32, 1e-6), (torch.float16, tolerances.same_product(torch.float16))):
        other.to(dtype)
        for linear, layer in zip(linears, other, strict=True):
            assert (layer.group is None) == (dtype == torch.float32)
            assert layer.group is other[0].group is not group
            assert layer.layout is None
            assert torch.equal(layer.unpacked(), linear.weight.to(dtype))
            y = copy.deepcopy(linear).to(dtype)(x.to(dtype)).detach()
            assert_close("cast", y.cpu(), layer(x.to(dtype)).cpu(), bound, floor=1e-30)
    assert all(layer.group is group for layer in layers)
    # One that is loaded leaves; the others stay.
    layers[1].load_state_dict(
        {name: -value if name == "values" else value for name, value in layers[1].state_dict().items()}
    )
    assert [layer.group is group for layer in layers] == [True, False, True]
    with torch.no_grad():
        linears[1].weight.neg_()
    for linear, layer in zip(linears, layers, strict=True):
        y = linear.bfloat16()(x.bfloat16()).detach()
        assert_close("loaded", y.cpu(), layer(x.bfloat16()).cpu(), tolerances.same_product(y.dtype), floor=1e-30)
    # When all of them are, they are a group again.
    model.load_state_dict(model.state_dict())
    assert layers[0].group is layers[1].group is layers[2].group is not group
    assert torch.equal(layers[1].unpacked(), linears[1].weight)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_only_layers_of_the_same_dtype_on_a_gpu_are_a_group() -> None:
    layers = [PackedLinear.of(nn.Linear(70, 9).to(DEVICE, dtype)) for dtype in (*DTYPES, torch.bfloat16)]
    packed_linear.join([layers[0], layers[1]])
    packed_linear.join([layers[0]])
    packed_linear.join([layers[0], nn.Linear(70, 9), layers[2]])
    assert not any(layer.group for layer in layers)
    packed_linear.join([layers[0], nn.Linear(70, 9), layers[3]])
    assert isinstance(layers[0].group, PackedGroup)
    assert layers[3].group is layers[0].group


def test_a_gpu_without_kernels_says_so_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    packed_linear._say.cache_clear()
    kind = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(cuda, "available", lambda: (False, "no nvcc"))
    assert not any(packed_linear._has_kernels(*kind) for _ in range(3))
    monkeypatch.setattr(cuda, "available", lambda: (True, ""))
    assert packed_linear._has_kernels(*kind)
    assert not any(packed_linear._has_kernels(kind[0], torch.float32) for _ in range(3))
    said = "packed weights: GPU kernels are not available, so decoding is slower ({})\n"
    reasons = ("no nvcc", "they support bfloat16 and float16, not float32")
    assert capsys.readouterr().err == "".join(said.format(reason) for reason in reasons)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 4, 5])
def test_the_layer_in_a_graph(rows: int) -> None:
    layer = gpu_pair(torch.bfloat16)[1]
    x = torch.randn(rows, 70, device=DEVICE).bfloat16()
    eager = layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x)
    graph.replay()
    assert torch.equal(eager, captured)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_group_in_a_graph() -> None:
    """What was worked out before is not for the graph, which sees other numbers each time."""
    linears, layers = gpu_group()
    x = torch.randn(1, 70, device=DEVICE).bfloat16()
    layers[0](x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [layer(x) for layer in reversed(layers)]
    x.copy_(torch.randn_like(x))
    graph.replay()
    for linear, y in zip(reversed(linears), captured, strict=True):
        assert_close("graph", linear(x).detach().cpu(), y.cpu(), tolerances.same_product(y.dtype), floor=1e-30)


@pytest.mark.skipif(not cpu.paths(), reason="no compiler")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_kernels_use_the_threads_that_torch_does(count: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        assert torch.ops.losa_cpu_decode.threads() == count
    finally:
        torch.set_num_threads(before)
