"""Load the model that a command line names, packed or plain."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_impl.decode import packed_folder
from torch_impl.engine.checkpoints import pretrained


def load(
    name: str, device: str, dtype: str, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer. name: folder of a packed or plain model, or hub id. dtype: auto means as stored.

    Errors: ValueError or FileNotFoundError naming the problem.
    """
    pretrained.check_dtype(dtype)
    place, folder = pretrained.choose_device(device), Path(name)
    if packed_folder.is_packed(folder):
        return packed_folder.load(folder, place, pretrained.DTYPES.get(dtype), trust_remote_code)
    return pretrained.load(name, place, "stored" if dtype == "auto" else dtype, trust_remote_code)


@torch.no_grad()
def warm_up(model: PreTrainedModel) -> None:
    """Compute one token, so that kernels are compiled before anything is timed or served."""
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
