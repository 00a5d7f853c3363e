"""Train the embedded model: a tiny LLaMA with its own tokenizer, on the sources of Python's standard library.

    python -m tiny_models.train --output_dir tiny_models/stdlib_llama --device cuda

Writes a Hugging Face folder with a model card that compares held-out perplexity with unigram and bigram baselines.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tiny_models import corpus

END = "<|endoftext|>"
VOCABULARY = 2048
WINDOW = 256
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.5
WARMUP = 0.05


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level byte-pair tokenizer: it encodes and decodes any text without loss."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        model_max_length=2 * WINDOW,
        clean_up_tokenization_spaces=False,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Encode all texts as one row of token ids, each text after a begin-of-text token."""
    rows = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]
    return torch.tensor([token for row in rows for token in (tokenizer.bos_token_id, *row)])


def build_model() -> LlamaForCausalLM:
    """Create the model: eight blocks with grouped-query attention, 1.7 M parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2 * WINDOW,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face folder that older releases of transformers can read too."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # safetensors makes its file readable by its owner only.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    settings = folder / "tokenizer_config.json"
    renamed = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings.write_text(json.dumps(renamed, indent=2) + "\n")


def optimizer_and_schedule(model: LlamaForCausalLM, steps: int, rate: float) -> tuple[AdamW, LambdaLR]:
    """Create AdamW without weight decay of the norms, and a learning rate with warm-up and cosine decay to 0."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=rate, betas=BETAS, fused=model.device.type == "cuda")
    warmup = max(1, round(WARMUP * steps))

    def share(step: int) -> float:
        fall = max(0, step - warmup) / max(1, steps - warmup)
        return min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * fall))

    return optimizer, LambdaLR(optimizer, share)


def train_model(model: LlamaForCausalLM, stream: torch.Tensor, steps: int, batch: int, rate: float) -> None:
    """Train on random windows of the token stream."""
    device = stream.device
    optimizer, schedule = optimizer_and_schedule(model, steps, rate)
    forward = torch.compile(model) if device.type == "cuda" else model
    offsets = torch.arange(WINDOW, device=device)
    progress = tqdm(range(steps), desc="train", unit_scale=batch * WINDOW, unit="token")
    for step in progress:
        ids = stream[torch.randint(len(stream) - WINDOW, (batch, 1), device=device) + offsets]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = forward(input_ids=ids, use_cache=False).logits
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Compute the mean negative log-likelihood per predicted token on non-overlapping windows, except their first token."""
    windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
    total = 0.0
    for ids in windows.split(32):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += float(functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
    return total / (len(windows) * (WINDOW - 1))


def unigram_loss(train: np.ndarray, heldout: np.ndarray) -> float:
    """Compute the held-out loss of an add-one unigram model of the training tokens."""
    counts = np.bincount(train, minlength=VOCABULARY) + 1.0
    return float(-np.log(counts / counts.sum())[heldout].mean())


def bigram_loss(train: np.ndarray, heldout: np.ndarray) -> float:
    """Compute the held-out loss of a bigram model, interpolated with the unigram model by the best of nine weights."""
    unigram = np.bincount(train, minlength=VOCABULARY) + 1.0
    unigram /= unigram.sum()
    pairs = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(pairs, (train[:-1], train[1:]), 1.0)
    seen = pairs / np.maximum(pairs.sum(1, keepdims=True), 1.0)
    likelihood = seen[heldout[:-1], heldout[1:]]
    base = unigram[heldout[1:]]
    return min(float(-np.log(w * likelihood + (1 - w) * base).mean()) for w in np.arange(1, 10) / 10)


CARD = """---
license: psf-2.0
library_name: transformers
pipeline_tag: text-generation
---
# A tiny LLaMA that has read Python's standard library

The embedded default model of this repository: {parameters:,} parameters, 8 decoder blocks, grouped-query attention
(8 heads, 4 key-value heads), tied embeddings, byte-level byte-pair tokenizer of {vocabulary} tokens, float32.

| held-out text, windows of {window} tokens that do not overlap | perplexity per token | bits per byte |
|---|---|---|
| unigram (add one) | {unigram} |
| bigram (interpolated, its weight tuned on the held-out text) | {bigram} |
| **this model** | {model} |

Text: the sources of the standard library of Python {python} and its language reference (`tiny_models/corpus.py`),
{train_tokens:,} training and {heldout_tokens:,} held-out tokens ({heldout_bytes:,} bytes), split by file.
Every document begins with `{end}`. Python's sources are under the PSF licence.

Trained by

    {command}

in {minutes:.1f} minutes on {device}: {steps:,} steps of {batch} windows of {window} tokens ({epochs:.0f} passes),
AdamW, peak learning rate {rate}, weight decay {decay}, cosine decay, seed {seed}.
"""


def measure(model: LlamaForCausalLM, train: torch.Tensor, heldout: torch.Tensor, heldout_bytes: int) -> dict[str, str]:
    """Measure held-out perplexity per token and bits per byte of the model and both baselines, as cells of the table."""
    losses = {
        "unigram": unigram_loss(train.numpy(), heldout.numpy()),
        "bigram": bigram_loss(train.numpy(), heldout.numpy()),
        "model": mean_loss(model, heldout.to(model.device)),
    }
    bits = len(heldout) / heldout_bytes / math.log(2)
    return {name: f"{math.exp(loss):.2f} | {loss * bits:.3f}" for name, loss in losses.items()}


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--stdlib", help="Folder of a standard library; default: the interpreter's own.")
    parser.add_argument("--python", default=platform.python_version(), help="Its Python version, for the model card.")
    parser.add_argument("--steps", type=int, default=1300)
    parser.add_argument("--batch", type=int, default=128, help="Windows per step.")
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train tokenizer and model, measure them, and write the folder."""
    arguments = parse()
    torch.manual_seed(arguments.seed)
    texts = [text for _, text in corpus.documents("train", arguments.stdlib)]
    heldout_texts = [text for _, text in corpus.documents("heldout", arguments.stdlib)]
    tokenizer = train_tokenizer(texts)
    train, heldout = token_stream(tokenizer, texts), token_stream(tokenizer, heldout_texts)
    print(f"{len(train):,} training and {len(heldout):,} held-out tokens", flush=True)

    device = torch.device(arguments.device)
    model = build_model().to(device)
    start = time.perf_counter()
    train_model(model, train.to(device), arguments.steps, arguments.batch, arguments.learning_rate)
    minutes = (time.perf_counter() - start) / 60
    heldout_bytes = sum(len(text.encode()) for text in heldout_texts)
    cells = measure(model.eval(), train, heldout, heldout_bytes)

    save(model.cpu(), tokenizer, arguments.output_dir)
    card = CARD.format(
        **cells,
        parameters=model.num_parameters(),
        vocabulary=VOCABULARY,
        window=WINDOW,
        end=END,
        python=arguments.python,
        train_tokens=len(train),
        heldout_tokens=len(heldout),
        heldout_bytes=heldout_bytes,
        command=f"python -m tiny_models.train --output_dir tiny_models/stdlib_llama --steps {arguments.steps} "
        f"--batch {arguments.batch} --learning_rate {arguments.learning_rate}",
        minutes=minutes,
        device=f"one {torch.cuda.get_device_name()}" if device.type == "cuda" else "a CPU",
        steps=arguments.steps,
        batch=arguments.batch,
        epochs=arguments.steps * arguments.batch * WINDOW / len(train),
        rate=arguments.learning_rate,
        decay=WEIGHT_DECAY,
        seed=arguments.seed,
    )
    (arguments.output_dir / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
