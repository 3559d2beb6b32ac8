"""`python -m infopo_kernels train`: `trl dpo` with `InfoPOTrainer`, and JSONL files of pairs as datasets."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from trl import ModelConfig, get_peft_config, get_quantization_config

from infopo_kernels.commands.console import is_main, quiet_other_processes, say, wide_console
from infopo_kernels.commands.data import Data
from infopo_kernels.commands.errors import UserError, one_line, user_errors
from infopo_kernels.commands.metrics_file import MetricsFile
from infopo_kernels.commands.options import parse
from infopo_kernels.commands.policy import check_adapter, init_options, load_model_files, load_start
from infopo_kernels.commands.report import evaluation_table
from infopo_kernels.commands.resume import checkpoint_to_resume
from infopo_kernels.integrations.preferences import check_features
from infopo_kernels.integrations.references import ReferenceTable
from infopo_kernels.integrations.trl import InfoPOConfig, InfoPOTrainer


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


def check_references(config: InfoPOConfig, train: Any, test: Any) -> None:
    """Refuse a file of reference log-probabilities that does not fit, before the model is loaded.

    A file without chosen references sets `skip_chosen_reference`, and says so.

    Raises:
        UserError: the file is none, or was made for other data or options, or lacks what the loss needs.
    """
    if config.reference_logps is None:
        return
    with user_errors("--reference_logps "):
        table = ReferenceTable.read(config.reference_logps)
        if table.header.skip_chosen and config.objective().reference == "all":
            raise UserError(
                f"{table.path}: holds no chosen references, and the gradients of --loss_type {config.loss_type[0]} "
                f"need them; compute it again without --skip_chosen_reference"
            )
        if table.header.skip_chosen and not config.skip_chosen_reference:
            config.skip_chosen_reference = True
            say(
                f"{table.path} holds no chosen references: gradients are the same, the loss is shifted by a constant, "
                f"and the chosen rewards and the bound are not logged."
            )
        table.check_options(average=config.average, max_length=config.max_length, skip_chosen=True)
        for features, named in ((train, "--dataset_name"), (test, "--eval_dataset_name")):
            if features is None or isinstance(features, datasets.IterableDataset):
                continue
            try:
                for feature in features:
                    table.lookup(feature)
            except ValueError as error:
                raise UserError(f"{error} precompute-reference takes the same {named} as training") from None


def main(words: Sequence[str], prog: str) -> None:
    """Read, check, load, train, save, report.

    Raises:
        UserError: something that the user can put right.
    """
    quiet_other_processes()
    script, config, model, mixture = parse(words, prog)
    data = Data(script, config, mixture)
    processor, model_config = load_model_files(model, config)
    adapter = check_adapter(script, model)
    train, test = data.features(processor, model_config)
    check_references(config, train, test)
    prepare_output(Path(config.output_dir), overwrite=script.overwrite or config.resume_from_checkpoint is not None)
    checkpoint = checkpoint_to_resume(config.resume_from_checkpoint, Path(config.output_dir), config.world_size)
    if data.has_eval and config.eval_strategy == "no":
        config.eval_on_start = checkpoint is None
    if checkpoint is None and is_main():
        metrics_path(config).unlink(missing_ok=True)
    trainer = make_trainer(model, config, processor, train, test, adapter)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if script.merge_adapter and sharded:
        raise UserError("--merge_adapter does not go with sharded weights; save the adapter, merge it on one device")
    pairs = (
        "a stream of pairs" if isinstance(train, datasets.IterableDataset) else f"{len(trainer.train_dataset)} pairs"
    )
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    say(
        f"{' + '.join(config.loss_type)} on {pairs}: {batch} pairs a step on {config.world_size} "
        f"{'process' if config.world_size == 1 else 'processes'}, lr {config.learning_rate:g}, beta {config.beta:g}."
    )
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    except FloatingPointError as error:  # a loss that is not finite: the options cause it, not a bug
        raise UserError(one_line(error)) from error
    if data.has_eval and config.eval_strategy == "no":
        trainer.evaluate()
    save(trainer, merge_adapter=script.merge_adapter)
    if is_main() and test is not None:
        wide_console().print(evaluation_table({"held out": trainer.state.log_history}))
    kept = (model.use_peft or adapter == "continue") and not script.merge_adapter
    say(f"The {'adapter' if kept else 'model'} is in {config.output_dir}.")
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    trainer.accelerator.end_training()


def metrics_path(config: InfoPOConfig) -> Path:
    """The file of the trainer's log."""
    return Path(config.output_dir) / "metrics.jsonl"


def make_trainer(
    model: ModelConfig, config: InfoPOConfig, processor: Any, train: Any, test: Any, adapter: str = "refuse"
) -> InfoPOTrainer:
    """The trainer, as `trl dpo` builds it; `adapter`: see `check_adapter`.

    Raises:
        UserError: model, data and options do not go together.
    """
    config.model_init_kwargs = init_options(model, config)
    if model.dtype in ("bfloat16", "float16") and not model.use_peft:
        say(
            f"--dtype {model.dtype}: the weights that are trained have this type, and small updates are lost in it; "
            f"--dtype float32 --bf16 keeps them and computes in bfloat16."
        )
    start: Any = model.model_name_or_path
    reference = None
    if adapter != "refuse":
        merged_into = Path(config.output_dir) / "merged" if model.use_peft else None
        start = load_start(adapter, model, config, merged_into=merged_into)
        config.model_init_kwargs = None  # the model is here
        if adapter == "merge" and not model.use_peft and not config.precompute_ref_log_probs:
            reference = copy.deepcopy(start)  # TRL would load it by its name, which is that of the adapter
        with user_errors():
            check_features(train if isinstance(train, datasets.Dataset) else (), start)
    with user_errors():
        return InfoPOTrainer(
            model=start,
            ref_model=reference,
            args=config,
            train_dataset=train,
            eval_dataset=test,
            processing_class=processor,
            quantization_config=get_quantization_config(model) if adapter == "refuse" else None,
            peft_config=get_peft_config(model) if adapter != "continue" else None,
            callbacks=[MetricsFile(metrics_path(config))],
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
