"""`python -m infopo_kernels train`: `trl dpo` with `InfoPOTrainer`, and JSONL files of pairs as datasets."""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, NoReturn

import datasets
import torch
import transformers
from accelerate import PartialState
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, ProcessorMixin
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from infopo_kernels.commands.cli import SHORT_NAMES, SHORT_VALUES, expand
from infopo_kernels.commands.errors import UserError, one_line, user_errors
from infopo_kernels.commands.metrics_file import MetricsFile
from infopo_kernels.commands.report import evaluation_table
from infopo_kernels.commands.smollm2 import SMOLLM2, smollm2_directory
from infopo_kernels.integrations.trl import InfoPOConfig, InfoPOTrainer
from infopo_kernels.reference_logps import ReferenceTable
from infopo_kernels.training.data import Preference, read_preferences
from infopo_kernels.training.tokens import tokenize


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class TrainArguments(ScriptArguments):  # type: ignore[misc, unused-ignore]
    """TRL's script arguments, and what this command adds."""

    dataset_name: str | None = _option(None, "A JSONL file of preference pairs, or a dataset of the hub.")
    eval_dataset_name: str | None = _option(None, "Pairs to score: a JSONL file, or a dataset of the hub.")
    held_out: int = _option(0, "Score this many pairs of the dataset instead of training on them.")
    skip_bad_rows: bool = _option(False, "Leave rows out that cannot be used, instead of refusing the file.")
    overwrite: bool = _option(False, "Write into an output directory that is not empty.")
    merge_adapter: bool = _option(False, "Save the merged model instead of the adapter.")


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
    **({} if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else {"bf16": False}),
}
"""Where TRL's defaults do not fit: 1e-6 and three epochs are for DPO's weak pull, eight pairs for a GPU's memory,
bfloat16 for units that have it; PEFT's own choice of layers leaves most of a model out."""

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

_LAST: Final = ("last", "true", "True")
"""Values of --resume_from_checkpoint that mean the newest checkpoint of the output directory."""

_POSITIVE: Final = ("learning_rate", "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size")
_POSITIVE_OR_UNSET: Final = ("max_length", "save_steps", "eval_steps", "gradient_accumulation_steps", "lora_r")
_NOT_NEGATIVE: Final = ("held_out", "weight_decay", "max_grad_norm", "warmup_steps", "seed")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class _Parser(TrlParser):  # type: ignore[misc, unused-ignore]
    """Says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{one_line(message)} (see --help)")


def make_parser(prog: str = "python -m infopo_kernels train") -> TrlParser:
    """TRL's parser over its own options, `InfoPOConfig` and `TrainArguments`."""
    names = {**SHORT_NAMES, **{" ".join(pair): long or "nothing: it is the default" for pair, long in SHORT_VALUES.items()}}
    epilog = _EPILOG.format(
        smollm2=SMOLLM2,
        short_names="\n".join(f"  {name:<15}{long.format('...')}" for name, long in names.items()),
        defaults=", ".join(f"{name} {value}" for name, value in DEFAULTS.items() if value is not None),
    )
    parser = _Parser(
        (TrainArguments, InfoPOConfig, ModelConfig, DatasetMixtureConfig),
        prog=prog,
        description="Tune a causal language model on preference pairs with InfoPO, without ever forming its logits: "
        "infopo_kernels in the place of the loss of `trl dpo`, with its options, YAML files (--config FILE), trackers, "
        "checkpoints and launchers.",
        epilog=epilog,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.set_defaults(**DEFAULTS)
    for action in parser._actions:
        if action.dest == "resume_from_checkpoint":
            action.nargs, action.const = "?", _LAST[0]
    return parser


def parse(words: Sequence[str], prog: str) -> tuple[TrainArguments, InfoPOConfig, ModelConfig, DatasetMixtureConfig]:
    """The options, checked as far as they can be without data and model.

    Raises:
        UserError: an option is unknown, wrong, or contradicts another.
    """
    parser = make_parser(prog)
    with user_errors():
        script, config, model, mixture, unknown = parser.parse_args_and_config(
            expand(words), return_remaining_strings=True
        )
    if unknown:
        parser.error(f"unknown option: {' '.join(unknown)}")
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
        if not value:
            short = next(short for short, long in SHORT_NAMES.items() if long.startswith(f"--{name} "))
            raise UserError(f"--{name} (short: {short}) is needed (see --help)")
    if script.held_out and script.eval_dataset_name is not None:
        raise UserError("--held_out and --eval_dataset_name were both given; pass one of them")
    if not model.use_peft:
        given = [each.name for each in fields(ModelConfig) if "lora" in each.name or "dora" in each.name]
        changed = [name for name in given if getattr(model, name) != DEFAULTS.get(name, getattr(ModelConfig, name))]
        if changed or script.merge_adapter:
            name = (changed or ["merge_adapter"])[0]
            raise UserError(f"--{name} has no meaning without --use_peft (short: --lora-rank R); add it, or leave it out")
    if model.lora_alpha is None:
        model.lora_alpha = 2 * model.lora_r
    return script, config, model, mixture


def is_file(name: str | None) -> bool:
    """Whether a dataset's name is that of a local file of pairs."""
    return name is not None and (Path(name).is_file() or Path(name).suffix in (".jsonl", ".json"))


def load_model_files(model: ModelConfig, config: InfoPOConfig) -> Any:
    """The model's tokenizer, after `smollm2` has become a directory; a model that is not there is refused here.

    Raises:
        UserError: there is no such model.
    """
    name = str(model.model_name_or_path)
    if name == SMOLLM2 and not Path(name).exists():
        model.model_name_or_path = str(smollm2_directory())
    options = {"revision": model.model_revision, "trust_remote_code": config.trust_remote_code}
    with user_errors(
        f"`--model_name_or_path {name}` cannot be loaded; pass a directory written by save_pretrained, the id of a "
        f"causal language model on the hub, or {SMOLLM2!r}. Reason: "
    ):
        AutoConfig.from_pretrained(model.model_name_or_path, **options)
        return AutoProcessor.from_pretrained(model.model_name_or_path, **options)


class Data:
    """Pairs to train on and pairs to score, read in two steps: text before a model is looked for, then tokens."""

    def __init__(self, script: TrainArguments, config: InfoPOConfig, mixture: DatasetMixtureConfig) -> None:
        """Read and check the text.

        Raises:
            UserError: a file or a dataset cannot be read; of a file, with line and field.
        """
        self._script, self._config, self._mixture = script, config, mixture
        self._train = self._read(script.dataset_name)
        self._eval = self._read(script.eval_dataset_name)
        if config.eval_strategy != "no" and is_file(script.dataset_name) and not self.has_eval:
            raise UserError(
                f"--eval_strategy {config.eval_strategy} needs pairs to score; add --held_out N or "
                f"--eval_dataset_name FILE"
            )

    @property
    def has_eval(self) -> bool:
        """Whether pairs to score were named."""
        return bool(self._script.held_out) or self._script.eval_dataset_name is not None

    def _read(self, name: str | None) -> list[Preference] | None:
        if not is_file(name):
            return None
        with user_errors():
            return read_preferences(str(name))

    def datasets(self, processor: Any) -> tuple[Any, Any]:
        """Datasets to train on and to score (None: none); pairs of files are tokenised here, others by the trainer.

        Raises:
            UserError: nothing is left to train on, or a split does not exist.
        """
        script, config = self._script, self._config
        tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
        with user_errors():
            train, test = self._one(self._train, script.dataset_name, tokenizer)
            if script.held_out:
                if isinstance(train, datasets.IterableDataset):
                    raise UserError("--held_out does not go with a stream; pass --eval_dataset_name")
                if script.held_out >= len(train):
                    raise UserError(
                        f"--held_out {script.held_out}: leaves nothing to train on, {script.dataset_name} has "
                        f"{len(train)} pairs"
                    )
                parts = train.train_test_split(test_size=script.held_out, seed=config.seed)
                return parts["train"], parts["test"]
            if script.eval_dataset_name is not None:
                return train, self._one(self._eval, script.eval_dataset_name, tokenizer)[1]
            return train, test

    def _one(self, pairs: list[Preference] | None, name: str | None, tokenizer: Any) -> tuple[Any, Any]:
        """The training and the test split of one name; of a file both are the file."""
        script, config = self._script, self._config
        if pairs is not None:
            data = tokenize(tokenizer, pairs, config.max_length)
            if data.truncated or data.dropped:
                _say(
                    f"{name}, --max_length {config.max_length}: {data.truncated} pairs were cut at the end, "
                    f"{data.dropped} left out because nothing to compare was left of them."
                )
            rows = [{"prompt_ids": e.prompt, "chosen_ids": e.chosen, "rejected_ids": e.rejected} for e in data.examples]
            whole = datasets.Dataset.from_list(rows)
            return whole, whole if name == script.eval_dataset_name else None
        if self._mixture.datasets and name == script.dataset_name:
            splits = get_dataset(self._mixture)
        else:
            splits = datasets.load_dataset(name, name=script.dataset_config, streaming=script.dataset_streaming)
        wanted = config.eval_strategy != "no" or name == script.eval_dataset_name
        for split, needed in ((script.dataset_train_split, name != script.eval_dataset_name),
                              (script.dataset_test_split, wanted and not script.held_out)):  # fmt: skip
            if needed and split not in splits:
                raise UserError(f"{name}: has no split {split!r}, only {', '.join(splits)}")
        return splits.get(script.dataset_train_split), splits.get(script.dataset_test_split) if wanted else None


def prepare_output(directory: Path, *, overwrite: bool) -> None:
    """Refuse an output directory that holds something, or cannot be written; make it.

    Raises:
        UserError: see above.
    """
    state = PartialState()
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise UserError(
            f"--output_dir {directory}: is not empty; pass another directory, --overwrite to write into it, or "
            f"--resume_from_checkpoint to go on with it"
        )
    state.wait_for_everyone()  # nobody writes before everybody has looked
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(f"--output_dir {directory}: cannot be written: {error.strerror}") from None


def last_checkpoint(directory: Path, processes: int) -> Path | None:
    """The newest whole checkpoint in `directory`; None if there is none.

    The trainer writes the state last, and each process its own random state: a run that was killed while it saved
    leaves a checkpoint without one of them. If no checkpoint has random states for `processes` (their number was
    changed), the newest one with a state is taken.
    """
    found = sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    whole = [path for path in found if _state_is_whole(path / "trainer_state.json")]
    names = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
    same = [path for path in whole if all((path / name).exists() for name in names)]
    return next(iter(same or whole), None)


def _state_is_whole(path: Path) -> bool:
    try:
        return "global_step" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _resume(config: InfoPOConfig) -> str | None:
    """The checkpoint that the options name, or None to begin."""
    named = config.resume_from_checkpoint
    if named is None:
        return None
    if named in _LAST:
        found = last_checkpoint(Path(config.output_dir), config.world_size)
        _say(f"Going on from {found}." if found else f"{config.output_dir} holds no checkpoint yet: beginning.")
        return None if found is None else str(found)
    if not _state_is_whole(Path(named) / "trainer_state.json"):
        raise UserError(
            f"--resume_from_checkpoint {named}: is not a whole checkpoint (no trainer_state.json to read); pass a "
            f"directory OUTPUT/checkpoint-STEP, or no directory for the last one"
        )
    return str(named)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _say(text: str) -> None:
    """One line, from the first process."""
    if _is_main():
        print(text, flush=True)


def _quiet_other_processes() -> None:
    if not _is_main():
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        datasets.utils.logging.set_verbosity_error()
        datasets.disable_progress_bars()
        warnings.simplefilter("ignore")


def _check_references(config: InfoPOConfig, train: Any) -> None:
    """A file of reference log-probabilities that does not fit is refused before the model is loaded."""
    if config.reference_logps is None or isinstance(train, datasets.IterableDataset):
        return
    with user_errors("--reference_logps "):
        table = ReferenceTable.read(config.reference_logps)
        table.check_options(
            average=config.average, max_length=config.max_length, skip_chosen=config.skip_chosen_reference
        )
        if "chosen_ids" in train.column_names:
            for row in train:
                table.lookup(row)


def main(words: Sequence[str], prog: str) -> None:
    """Read, check, load, train, save, report.

    Raises:
        UserError: something that the user can put right.
    """
    _quiet_other_processes()
    script, config, model, mixture = parse(words, prog)
    data = Data(script, config, mixture)
    processor = load_model_files(model, config)
    train, test = data.datasets(processor)
    _check_references(config, train)
    prepare_output(
        Path(config.output_dir), overwrite=script.overwrite or config.resume_from_checkpoint is not None
    )
    checkpoint = _resume(config)
    if data.has_eval and config.eval_strategy == "no":
        config.eval_on_start = checkpoint is None
    trainer = make_trainer(model, config, processor, train, test)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if script.merge_adapter and sharded:
        raise UserError("--merge_adapter does not go with sharded weights; save the adapter, merge it on one device")
    pairs = "a stream of pairs" if isinstance(train, datasets.IterableDataset) else f"{len(trainer.train_dataset)} pairs"
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    _say(
        f"{' + '.join(config.loss_type)} on {pairs}: {batch} pairs a step on {config.world_size} "
        f"{'process' if config.world_size == 1 else 'processes'}, lr {config.learning_rate:g}, beta {config.beta:g}."
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if data.has_eval and config.eval_strategy == "no":
        trainer.evaluate()
    save(trainer, merge_adapter=script.merge_adapter)
    if _is_main() and test is not None:
        from rich.console import Console

        # rich takes 80 columns where it cannot ask a terminal; the table needs more.
        console = Console(width=None if sys.stdout.isatty() else 120)
        console.print(evaluation_table({"held out": trainer.state.log_history}))
    _say(f"The {'adapter' if model.use_peft and not script.merge_adapter else 'model'} is in {config.output_dir}.")
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    trainer.accelerator.end_training()


def make_trainer(model: ModelConfig, config: InfoPOConfig, processor: Any, train: Any, test: Any) -> InfoPOTrainer:
    """The trainer, as `trl dpo` builds it.

    Raises:
        UserError: model, data and options do not go together.
    """
    config.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(config.model_init_kwargs or {}),
    }
    if model.dtype in ("bfloat16", "float16") and not model.use_peft:
        _say(
            f"--dtype {model.dtype}: the weights that are trained have this type, and small updates are lost in it; "
            f"--dtype float32 --bf16 keeps them and computes in bfloat16."
        )
    with user_errors():
        return InfoPOTrainer(
            model=model.model_name_or_path,
            args=config,
            train_dataset=train,
            eval_dataset=test,
            processing_class=processor,
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
            callbacks=[MetricsFile(Path(config.output_dir) / "metrics.jsonl")],
        )


def save(trainer: InfoPOTrainer, *, merge_adapter: bool) -> None:
    """Model or adapter, tokenizer, and the trainer's state."""
    trainer.save_state()
    if not merge_adapter:
        trainer.save_model(trainer.args.output_dir)
    elif trainer.accelerator.is_main_process:
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        merged.save_pretrained(trainer.args.output_dir)
        trainer.processing_class.save_pretrained(trainer.args.output_dir)
