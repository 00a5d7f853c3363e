"""Print the table of docs/scaling.md: python -m torch_impl.experiment.planning.table."""

from __future__ import annotations

from torch_impl.experiment.config import CONFIGS, parse
from torch_impl.experiment.planning.geometry import GEOMETRIES
from torch_impl.experiment.planning.parts import Place
from torch_impl.experiment.planning.phases import peak
from torch_impl.experiment.planning.sizes import BlockShapes, Sizes
from torch_impl.experiment.planning.traffic import calibration_traffic, step_traffic

GIB, MIB = 2**30, 2**20
CARDS = (1, 2, 4, 8, 16, 32, 64)
CARD = 80 * 10**9
"""Memory of a card in bytes; it decides whether merged weights are held during training."""


def sizes_of(geometry: str) -> Sizes:
    """Return the sizes of a LLaMA of this geometry in bfloat16, with an untied head, as `Sizes.of` reads them from the model."""
    shape = GEOMETRIES[geometry]
    h, m, v = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    keys = h // shape["num_attention_heads"] * shape["num_key_value_heads"]
    projections = ((h, h), (keys, h), (keys, h), (h, h), (m, h), (m, h), (h, m))
    return Sizes(
        itemsize=2,
        blocks=(BlockShapes((*projections, (h,), (h,)), projections),) * shape["num_hidden_layers"],
        outside=((v, h), (h,), (v, h)),
        inputs=(h, h, h, m),
        hidden=h,
        width=m,
        gated=True,
        keys=keys,
        vocabulary=v,
    )


def table() -> str:
    """Format memory and traffic of LLaMA-2 on 1 to 64 cards with the paper's settings, in Markdown."""
    lines = [
        "| model | cards | memory a card, GiB | of it weights and dense copy | most in | received in an optimizer step, GiB "
        "| its gradients, MiB | received in a calibration, GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in ("7b", "13b", "70b"):
        config = parse(["--config", str(CONFIGS / f"llama_{size}.toml"), "--model", f"llama-2-{size}"])
        sizes = sizes_of(f"llama-2-{size}")
        for cards in CARDS:
            taken = peak(config, sizes, Place("cuda", cards, CARD))
            step, calibration = step_traffic(config, sizes, cards), calibration_traffic(config, sizes, cards)
            lines.append(
                f"| {size.upper()} | {cards} | {taken.device.total / GIB:.1f} | {2 * sizes.weights(cards) / GIB:.1f} "
                f"| {taken.phase} | {step.total / GIB:.1f} | {step.gradients / MIB:.0f} | {calibration.total / GIB:.1f} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
