"""Do the rate rules agree which blocks matter? Importances of a model's blocks by each rule, and how alike their orders are.

    python -m oracle_tests.programs.importance_orders --model DIR --calibration_data FILE --eval_data FILE \\
        [other options of torch_impl.run, such as --nsamples 16 --seqlen 512 --device cpu]

Prints a table of the dense model's blocks: importance by mutual information (rmi), by gradients (Σ |w·∂loss/∂w|, per weight),
outliers (OWL), the share that LAMP keeps; and e of LoSA, Eq. 6, when the model is pruned once at uniform rates. Then Spearman's
rank correlation of each pair: 1 means the same order, -1 the reverse. A block with a large e has been hurt, by pruning it and the
blocks before it. Nothing is trained or written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.stats import spearmanr

from torch_impl import losa
from torch_impl.engine import blocks
from torch_impl.engine.adapted_linear import attach_adapters
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.rates import RULES
from torch_impl.experiment.config import Config, parse
from torch_impl.experiment.material import load_material

MEASURES = ("rmi", "gradient", "owl", "lamp")


def importances(config: Config) -> dict[str, np.ndarray]:
    """Measure each rule's importance (L,) on the dense model; and e (L,) after pruning it in one shot at uniform rates."""
    material = load_material(replace(config, training=replace(config.training, finetune=False)))
    decoder = Decoder(material.model)
    attach_adapters(decoder, config.adapter.scale)
    ids, target = material.calibration, config.prune.final_sparsity
    size = config.calibration.calibration_batch_size
    found = {}
    for name in MEASURES:
        measure = RULES[name].measure
        assert measure is not None
        found[name] = blocks.measure_importance(decoder, measure(decoder, target), ids, size).numpy()
    found["gradient"] = found["gradient"] / np.array(decoder.prunable_weights)
    once = replace(
        config.settings.without_reconstruction(),
        prune=replace(config.prune, steps=1, layer_sparsity="uniform"),
        training=replace(config.training, finetune=False),
    )
    [record] = losa.run(material.model, ids, [], once)
    return {**found, "e": np.array(record.errors)}


def correlations(found: dict[str, np.ndarray]) -> np.ndarray:
    """Compute Spearman's rank correlation of every pair (k, k); nan where all blocks are equal."""
    constant = [len(np.unique(values)) == 1 for values in found.values()]
    result = np.full((len(found), len(found)), np.nan)
    for i, x in enumerate(found.values()):
        for j, y in enumerate(found.values()):
            if not constant[i] and not constant[j]:
                result[i, j] = spearmanr(x, y).statistic
    return result


def table(found: dict[str, np.ndarray]) -> str:
    """Format both tables as Markdown. Ranks: 1 is the most important block, or the one with the largest e."""
    names, count = list(found), len(found["rmi"])
    ranks = {name: np.argsort(np.argsort(-values, kind="stable")) + 1 for name, values in found.items()}
    lines = [f"| block | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for block in range(count):
        cells = [f"{found[name][block]:.4g} ({ranks[name][block]})" for name in names]
        lines.append(f"| {block} | {' | '.join(cells)} |")
    lines += ["", f"| Spearman | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, row in zip(names, correlations(found), strict=True):
        lines.append(f"| {name} | {' | '.join(f'{value:+.2f}' for value in row)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Measure and print."""
    config = parse(arguments)
    print(f"{config.model.model}: {config.calibration.nsamples} x {config.calibration.seqlen} tokens of "
          f"{config.text.calibration_data}; e at {config.prune.final_sparsity:.0%} by {config.prune.prune_method}\n")  # fmt: skip
    print(table(importances(config)))
    return 0


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main(sys.argv[1:]))
