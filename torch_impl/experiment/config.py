"""Configuration: frozen dataclasses beside what they configure, a TOML file, and flags; later ones win."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import tomllib
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import HfArgumentParser

from torch_impl import _checks
from torch_impl.engine.calibration import CalibrationConfig
from torch_impl.engine.checkpoints.pretrained import DTYPES
from torch_impl.engine.reconstruction import ReconstructionConfig
from torch_impl.engine.settings import AdapterConfig, PruneConfig, Settings
from torch_impl.engine.training import TrainingConfig
from torch_impl.experiment.command import Parser, closest

CONFIGS = Path(__file__).parents[1] / "configs"
EMBEDDED_MODEL = Path(__file__).parents[2] / "tiny_models" / "stdlib_llama"
FIRST_SHARE = 0.1
PRESETS = ("paper", "best", "quick")
# What torch's generators take.
MOST_SEED = 2**63 - 1
# What a run may go on with changed, if told so: numbers that leave nothing of what is done without meaning.
CHANGEABLE = ("learning_rate", "max_grad_norm", "weight_decay")


@dataclass(frozen=True)
class ModelConfig:
    """Which model, where, in which precision."""

    model: str = str(EMBEDDED_MODEL)
    """Local folder in Hugging Face layout, or hub id; default: the embedded tiny LLaMA."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda, cuda:N."""
    dtype: str = "auto"
    """auto (float32 on the CPU, the checkpoint's own on a GPU), float32, bfloat16, float16, float64."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Only for sources you trust."""
    offload: str = "auto"
    """Leave the model on disk and prune it block by block, for plain pruning (--steps 1 --finetune false) of a model
    larger than the memory: on, off or auto (on, if it would not fit)."""

    def __post_init__(self) -> None:
        _checks.choice("offload", self.offload, ("auto", "on", "off"))
        _checks.choice("dtype", self.dtype, ("auto", *DTYPES))


@dataclass(frozen=True)
class TextConfig:
    """Which text calibrates, trains and evaluates; how much of it."""

    calibration_data: str = "stdlib"
    """stdlib; a .txt, .jsonl, .json, .parquet file or a folder of them; c4, wikitext2, alpaca-gpt4 or hf:REPO[:CONFIG[:SPLIT]]."""
    finetune_data: str = "stdlib"
    """Text or instruction records to fine-tune on; the same kinds of source."""
    eval_data: str = "stdlib"
    """Text to measure perplexity on: what the other two never see; the same kinds of source."""
    train_examples: int = 10000
    """Fine-tuning sequences over all steps together (paper: 10,000 records)."""
    train_seqlen: int = 1024
    """Tokens of a fine-tuning sequence at most (paper: 1024)."""
    step_shares: list[float] | None = None
    """Share of the fine-tuning sequences of every step; default: 0.1 for each but the last, which gets the rest."""
    eval_seqlen: int = 2048
    """Tokens of an evaluation window (paper: 2048; 4096 for LLaMA-2 and 3)."""
    eval_windows: int | None = None
    """Evaluate on the first so many windows only; default: all."""
    eval_batch_size: int = 8
    """Windows evaluated at once."""

    def __post_init__(self) -> None:
        for name, least in (("train_examples", 1), ("train_seqlen", 2), ("eval_seqlen", 2), ("eval_batch_size", 1)):
            _checks.count(name, getattr(self, name), least)
        if self.eval_windows is not None:
            _checks.count("eval_windows", self.eval_windows)

    def shares(self, steps: int) -> list[float]:
        """Share of the fine-tuning sequences of every step."""
        if self.step_shares is None:
            first = min(FIRST_SHARE, 1 / steps)
            return [first] * (steps - 1) + [1 - first * (steps - 1)]
        positive = all(share > 0 for share in self.step_shares)
        if len(self.step_shares) != steps or not positive or not abs(sum(self.step_shares) - 1) <= 1e-6:
            raise ValueError(
                f"step_shares is {self.step_shares}; allowed with steps {steps}: {steps} numbers above 0 that sum to 1"
            )
        return list(self.step_shares)


@dataclass(frozen=True)
class OutputConfig:
    """Where the result goes."""

    output_dir: str | None = None
    """Folder of the run, written when all is done; default: losa-MODEL-METHOD-SPARSITY here."""
    overwrite: bool = False
    """Replace output_dir if it exists, and forget an unfinished run in its place."""
    resume: bool = False
    """Go on with the unfinished run of output_dir; it ends with the same bits as if it had never stopped."""
    accept_changes: list[str] | None = None
    """With --resume: options that may differ from those the run began with; of learning_rate, max_grad_norm, weight_decay."""
    save_every: int = 100
    """Optimizer steps from one point to go on from to the next; every pruned block is one too."""
    keep_points: int = 2
    """How many points are kept; if the newest is damaged, the one before serves."""
    deterministic: bool = False
    """Same bits on every run on CUDA too, for some time; the CPU always gives them."""
    seed: int = 0
    """Seed of every random choice."""
    dry_run: bool = False
    """Print the plan, its memory and work, and stop."""
    devices: int | None = None
    """With dry_run: plan for so many GPUs, one process each; default: as many as torchrun has started."""
    preset: str | None = None
    """paper: the paper's algorithm; best: the recipe with the lowest perplexity; quick: pruning and reconstruction in one shot, no
    fine-tuning. --config and flags win over it."""
    config: str | None = None
    """TOML file with any of these options; flags win over it."""

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
        unknown = sorted(set(self.accept_changes or ()) - set(CHANGEABLE))
        if unknown:
            raise ValueError(f"accept_changes is {', '.join(unknown)}; allowed: {', '.join(CHANGEABLE)}")


@dataclass(frozen=True)
class Config:
    """All options of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    output: OutputConfig = field(default_factory=OutputConfig)

    def __post_init__(self) -> None:
        if self.model.offload == "on" and not self.plain:
            raise ValueError(
                f"offload is 'on' with steps {self.prune.steps} and finetune {self.training.finetune}; "
                "allowed: with steps 1 and finetune false"
            )

    @property
    def plain(self) -> bool:
        """Whether this is plain pruning, in one shot without fine-tuning: what can be done block by block from disk."""
        return self.prune.steps == 1 and not self.training.finetune

    @property
    def settings(self) -> Settings:
        """The part that Algorithm 1 reads."""
        return Settings(
            self.prune, self.adapter, self.calibration, self.training, self.reconstruction, self.output.seed
        )

    @property
    def output_dir(self) -> Path:
        """Folder of the run."""
        if self.output.output_dir is not None:
            return Path(self.output.output_dir)
        name = Path(self.model.model).name
        pattern = self.prune.sparsity_type.replace(":", "of")
        amount = f"{self.prune.final_sparsity:g}" if self.prune.group is None else pattern
        return Path(f"losa-{name}-{self.prune.prune_method}-{amount}")

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values by section, for JSON."""
        return asdict(self)


SECTIONS: dict[str, type] = {
    "model": ModelConfig,
    "prune": PruneConfig,
    "adapter": AdapterConfig,
    "calibration": CalibrationConfig,
    "training": TrainingConfig,
    "reconstruction": ReconstructionConfig,
    "text": TextConfig,
    "output": OutputConfig,
}

DESCRIPTION = """Prune a language model and heal it with LoSA: sparse weights, merged low-rank adapters, no filled zeros.

  python -m torch_impl.run                                      the embedded model, Wanda, 70 %, five steps
  python -m torch_impl.run --model DIR --sparsity_type 2:4      your model, two of every four weights kept
  python -m torch_impl.run --model DIR --preset best            the recipe with the lowest perplexity
  python -m torch_impl.run --model DIR --steps 1 --finetune false   plain pruning
  python -m torch_impl.run --config llama_7b.toml --model DIR --dry_run   what it would take

Options come from the defaults, then --preset, then --config, then flags. Ready-made files (the paper's settings) are in
torch_impl/configs/.
"""


class _Parser(Parser, HfArgumentParser):  # type: ignore[misc]
    """Options are the fields of the sections."""


def parse(arguments: Sequence[str]) -> Config:
    """The configuration that a command line asks for.

    Errors: ValueError naming option, value and what is allowed; FileNotFoundError for a missing TOML file.
    """
    parser = _make_parser()
    early = parser.parse_args(list(arguments))
    from_file = _from_toml(Path(early.config)) if early.config is not None else {}
    if early.preset is not None:
        _checks.choice("preset", early.preset, PRESETS)
        from_file = _from_toml(CONFIGS / f"preset_{early.preset}.toml") | from_file
    if "model" not in from_file and not _names("model", arguments):
        from_file = _from_toml(CONFIGS / "embedded.toml") | from_file
    if "step_shares" in from_file and _names("steps", arguments) and not _names("step_shares", arguments):
        from_file["step_shares"] = _shares_again(from_file["step_shares"], early.steps)
    words = [word for name, values in from_file.items() for word in (f"--{name}", *values)]
    config = Config(*parser.parse_args_into_dataclasses([*words, *arguments], look_for_args_file=False))
    _ = config.settings, config.text.shares(config.prune.steps)
    return config


def _names(option: str, arguments: Sequence[str]) -> bool:
    spellings = (f"--{option}", f"--{option.replace('_', '-')}")
    return any(word.partition("=")[0] in spellings for word in arguments)


def _shares_again(shares: list[str], steps: int) -> list[str]:
    """A file's shares for another number of steps than the file's: equal ones stay equal, a single step takes all."""
    equal = len(set(shares)) == 1 or steps == 1
    return [str(1 / steps)] * steps if equal and 1 <= steps != len(shares) else shares


@functools.cache
def _make_parser() -> _Parser:
    for section in SECTIONS.values():
        _document(section)
    return _Parser(
        list(SECTIONS.values()),  # type: ignore[arg-type]
        prog="python -m torch_impl.run",
        description=DESCRIPTION,
        formatter_class=RawDescriptionHelpFormatter,
    )


def _document(section: type) -> None:
    """Make the docstring below each field its --help text."""
    [definition] = ast.parse(textwrap.dedent(inspect.getsource(section))).body
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for before, after in zip(definition.body, definition.body[1:], strict=False):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if is_text and isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name):
            texts[before.target.id] = str(after.value.value)  # type: ignore[attr-defined]
    for item in fields(section):
        item.metadata = MappingProxyType({"help": texts[item.name].replace("%", "%%")})


def _from_toml(path: Path) -> dict[str, list[str]]:
    """A TOML file, option = value in sections or not, as the words that follow each option on a command line."""
    if not path.is_file():
        raise FileNotFoundError(f"config {path} does not exist; allowed: a TOML file")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config {path} is not TOML: {error}") from error
    known = {item.name for section in SECTIONS.values() for item in fields(section)} - {"config", "preset"}
    words: dict[str, list[str]] = {}
    for name, value in table.items():
        entries = value.items() if isinstance(value, dict) else [(name, value)]
        for key, entry in entries:
            if key not in known or isinstance(entry, dict):
                raise ValueError(f"config {path}: {key!r} is not an option{closest(key, sorted(known))}; see --help")
            words[key] = [str(value) for value in entry] if isinstance(entry, list) else [str(entry)]
    return words
