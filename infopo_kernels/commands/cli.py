"""The command line: `python -m infopo_kernels COMMAND`. A command is imported when it is run."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Final

from infopo_kernels import __version__
from infopo_kernels.commands.errors import UserError

COMMANDS: Final = {
    "train": ("infopo_kernels.commands.train", "tune your model on your preference pairs, on one device or many"),
    "precompute-reference": (
        "infopo_kernels.commands.precompute_reference",
        "compute reference log-probabilities ahead of time, beside the data",
    ),
    "demo": (
        "infopo_kernels.commands.demo.command",
        "tune SmolLM2-135M-Instruct with InfoPO and with DPO, side by side, in a few minutes",
    ),
    "info": ("infopo_kernels.commands.info", "versions, and which backends can run here"),
}
"""Name of each command, the module whose `main(words, prog)` runs it, and what it does."""

_NEEDED: Final = {
    "train": ("transformers", "trl", "peft", "datasets", "rich"),
    "precompute-reference": ("transformers", "trl", "datasets", "rich"),
    "demo": ("transformers", "trl", "datasets", "rich", "matplotlib"),
    "info": (),
}
"""Packages of the extra `train` that a command needs."""

SHORT_NAMES: Final = {
    "--model": "--model_name_or_path {}",
    "--data": "--dataset_name {}",
    "--eval-data": "--eval_dataset_name {}",
    "--output": "--output_dir {}",
    "--loss": "--loss_type {}",
    "--lr": "--learning_rate {}",
    "--steps": "--max_steps {}",
    "--batch": "--per_device_train_batch_size {}",
    "--accumulate": "--gradient_accumulation_steps {}",
    "--warmup": "--warmup_steps {}",
    "--schedule": "--lr_scheduler_type {}",
    "--lora-rank": "--use_peft --lora_r {}",
    "--eval-every": "--eval_strategy steps --eval_steps {}",
    "--save-every": "--save_strategy steps --save_steps {}",
}
"""Short names of `train`, and the options of TRL that each stands for; {} is the value that follows the name."""

SHORT_VALUES: Final = {
    ("--loss", "dpo"): "--loss_type sigmoid",
    ("--device", "auto"): "",
    ("--device", "cpu"): "--use_cpu",
    ("--device", "cuda"): "",
}
"""Names with a value that TRL calls otherwise. A GPU is taken where there is one; CUDA_VISIBLE_DEVICES says which."""


def expand(words: Sequence[str], names: Mapping[str, str] = SHORT_NAMES) -> list[str]:
    """The words with each name of `names` and `SHORT_VALUES` written out.

    Raises:
        UserError: a short name without its value, or with one that it does not have.
    """
    expanded: list[str] = []
    rest = list(words)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        values = [known for short, known in SHORT_VALUES if short == name]
        if name not in names and not values:
            expanded.append(name + equals + value)
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{name} expects a value (see --help)")
            value = rest.pop(0)
        if (long := SHORT_VALUES.get((name, value), names.get(name))) is None:
            raise UserError(f"{name} expects one of {', '.join(values)}, got {value!r} (see --help)")
        expanded += [word.format(value) for word in long.split()]
    return expanded


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = (f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items())
    return (
        "usage: python -m infopo_kernels COMMAND ...\n\n"
        "Fused LM-head loss for preference training with InfoPO (infopo_kernels): no logits in memory.\n\n"
        "commands (each takes --help):\n" + "\n".join(lines) + "\n\n  --version  print the version"
    )


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; the exit code: 0, 2 for bad input, 130 if interrupted."""
    words = list(sys.argv[1:] if words is None else words)
    name = words[0] if words else None
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name == "--version":
        print(f"infopo_kernels {__version__}")
        return 0
    try:
        if name not in COMMANDS:
            raise UserError(
                f"{'expected a COMMAND' if name is None else f'there is no command {name!r}'}; choose one of "
                f"{', '.join(COMMANDS)} (see --help)"
            )
        _run(name, words[1:])
    except UserError as error:
        # Ranks of one machine fail alike: its first one speaks for all.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{name or 'infopo_kernels'}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(name: str, words: list[str]) -> None:
    missing = [package for package in _NEEDED[name] if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"needs the package `{missing[0]}`; run: pip install 'infopo_kernels[train]'")
    importlib.import_module(COMMANDS[name][0]).main(words, f"python -m infopo_kernels {name}")
