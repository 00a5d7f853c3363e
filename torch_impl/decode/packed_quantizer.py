"""The quantizer that `transformers.AutoModelForCausalLM.from_pretrained` uses for a packed folder.

transformers reads the packed tensors like all others, so `device_map` and the like work as for a plain model. Before that, the
packed projections become `PackedLinear`s on the meta device; afterwards their contents are checked and cast. transformers
imports this file while it is being imported itself, so modules that need its models are imported inside the methods.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from torch_impl import _checks
from torch_impl.engine.checkpoints.contents import METHOD, PACKED_INDEX, Entry, headers
from torch_impl.packed import CODED, PARTS, WORD

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The entry `quantization_config` of a packed model's config.json, and what loading adds to it.

    sequences: how many are decoded at once, for which a GPU's layout of the weights is chosen:

        config = AutoConfig.from_pretrained(folder)
        config.quantization_config["sequences"] = 8
        model = AutoModelForCausalLM.from_pretrained(folder, config=config)

    Errors: ValueError or TypeError if that is not a positive integer.
    """

    def __init__(self, quant_method: str = METHOD, sequences: int = 1, **_: Any) -> None:
        _checks.count("sequences", sequences)
        self.quant_method: Any = quant_method
        self.sequences = sequences


class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads packed models. To pack a model, use `losa pack`.

    Errors of loading: ValueError naming the model, and some of the tensors concerned.
    """

    requires_calibration = True

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Set the files to load; they replace the entry that stops transformers without this quantizer."""
        config.transformers_weights = PACKED_INDEX
        return config

    # In transformers before 5.16, this hook gets the configuration before the files are searched.
    update_tp_plan = update_attn_implementation

    def update_ep_plan(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Do not change the configuration."""
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        from torch_impl.engine.checkpoints.skeleton import match

        _check_class(model)
        stored = _headers(model, checkpoint_files or [])
        weights = _packed_weights(model, stored)
        entries = {key: entry for key, entry in stored.items() if key.rpartition(".")[0] not in weights}
        entries |= {key: _plain(model, key, parts) for key, parts in weights.items()}
        settings: Any = self.quantization_config
        for name, key in match(Path(str(model.config.name_or_path)), model, entries).names.items():
            if key in weights:
                _replace(model, name.rpartition(".")[0], weights[key], settings.sequences)

    def get_weight_conversions(self) -> list[Any]:
        """Return how stored names become names in the model: NAME.weight.bitmap is NAME.bitmap."""
        from transformers.core_model_loading import WeightRenaming

        return [WeightRenaming(rf"\.weight\.{part}", f".{part}") for part in dict.fromkeys(PARTS + CODED)]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        from torch_impl.decode.captured_call import capture_in_generate
        from torch_impl.decode.packed_linear import PackedLinear, group_projections
        from torch_impl.decode.packed_writer import keep_packed

        module: nn.Module = model
        for name, layer in module.named_modules():
            if isinstance(layer, PackedLinear) and not layer.bitmap.is_meta:
                try:
                    layer.loaded(model.dtype)
                except (ValueError, TypeError) as error:
                    raise ValueError(
                        f"model {model.config.name_or_path}, {name}: {error}; pack the model again"
                    ) from error
        # A packed layer passes no gradient on, so training the rest would follow a wrong one.
        module.requires_grad_(False)
        group_projections(model)
        keep_packed(model)
        capture_in_generate(model)
        return model

    def is_serializable(self) -> bool:
        """Return False: `model.save_pretrained` writes a packed folder by itself, and transformers' own method must not."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Return True: with a static cache on a GPU, `generate` then asks for a compiled call, see `captured_call`."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return False."""
        return False


def _check_class(model: PreTrainedModel) -> None:
    """Check the model's class. Errors: ValueError if it is not the class of the packed model."""
    classes = model.config.architectures
    if classes and type(model).__name__ not in classes:
        raise ValueError(
            f"model {model.config.name_or_path} is packed and loads as {classes[0]} only, not as {type(model).__name__}; "
            "use AutoModelForCausalLM, or unpack it first: losa pack --unpack"
        )


def _headers(model: PreTrainedModel, files: list[str]) -> dict[str, Entry]:
    """Return all tensors of the packed files."""
    folders = {Path(file).parent for file in files}
    if len(folders) != 1:
        raise ValueError(
            f"model {model.config.name_or_path}: the packed files are not in one folder; pack the model again"
        )
    return headers(folders.pop(), [Path(file).name for file in files])[1]


def _packed_weights(model: PreTrainedModel, stored: dict[str, Entry]) -> dict[str, list[Entry]]:
    """Return the parts of each packed weight by its name.

    Errors: ValueError naming a weight that lacks a part, or whose values or scales are of another dtype than a file has.
    """
    found = {}
    for key in stored:
        weight, _, part = key.rpartition(".")
        if part == PARTS[0] and weight.endswith(".weight"):
            names = CODED if f"{weight}.codes" in stored else PARTS
            parts = [stored[name] for name in (f"{weight}.{part}" for part in names) if name in stored]
            # Values or scales are the last but one; bitmap and codes are matrices.
            whole = len(parts) == len(names) and parts[-2].dtype is not None
            if not whole or any(len(part.shape) != 2 for part in parts[: len(names) - 2]):
                raise ValueError(f"model {model.config.name_or_path}: {weight} is not complete; pack the model again")
            found[weight] = parts
    return found


def _plain(model: PreTrainedModel, key: str, parts: list[Entry]) -> Entry:
    """Return the unpacked weight as a plain file would hold it. A bitmap has whole words: the model knows the columns."""
    bitmap, numbers = parts[0], parts[-2]
    rows, width = bitmap.shape
    columns = 8 * width
    prefix = f"{model.base_model_prefix}."
    places = dict(model.state_dict())
    for name in (key, f"{prefix}{key}", key.removeprefix(prefix)):
        if name in places and -(-places[name].shape[-1] // WORD) * WORD == columns:
            columns = places[name].shape[-1]
    return Entry(bitmap.file, (rows, columns), numbers.code)


def _replace(model: PreTrainedModel, path: str, parts: list[Entry], sequences: int) -> None:
    """Replace a linear layer with an empty packed layer on the meta device."""
    from torch_impl.decode.coded_linear import layer_of

    linear: Any = model.get_submodule(path)
    codes = [torch.uint8] * (len(parts) == len(CODED))
    dtypes = (torch.uint8, *codes, parts[-2].dtype, torch.int64)
    empty = [torch.empty(part.shape, dtype=dtype, device="meta") for part, dtype in zip(parts, dtypes, strict=True)]
    layer = layer_of(empty, linear.in_features, linear.weight.dtype, linear.bias, sequences)
    model.set_submodule(path, layer)
