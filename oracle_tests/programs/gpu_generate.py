"""Compare text from a packed model with the plain one's on a GPU: tokens, logits, tokens/s and memory.

    python -m oracle_tests.programs.gpu_generate [--device cuda] [--blocks 4] [--compiled] [--small]

A random LLaMA with blocks of LLaMA-2-7B's shapes over a small vocabulary, pruned to 70 %, is saved, packed by
`torch_impl.pack` and run by `torch_impl.generate`. Checks that greedy tokens of a tiny model in float32 are the same, also where
transformers alone opens the folder, by device_map or `model.to`, and that logits in bf16, of a prompt and of single tokens after
it, are within `tolerances.PACKED_LOGITS`. Exits with 1 if not.
`--compiled` compiles the blocks instead of using the kernels of decode/fused_step.py. `--small` is a quick test of the script.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from oracle_tests.tolerances import PACKED_LOGITS
from tiny_models.random_models import byte_tokenizer
from torch_impl.bench.measure import resident
from torch_impl.commands import generate, pack
from torch_impl.decode import next_token
from torch_impl.engine.decoder import Decoder
from torch_impl.experiment.planning.geometry import GEOMETRIES

SPARSITY = 0.7
PROMPT = "def main(arguments):"


def save(folder: Path, geometry: str, blocks: int, dtype: torch.dtype) -> tuple[Path, Path]:
    """Save a random model pruned to 70 %, and pack it; returns both folders."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    shape = {**GEOMETRIES[geometry], "num_hidden_layers": blocks, "vocab_size": len(tokenizer)}
    model: Any = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False, eos_token_id=None))
    model.to(dtype)
    with torch.no_grad():
        for weight in Decoder(model).weights:
            weight.masked_fill_(torch.rand(weight.shape) < SPARSITY, 0)
    plain, packed = folder / "plain", folder / "packed"
    model.save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    if pack.main([str(plain), str(packed)]):
        raise RuntimeError("packing failed")
    return plain, packed


def text(folder: Path, device: str, tokens: int) -> tuple[PreTrainedModel, torch.Tensor, str]:
    """Generate twice, first to warm up. Returns model, greedy token ids and the figures that `generate` prints."""
    arguments = [str(folder), "--prompt", PROMPT, "--max_new_tokens", str(tokens), "--device", device]
    options = generate._parser().parse_args(arguments)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    model, tokenizer = generate._load(options)
    with contextlib.redirect_stdout(io.StringIO()):
        generate.generate(model, tokenizer, options)
        ids, times = generate.generate(model, tokenizer, options)
    return model, ids, generate._summary(model, len(tokenizer(PROMPT)["input_ids"]), times)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of a prompt and of four single tokens after it: (tokens, vocabulary), float32."""
    ids, cache, found = ids[None].to(model.device), DynamicCache(config=model.config), []
    for part in (ids[:, :-4], *ids[:, -4:].split(1, dim=1)):
        found.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits[0].float().cpu())
    return torch.cat(found)


def blocks_of(model: PreTrainedModel) -> float:
    """Memory of the decoder blocks in GiB: projections and norms."""
    return resident(Decoder(model).blocks)


def same_tokens(folder: Path, device: str) -> bool:
    """Compare a tiny model in float32."""
    found = [text(path, device, 32)[1] for path in save(folder, "small", 3, torch.float32)]
    same = torch.equal(*found)
    print(f"float32, small: {len(found[0])} greedy tokens, {'the same' if same else f'not the same: {found}'}\n")
    return same


def opened_by_transformers(folder: Path, device: str) -> bool:
    """Open the packed tiny model with transformers alone, in every way that puts it on the device; save it and open that."""
    plain, packed = save(folder, "small", 3, torch.float32)
    opened: Any = AutoModelForCausalLM.from_pretrained
    ids = torch.randint(0, 200, (1, 24), generator=torch.Generator().manual_seed(1)).to(device)

    def tokens(model: Any) -> torch.Tensor:
        found: torch.Tensor = model.generate(ids, max_new_tokens=32, do_sample=False, pad_token_id=0)
        return found[0].cpu()

    expected = tokens(opened(plain, dtype=torch.float32).to(device))
    ways = {
        "device_map": lambda: opened(packed, dtype=torch.float32, device_map=device),
        "device_map auto": lambda: opened(packed, dtype=torch.float32, device_map="auto"),
        "model.to": lambda: opened(packed, dtype=torch.float32).to(device),
        "there and back": lambda: opened(packed, dtype=torch.float32).to(device).to("cpu").to(device),
        "saved again": lambda: _again(opened(packed, dtype=torch.float32, device_map=device), folder / "again"),
    }
    passed = True
    for name, way in ways.items():
        model = way()
        where = {str(tensor.device.type) for tensor in (*model.parameters(), *model.buffers())}
        same = torch.equal(tokens(model), expected)
        passed &= same
        print(f"transformers, {name}: on {', '.join(sorted(where))}, tokens {'the same' if same else 'NOT the same'}")
    return passed


def _again(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    where = model.device
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=where)


def same_logits(folder: Path, options: argparse.Namespace) -> bool:
    """Compare blocks of 7B's shapes in bf16, with speed and memory of both."""
    tokens, geometry = (8, "small") if options.small else (128, "llama-2-7b")
    found, sizes = [], []
    ids = torch.randint(0, 200, (24,), generator=torch.Generator().manual_seed(1))
    for path in save(folder, geometry, options.blocks, torch.bfloat16):
        model, _, summary = text(path, options.device, tokens)
        print(f"{path.name}:\n    " + summary.replace("\n", "\n    "))
        found.append(logits(model, ids))
        sizes.append(blocks_of(model))
        del model
    apart = float((found[0] - found[1]).abs().max() / found[0].abs().max())
    bound = PACKED_LOGITS[torch.bfloat16]
    shape = GEOMETRIES["llama-2-7b"]
    # Embeddings and head stay dense; the rest is projections and norms.
    others = 2 * 2 * shape["vocab_size"] * shape["hidden_size"] / 2**30
    dense = 2 * 4 * shape["hidden_size"] ** 2 + 2 * 3 * shape["hidden_size"] * shape["intermediate_size"]
    dense = dense * shape["num_hidden_layers"] / 2**30
    share = sizes[1] / sizes[0]
    print(
        f"projections: {share:.3f} of dense; so LLaMA-2-7B: {(dense * share + others) / (dense + others):.3f} of dense"
    )
    print(f"logits of a prompt and single tokens: apart {apart:.1e}, allowed {bound:.1e}")
    return apart <= bound


def main() -> int:
    """Run both comparisons. Returns 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if options.compiled:
        next_token.KERNELS = ()
    with tempfile.TemporaryDirectory() as folder:
        checks = [
            same_tokens(Path(folder) / "float32", options.device),
            opened_by_transformers(Path(folder) / "opened", options.device),
            same_logits(Path(folder) / "bf16", options),
        ]
    return int(not all(checks))


if __name__ == "__main__":
    sys.exit(main())
