"""Train a pruned model further with any optimizer, keeping its zeros: python examples/train_on.py [MODEL]"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import torch_impl

EMBEDDED = Path(__file__).parents[1] / "tiny_models" / "stdlib_llama"
name = sys.argv[1] if len(sys.argv) > 1 else str(EMBEDDED)

model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
texts = [path.read_text(encoding="utf-8") for path in sorted(Path(torch.__file__).parent.glob("nn/modules/*.py"))]
result = torch_impl.prune(
    model, tokenizer, calibration=texts, sparsity=0.5, steps=1, nsamples=8, seqlen=128, rmi_samples=8
)

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
result.keep_zeros(optimizer)  # without this line, the first step fills every zero
model.train()
for step, text in enumerate(texts[:4]):
    ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=128)["input_ids"]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    projection = model.get_submodule("model.layers.0.mlp.up_proj").weight
    print(f"step {step + 1}: loss {loss.item():.3f}, {(projection == 0).float().mean():.1%} zeros in the first up_proj")
