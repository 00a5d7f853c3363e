"""A linear layer over a packed weight: decoding multiplies with the packed form, a prompt unpacks one weight at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from torch_impl import packed
from torch_impl.decode import cpu, cuda, cuda_coded, cuda_layouts
from torch_impl.decode.packed_group import Packed, PackedGroup
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.progress import note
from torch_impl.packed import PARTS

# Up to this many rows of input, the CPU kernels are faster than unpacking. They read the weight once per eight rows.
DECODE_ROWS = 16


class PackedLinear(Packed):
    """y = x Wᵀ + b, where W (out, in) is a bitmap and its kept values, on any device. Nothing is trainable.

    bitmap, values, offsets: as `packed.pack` returns them; bias: (out,) or None. On a GPU with kernels for the dtype,
    `layout` replaces them, or the layout of a `group` of layers, in which this weight's rows begin at `start`. Which kind it is
    depends on `sequences`, how many are decoded at once. A state_dict always holds bitmap, values and offsets, without kept zeros.

    Errors: as `packed.check`. Tensors on the meta device are not checked: fill the buffers, then call `loaded`.
    """

    names: ClassVar[tuple[str, ...]] = PARTS
    bitmap: torch.Tensor
    values: torch.Tensor
    offsets: torch.Tensor

    def __init__(
        self,
        bitmap: torch.Tensor,
        values: torch.Tensor,
        offsets: torch.Tensor,
        columns: int,
        bias: torch.Tensor | None = None,
        sequences: int = 1,
    ) -> None:
        super().__init__(len(bitmap))
        self._fill((bitmap, values, offsets), columns, bias, sequences)

    def _fill(self, parts: Sequence[torch.Tensor], columns: int, bias: torch.Tensor | None, sequences: int = 1) -> None:
        """Take over the parts, in the order of `names`."""
        self.in_features, self.sequences = columns, sequences
        self.group: PackedGroup | None = None
        self.start = 0
        # The packed layers with the same input, this one among them.
        self.together: list[PackedLinear] = []
        for name, value in (*zip(self.names, parts, strict=True), ("bias", bias)):
            self.register_buffer(name, None if value is None else value.detach().contiguous())
        if not self.bitmap.is_meta:
            self.check()
        self.kept = self._count()
        self._settle()

    @classmethod
    def of(cls, linear: nn.Linear, sequences: int = 1) -> PackedLinear:
        """Pack a linear layer."""
        bitmap, values, offsets = packed.pack(linear.weight.detach())
        return cls(bitmap, values, offsets, linear.in_features, linear.bias, sequences)

    @property
    def positions(self) -> int:
        """Return the size of the matrix, zeros included."""
        return self.in_features * self.out_features

    @property
    def dtype(self) -> torch.dtype:
        """Return the weight's dtype."""
        return self.values.dtype if self._on_gpu is None else self._on_gpu.dtype

    def check(self) -> None:
        """Check the buffers. Errors: as `packed.check`."""
        packed.check(self.bitmap, self.values, self.offsets, self.in_features)

    def loaded(self, dtype: torch.dtype) -> None:
        """Check the buffers that have been filled, and cast them. Errors: as `check`."""
        self.check()
        self.kept = self._count()
        self._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)

    def unpacked(self) -> torch.Tensor:
        """Unpack the weight (out, in)."""
        if self.group is not None:
            return self.group.unpacked_part(self.start)
        if self.layout is not None:
            return cuda.unpack(self.layout)
        return self._expanded()

    def stored(self) -> dict[str, torch.Tensor]:
        """Return the parts of the packed weight by name, wherever they are."""
        if self._on_gpu is not None:
            return dict(zip(PARTS, packed.pack(self.unpacked()), strict=True))
        return {name: getattr(self, name) for name in self.names}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x (..., in) to (..., out), in the weight's dtype. On a GPU, a CUDA graph can capture it.

        Errors: RuntimeError if x needs a gradient, which would be lost here.
        """
        # As in `product`, no attribute here goes through `nn.Module.__getattr__`.
        group: Any = self._modules.get("group")
        if torch.compiler.is_compiling():
            return self._traced(x, group)
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "a packed weight passes no gradient on, so nothing before it can be trained; unpack the model to train it "
                "(losa pack --unpack), or call it under torch.no_grad()"
            )
        if group is not None and x.numel() <= group.layout.MOST_ROWS * self.in_features:
            shared: torch.Tensor = group.share(x, self.start)
            return shared
        return self.product(x)

    def _traced(self, x: torch.Tensor, group: PackedGroup | None) -> torch.Tensor:
        y: torch.Tensor
        if group is None:
            y = torch.ops.losa.packed_linear(x, self.handle, self.out_features)
            return y
        # All layers of the group request this product; `compiled_blocks` computes it once.
        y = torch.ops.losa.packed_linear(x, group.handle, group.out_features)
        return y[..., self.start : self.start + self.out_features]

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the output of this layer alone, without its group."""
        if self.layout is None and x.is_cpu and x.numel() <= DECODE_ROWS * self.in_features and self._on_gpu is None:
            return self._kernel(x)
        return super().product(x)

    def extra_repr(self) -> str:
        """Describe the layer for `print`."""
        sparsity = 1 - self.kept / self.positions
        return f"in_features={self.in_features}, out_features={self.out_features}, sparsity={sparsity:.4f}"

    def _count(self) -> int:
        """Count the kept values in the buffers."""
        return len(self.values)

    def _expanded(self) -> torch.Tensor:
        """Unpack the weight from the buffers."""
        return cpu.unpack(self._parts(), self.in_features, self.dtype)

    @torch.no_grad()
    def _multiply_unpacked(self, x: torch.Tensor) -> torch.Tensor:
        if not x.is_cpu or self._on_gpu is not None:
            self._advise(x)
            return super()._multiply_unpacked(x)
        y = cpu.linear_unpacked(x.reshape(-1, x.shape[-1]), self._parts(), self.bias)
        return y.view(*x.shape[:-1], self.out_features)

    def _advise(self, x: torch.Tensor) -> None:
        """Say once if x has a token of each of more sequences than the layout is for."""
        layout = self._on_gpu
        if layout is None or x.dim() != 3 or x.shape[1] != 1:
            return
        panels = cuda_coded.CodedLayout if layout.code_bits else cuda.Layout
        if layout.MOST_ROWS < len(x) <= panels.MOST_ROWS:
            _say(
                f"packed weights: their layout is for up to {cuda_layouts.FEW} sequences at once, so decoding {len(x)} is slower; "
                f"load the model with sequences={len(x)}"
            )

    def _parts(self) -> list[torch.Tensor]:
        """Return the buffers of the packed weight, in the order of `names`."""
        return [getattr(self, name) for name in self.names]

    def _kernel(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply with the buffers on the CPU."""
        buffers: Any = self._buffers
        return cpu.linear(x, buffers["bitmap"], buffers["values"], buffers["offsets"], buffers["bias"])

    def _lay_out(self) -> cuda.Layout:
        """Return the layout of the buffers on a GPU."""
        return cuda_layouts.lay_out(self.unpacked(), self.sequences)

    def _settle(self) -> None:
        """Convert to the GPU's layout if there are kernels. All building and synchronising happens here, not in `forward`.

        The last of the layers with the same input to arrive groups them.
        """
        if self._on_gpu is not None or self.bitmap.is_meta or not _has_kernels(self.bitmap.device, self.dtype):
            return
        self._hold(self._lay_out())
        for name in self.names:
            self.register_buffer(name, None)
        if all(layer.layout is not None for layer in self.together):
            _group(self.together)

    def _drop_zeros(self) -> None:
        """Remove kept values that a cast to a narrower dtype has rounded to 0."""
        if not self.values.is_meta and not bool(self.values.all()):
            dense = packed.expand(self.bitmap, self.values, self.in_features)
            for name, value in zip(PARTS, packed.pack(dense), strict=True):
                self.register_buffer(name, value)
            self.kept = self._count()

    def _restore(self) -> None:
        """Convert back to bitmap, values and offsets, and leave the group."""
        layout = self._on_gpu
        if layout is None:
            return
        for name, value in self.stored().items():
            self.register_buffer(name, value.to(layout.data.device))
        self.kept = self._count()
        self._drop()
        self.group, self.start = None, 0

    def _join(self, group: PackedGroup, start: int) -> None:
        """Use rows of a group's layout instead of an own layout."""
        self._drop()
        self.group, self.start = group, start

    @property
    def _on_gpu(self) -> cuda.Layout | None:
        """Return the layout that holds the weight: its own or the group's."""
        return self.layout if self.group is None else self.group.layout

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedLinear:
        """Implement `to`, `cuda`, `half` and the like: another device or dtype may need the other form."""
        layout = self._on_gpu
        if layout is not None:
            old = torch.empty(0, dtype=layout.dtype, device=layout.data.device)
            new = fn(old)
            if (new.device, new.dtype) != (old.device, old.dtype):
                self._restore()
        dtype = self.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._follow()
        if self.dtype != dtype:
            self._drop_zeros()
        self._settle()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._on_gpu is not None:
            destination.update({prefix + name: value for name, value in self.stored().items()})

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*arguments)  # type: ignore[no-untyped-call]
        self.kept = self._count()
        self._settle()


def group_projections(model: PreTrainedModel) -> None:
    """Group the packed projections of a block that share an input into one product on a GPU: q, k and v; gate and up.

    A layer leaves its group when it is moved, cast or loaded. When all of them are on a GPU, they form a group again.
    Errors: ValueError if the model's family is unknown.
    """
    decoder = Decoder(model)
    for index in range(len(decoder.blocks)):
        projections = decoder.projections(index)
        for names in decoder.family.inputs:
            join([projections[name] for name in names])


def join(modules: Sequence[nn.Module]) -> None:
    """Group the modules that are packed, now and whenever all of them are on a GPU. They must share one input."""
    layers = [module for module in modules if isinstance(module, PackedLinear)]
    for layer in layers:
        layer.together = layers
    _group([layer for layer in layers if layer.layout is not None])


def _group(layers: Sequence[PackedLinear]) -> None:
    """Group layers, packed on a GPU, that share one input, if they are two or more of one dtype and device, all codes or none."""
    layouts = [layer.layout for layer in layers if layer.layout is not None]
    if len(layers) < 2 or len({(own.code_bits, own.dtype, own.data.device) for own in layouts}) > 1:
        return
    layout = cuda.stack(layouts) if len({type(own) for own in layouts}) == 1 else None
    if layout is None:
        layout = cuda_layouts.lay_out_joined(layouts, max(layer.sequences for layer in layers))
    group = PackedGroup(layout, [layer.out_features for layer in layers], [layer.bias for layer in layers])
    for layer, start in zip(layers, group.starts, strict=True):
        layer._join(group, start)


def _has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether there are GPU kernels for a dtype; if a GPU has none, print why once."""
    if device.type != "cuda":
        return False
    usable, reason = cuda.available()
    if usable and dtype not in cuda.DTYPES:
        usable, reason = False, f"they support bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    if not usable:
        _say(f"packed weights: GPU kernels are not available, so decoding is slower ({reason})")
    return usable


@functools.cache
def _say(line: str) -> None:
    """Print a line to standard error, once."""
    note(line)
