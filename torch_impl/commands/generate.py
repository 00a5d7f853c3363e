"""Generate text with a packed or plain model: losa generate MODEL --prompt "..."."""

from __future__ import annotations

import argparse
import functools
import math
import resource
import time
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextStreamer,
)

from torch_impl._checks import MOST
from torch_impl.commands.loading import load, warm_up
from torch_impl.commands.sampling import COLDEST
from torch_impl.commands.stop_text import criteria
from torch_impl.decode import next_token
from torch_impl.decode.packed_group import Packed
from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.families import position_limit
from torch_impl.engine.progress import note
from torch_impl.experiment.command import Parser, command
from torch_impl.experiment.continued import BEFORE
from torch_impl.experiment.planning import checks

# Number of new tokens from which compiling, which takes some seconds, pays off.
WORTH_COMPILING = 256
# Settings of generation_config.json that this command ignores.
NOT_USED = (
    "num_beams", "num_beam_groups", "penalty_alpha", "repetition_penalty", "encoder_repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "bad_words_ids", "force_words_ids", "forced_bos_token_id", "forced_eos_token_id",
    "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "min_length", "min_new_tokens", "guidance_scale",
    "num_return_sequences", "constraints", "prompt_lookup_num_tokens", "watermarking_config", "dola_layers",
)  # fmt: skip


class _TimedStreamer(TextStreamer):  # type: ignore[misc]
    """Prints text as it is generated and records the times: of the prompt's echo, then of every token.

    continues: the text continues the prompt, so its first token may begin with a space; an answer in a chat may not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, continues: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []
        self._continues = continues

    def put(self, value: torch.Tensor) -> None:
        """Receive token ids from `generate`."""
        self.times.append(time.perf_counter())
        super().put(value)
        if not self.token_cache and (self._continues or len(self.times) > 1):
            # At the start, and after a line: without what is before it, a SentencePiece token would lose its space.
            self.token_cache = value.flatten()[-BEFORE:].tolist()
            self.print_len = len(self.tokenizer.decode(self.token_cache, skip_special_tokens=True))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="losa generate", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="Folder of a packed model, or a plain folder or hub id.")
    parser.add_argument("--prompt", required=True, help="Text to continue.")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="Give the prompt as a user's message, through the tokenizer's chat template.",
    )
    parser.add_argument("--max_new_tokens", type=int, default=128, help="Maximum number of new tokens (default 128).")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        help="Sampling temperature; 0: always the most likely token (default).",
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="With --temperature, sample from the most likely tokens with this total probability.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the sampling.")
    parser.add_argument("--device", default="auto", help="auto (a GPU if available), cpu, cuda or cuda:N.")
    parser.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16, float16 or float64.")
    pretrained.add_trust_remote_code(parser)
    parser.add_argument(
        "--compile",
        default="auto",
        help="Compile the blocks: about ten seconds once, then every token is faster. on, off or auto (default: on a GPU "
        f"from {WORTH_COMPILING} new tokens).",
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    for name, right, allowed in (
        ("prompt", bool(options.prompt), "some text"),
        ("max_new_tokens", 1 <= options.max_new_tokens <= MOST, f"1 to {MOST:,}"),
        (
            "temperature",
            options.temperature == 0 or COLDEST <= options.temperature < math.inf,
            f"0, or {COLDEST:.5f} or more",
        ),
        ("top_p", 0 < options.top_p <= 1, "above 0, up to 1"),
        ("seed", 0 <= options.seed < 2**63, "0 or more, below 2**63"),
        ("compile", options.compile in ("auto", "on", "off"), "auto, on, off"),
    ):
        if not right:
            raise ValueError(f"{name} is {getattr(options, name)!r}; allowed: {allowed}")
    if options.top_p < 1 and options.temperature == 0:
        raise ValueError(f"top_p is {options.top_p} and has no effect at temperature 0; give --temperature, say 1")
    pretrained.check_dtype(options.dtype)


def _load(options: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load(options.model, options.device, options.dtype, options.trust_remote_code)


def _encode(tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace) -> torch.Tensor:
    """Tokenize the prompt, with --chat as a user's message: ids (1, n).

    Errors: ValueError if there is no chat template, or it fails.
    """
    if not options.chat:
        ids: torch.Tensor = tokenizer(options.prompt, return_tensors="pt")["input_ids"]
        return ids
    if not tokenizer.chat_template:
        raise ValueError(f"model {options.model}: its tokenizer has no chat template; leave out --chat")
    message = {"role": "user", "content": options.prompt}
    try:
        found: Any = tokenizer.apply_chat_template(
            [message], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    except TemplateError as error:
        raise ValueError(f"model {options.model}: its chat template fails ({error}); leave out --chat") from error
    ids = found["input_ids"]
    return ids


def _prompt_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> torch.Tensor:
    """Tokenize the prompt: ids (1, n).

    Errors: ValueError if it has no token, a token unknown to the model, or too many tokens together with the new ones.
    """
    ids = _encode(tokenizer, options)
    given = ids.shape[1]
    if not given:
        raise ValueError(f"prompt is {options.prompt!r}, which has no token; give some text")
    checks.check_tokens(model, tokenizer, ids)
    limit, whole = position_limit(model), given + options.max_new_tokens
    if limit is not None and whole > limit:
        advice = f"use --max_new_tokens {limit - given} or fewer" if given < limit else "use a shorter prompt"
        raise ValueError(
            f"prompt is {given} tokens long and max_new_tokens is {options.max_new_tokens}, but this model has only {limit} "
            f"learned positions; {advice}"
        )
    trained = getattr(model.config, "max_position_embeddings", None)
    if trained and whole > trained:
        note(f"note: this model was trained on at most {trained} tokens; expect worse text beyond")
    return ids.to(model.device)


def _settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace, fixed: bool
) -> tuple[GenerationConfig, StoppingCriteriaList]:
    """Build generation settings from the command line, and stopping criteria from the model's own settings.

    fixed: use a static cache. Errors: ValueError naming an invalid field of generation_config.json.
    """
    theirs: Any = model.generation_config or GenerationConfig()
    ends, stops = theirs.eos_token_id, theirs.stop_strings
    if not all(type(token) is int for token in (ends if isinstance(ends, list) else [ends]) if token is not None):
        raise ValueError(f"model {options.model}: generation_config.json has eos_token_id {ends!r}; allowed: token ids")
    stops = stops if isinstance(stops, list | None) else [stops]
    if not all(isinstance(text, str) and text for text in stops or ()):
        raise ValueError(f"model {options.model}: generation_config.json has stop_strings {stops!r}; allowed: texts")
    unused = [f"{name} {value!r}" for name, value in sorted(theirs.to_diff_dict().items()) if name in NOT_USED]
    if unused:
        note(f"note: ignored settings of generation_config.json: {', '.join(unused)}")
    draws = options.temperature > 0
    settings = GenerationConfig(
        max_new_tokens=options.max_new_tokens,
        do_sample=draws,
        **({"temperature": options.temperature, "top_p": options.top_p, "top_k": 0} if draws else {}),
        cache_implementation="static" if fixed else None,
        eos_token_id=ends,
        pad_token_id=0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    return settings, criteria(tokenizer, stops)


def compiles(choice: str, device: torch.device, tokens: int) -> bool:
    """Return whether to compile the blocks. choice: on, off or auto; tokens: the number of new ones."""
    return choice == "on" or (choice == "auto" and device.type == "cuda" and tokens >= WORTH_COMPILING)


# Not inference_mode: its tensors do not record modifications, which `PackedGroup.share` needs to know.
@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: argparse.Namespace
) -> tuple[torch.Tensor, list[float]]:
    """Generate text to standard output. Return the new token ids (n,) and the times of the prompt and each token, seconds."""
    streamer = _TimedStreamer(tokenizer, continues=not options.chat)
    inputs = _prompt_ids(model, tokenizer, options)
    fuse = compiles(options.compile, model.device, options.max_new_tokens)
    # On a GPU a static cache gives every token the same shapes, so one graph or one compiled block serves all. Replace the
    # model's own settings, because transformers uses them for everything not set here.
    fixed = fuse or model.device.type == "cuda"
    model.generation_config, stopping = _settings(model, tokenizer, options, fixed)
    torch.manual_seed(options.seed)
    if fuse and model.device.type not in next_token.KERNELS:
        note("compiling the blocks: some seconds, then every token is faster")
    try:
        ids: torch.Tensor = model.generate(  # type: ignore[operator]
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            custom_generate=functools.partial(next_token.decode, streamer=streamer, fuse=fuse),
            stopping_criteria=stopping,
        )
    except BaseException:
        if len(streamer.times) > 1:
            # Print the error on a line of its own.
            note("")
        raise
    return ids[0, inputs.shape[1] :].cpu(), streamer.times


def _rate(times: Sequence[float]) -> str:
    """Describe tokens per second after the first token; report slow first tokens, which compile and capture, separately."""
    whole = (len(times) - 2) / (times[-1] - times[1])
    ready = 1 + next_token.WARM_UP + 1
    if len(times) <= 2 * ready:
        return f"{whole:.2f} tokens/s"
    settled = (len(times) - 1 - ready) / (times[-1] - times[ready])
    if settled < 1.5 * whole:
        return f"{whole:.2f} tokens/s"
    preparing = times[ready] - times[1]
    return f"{settled:.2f} tokens/s, after {preparing:.1f} s for the first {ready - 1}, which compile and capture"


def _summary(model: PreTrainedModel, given: int, times: Sequence[float]) -> str:
    """Describe speed and memory, in one line each."""
    module: nn.Module = model
    # Tied weights count once.
    tensors = {tensor.data_ptr(): tensor for tensor in (*module.parameters(), *module.buffers())}
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    lines = [f"prompt of {given} tokens: first token after {times[1] - times[0]:.2f} s"]
    if len(times) > 2:
        lines.append(f"{len(times) - 2} more tokens: {_rate(times)}")
    if model.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(model.device)
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    dtype = str(model.dtype).removeprefix("torch.")
    lines.append(f"weights {weights / 1e6:,.1f} MB, {dtype}; peak memory {peak / 1e6:,.0f} MB")
    return "\n".join(lines)


@command
def main(arguments: Sequence[str]) -> None:
    """Generate text to standard output, then print speed and memory to standard error."""
    options = _parser().parse_args(arguments)
    _check(options)
    model, tokenizer = _load(options)
    if any(isinstance(module, Packed) for module in model.modules()):
        # Compile the kernels before the time of the first token is taken.
        warm_up(model)
    _, times = generate(model, tokenizer, options)
    note(f"\n{_summary(model, _encode(tokenizer, options).shape[1], times)}")
