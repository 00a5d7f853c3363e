"""Baselines of LoSA: ways to fine-tune a pruned model, each one record. All see the same tokens in the same optimizer steps.

Every baseline but `losa` prunes in one shot, with the method, rates, pattern and reconstruction of the configuration, then trains
once over all examples with one schedule of the learning rate. Structured ones have a method of their own. See docs/baselines.md.
"""

from __future__ import annotations

from torch_impl.experiment.baselines import by_structure, loraprune, masked, peft_adapters, sleb, slicegpt, sora
from torch_impl.experiment.baselines.baseline import Baseline, Trained
from torch_impl.experiment.baselines.structured import smaller

BASELINES: dict[str, Baseline] = {
    baseline.name: baseline
    for baseline in (
        Baseline("none", "no training", masked.none),
        Baseline("lora", "LoRA", peft_adapters.lora, needs=("peft",), dense_base=True, unmerged=True),
        Baseline("adalora", "AdaLoRA", peft_adapters.adalora, needs=("peft",), dense_base=True, unmerged=True),
        Baseline("sora", "SoRA", sora.sora, dense_base=True, unmerged=True),
        Baseline("sparse_lora", "Sparse LoRA", masked.sparse_lora),
        Baseline("full", "every kept weight", masked.full, dense_base=True),
        Baseline("losa", "LoSA", masked.losa),
        Baseline("sleb", "SLEB", smaller(sleb.remove), structured=True, dense_base=True),
        Baseline("slicegpt", "SliceGPT", smaller(slicegpt.remove), structured=True, dense_base=True),
        Baseline("flap", "FLAP", smaller(by_structure.flap), structured=True, dense_base=True),
        Baseline("llm_pruner", "LLM-Pruner", smaller(by_structure.llm_pruner), structured=True, dense_base=True),
        Baseline("loraprune", "LoRAPrune", loraprune.loraprune, structured=True, dense_base=True),
    )
}

__all__ = ["BASELINES", "Baseline", "Trained"]
