"""`python -m infopo_kernels precompute-reference`: score pairs with the model that training starts from, once.

The options, the data and the model are those of `train`, so that one YAML file serves both. Each process holds the
whole model and scores its share of the pairs; the first one writes (`infopo_kernels.integrations.references` has the
format).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from trl import ModelConfig

from infopo_kernels.commands.cli import SHORT_NAMES
from infopo_kernels.commands.console import is_main, quiet_other_processes, say
from infopo_kernels.commands.data import Data
from infopo_kernels.commands.errors import UserError, user_errors
from infopo_kernels.commands.options import TrainArguments, parse
from infopo_kernels.commands.policy import check_adapter, load_model_files, load_start, saved_adapter
from infopo_kernels.integrations.collators import PreferenceCollator, pad_token_id
from infopo_kernels.integrations.preferences import Feature, by_feature, check_features
from infopo_kernels.integrations.references import (
    Header,
    Values,
    data_fingerprint,
    model_identity,
    pair_key,
    pair_line,
    read_part,
    type_name,
)
from infopo_kernels.integrations.step import reference_logps
from infopo_kernels.integrations.transformers import attach_linear_logps
from infopo_kernels.integrations.trl import InfoPOConfig

_NAMES: Final = {
    **SHORT_NAMES,
    "--output": "--reference_logps {}",
    "--batch": "--precompute_ref_batch_size {}",
}
_BATCH: Final = 8
"""Pairs that a process scores at once where --precompute_ref_batch_size is not given."""

_DESCRIPTION: Final = """\
Score preference pairs with the model that training starts from, once, so that training needs no reference model:
train with --reference_logps FILE then. Takes the options of `train`, so that one YAML file (--config) serves both; what
counts here: model and data, --max_length, --average, --skip_chosen_reference, --adapter, --dtype, --bf16, --use_cpu,
--precompute_ref_batch_size, --overwrite, and --reference_logps, the file to write (default: FILE.reference.jsonl beside
the data). A run that was killed goes on where it was when it is started again."""


def main(words: Sequence[str], prog: str) -> None:
    """Read, check, load, score, write.

    Raises:
        UserError: something that the user can put right.
    """
    quiet_other_processes()
    script, config, model, mixture = parse(
        words, prog, names=_NAMES, needed=("dataset_name", "model_name_or_path"), description=_DESCRIPTION
    )
    if config.reference_free:
        raise UserError("--reference_free: there is no reference to compute; leave it out")
    path = _path(script, config)
    data = Data(script, config, mixture)
    processor, model_config = load_model_files(model, config)
    train, test = data.features(processor, model_config)
    if any("chosen_ids" not in feature for part in (train, test) if part is not None for feature in part):
        raise UserError(f"--dataset_name {script.dataset_name}: holds images; references ahead of time are for text")
    with user_errors():
        features = {pair_key(feature): feature for part in (train, test) if part is not None for feature in part}
    policy = _load(script, model, config)
    dtype = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else policy.dtype
    with user_errors():
        check_features(features.values(), policy)
        weights, adapter = model_identity(policy)
    header = Header(
        model=weights, adapter=adapter, dtype=type_name(dtype), data=data_fingerprint(features), pairs=len(features),
        max_length=config.max_length, average=config.average, skip_chosen=config.skip_chosen_reference,
    )  # fmt: skip
    done = _begin(path, header, overwrite=script.overwrite)
    if done:
        say(f"{path} holds {done} of {len(features)} pairs already.")
    scorer = _Scorer(policy, PreferenceCollator(pad_token_id=pad_token_id(processor)), config, dtype)
    # The file's order is the data's, so that what is done is a prefix.
    _score_rest(path, list(features.items())[done:], scorer, config.precompute_ref_batch_size or _BATCH)
    on = f", with its adapter {adapter}" if adapter else ""
    say(f"{len(features)} pairs, scored by {model.model_name_or_path}{on} in {header.dtype}, are in {path}.")


def _path(script: TrainArguments, config: InfoPOConfig) -> Path:
    if config.reference_logps is not None:
        return Path(config.reference_logps)
    if not Path(str(script.dataset_name)).exists():
        raise UserError("--reference_logps FILE (short: --output) is needed where the data is not a local file")
    return Path(str(script.dataset_name)).with_suffix(".reference.jsonl")


def _load(script: TrainArguments, model: ModelConfig, config: InfoPOConfig) -> Any:
    """The reference, attached, in evaluation mode, on this process's device."""
    if saved_adapter(model) is not None and script.adapter is None:
        script.adapter = "continue"  # what training goes on from is scored as it is
    policy = load_start(check_adapter(script, model), model, config, trainable=False)
    with user_errors():
        attach_linear_logps(policy, kernel=config.kernel_options())
    return policy.eval().to(PartialState().device)


def _begin(path: Path, header: Header, *, overwrite: bool) -> int:
    """Make the file, or count the pairs that an earlier run has scored. One process looks and tells the others.

    Raises:
        UserError: there is another file, or it cannot be written.
    """
    answer: list[Any] = [None]
    if is_main():
        try:
            answer = [_prepare(path, header, overwrite=overwrite)]
        except (OSError, ValueError) as error:
            answer = [f"--reference_logps {error}"]
    if PartialState().num_processes > 1:
        broadcast_object_list(answer)
    if isinstance(answer[0], str):
        raise UserError(answer[0])
    return int(answer[0])


def _prepare(path: Path, header: Header, *, overwrite: bool) -> int:
    if overwrite or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(header)) + "\n", encoding="utf-8")
        return 0
    try:
        found, values, end = read_part(path)
    except ValueError as error:
        raise ValueError(f"{error} Pass another path, or --overwrite.") from None
    if differing := [name for name, value in asdict(header).items() if asdict(found)[name] != value]:
        raise ValueError(f"{path}: was made from another {', '.join(differing)}; pass another path, or --overwrite.")
    os.truncate(path, end)
    return len(values)


class _Scorer:
    """The reference pass over a few pairs."""

    def __init__(self, policy: Any, collator: PreferenceCollator, config: InfoPOConfig, dtype: torch.dtype) -> None:
        self._policy = policy
        self._collator = collator
        self._config = config
        self._device = PartialState().device
        low = config.bf16 or config.fp16
        self._autocast = torch.autocast(self._device.type, dtype=dtype) if low else nullcontext()

    def __call__(self, features: Sequence[Feature]) -> list[Values]:
        """The values of each pair."""
        if not features:
            return []
        skip, P = self._config.skip_chosen_reference, len(features)
        batch = self._collator(features)
        inputs = {name: batch[name][P if skip else 0 :].to(self._device) for name in _INPUTS}
        with self._autocast:
            logps = reference_logps(self._policy, inputs, average=self._config.average, skip_chosen=False).tolist()
        chosen, rejected = ([None] * P, logps) if skip else (logps[:P], logps[P:])
        return list(zip(chosen, map(tuple, by_feature(features, rejected)), strict=True))


_INPUTS: Final = ("input_ids", "attention_mask", "labels")


def _score_rest(path: Path, rest: Sequence[tuple[str, Feature]], scorer: _Scorer, batch: int) -> None:
    """Score the pairs in order, `batch` a process at a time, and append them to the file."""
    state = PartialState()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not is_main()) as progress:
        task = progress.add_task("Reference log-probabilities", total=len(rest))
        for start in range(0, len(rest), batch * state.num_processes):
            part = rest[start : start + batch * state.num_processes]
            with state.split_between_processes(list(part)) as own:
                lines = [
                    pair_line(key, values)
                    for (key, _), values in zip(own, scorer([feature for _, feature in own]), strict=True)
                ]
            lines = gather_object(lines)
            if is_main():
                with path.open("a", encoding="utf-8") as file:
                    file.writelines(lines)
            progress.update(task, advance=len(part))
    state.wait_for_everyone()
