"""What a run takes on N cards: bytes of memory on each, bytes that each receives. From shapes and options alone.

`python -m torch_impl.experiment.planning.scaling` prints the table of docs/scaling.md. Counting what a card receives: gathering P
bytes brings it P · (N − 1)/N; summing P bytes 2 P · (N − 1)/N (each gets its part of the sum, then the others' parts);
what another card has decided on, P.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from torch_impl import schedule
from torch_impl.engine.families import Family, decoder_blocks, weight_of
from torch_impl.engine.memory import bytes_in_training
from torch_impl.experiment.config import CONFIGS, Config, parse
from torch_impl.experiment.planning.geometry import GEOMETRIES

GIB = 2**30
WIDE = 4  # bytes of float32: adapters, gradients, moments, statistics
CARDS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Layout:
    """Shapes of a model: `block` and `outside` hold those of all parameters of a block and outside the blocks.

    projections: (out, in) of those that are pruned; inputs: width of each input that some of them share; size: bytes of a
    number.
    """

    blocks: int
    block: tuple[tuple[int, ...], ...]
    outside: tuple[tuple[int, ...], ...]
    projections: tuple[tuple[int, int], ...]
    inputs: tuple[int, ...]
    size: int

    @property
    def hidden(self) -> int:
        """Width of a hidden state."""
        return self.inputs[0]

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return max(shape[0] for shape in self.outside)

    def adapter_numbers(self, mean_rank: int) -> int:
        """Numbers in all adapters."""
        return self.blocks * mean_rank * sum(out + into for out, into in self.projections)


def layout_of(model: nn.Module, family: Family, size: int) -> Layout:
    """The layout of a model, which may be on the meta device."""
    blocks = decoder_blocks(model, family)
    weights = [weight_of(blocks[0], name) for name in family.projections]
    return Layout(
        blocks=len(blocks),
        block=tuple(tuple(p.shape) for n, p in blocks[0].named_parameters() if not n.endswith((".A", ".B"))),
        outside=tuple(tuple(p.shape) for n, p in model.named_parameters() if not n.startswith(f"{family.blocks}.")),
        projections=tuple((int(weight.shape[0]), int(weight.shape[1])) for weight in weights),
        inputs=tuple(int(weight_of(blocks[0], group[0]).shape[1]) for group in family.inputs),
        size=size,
    )


def llama_layout(geometry: dict[str, int], size: int) -> Layout:
    """The layout of a LLaMA of such shapes, untied head: what `layout_of` finds in the model."""
    h, m, v = geometry["hidden_size"], geometry["intermediate_size"], geometry["vocab_size"]
    kv = h // geometry["num_attention_heads"] * geometry["num_key_value_heads"]
    projections = ((h, h), (kv, h), (kv, h), (h, h), (m, h), (m, h), (h, m))
    norms = ((h,), (h,))
    outside = ((v, h), (h,), (v, h))
    return Layout(geometry["num_hidden_layers"], (*projections, *norms), outside, projections, (h, h, h, m), size)


def sharded_bytes(shapes: tuple[tuple[int, ...], ...], size: int, cards: int) -> int:
    """Bytes of the rows that a card holds: ⌈rows / N⌉ of each tensor, as FSDP2 pads the last."""
    return sum(math.ceil(shape[0] / cards) * math.prod(shape[1:]) * size for shape in shapes)


def memory(layout: Layout, config: Config, cards: int) -> dict[str, int]:
    """Bytes on every card by what takes them; "largest at once" is what must fit."""
    calibration, training = config.calibration, config.training
    held = layout.blocks * sharded_bytes(layout.block, layout.size, cards)
    held += sharded_bytes(layout.outside, layout.size, cards)
    whole_block = cards * sharded_bytes(layout.block, layout.size, cards)
    largest = max(out * into for out, into in layout.projections) * layout.size
    streams = 2 * math.ceil(calibration.nsamples / cards) * calibration.seqlen * layout.hidden * layout.size
    taken = {
        "weights": held,
        "dense copy": held,
        # Calibration: dense and pruned block, merged weights, and what is on its way. Training: two blocks, two on their way.
        "whole blocks": 4 * whole_block if cards > 1 else 0,
        "embeddings and head, whole": cards * sharded_bytes(layout.outside, layout.size, cards) if cards > 1 else 0,
        "streams of hidden states": streams,
    }
    if config.prune.prune_method == "sparsegpt":
        taken["Hessians of a block"] = WIDE * sum(width**2 for width in layout.inputs)
    if config.reconstruction.reconstruct_epochs:
        taken["training of a block"] = _reconstruction(layout, config, cards)
    calibrating = sum(taken.values())
    if not training.finetune:
        return {**taken, "largest at once": calibrating}
    numbers = layout.adapter_numbers(schedule.mean_rank(config.prune.steps, config.adapter.initial_rank))
    tokens = (
        min(training.per_device_train_batch_size, math.ceil(training.batch_size / cards)) * config.text.train_seqlen
    )
    widest = max(out for out, _ in layout.projections)
    each = 8 + 4 * widest // layout.hidden
    kept = layout.blocks + each if training.gradient_checkpointing else layout.blocks * each
    trained = {
        # Value, gradient, two moments; and all gradients once more on their way.
        "adapters and optimizer": numbers * WIDE * (5 if cards > 1 else 4),
        "merged weights": largest
        if cards > 1
        else layout.blocks * sum(o * i for o, i in layout.projections) * layout.size,
        "activations": tokens * (kept * layout.hidden * layout.size + layout.vocabulary * (layout.size + 2 * WIDE)),
    }
    train = 2 * held + taken["whole blocks"] + taken["embeddings and head, whole"] + sum(trained.values())
    # Weights of adapters stay while calibrating; streams are gone while training.
    return {**taken, **trained, "largest at once": max(train, calibrating + trained["adapters and optimizer"])}


def _reconstruction(layout: Layout, config: Config, cards: int) -> int:
    """Bytes of training the weights of one block, which is whole on every card, on a card's share of a batch."""
    entries = sum(out * into for out, into in layout.projections)
    tokens = math.ceil(config.reconstruction.reconstruct_batch_size / cards) * config.calibration.seqlen
    widest = max(out for out, _ in layout.projections)
    kept = (8 + 4 * widest // layout.hidden) * layout.size + 2 * WIDE
    return entries * bytes_in_training(layout.size) + tokens * kept * layout.hidden


def micro_batches(config: Config, cards: int) -> int:
    """Micro-batches that each card does in an optimizer step."""
    training = config.training
    return math.ceil(math.ceil(training.batch_size / cards) / training.per_device_train_batch_size)


def training_traffic(layout: Layout, config: Config, cards: int, mean_rank: int) -> dict[str, int]:
    """Bytes that a card receives in one optimizer step."""
    if cards == 1:
        return {"weights": 0, "gradients": 0}
    model = layout.blocks * sharded_bytes(layout.block, layout.size, cards)
    model += sharded_bytes(layout.outside, layout.size, cards)
    # The model in forward and in backward, the dense one in forward.
    passes = 2 + (config.training.loss == "kl")
    # One number more: the loss, in float64.
    summed = WIDE * layout.adapter_numbers(mean_rank) + 8
    return {
        "weights": micro_batches(config, cards) * passes * model * (cards - 1),
        "gradients": 2 * summed * (cards - 1) // cards,
    }


def calibration_traffic(layout: Layout, config: Config, cards: int) -> dict[str, int]:
    """Bytes that a card receives while one LoSA step measures importance, prunes and measures errors."""
    if cards == 1:
        return {"weights": 0, "pruned weights": 0, "statistics": 0, "gradients of reconstruction": 0, "features": 0}
    others = cards - 1
    block = sharded_bytes(layout.block, layout.size, cards)
    outside = sharded_bytes(layout.outside, layout.size, cards)
    rmi = config.prune.rule.measure is not None
    method, calibration = config.prune.prune_method, config.calibration
    per_block = {"magnitude": 0, "wanda": sum(layout.inputs), "sparsegpt": sum(width**2 for width in layout.inputs)}
    samples = calibration.rmi_rows
    columns = math.ceil(calibration.seqlen * layout.hidden / cards)
    here = math.ceil(samples / cards)
    sums = WIDE * per_block[method] + 2 * 8 * layout.hidden + 8 * samples**2 * rmi
    options = config.reconstruction
    reconstructs = options.reconstruct_epochs > 0
    steps = options.reconstruct_epochs * math.ceil(calibration.nsamples / options.reconstruct_batch_size)
    entries = sum(out * into for out, into in layout.projections)
    # Of each block: every step's gradients, and the energy of its channels in float64.
    trained = layout.blocks * (steps * WIDE * entries + 8 * layout.hidden * reconstructs)
    return {
        # Importance, dense stream, pruned stream; the last two start from one embedding.
        "weights": ((2 + rmi) * layout.blocks * block + (1 + rmi + reconstructs) * outside) * others,
        "pruned weights": layout.blocks * sum(out * into for out, into in layout.projections) * layout.size,
        "statistics": 2 * layout.blocks * sums * others // cards,
        "gradients of reconstruction": 2 * trained * others // cards,
        "features": layout.blocks * (samples - here) * columns * layout.size * rmi,
    }


def scale(layout: Layout, config: Config, cards: int) -> dict[str, dict[str, int]]:
    """All of it, by section, in bytes."""
    rank = schedule.mean_rank(config.prune.steps, config.adapter.initial_rank)
    return {
        f"memory of each of {cards} cards": memory(layout, config, cards),
        "received by each in an optimizer step": training_traffic(layout, config, cards, rank),
        "received by each in the calibration of a step": calibration_traffic(layout, config, cards),
    }


def table() -> str:
    """Memory and traffic of LLaMA-2 on 1 to 64 cards with the paper's settings, in Markdown."""
    lines = [
        "| model | cards | memory a card, GiB | of it weights and dense copy | received in an optimizer step, GiB "
        "| its gradients, MiB | received in a calibration, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in ("7b", "13b", "70b"):
        config = parse(["--config", str(CONFIGS / f"llama_{size}.toml"), "--model", f"llama-2-{size}"])
        layout = llama_layout(GEOMETRIES[f"llama-2-{size}"], size=2)
        for cards in CARDS:
            taken, step, calibration = scale(layout, config, cards).values()
            lines.append(
                f"| {size.upper()} | {cards} | {taken['largest at once'] / GIB:.1f} | {2 * taken['weights'] / GIB:.1f} "
                f"| {sum(step.values()) / GIB:.1f} | {step['gradients'] / 2**20:.0f} "
                f"| {sum(calibration.values()) / GIB:.1f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
