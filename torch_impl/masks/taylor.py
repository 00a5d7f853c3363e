"""Taylor: score each weight by its size times the gradient of the loss by it. Spec: reference/masks/taylor.py."""

from __future__ import annotations

import torch

from torch_impl.llm_pruner import taylor_score
from torch_impl.masks.method import GradientStatistic, Method

METHOD = Method.by_score(
    "taylor", taylor_score, GradientStatistic(part=torch.clone, finish=torch.clone), sums_structures=True
)
