"""A text sample of a model, for the report: what it writes after the beginning of the evaluation text."""

from __future__ import annotations

import logging

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from torch_impl.engine.families import position_limit
from torch_impl.experiment.continued import text_after

logger = logging.getLogger(__name__)

PROMPT, NEW = 24, 40


@torch.no_grad()
def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: torch.Tensor) -> dict[str, str]:
    """Return prompt and text: the most likely continuation, token by token, of the start of the first evaluation window.

    The model's own generation settings do not count, except for its end-of-text tokens.

    Returns nothing if the model cannot generate: a run does not fail for its sample.
    """
    ids = windows[:1, :PROMPT].to(model.device)
    # Beyond learned positions, a GPU would be of no more use to this process.
    room = (position_limit(model) or ids.shape[1] + NEW) - ids.shape[1]
    if room < 1:
        return {}
    theirs = model.generation_config
    try:
        # Not as arguments of `generate`, which takes the model's own beams, penalties and the like for everything not set.
        model.generation_config = GenerationConfig(
            max_new_tokens=min(NEW, room),
            do_sample=False,
            pad_token_id=0,
            eos_token_id=getattr(theirs, "eos_token_id", None),
        )
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))  # type: ignore[operator]
        prompt = tokenizer.decode(ids[0], skip_special_tokens=True)
        text = text_after(tokenizer, ids[0], written[0, ids.shape[1] :])
    except Exception as error:
        logger.warning("no text sample in the report: %s", error)
        return {}
    finally:
        model.generation_config = theirs
    return {"prompt": str(prompt), "text": text}
