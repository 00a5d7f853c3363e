"""Taylor: score each weight by its size times the gradient of the loss by it, and a structure by the sum over all its weights.

The formulas are LLM-Pruner's, `llm_pruner.taylor_score` and `llm_pruner.structure_sum`. The gradient is that of the whole
calibration text: the sum over sequences.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from reference.llm_pruner import taylor_score
from reference.masks.method import Method

METHOD = Method.by_score("taylor", taylor_score, gradient_statistic=partial(np.sum, axis=0), sums_structures=True)
