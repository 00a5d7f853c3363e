"""What packing may replace: a folder that holds a model and no other files, and not the model that is packed."""

from __future__ import annotations

import fnmatch
from pathlib import Path

from torch_impl import _checks
from torch_impl.decode import packed_card
from torch_impl.engine.checkpoints.contents import INDEX, PACKED, PACKED_INDEX, SINGLE

# The files of a model's folder. A folder with any other file is never replaced.
OF_A_MODEL = (
    "config.json", "generation_config.json", "model*.safetensors", "packed-*.safetensors", INDEX, PACKED, PACKED_INDEX,
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "chat_template.*",
    "modeling_*.py", "configuration_*.py", "tokenization_*.py", packed_card.CARD, packed_card.PLAIN, "LICENSE*", "NOTICE*",
    ".gitattributes",
)  # fmt: skip


def check_target(
    source: Path | None, target: Path, names: tuple[str, str] = ("MODEL", "OUT"), replacing: str = "--overwrite"
) -> None:
    """Check that `target` may be replaced. source: the folder of the model, if it comes from one. names: of both, in messages;
    replacing: of the option that asks for it.

    Errors: ValueError if `target` exists and holds other files than a model's, or contains `source`.
    """
    if not target.exists():
        return
    place = target.resolve()
    if source is not None and (place == source.resolve() or place in source.resolve().parents):
        raise ValueError(
            f"{names[1]} {target} is or contains {names[0]} {source}, which {replacing} would delete; choose another folder"
        )
    found = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else [target.name]
    whole = "config.json" in found and any(name in found for name in (PACKED, SINGLE, INDEX))
    others = [name for name in found if not whole or not _of_a_model(target / name)]
    if others:
        raise ValueError(
            f"{names[1]} {target} holds files that are not a model's ({_checks.few(others)}), so {replacing} does not replace "
            "it; choose another folder"
        )


def _of_a_model(path: Path) -> bool:
    return path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in OF_A_MODEL)
