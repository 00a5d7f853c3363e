"""The library: what `import torch_impl` offers.

import torch_impl
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
result = torch_impl.prune(model, tokenizer, calibration=texts, train=records, sparsity=0.7, preset="best")
result.model.save_pretrained(out)
torch_impl.pack(result.model, packed, tokenizer=tokenizer)
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from torch_impl import _checks, losa
from torch_impl.decode import packed_folder, packed_rounding
from torch_impl.decode.packed_folder import Saving
from torch_impl.decode.packed_target import check_target
from torch_impl.engine import structure
from torch_impl.engine.adapted_linear import adapters, merge_adapters
from torch_impl.engine.blocks import zero_share
from torch_impl.engine.checkpoints import pretrained
from torch_impl.engine.checkpoints.contents import check_finite
from torch_impl.engine.decoder import Decoder
from torch_impl.engine.families import position_limit
from torch_impl.engine.record import StepRecord
from torch_impl.engine.resume.run_folder import MODEL, run_folder
from torch_impl.engine.rounding import ERROR
from torch_impl.engine.smaller import make_smaller
from torch_impl.engine.training import same_checkpointing
from torch_impl.experiment import zero_shot
from torch_impl.experiment.arguments import (
    check_model,
    check_weights,
    configuration,
    is_ids,
    material_of,
    with_shape,
)
from torch_impl.experiment.evaluate import eval_mode, perplexity
from torch_impl.experiment.planning import checks
from torch_impl.experiment.text import given
from torch_impl.experiment.text.written import with_written

# How messages name the argument of `pack` that allows it to replace a folder.
REPLACING = "overwrite=True"


@dataclass
class PruneResult:
    """What `prune` returns.

    model: the model that was given, pruned and merged: a plain transformers model; with sparsity_type structured, a new, smaller
    one that computes the same. steps: one record per step. sparsity: share of zeros of the given model's projections. settings:
    all options that were used, by section. seconds: of the whole call.
    """

    model: PreTrainedModel
    steps: list[StepRecord]
    sparsity: float
    settings: dict[str, dict[str, Any]]
    seconds: float

    def keep_zeros(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """`keep_zeros` for this model."""
        return keep_zeros(self.model, optimizer)


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    calibration: Any,
    train: Any = None,
    sparsity: float | None = None,
    method: str = "wanda",
    preset: str = "paper",
    on_step: Callable[[StepRecord], None] | None = None,
    on_loss: Callable[[int, int, float, float], None] | None = None,
    **options: Any,
) -> PruneResult:
    """Prune a model in place by LoSA, Algorithm 1, and merge its adapters. result.model is it, or a smaller one made of it.

    calibration: token ids (n, t), a list of texts or records, a data set, or the name of a text source as on the command line.
    train: the same, or tokenized examples {input_ids, labels}, of which labels may be left out; what an attention_mask leaves out
    at either end is padding and is cut off; None: no fine-tuning. Text needs the tokenizer. sparsity: final share of zeros,
    default 0.7, and 0.2 with the option sparsity_type="structured"; with sparsity_type="2:4", say, the pattern decides. preset:
    paper, best or quick.
    on_step(record) is called after every step, on_loss(step, optimizer step, loss, learning rate) while training.
    options: any option of the command line's sections prune, adapter, calibration, training and reconstruction, and
    train_examples, train_seqlen, step_shares and seed.

    The dense model is copied, so memory holds two models. The parameters' requires_grad, the training mode, gradient checkpointing
    and torch's random generators stay as they are, also if this fails; the model is then plain again, but may be pruned in part.

    Errors: TypeError or ValueError naming the argument, or the memory that is lacking, before the model changes;
    FloatingPointError if training diverges.
    """
    started = time.perf_counter()
    if torch.is_inference_mode_enabled():
        raise ValueError("prune is called in torch.inference_mode(), in which nothing can be trained; call it outside")
    train = given.listed(train, "train")
    config = configuration(model, calibration, train, sparsity, method, preset, options)
    decoder = check_weights(model, config.settings)
    windows, parts = material_of(model, tokenizer, calibration, train, config)
    tokenized = [example for part in parts for example in part] if given.is_tokenized(train) else []
    config = with_shape(config, windows, tokenized)
    checks.check_memory(model, config)
    cards = sorted({tensor.device.index for tensor in model.parameters() if tensor.is_cuda})
    with torch.random.fork_rng(cards), torch.enable_grad():
        windows = with_written(model, tokenizer, windows, config.calibration.written, config.output.seed)
        with same_checkpointing(model), _as_it_was(decoder):
            model.requires_grad_(False)
            steps = losa.run(model, windows, parts, config.settings, on_step, on_loss)
    sparsity = zero_share(decoder.weights)
    result = make_smaller(model).model if config.prune.pattern.structured else model
    return PruneResult(result, steps, sparsity, config.as_dict(), time.perf_counter() - started)


def keep_zeros(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> RemovableHandle:
    """Keep the zeros of a pruned model's projections through all further steps of an optimizer; without, one step fills them.

    Returns a handle; its remove() ends this. Errors: ValueError if the model's structure is unknown.
    """
    weights = Decoder(model).weights
    zeros = [weight == 0 for weight in weights]

    @torch.no_grad()
    def restore(*_: Any) -> None:
        for weight, zero in zip(weights, zeros, strict=True):
            weight.masked_fill_(zero, 0.0)

    return optimizer.register_step_post_hook(restore)


def pack(
    model: PreTrainedModel | str | Path,
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    values: str = "same",
    overwrite: bool = False,
    *,
    calibration: Any = None,
    nsamples: int = 128,
    seqlen: int = 2048,
    mean_bits: float | None = None,
    bits_by: str | None = None,
    seed: int = 0,
) -> list[Saving]:
    """Write a sparse model without its zeros to `folder`, which appears when complete. Return the sizes per kind of tensor.

    model: a plain transformers model, or its folder. tokenizer: saved with a model; a folder has its own. values: how kept
    values are stored; same: in the model's dtype; int8, int4 or any from int2: rounded to codes of that many bits; mixed: to
    codes of `mean_bits` on average, default 4. bits_by: what chooses them; error, the default: for each projection, the estimated
    harm of rounding to the loss; gradient, rmi: for each block, its first-order importance or mutual information.

    calibration: token ids (n, t), texts or the name of a text source, of which nsamples windows of seqlen tokens are taken;
    each weight's error is then compensated for by the weights to its right. None: weights are rounded to nearest.
    overwrite: replace `folder` if it holds a model and no other files.

    Errors: ValueError, FileNotFoundError or TypeError naming the argument.
    """
    _checks.choice("values", values, packed_rounding.VALUES)
    if values == packed_rounding.SAME and calibration is not None:
        raise ValueError("calibration is given and values is 'same', which rounds nothing; leave one out")
    for name, value in (("mean_bits", mean_bits), ("bits_by", bits_by)):
        if value is not None and values != packed_rounding.MIXED:
            raise ValueError(f"{name} is {value} and has no effect without values='mixed'; leave it out")
    target = Path(folder)
    if overwrite:
        check_target(Path(model) if isinstance(model, str | Path) else None, target, ("model", "folder"), REPLACING)
    with run_folder(
        target, overwrite, kind=dataclasses.replace(MODEL, argument="folder", replacing=REPLACING)
    ) as place:
        if isinstance(model, str | Path):
            source = Path(model)
            if calibration is not None and not is_ids(calibration) and tokenizer is None:
                tokenizer = pretrained.load_tokenizer(source)
            rounding = _rounding(values, calibration, tokenizer, nsamples, seqlen, mean_bits, bits_by, seed)
            return packed_folder.pack_folder(source, place, torch.device("cpu"), rounding=rounding)
        _check_plain(model)
        with tempfile.TemporaryDirectory(dir=target.resolve().parent, prefix=f".{target.name}.plain") as plain:
            model.save_pretrained(plain)
            if tokenizer is not None:
                tokenizer.save_pretrained(plain)
            rounding = _rounding(values, calibration, tokenizer, nsamples, seqlen, mean_bits, bits_by, seed)
            return packed_folder.pack_folder(Path(plain), place, torch.device("cpu"), rounding=rounding)


def _check_plain(model: Any) -> None:
    """Check that a model in memory is a causal language model of plain, finite weights, while messages can name what is in it."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model is {name}; give a transformers model or the folder of one")
    if model.get_output_embeddings() is None:
        raise ValueError(f"model is {name}; give a causal language model, which predicts tokens")
    structure.check_plain(Decoder(model))
    # What device_map leaves on disk is checked when it is saved.
    check_finite(((key, value) for key, value in model.state_dict().items() if not value.is_meta), Path(name))


def _rounding(
    values: str,
    calibration: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    nsamples: int,
    seqlen: int,
    mean_bits: float | None,
    bits_by: str | None,
    seed: int,
) -> packed_rounding.Rounding | None:
    if values == packed_rounding.SAME:
        return None
    _checks.count("nsamples", nsamples, 2)
    _checks.count("seqlen", seqlen)
    ids = None if calibration is None else given.windows_of(calibration, tokenizer, nsamples, seqlen, seed)
    bits = packed_rounding.MEAN_BITS if mean_bits is None else mean_bits
    return packed_rounding.Rounding(values, ids, bits, bits_by=ERROR if bits_by is None else bits_by)


def load_packed(
    folder: str | Path, device: str = "auto", dtype: str | torch.dtype = "auto", *, sequences: int = 1
) -> PreTrainedModel:
    """Load a packed model, in eval mode, without unpacking it.

    device: auto (a GPU if available), cpu, cuda or cuda:N. dtype: auto (as stored), or a floating-point dtype or its name.
    sequences: how many will be decoded at once, by which a GPU's layout of the weights is chosen; others are right too, only
    slower.

    Errors: ValueError or FileNotFoundError naming folder, file and tensor; ValueError or TypeError naming sequences.
    """
    _checks.count("sequences", sequences)
    name = str(dtype).removeprefix("torch.")
    pretrained.check_dtype(name)
    wanted = None if name == "auto" else pretrained.DTYPES[name]
    return packed_folder.load_model(Path(folder), pretrained.choose_device(device), wanted, sequences=sequences)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    text: Any = None,
    seqlen: int = 2048,
    windows: int | None = None,
    protocol: str | None = None,
    tasks: Sequence[str] | None = None,
    tasks_data: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Measure a model, plain, merged, packed or with adapters: perplexity on a text, accuracy on tasks, or both.

    text: token ids (n, t), a list of texts, or the name of a text source; default wikitext2, unless there are tasks. seqlen:
    tokens per window of text. windows: use only the first N windows. protocol: wikitext2, c4 or documents; default: that of
    the text. Returns perplexity; protocol, joined_by, begin_of_text, stride, windows, seqlen, tokens, predicted_tokens and
    the sha256 of the token ids, to compare measurements.

    tasks: names of lm-eval's tasks; "paper" means its seven. tasks_data: folder with their documents (those of the paper's
    seven), otherwise they come from the hub. limit: only the first N documents of each task. num_fewshot: examples in each
    prompt. Returns tasks, with acc, stderr, documents, num_fewshot and source of each; average_acc; lm_eval, its version; limit.

    Errors: TypeError or ValueError naming the argument; RuntimeError if there are tasks and lm-eval is missing;
    FileNotFoundError for text or documents that are not there; FloatingPointError if the perplexity is not finite.
    """
    model = _measurable(model)
    # From here on Python's own integers: torch and JSON take no others.
    batch_size, seqlen = _checks.count("batch_size", batch_size), _checks.count("seqlen", seqlen, 2)
    windows = None if windows is None else _checks.count("windows", windows)
    limit = None if limit is None else _checks.count("limit", limit)
    if tasks is None:
        text = "wikitext2" if text is None else text
        _check_unused("tasks", tasks_data=tasks_data, limit=limit, num_fewshot=num_fewshot)
    if text is None:
        _check_unused("text", windows=windows, protocol=protocol)
    if tasks is not None and tokenizer is None:
        raise ValueError("tasks are text and tokenizer is missing; give the model's tokenizer")
    loaded = None if tasks is None else zero_shot.load_tasks(tasks, tasks_data, num_fewshot)
    found: dict[str, Any] = {}
    with eval_mode(model):
        if text is not None:
            found |= _perplexity(model, tokenizer, text, seqlen, windows, protocol, batch_size)
        if loaded is not None and tokenizer is not None:
            found |= zero_shot.measure(model, zero_shot.Tokens(tokenizer), loaded, limit, batch_size).by_task()
    return found


def _check_unused(what: str, **options: Any) -> None:
    """Errors: ValueError naming an option about what is not measured."""
    for name, value in options.items():
        if value is not None:
            raise ValueError(f"{name} is about {what}, which is not measured here; give {what} too, or leave it out")


def _perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    text: Any,
    seqlen: int,
    windows: int | None,
    protocol: str | None,
    batch_size: int,
) -> dict[str, Any]:
    ids, facts = given.evaluation_of(text, tokenizer, seqlen, windows, protocol)
    given.check_ids(model, {"text": [ids]})
    limit = position_limit(model)
    if limit is not None and ids.shape[1] > limit:
        raise ValueError(f"seqlen is {ids.shape[1]}; this model has {limit} positions, so take {limit} or fewer")
    checks.warn_beyond(model, {"seqlen": ids.shape[1]})
    return {"perplexity": perplexity(model, ids, batch_size), **facts}


def _measurable(model: Any) -> PreTrainedModel:
    """Return the transformers model; of one of peft's, the model that holds its adapters."""
    if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
        model = model.get_base_model()
    check_model(model)
    found: PreTrainedModel = model
    return found


@contextmanager
def _as_it_was(decoder: Decoder) -> Iterator[None]:
    """Merge whatever adapters there are at the end, and give the parameters and modules the modes that they had."""
    model: nn.Module = decoder.model
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    training = {name: module.training for name, module in model.named_modules()}
    try:
        yield
    except BaseException as error:
        error.add_note("the model is plain again, but may be pruned in part: load it again")
        raise
    finally:
        if next(iter(adapters(model)), None) is not None:
            merge_adapters(decoder)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable.get(name, False))
        for name, module in model.named_modules():
            module.training = training.get(name, module.training)
