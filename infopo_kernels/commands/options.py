"""The options of `train`: TRL's, InfoPO's, and a few more; checked before data and model are loaded."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import torch
import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from infopo_kernels.commands.cli import SHORT_NAMES, SHORT_VALUES, expand
from infopo_kernels.commands.errors import OneSentence, UserError, one_line, user_errors
from infopo_kernels.commands.resume import LAST
from infopo_kernels.commands.smollm2 import SMOLLM2
from infopo_kernels.integrations.adapters import WAYS
from infopo_kernels.integrations.trl import InfoPOConfig, option


@dataclass
class TrainArguments(ScriptArguments):  # type: ignore[misc, unused-ignore]
    """TRL's script arguments, and those that this command adds."""

    dataset_name: str | None = option(None, "A JSONL file of preference pairs, or a dataset of the hub.")
    eval_dataset_name: str | None = option(None, "Pairs to score: a JSONL file, or a dataset of the hub.")
    held_out: int = option(0, "Score this many pairs of the dataset instead of training on them.")
    skip_bad_rows: bool = option(False, "Leave rows out that cannot be used, instead of refusing the file.")
    overwrite: bool = option(False, "Write into an output directory that is not empty.")
    merge_adapter: bool = option(False, "Save the merged model instead of the adapter.")
    adapter: str | None = option(
        None,
        "What becomes of an adapter in the model's directory: continue (train it on), merge (into the weights, before "
        "training), refuse. Default: continue with --use_peft, else refuse; precompute-reference: continue.",
    )


DEFAULTS: Final[dict[str, Any]] = {
    "output_dir": None,
    "learning_rate": 1e-5,
    "num_train_epochs": 1.0,
    "per_device_train_batch_size": 4,
    "warmup_steps": 0.1,
    "lora_alpha": None,
    "lora_target_modules": "all-linear",
    "report_to": "none",
    "log_level_replica": "error",
    "dataloader_pin_memory": torch.cuda.is_available(),
    "use_cpu": not torch.accelerator.is_available(),
    **({} if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else {"bf16": False}),
}
"""Where TRL's defaults do not fit: 1e-6 and three epochs are for DPO's weak pull, eight pairs for a GPU's memory,
bfloat16 for units that have it; PEFT's own choice of layers leaves most of a model out; memory is pinned for a GPU.
Without `use_cpu` processes on a machine without GPUs would not join in one group: each would train by itself."""

_EPILOG: Final = """\
data: a JSONL file holds one JSON object a line, in TRL's preference format:
  {{"prompt": "...", "chosen": "...", "rejected": "..."}}            strings, or
  {{"prompt": [messages], "chosen": [messages], "rejected": [...]}}  conversations, rendered by the chat template
without `prompt`, it is what `chosen` and `rejected` begin with.

output: the model (or the LoRA adapter) and its tokenizer, metrics.jsonl, trainer_state.json, checkpoints.

model: a directory, an id of the hub, or {smollm2!r} (the model of the demo).

short names, and what they stand for:
{short_names}

defaults that differ from TRL's: {defaults}; lora_alpha is twice lora_r.
With pairs to score and --eval_strategy no, they are scored before and after training.
--resume_from_checkpoint DIR goes on from a checkpoint; without DIR, from the last whole one in output_dir, or from the
start if there is none yet.

several devices:
  torchrun --nproc-per-node 8 -m infopo_kernels train ...
  accelerate launch --config_file examples/accelerate/fsdp2.yaml -m infopo_kernels train ..."""

_POSITIVE: Final = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size")
_POSITIVE_OR_UNSET: Final = ("max_length", "save_steps", "eval_steps", "gradient_accumulation_steps", "lora_r")
_NOT_NEGATIVE: Final = ("held_out", "weight_decay", "max_grad_norm", "warmup_steps", "seed")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class _Parser(OneSentence, TrlParser):  # type: ignore[misc, unused-ignore]
    pass


_DESCRIPTION: Final = """\
Tune a causal language model on preference pairs with InfoPO, without ever forming its logits: infopo_kernels in the
place of the loss of `trl dpo`, with its options, YAML files (--config FILE), trackers, checkpoints and launchers."""


def make_parser(
    prog: str = "python -m infopo_kernels train",
    names: Mapping[str, str] = SHORT_NAMES,
    description: str = _DESCRIPTION,
) -> TrlParser:
    """TRL's parser over its own options, `InfoPOConfig` and `TrainArguments`; `names` are the short ones."""
    names = {
        **names,
        **{" ".join(pair): long or "nothing: it is the default" for pair, long in SHORT_VALUES.items()},
    }
    epilog = _EPILOG.format(
        smollm2=SMOLLM2,
        short_names="\n".join(f"  {name:<15}{long.format('...')}" for name, long in names.items()),
        defaults=", ".join(f"{name} {value}" for name, value in DEFAULTS.items() if value is not None),
    )
    parser = _Parser(
        (TrainArguments, InfoPOConfig, ModelConfig, DatasetMixtureConfig),
        prog=prog,
        usage="%(prog)s --model_name_or_path M --dataset_name D --output_dir O [options] [--config FILE.yaml]",
        description=description,
        epilog=epilog,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.set_defaults(**DEFAULTS)
    for action in parser._actions:
        if action.dest == "resume_from_checkpoint":
            action.nargs, action.const = "?", LAST[0]
    return parser


def parse(
    words: Sequence[str],
    prog: str,
    *,
    names: Mapping[str, str] = SHORT_NAMES,
    needed: Sequence[str] = ("dataset_name", "output_dir", "model_name_or_path"),
    description: str = _DESCRIPTION,
) -> tuple[TrainArguments, InfoPOConfig, ModelConfig, DatasetMixtureConfig]:
    """The options, checked as far as they can be without data and model.

    Args:
        words: of the command line.
        prog: what --help calls the command.
        names: its short names (see `cli.expand`).
        needed: options that have to be given.
        description: for --help.

    Raises:
        UserError: an option is unknown, wrong, or contradicts another.
    """
    parser = make_parser(prog, names, description)
    expanded = expand(words, names)
    if expanded[-1:] == ["--config"]:
        parser.error("--config expects a file")
    with user_errors():
        try:
            found = parser.parse_args_and_config(expanded, return_remaining_strings=True)
        except yaml.YAMLError as error:
            raise UserError(f"--config: is not YAML: {one_line(error)}") from None
        script, config, model, mixture, unknown = found
        if unknown:
            parser.error(f"unknown option: {' '.join(unknown)}")
        _check(script, config, model, mixture, names, needed)
    return script, config, model, mixture


def _check(
    script: TrainArguments,
    config: InfoPOConfig,
    model: ModelConfig,
    mixture: DatasetMixtureConfig,
    names: Mapping[str, str],
    needed: Sequence[str],
) -> None:
    """Refuse numbers out of range, options that are missing and options that contradict each other."""
    values = {**vars(script), **vars(config), **vars(model)}
    ranges = [
        *((name, values[name] > 0, "a number above 0") for name in _POSITIVE),
        *((name, values[name] is None or values[name] > 0, "a number above 0") for name in _POSITIVE_OR_UNSET),
        *((name, values[name] >= 0, "a number from 0") for name in _NOT_NEGATIVE),
        ("max_steps", config.max_steps > 0 or config.max_steps == -1, "a whole number from 1 (-1: no limit)"),
    ]
    for name, fits, expected in ranges:
        if not fits or values[name] == float("inf"):
            raise UserError(f"--{name}: expected {expected}, got {values[name]}")
    for name, value in (("dataset_name", script.dataset_name or mixture.datasets), ("output_dir", config.output_dir),
                        ("model_name_or_path", model.model_name_or_path)):  # fmt: skip
        if name in needed and not value:
            short = next(short for short, long in names.items() if long.startswith(f"--{name} "))
            raise UserError(f"--{name} (short: {short}) is needed (see --help)")
    if script.adapter is not None and script.adapter not in WAYS:
        raise UserError(f"--adapter: expected one of {', '.join(WAYS)}, got {script.adapter}")
    if script.held_out and script.eval_dataset_name is not None:
        raise UserError("--held_out and --eval_dataset_name were both given; pass one of them")
    if not model.use_peft:
        given = [each.name for each in fields(ModelConfig) if "lora" in each.name or "dora" in each.name]
        changed = [name for name in given if getattr(model, name) != DEFAULTS.get(name, getattr(ModelConfig, name))]
        if changed or script.merge_adapter:
            name = (changed or ["merge_adapter"])[0]
            raise UserError(
                f"--{name} has no meaning without --use_peft (short: --lora-rank R); add it, or leave it out"
            )
    if model.lora_alpha is None:
        model.lora_alpha = 2 * model.lora_r
