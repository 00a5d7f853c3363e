"""The sections of a run's options that the engine does not know: the model, the text, the output."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch_impl import _checks
from torch_impl.engine.checkpoints.pretrained import check_dtype
from torch_impl.experiment.planning.cards import find_card
from torch_impl.experiment.tensorboard import check_report_to
from torch_impl.experiment.text.protocols import DOCUMENTS, protocol_named

EMBEDDED_MODEL = Path(__file__).parents[2] / "tiny_models" / "stdlib_llama"
FIRST_SHARE = 0.1
# The largest seed that torch accepts.
MOST_SEED = 2**63 - 1
# Options that a resumed run may change: the work done so far stays valid.
CHANGEABLE = ("learning_rate", "max_grad_norm", "reconstruct_learning_rate", "weight_decay")
# Further rows of the report.
BASELINES = ("one_shot",)


@dataclass(frozen=True)
class ModelConfig:
    """The model, its device and its precision."""

    model: str = str(EMBEDDED_MODEL)
    """Hugging Face model folder or hub id; default: the embedded tiny LLaMA."""
    device: str = "auto"
    """auto (a GPU if available), cpu, cuda or cuda:N."""
    dtype: str = "auto"
    """auto (float32 on the CPU, the checkpoint's own on a GPU), float32, bfloat16, float16 or float64."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for sources you trust."""
    offload: str = "auto"
    """Keep the model on disk and load one block at a time, for models larger than memory. Works for pruning and reconstruction
    in one shot (--steps 1 --finetune false), and for training over --train_base packed or int8, which must fit. on, off or auto
    (on if the model does not fit)."""

    def __post_init__(self) -> None:
        _checks.choice("offload", self.offload, ("auto", "on", "off"))
        check_dtype(self.dtype)


@dataclass(frozen=True)
class TextConfig:
    """The text for calibration, training and evaluation, and how much of it."""

    calibration_data: str = "stdlib"
    """Calibration text: {names} (stdlib, the sources of Python's standard library, is the default of the embedded model alone); a
    .txt, .raw, .jsonl, .json (also .gz) or .parquet file, or a folder of them; hf:REPO[:CONFIG[:SPLIT]], a data set of the
    Hugging Face hub."""
    finetune_data: str = "stdlib"
    """Text or instruction records for fine-tuning; the same kinds of source and default."""
    eval_data: str = "stdlib"
    """Text to measure perplexity on; the same kinds of source and default. It is kept out of calibration and fine-tuning."""
    train_examples: int = 10000
    """Number of fine-tuning sequences over all steps (paper: 10,000 records)."""
    train_seqlen: int = 1024
    """Maximum tokens per fine-tuning sequence (paper: 1024)."""
    step_shares: list[float] | None = None
    """Share of the fine-tuning sequences for each step; default: 0.1 each, and the rest for the last step."""
    eval_seqlen: int = 2048
    """Tokens per evaluation window (paper: 2048; 4096 for LLaMA-2 and 3)."""
    eval_windows: int | None = None
    """Evaluate only the first N windows; default: all."""
    eval_protocol: str | None = None
    """How the text is joined and cut into windows: wikitext2 or c4, as in the literature, or documents, each after the
    begin-of-text token; default: that of eval_data. Use it for a local file of C4."""
    eval_batch_size: int = 8
    """Windows to evaluate at once."""

    def __post_init__(self) -> None:
        for name, least in (("train_examples", 1), ("train_seqlen", 2), ("eval_seqlen", 2), ("eval_batch_size", 1)):
            _checks.count(name, getattr(self, name), least)
        if self.eval_windows is not None:
            _checks.count("eval_windows", self.eval_windows)
        protocol_named(self.eval_protocol, DOCUMENTS, "eval_protocol")

    def shares(self, steps: int) -> list[float]:
        """Return the share of the fine-tuning sequences for each step."""
        if self.step_shares is None:
            first = min(FIRST_SHARE, 1 / steps)
            return [first] * (steps - 1) + [1 - first * (steps - 1)]
        positive = all(share > 0 for share in self.step_shares)
        if len(self.step_shares) != steps or not positive or not abs(sum(self.step_shares) - 1) <= 1e-6:
            raise ValueError(
                f"step_shares is {self.step_shares}; with steps {steps}, give {steps} numbers above 0 that sum to 1"
            )
        return list(self.step_shares)


@dataclass(frozen=True)
class OutputConfig:
    """Output folder, checkpoints and run control."""

    output_dir: str | None = None
    """Folder of the result; default: losa-MODEL-METHOD-SPARSITY in the current folder."""
    overwrite: bool = False
    """Replace output_dir if it exists, and discard an unfinished run in it."""
    resume: bool = False
    """Resume the unfinished run in output_dir; if there is none, start one. The result is bit-identical to that of an uninterrupted
    run."""
    accept_changes: list[str] | None = None
    """With --resume: options that may differ from the original run: learning_rate, max_grad_norm, reconstruct_learning_rate,
    weight_decay."""
    save_every: int = 100
    """Save a checkpoint every N optimizer steps. One is also saved after every pruned block."""
    keep_points: int = 2
    """Number of checkpoints to keep. If the newest is corrupt, the run resumes from the one before."""
    report_to: str = "none"
    """tensorboard: also write loss, learning rate, perplexity, sparsity and errors for TensorBoard, in output_dir/tensorboard."""
    baselines: list[str] | None = None
    """Further rows of the report. one_shot: prune once, at uniform rates and ranks, and train on the same sequences with the same
    options; takes about as long as the run again."""
    deterministic: bool = False
    """Bit-identical CUDA runs, at some cost in speed. CPU runs always are."""
    seed: int = 0
    """Seed of all random choices."""
    dry_run: bool = False
    """Print the plan with its memory and work, and stop."""
    devices: int | None = None
    """With --dry_run: plan for N GPUs with one process each; default: the number of processes that torchrun started."""
    plan_for: str | None = None
    """With --dry_run: plan for a GPU that need not be here: H200, H100, "A100 80GB", "A100 40GB", L40S, "RTX 4090", or just "80GB".
    Says whether the run fits, what would make it fit, and how long it takes."""
    preset: str | None = None
    """paper: the paper's algorithm; best: the recipe with the lowest perplexity; quick: one-shot pruning and reconstruction
    without fine-tuning. It overrides --config, and flags override it."""
    config: str | None = None
    """TOML file with any of these options, or the name of one that ships: llama_7b, llama_13b, llama_70b (the paper's settings).
    Flags and --preset override it."""

    def __post_init__(self) -> None:
        _checks.count("seed", self.seed, 0, MOST_SEED)
        _checks.count("save_every", self.save_every)
        _checks.count("keep_points", self.keep_points)
        if self.devices is not None:
            _checks.count("devices", self.devices)
            if not self.dry_run:
                raise ValueError(
                    f"devices is {self.devices}; add --dry_run, or start that many processes with torchrun"
                )
        if self.plan_for is not None:
            find_card(self.plan_for)
            if not self.dry_run:
                raise ValueError(f"plan_for is {self.plan_for!r}; it is for plans: losa plan, or add --dry_run")
        check_report_to(self.report_to)
        for name, allowed in (("accept_changes", CHANGEABLE), ("baselines", BASELINES)):
            unknown = sorted(set(getattr(self, name) or ()) - set(allowed))
            if unknown:
                raise ValueError(f"{name} is {', '.join(unknown)}; allowed: {', '.join(allowed)}")
