"""Prune a model to 60 % zeros, train it, save it, pack it, and let it write: python examples/prune_and_pack.py [MODEL] [OUT]"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import torch_impl

EMBEDDED = Path(__file__).parents[1] / "tiny_models" / "stdlib_llama"
name = sys.argv[1] if len(sys.argv) > 1 else str(EMBEDDED)
out = Path(sys.argv[2] if len(sys.argv) > 2 else "sparse-model")

model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
texts = [path.read_text(encoding="utf-8") for path in sorted(Path(torch.__file__).parent.glob("nn/modules/*.py"))]

# Use your own texts and records here, and for a real model nsamples 128, seqlen 2048 and thousands of records (the defaults).
result = torch_impl.prune(
    model, tokenizer, calibration=texts, train=texts, sparsity=0.6, preset="best",
    nsamples=8, seqlen=128, rmi_samples=8, steps=2, train_examples=32, train_seqlen=128, reconstruct_epochs=1,
    learning_rate=2e-3, on_step=lambda step: print(f"step {step.step}: {step.target:.0%} zeros, ranks {step.ranks}"),
)  # fmt: skip
print(f"{result.sparsity:.1%} zeros, {result.seconds:.0f} s")
print(torch_impl.evaluate(model, tokenizer, text=texts, seqlen=128, windows=8))

model.save_pretrained(out / "plain")
tokenizer.save_pretrained(out / "plain")
torch_impl.pack(model, out / "packed", tokenizer=tokenizer)

packed = torch_impl.load_packed(out / "packed", device="cpu")
prompt = tokenizer("def forward(self, ", return_tensors="pt")
print(tokenizer.decode(packed.generate(**prompt, max_new_tokens=16, do_sample=False)[0]))
