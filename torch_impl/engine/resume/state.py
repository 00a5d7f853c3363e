"""The state of an unfinished run as named tensors: masks or base weights, adapters, optimizer, random generators.

Each function is followed by its inverse. All tensors are copies in host memory, which the run does not change when it goes on.
Tensors that never change (embeddings, norms, the dense weights) are not included; they are loaded from the model's own folder.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from torch_impl.engine.adapted_linear import adapters, block_adapters
from torch_impl.engine.compressed_linear import CompressedLinear, restore_compressed
from torch_impl.engine.families import Family
from torch_impl.packed import CODED, PARTS

Tensors = dict[str, torch.Tensor]
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def block_tensors(block: nn.Module, dense: nn.Module, family: Family) -> Tensors:
    """Return the base weights of a block: only the mask if they are the dense weights under it, otherwise all weights.

    Of a compressed base, return its parts.
    """
    tensors: Tensors = {}
    before = family.weights_of(dense)
    for name, layer in block_adapters(block, family).items():
        if isinstance(layer, CompressedLinear):
            tensors |= {f"{name}.{part}": _copy(tensor) for part, tensor in layer.parts.items()}
            continue
        weight = layer.weight.detach()
        if _same_bits(weight, before[name].detach().masked_fill(~layer.mask, 0.0)):
            tensors[f"{name}.mask"] = torch.from_numpy(np.packbits(layer.mask.cpu().numpy()))
        else:
            tensors[f"{name}.weight"] = _copy(weight)
    return tensors


def restore_block(block: nn.Module, dense: nn.Module, family: Family, tensors: Mapping[str, torch.Tensor]) -> None:
    """Restore a block's base weights from `block_tensors`."""
    before = family.weights_of(dense)
    for name, layer in block_adapters(block, family).items():
        parts = {part: tensors[f"{name}.{part}"] for part in (*PARTS, *CODED) if f"{name}.{part}" in tensors}
        if parts:
            restore_compressed(block, name, parts)
            continue
        if f"{name}.weight" in tensors:
            layer.set_base(tensors[f"{name}.weight"])
            continue
        bits = np.unpackbits(tensors[f"{name}.mask"].numpy(), count=layer.weight.numel())
        mask = torch.from_numpy(bits).bool().view(layer.weight.shape).to(layer.weight.device)
        layer.set_base(before[name].detach().masked_fill(~mask, 0.0))


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Copy to host memory; also what is there already, such as the step counts of an optimizer whose moments are on a GPU."""
    return tensor.to("cpu", copy=True)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Compare bits: unlike for torch.equal, 0 and -0 differ."""
    kind = _BITS[a.element_size()]
    return torch.equal(a.view(kind), b.view(kind))


def adapter_tensors(model: nn.Module) -> Tensors:
    """Return A and B of every projection."""
    return {
        f"{number}.{name}": _copy(parameter.detach())
        for number, layer in enumerate(adapters(model))
        for name, parameter in (("A", layer.A), ("B", layer.B))
    }


def restore_adapters(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Restore A and B of every projection from `adapter_tensors`, with their ranks."""
    for number, layer in enumerate(adapters(model)):
        device = layer.A.device
        layer.A = nn.Parameter(tensors[f"{number}.A"].to(device))
        layer.B = nn.Parameter(tensors[f"{number}.B"].to(device))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Tensors:
    """Return moments and step counts of every parameter."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": _copy(value) for number, values in state.items() for name, value in values.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Restore the optimizer from `optimizer_tensors`."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for full_name, tensor in tensors.items():
        number, _, name = full_name.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_tensors() -> Tensors:
    """Return the states of the random generators of torch (CPU and all CUDA devices), NumPy and Python."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - the global generator is state too
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64)),
        "numpy.rest": torch.tensor([position, has_gauss, gauss], dtype=torch.float64),
        "python": torch.tensor(list(json.dumps(random.getstate(), allow_nan=False).encode()), dtype=torch.uint8),
    }
    if torch.cuda.is_initialized():
        states |= {f"cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore_random(tensors: Mapping[str, torch.Tensor]) -> None:
    """Restore all random generators from `random_tensors`."""
    torch.set_rng_state(tensors["torch"])
    position, has_gauss, gauss = tensors["numpy.rest"].tolist()
    keys = tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))  # noqa: NPY002
    version, internal, gauss_next = json.loads(bytes(tensors["python"].tolist()))
    random.setstate((version, tuple(internal), gauss_next))
    if torch.cuda.is_initialized():
        for index in range(min(torch.cuda.device_count(), sum(name.startswith("cuda.") for name in tensors))):
            torch.cuda.set_rng_state(tensors[f"cuda.{index}"], index)
