"""Prune in one shot, with and without reconstruction, and compare: python examples/prune_without_training.py [MODEL]"""

import copy
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import torch_impl

EMBEDDED = Path(__file__).parents[1] / "tiny_models" / "stdlib_llama"
name = sys.argv[1] if len(sys.argv) > 1 else str(EMBEDDED)

dense, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
text = "\n\n".join(
    path.read_text(encoding="utf-8") for path in sorted(Path(torch.__file__).parent.glob("nn/modules/*.py"))
)
ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
windows = ids[: len(ids) // 128 * 128].view(-1, 128)
calibration, measured = windows[:16], windows[-16:]

print(f"{'dense':<32}{torch_impl.evaluate(dense, text=measured)['perplexity']:8.1f}")
for pattern in ({"sparsity_type": "2:4"}, {"sparsity": 0.5}):
    for epochs in (0, 4):
        model = copy.deepcopy(dense)
        torch_impl.prune(
            model, calibration=calibration, preset="quick", reconstruct_epochs=epochs, **pattern  # type: ignore[arg-type]
        )  # fmt: skip
        label = f"{next(iter(pattern.values()))}, {epochs} epochs of reconstruction"
        print(f"{label:<32}{torch_impl.evaluate(model, text=measured)['perplexity']:8.1f}")
