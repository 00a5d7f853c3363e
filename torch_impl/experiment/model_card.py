"""The model card: what a saved model is, how it was made, and how to load it. It names no local path."""

from __future__ import annotations

import json
from pathlib import Path

from torch_impl.experiment.report import cells_of, is_smaller, notes_of
from torch_impl.experiment.result import Result

PAPER = (
    "[Dynamic Low-Rank Sparse Adaptation for Large Language Models](https://arxiv.org/abs/2502.14816) (LoSA, ICLR 2025)"
)

CITATION = """\
@inproceedings{huang2025dynamic,
  title     = {Dynamic Low-Rank Sparse Adaptation for Large Language Models},
  author    = {Huang, Weizhong and Zhang, Yuxin and Zheng, Xiawu and Liu, Yang and Lin, Jing and Yao, Yiwu and Ji, Rongrong},
  booktitle = {The Thirteenth International Conference on Learning Representations},
  year      = {2025},
  url       = {https://arxiv.org/abs/2502.14816}
}"""


def name_of(model: str) -> str:
    """Return a model's name: a hub id as it is, of a folder only the last part."""
    return Path(model).resolve().name if Path(model).exists() else model


def of_saved(result: Result) -> str:
    """Write the README.md of the saved model."""
    name, smaller = name_of(result.model), is_smaller(result)
    cells = cells_of(result)
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    lines.insert(1, "|" + "---|" * len(cells[0]))
    on_hub = "/" in name
    trained = (
        f"trained by low-rank adapters on {result.train_examples:,} sequences (learning rate {result.learning_rate:g}, loss "
        f"{result.loss}, ranks {min(result.ranks)} to {max(result.ranks)}), which are merged"
        if result.finetuned
        else "not trained"
    )
    reconstructed = (
        f", each block reconstructed in {result.reconstruct_epochs} epochs" if result.reconstruct_epochs else ""
    )
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            *([f"base_model: {json.dumps(name, allow_nan=False)}"] if on_hub else []),
            *([f"license: {json.dumps(result.license, allow_nan=False)}"] if result.license else []),
            "tags: [pruned, losa]" if smaller else "tags: [sparse, pruned, losa]",
            "---",
            f"# {name.rpartition('/')[2]}, "
            + (
                f"without {result.losa.sparsity:.1%} of its blocks' weights"
                if smaller
                else f"pruned to {result.losa.sparsity:.1%} zeros"
            ),
            "",
            f"- **Base model:** {name}. Its licence{f', {result.license},' if result.license else ''} applies to this model too.",
            f"- **Method:** {PAPER}; {result.method} masks, {result.sparsity_type}, {result.rates} rates, {result.steps} "
            f"step{'s' * (result.steps > 1)}{reconstructed}; {trained}.",
            f"- **Data:** {', '.join(f'{purpose}: {text}' for purpose, text in result.texts.items())}. Seed {result.seed}.",
            f"- **Made with:** {result.software['name']} {result.software['version']}.",
            "",
            *lines,
            "",
            *(f"- {note}" for note in notes_of(result)),
            "",
            "```python",
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")',
            "```",
            "",
            "## Citation",
            "",
            "```bibtex",
            *CITATION.splitlines(),
            "```",
            "",
        ]
    )
