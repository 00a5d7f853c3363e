"""The closing table of a run, and what is said of it."""

from __future__ import annotations

from typing import Any

from torch_impl.experiment.result import Result, Row
from torch_impl.experiment.text.sources import ALL
from torch_impl.masks.pattern import Pattern

# Report a difference between two sparsities if it is larger than this.
VISIBLE = 5e-4
SCHEDULES = {"per_step": "in each step", "whole_run": "over all steps"}


def rows_of(result: Result) -> list[tuple[Row, str]]:
    """Return the rows of the closing table and their titles. A run that is one-shot pruning has no second row of it."""
    rows = [(result.dense, "dense")]
    if not result.is_at_once:
        rows.append((result.pruned_at_once, "pruned at once"))
    if result.one_shot is not None:
        reconstructed = "reconstructed and " if result.reconstruct_epochs else ""
        rows.append((result.one_shot, f"one shot, {reconstructed}trained"))
    return [*rows, (result.losa, title_of(result))]


def title_of(result: Result) -> str:
    """Name the row of the result by what was done: only a model that was trained is called LoSA."""
    if result.finetuned:
        return "LoSA"
    how = "pruned and reconstructed" if result.reconstruct_epochs else "pruned"
    steps = f" in {result.steps} steps" if result.steps > 1 else ""
    return f"{how}{steps}, {result.rates} rates"


def is_smaller(result: Result) -> bool:
    """Return whether the saved model has fewer parameters than the dense one."""
    found = result.footprints
    return found is not None and found.saved.parameters < found.dense.parameters


def packing_pays(result: Result) -> bool:
    """Return whether the saved model has zeros to leave out, and is smaller without them."""
    return not is_smaller(result) and result.losa.packed_bytes < result.losa.bytes


def cells_of(result: Result) -> list[list[str]]:
    cells = [["", "perplexity", "sparsity", "on disk", "if packed", "time"]]
    for row, title in rows_of(result):
        cells.append(
            [
                title,
                f"{row.perplexity:,.2f}",
                _sparsity(row.sparsity, result.target_sparsity, pruned=row is not result.dense),
                _bytes(row.bytes),
                _bytes(row.packed_bytes),
                f"{row.seconds:.1f} s" if row.seconds else "",
            ]
        )
    return cells


def _sparsity(found: float, asked: float, pruned: bool) -> str:
    """Format a sparsity; add the requested one if they differ visibly."""
    return f"{found:.2%}" + (f" (asked: {asked:.2%})" if pruned and abs(found - asked) > VISIBLE else "")


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def table(result: Result) -> str:
    """Format the closing table as text."""
    cells = cells_of(result)
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(["", *lines, "", *notes_of(result)])


def notes_of(result: Result) -> list[str]:
    facts, checks = result.evaluation, result.verification
    shares = ", ".join(f"{share:.0%}" for share in result.step_shares)
    return [
        *_why_not_as_asked(result),
        *_dense_blocks(result),
        _measured_on(facts, result.texts["evaluation"]),
        f"Trained on {result.train_examples:,} sequences in parts of {shares}; loss {result.loss}, "
        f"learning rate {result.learning_rate:g}, scheduled {SCHEDULES[result.lr_schedule]}."
        if result.finetuned
        else "Nothing was trained.",
        f"Reloaded {checks.reloaded}: every pruned weight of {checks.projections} projections is "
        f"{'gone' if is_smaller(result) else 'zero'}, logits "
        f"within {checks.largest_logit_difference:.1e} of the unmerged model's.",
        f"Sizes are of {result.dtype} weights, as the run computed with and saved.",
        *_as_saved(result),
    ]


def _dense_blocks(result: Result) -> list[str]:
    """Say which blocks were not pruned."""
    first, last = result.dense_blocks
    if not first + last:
        return []
    ends = f"The first {first} and the last {last} blocks were not pruned, and the others so much more"
    return [f"{ends}; the row pruned at once prunes all alike."]


def _as_saved(result: Result) -> list[str]:
    """Describe what the saved model takes."""
    found = result.footprints
    if found is None or not is_smaller(result):
        zeros = "The saved model stores its zeros, so it is as large and as fast as the dense one."
        if found is not None:
            return [f"{zeros}{_sentence(found.note)}"]
        if Pattern.parse(result.sparsity_type).structured:
            return [f"{zeros} Whole heads and channels are zeros: run in one process for a smaller model."]
        if not packing_pays(result):
            return [f"{zeros} losa pack would not make it smaller."]
        return [f"{zeros} losa pack stores a bitmap and the kept values instead."]
    dense, saved = found.dense, found.saved
    speeds = [
        f"{ours:,.0f} tokens/s {name} (dense: {theirs:,.0f})"
        for name, ours, theirs in (
            ("in decoding", saved.tokens_per_second, dense.tokens_per_second),
            ("in reading a prompt", saved.prompt_tokens_per_second, dense.prompt_tokens_per_second),
        )
        if ours and theirs
    ]
    if saved.peak_bytes and dense.peak_bytes:
        speeds.append(f"{_bytes(saved.peak_bytes)} of memory in both (dense: {_bytes(dense.peak_bytes)})")
    return [
        f"The saved model is a plain, smaller one: {saved.parameters:,} of {dense.parameters:,} parameters "
        f"({saved.parameters / dense.parameters:.1%}), {saved.operations / dense.operations:.1%} of the operations of a token, "
        f"{saved.cache_bytes / dense.cache_bytes:.1%} of the cache{'; ' * bool(speeds)}{', '.join(speeds)}."
        + _sentence(found.note)
    ]


def _sentence(text: str) -> str:
    return f" {text[:1].upper()}{text[1:]}." if text else ""


def _why_not_as_asked(result: Result) -> list[str]:
    """Explain why the sparsity is not the requested one."""
    found, asked = result.losa.sparsity, result.target_sparsity
    if abs(found - asked) <= VISIBLE:
        return []
    if Pattern.parse(result.sparsity_type).structured:
        why = "whole heads and a multiple of channels go, or parts of the model already had zeros"
    elif Pattern.parse(result.sparsity_type).group is not None:
        why = "blocks differ in size, or parts of the model already had more zeros than the pattern"
    elif found > asked:
        why = "parts of the model were already sparser"
    else:
        why = "the number of pruned weights is rounded down in each row or group, which is visible if rows are short"
    kind = "smaller blocks" if is_smaller(result) else "zeros"
    return [f"Requested {asked:.2%} {kind}, got {found:.2%}: {why}."]


def _measured_on(facts: dict[str, Any], name: str) -> str:
    """Describe the evaluation text. name: of the text, without a local path, as model cards repeat this."""
    part = facts["split"]
    if facts["end_of_document"]:
        part += ": the end of a document"
    elif facts["documents"] < facts["documents_of_source"]:
        part += f": {facts['documents']:,} of {facts['documents_of_source']:,} documents"
    if facts["first_windows_only"]:
        part = "the first windows of it" if part == ALL else f"{part}, the first windows"
    removed = [f"{count:,} of {text}" for text, count in facts["documents_left_out"].items() if count]
    return (
        f"Perplexity per token on {name} ({part}): {facts['windows']} windows of {facts['seqlen']} tokens, "
        f"sha256 {facts['sha256'][:12]}. {protocol_of(facts)}."
        + (f" Evaluation documents removed from other texts: {', '.join(removed)}." if removed else "")
    )


def protocol_of(facts: dict[str, Any]) -> str:
    """Describe how the windows were made."""
    parts = [f"Protocol {facts['protocol']}"]
    if facts.get("joined_by") is not None:
        parts.append(f"documents joined by {facts['joined_by']!r}")
    if "begin_of_text" in facts:
        parts.append(f"begin-of-text token: {facts['begin_of_text']}")
    return f"{', '.join(parts)}, stride {facts['stride']}, {facts['predicted_tokens']:,} tokens predicted"


def accuracies(found: dict[str, Any]) -> str:
    """Format zero-shot accuracies as a table, in percent."""
    width = max(map(len, found["tasks"]))
    lines = [f"{'':<{width}}     acc  ± stderr  documents  source"]
    for name, task in found["tasks"].items():
        error = "" if task["stderr"] is None else f"± {task['stderr']:.2%}"
        shots = f", {task['num_fewshot']} examples in each prompt" if task["num_fewshot"] else ""
        lines.append(
            f"{name:<{width}}  {task['acc']:>6.2%}  {error:>8}  {task['documents']:>9,}  {_from(task['source'])}{shots}"
        )
    first = "" if found["limit"] is None else f", the first {found['limit']} documents of each task"
    return "\n".join(
        [*lines, f"{'average':<{width}}  {found['average_acc']:>6.2%}  (acc of lm-eval {found['lm_eval']}{first})"]
    )


def _from(source: dict[str, Any]) -> str:
    if "file" in source:
        return f"{source['file']} (sha256 {source['sha256'][:12]})"
    return f"{source['hub']}, {source['split']} split"
