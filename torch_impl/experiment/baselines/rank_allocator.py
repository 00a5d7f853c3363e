"""AdaLoRA's choice of ranks by peft's schedule, with its formulas applied to all adapters at once.

peft's own allocator goes through the adapters one by one: thousands of kernel launches and hundreds of waits for the device at an
optimizer step, which take longer than the step itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import AdaLoraModel


def allocate_at_once(tuner: AdaLoraModel) -> None:
    """Replace peft's allocator of ranks by one that does the same in few kernels. Parameters must not be replaced afterwards."""
    from peft.tuners.adalora.layer import RankAllocator

    class AtOnce(RankAllocator):
        def __init__(self, model: nn.Module, config: Any, adapter: str) -> None:
            super().__init__(model, config, adapter)
            named = dict(model.named_parameters())
            found = [name for name in named if name.endswith(f".lora_E.{adapter}")]
            self.names = [[name.replace(".lora_E.", f".lora_{kind}.") for name in found] for kind in "EAB"]
            self.parameters: list[torch.Tensor] = [named[name] for names in self.names for name in names]
            self.values = self.parameters[: len(found)]
            self.masks: tuple[Mapping[str, list[bool]], list[torch.Tensor]] | None = None

        @torch.no_grad()
        def update_ipt(self, _: nn.Module) -> None:
            """Update the smoothed sensitivity I = |w · ∂loss/∂w| of every weight, and its uncertainty |I − smoothed I|."""
            names = [name for group in self.names for name in group]
            if not self.exp_avg_ipt:
                for known in (self.exp_avg_ipt, self.exp_avg_unc):
                    known.update(zip(names, map(torch.zeros_like, self.parameters), strict=True))
            smooth, uncertainty = ([known[name] for name in names] for known in (self.exp_avg_ipt, self.exp_avg_unc))
            gradients: list[Any] = [parameter.grad for parameter in self.parameters]
            now = torch._foreach_mul(self.parameters, gradients)
            torch._foreach_abs_(now)
            torch._foreach_lerp_(smooth, now, 1 - self.beta1)
            torch._foreach_sub_(now, smooth)
            torch._foreach_abs_(now)
            torch._foreach_lerp_(uncertainty, now, 1 - self.beta2)

        @torch.no_grad()
        def mask_to_budget(self, _: nn.Module, budget: int) -> dict[str, list[bool]]:
            """Zero the singular values of least importance; a triplet's is that of its value plus the means of its vectors."""
            E, A, B = (self._scores(names) for names in self.names)
            scores = torch.cat([e[:, 0] + a.mean(1) + b.mean(0) for e, a, b in zip(E, A, B, strict=True)])
            kept = scores > scores.kthvalue(self.init_bgt - budget).values
            sizes = [len(value) for value in self.values]
            torch._foreach_mul_(self.values, _columns(kept, sizes, self.values[0].dtype))
            return dict(zip(self.names[0], map(torch.Tensor.tolist, kept.cpu().split(sizes)), strict=True))

        def _scores(self, names: Sequence[str]) -> Sequence[torch.Tensor]:
            return torch._foreach_mul([self.exp_avg_ipt[n] for n in names], [self.exp_avg_unc[n] for n in names])

        @torch.no_grad()
        def mask_using_rank_pattern(self, _: nn.Module, pattern: Mapping[str, list[bool]]) -> None:
            """Zero the singular values that were given up for good."""
            if self.masks is None or self.masks[0] is not pattern:
                kept = torch.tensor([keep for name in self.names[0] for keep in pattern[name]])
                like = self.values[0]
                self.masks = pattern, _columns(kept.to(like.device), [len(v) for v in self.values], like.dtype)
            torch._foreach_mul_(self.values, self.masks[1])

    name = tuner.trainable_adapter_name
    tuner.rankallocator = AtOnce(tuner.model, tuner.peft_config[name], name)


def _columns(kept: torch.Tensor, sizes: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Split a mask (n,) into columns of ones and zeros."""
    return list(kept[:, None].to(dtype).split(sizes))
