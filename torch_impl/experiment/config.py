"""Configuration from frozen dataclasses, a TOML file, a preset and flags; later ones take precedence."""

from __future__ import annotations

import functools
import logging
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from torch_impl import _checks
from torch_impl.engine.calibration import CalibrationConfig
from torch_impl.engine.rates import PLAIN, RULES
from torch_impl.engine.reconstruction import ReconstructionConfig
from torch_impl.engine.settings import AdapterConfig, PruneConfig, Settings, TrainingConfig
from torch_impl.experiment.command import Parser, closest, process
from torch_impl.experiment.help import GroupedHelp, document
from torch_impl.experiment.sections import EMBEDDED_MODEL, ModelConfig, OutputConfig, TextConfig
from torch_impl.experiment.text.files import KINDS
from torch_impl.experiment.text.sources import SOURCES
from torch_impl.masks.prune import METHODS

logger = logging.getLogger(__name__)

CONFIGS = Path(__file__).parents[1] / "configs"
# Options whose values are the names in a registry.
REGISTRIES: dict[str, Iterable[str]] = {"prune_method": METHODS, "layer_sparsity": RULES, "calibration_data": SOURCES}
PRESETS = ("paper", "best", "quick")
# Text as in the paper.
EXAMPLE_DATA = {"calibration_data": "c4", "finetune_data": "alpaca-gpt4", "eval_data": "wikitext2"}
# What offloading allows of options that need the model in memory.
OFFLOADED = {"steps": 1, "finetune": False, "loss": "ce", "written_per_sample": 0}


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
        if self.output.baselines and not self.training.finetune:
            raise ValueError(
                f"baselines is {', '.join(self.output.baselines)}, which trains, with finetune False; leave out one of them"
            )
        if self.model.offload == "on" and not self.prune.rule.works_offloaded:
            others = [rule.name for rule in RULES.values() if rule.works_offloaded]
            raise ValueError(
                f"offload is 'on' and layer_sparsity {self.prune.layer_sparsity} needs the whole model in memory; "
                f"use --offload off or another layer_sparsity: {', '.join(others)}"
            )
        if self.model.offload == "on" and self.prune.pattern.structured:
            raise ValueError(
                "offload is 'on' with sparsity_type structured; the smaller model is made in memory: use --offload off"
            )
        if self.model.offload == "on" and (words := in_memory_options(self)):
            given = ", ".join(f"{name} {value}" for name, value in words.items())
            needed = " ".join(f"--{name} {OFFLOADED[name]}".lower() for name in words)
            more = " and a larger --nsamples" if "written_per_sample" in words else ""
            how = "trained on labels" if self.training.compressed else "pruned in one shot"
            more += ", or train over a compressed base: --train_base int8" if "finetune" in words else ""
            raise ValueError(
                f"offload is 'on' with {given}; a model on disk is {how}, on given text: use {needed}{more}"
            )
        if self.model.offload == "on" and self.output.baselines:
            raise ValueError(
                f"baselines is {', '.join(self.output.baselines)} with offload 'on'; it needs the model in memory: leave it "
                "out, or use --offload off"
            )

    @property
    def plain(self) -> bool:
        """Return whether this run works offloaded: one shot without fine-tuning, or over a compressed base, at rates that do not
        need the whole model, on given text, with zeros that are stored."""
        apart = self.prune.rule.works_offloaded and not self.prune.pattern.structured and not self.output.baselines
        return apart and not in_memory_options(self)

    @property
    def settings(self) -> Settings:
        """Return the settings of Algorithm 1."""
        return Settings(
            self.prune, self.adapter, self.calibration, self.training, self.reconstruction, self.output.seed
        )

    @property
    def output_dir(self) -> Path:
        """Return the folder of the result."""
        if self.output.output_dir is not None:
            return Path(self.output.output_dir)
        name = Path(self.model.model).name
        pattern = self.prune.sparsity_type.replace(":", "of")
        amount = f"{self.prune.final_sparsity:g}" if self.prune.group is None else pattern
        return Path(f"losa-{name}-{self.prune.prune_method}-{amount}")

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return plain values by section, for JSON."""
        return asdict(self)


def in_memory_options(config: Config) -> dict[str, int | bool | str]:
    """Return the options that need the whole model in memory, besides the rate rule; `OFFLOADED` has values that do not."""
    # Over a compressed base, an offloaded run trains, but cannot ask the dense model at every micro-batch.
    values: dict[str, int | bool | str] = (
        {"loss": config.training.loss}
        if config.training.compressed
        else {"steps": config.prune.steps, "finetune": config.training.finetune}
    )
    values["written_per_sample"] = config.calibration.written_per_sample
    return {name: value for name, value in values.items() if value != OFFLOADED[name]}


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

RUN_DESCRIPTION = """Prune a language model and restore its quality with LoSA: low-rank adapters that merge without filling zeros.

  losa run                                               prune the embedded model: Wanda, 70 %, two steps
  losa run --model DIR DATA --sparsity_type 2:4          prune your model; keep two of every four weights
  losa run --model DIR DATA --preset best                use the recipe with the lowest perplexity
  losa run --model DIR DATA --steps 1 --finetune false   prune in one shot, without training
  losa plan --config llama_7b --model DIR                show memory and work, and stop
  DATA: --calibration_data c4 --finetune_data alpaca-gpt4 --eval_data wikitext2, or files of yours

"""
PLAN_DESCRIPTION = """Show what a run would do and need: sparsity and ranks of each step, memory, disk and work. Nothing is loaded.

  losa plan                                           plan the run on the embedded model
  losa plan --model DIR DATA --preset best            plan a run on your model, with the options of losa run
  losa plan --model DIR DATA --plan_for "H100 80GB"   does it fit on a GPU that is not here, and how long does it take?
  DATA: --calibration_data c4 --finetune_data alpaca-gpt4 --eval_data wikitext2, or files of yours
"""
EPILOGUE = """
Flags override --preset, --preset overrides --config, and --config overrides the defaults. A configuration file may name a preset,
which its other options override. The groups below are its sections. --help-all also shows the options that are rarely needed.
"""
DESCRIPTIONS = {"losa run": RUN_DESCRIPTION + EPILOGUE, "losa plan": PLAN_DESCRIPTION + EPILOGUE}

# Options that --help leaves out and --help-all shows.
RARE = (
    "channel_multiple", "first_token_weight", "lora_alpha", "lora_r", "initial_rank", "min_rank", "max_rank", "rank_shrink",
    "adapted", "rmi_samples", "calibration_batch_size", "warmup_ratio", "weight_decay", "max_grad_norm", "hold_merged",
    "train_base", "compile_blocks", "cuda_graphs", "reconstruct_batch_size", "step_shares", "eval_protocol", "eval_batch_size",
    "accept_changes", "save_every", "keep_points", "deterministic", "devices",
)  # fmt: skip


class _Parser(Parser, GroupedHelp, HfArgumentParser):  # type: ignore[misc]
    """A parser whose options are the fields of the sections."""


def parse(arguments: Sequence[str], data_required: bool = False, prog: str = "losa run") -> Config:
    """Parse a command line. data_required: a model that is not the embedded one needs text that is named. prog: for --help.

    Errors: ValueError naming option, value and what is allowed; FileNotFoundError for a missing TOML file.
    """
    parser = _make_parser()
    parser.prog, parser.description = prog, DESCRIPTIONS.get(prog, parser.description)
    early = parser.parse_args(list(arguments))
    own = _from_toml(_config_file(early.config)) if early.config is not None else {}
    chosen = {} if early.preset is None else preset_options(early.preset)
    from_file = _with_preset(chosen, own, arguments)
    _tell_replaced(early.preset, chosen, own, arguments)
    steps = early.steps if _names("steps", arguments) else int(chosen.get("steps", ["0"])[0])
    if "step_shares" in from_file and steps and not _names("step_shares", arguments):
        from_file["step_shares"] = shares_again(from_file["step_shares"], steps)
    words = [word for name, values in from_file.items() for word in (f"--{name}", *values)]
    config = Config(*parser.parse_args_into_dataclasses([*words, *arguments], look_for_args_file=False))
    if "layer_sparsity" not in own.keys() - chosen and not _names("layer_sparsity", arguments):
        config = _without_rates(config)
    _ = config.settings, config.text.shares(config.prune.steps)
    if data_required and Path(config.model.model).resolve() != EMBEDDED_MODEL.resolve():
        names = ("calibration_data", *(("finetune_data",) if config.training.finetune else ()), "eval_data")
        _check_given([name for name in names if name not in from_file and not _names(name, arguments)])
    return config


def _with_preset(
    chosen: dict[str, list[str]], own: dict[str, list[str]], arguments: Sequence[str]
) -> dict[str, list[str]]:
    """Complete the user's configuration file: with the preset of the command line, else with the one that it names itself, which it
    overrides; and with the options of the embedded model."""
    found = own | chosen
    if not chosen and "preset" in own:
        found = preset_options(" ".join(own["preset"])) | own
    if "model" not in found and not _names("model", arguments):
        # Its text would calibrate the embedded model, which is another one.
        if {"calibration_data", "finetune_data", "eval_data"} & set(own):
            raise ValueError("the configuration names text and no model; add --model, the folder or hub id of yours")
        found = _from_toml(CONFIGS / "embedded.toml") | found
    return dict(found)


def _tell_replaced(
    preset: str | None, chosen: dict[str, list[str]], own: dict[str, list[str]], arguments: Sequence[str]
) -> None:
    """Log, in process 0, which options of the configuration file the preset of the command line replaces."""
    replaced = [
        f"{name} {' '.join(words)} (file: {' '.join(own[name])})"
        for name, words in chosen.items()
        if own.get(name, words) != words and not _names(name, arguments)
    ]
    if replaced and not process():
        logger.warning(
            "preset %s overrides the configuration file: %s; flags override both", preset, ", ".join(replaced)
        )


def _without_rates(config: Config) -> Config:
    """Choose uniform rates if nothing is trained: rates of their own are part of LoSA, and nobody asked for them. Choose them,
    too, if whole heads and channels go: a smaller model has one size for all blocks.

    A preset does not ask, as it describes the whole method. A mixed pattern does: it needs importances.
    """
    pattern = config.prune.pattern
    if (config.training.finetune and not pattern.structured) or pattern.mixed:
        return config
    return replace(config, prune=replace(config.prune, layer_sparsity=PLAIN))


def warn_of_idle(config: Config, arguments: Sequence[str]) -> None:
    """Log, in process 0, that flags of reconstruction on this command line do nothing without it."""
    names = [item.name for item in fields(ReconstructionConfig) if item.name != "reconstruct_epochs"]
    idle = [name for name in names if _names(name, arguments)]
    if idle and not config.reconstruction.reconstruct_epochs and not process():
        logger.warning("%s: no effect without reconstruction, which --reconstruct_epochs asks for", ", ".join(idle))


def option_names() -> list[str]:
    """Return the names of all options of a run."""
    return [item.name for section in SECTIONS.values() for item in fields(section)]


def preset_options(name: str) -> dict[str, list[str]]:
    """Return the options of a preset, as the words of the command line. Errors: ValueError for an unknown one."""
    _checks.choice("preset", name, PRESETS)
    return _from_toml(CONFIGS / f"preset_{name}.toml")


def _check_given(lacking: Sequence[str]) -> None:
    """Check the text options. Errors: ValueError if some are missing: Python's standard library is only for the embedded model."""
    if lacking:
        examples = " ".join(f"--{name} {EXAMPLE_DATA[name]}" for name in lacking)
        missing = f"{', '.join(lacking[:-1])} and {lacking[-1]} are" if lacking[1:] else f"{lacking[0]} is"
        raise ValueError(
            f"{missing} not given; choose text that suits the model, for example {examples}, or files ({', '.join(KINDS)})"
        )


def _names(option: str, arguments: Sequence[str]) -> bool:
    spellings = (f"--{option}", f"--{option.replace('_', '-')}")
    return any(word.partition("=")[0] in spellings for word in arguments)


def shares_again(shares: list[str], steps: int) -> list[str]:
    """Adapt a file's shares to another number of steps: equal shares stay equal, a single step gets all."""
    equal = len(set(shares)) == 1 or steps == 1
    return [str(1 / steps)] * steps if equal and 1 <= steps != len(shares) else shares


@functools.cache
def _make_parser() -> _Parser:
    descriptions = {}
    for name, section in SECTIONS.items():
        document(section, REGISTRIES)
        section._argument_group_name = name  # type: ignore[attr-defined]
        descriptions[name] = str(section.__doc__)
    parser = _Parser(list(SECTIONS.values()), prog="losa run", description=DESCRIPTIONS["losa run"])  # type: ignore[arg-type]
    parser.describe_groups(RARE, descriptions)
    return parser


def _config_file(name: str) -> Path:
    """Find a TOML file by its path, or a shipped one by its name. Errors: FileNotFoundError if there is none."""
    shipped = {path.stem: path for path in sorted(CONFIGS.glob("llama_*.toml"))}
    path = Path(name)
    if path.is_file():
        return path
    if name.removesuffix(".toml") not in shipped:
        raise FileNotFoundError(
            f"config {name} does not exist; give a TOML file or one of {', '.join(shipped)}{closest(name, shipped)}"
        )
    return shipped[name.removesuffix(".toml")]


def _from_toml(path: Path) -> dict[str, list[str]]:
    """Read a TOML file (option = value, in sections or not) as the command-line words of each option."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config {path} is not TOML: {error}") from error
    known = set(option_names()) - {"config"}
    words: dict[str, list[str]] = {}
    for name, value in table.items():
        entries = value.items() if isinstance(value, dict) else [(name, value)]
        for key, entry in entries:
            if key not in known or isinstance(entry, dict):
                raise ValueError(f"config {path}: {key!r} is not an option{closest(key, sorted(known))}; see --help")
            words[key] = [str(value) for value in entry] if isinstance(entry, list) else [str(entry)]
    return words
