"""The pairs for `train`: files and datasets under one option, made into features in one way."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from accelerate import PartialState
from trl import DatasetMixtureConfig, get_dataset

from infopo_kernels.commands.console import say
from infopo_kernels.commands.errors import UserError, user_errors
from infopo_kernels.commands.options import TrainArguments
from infopo_kernels.integrations.preferences import (
    Preference,
    PreferenceWarning,
    check_features,
    feature_dataset,
    preference_features,
    read_preferences,
)
from infopo_kernels.integrations.trl import InfoPOConfig

_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".bz2", ".zst", ".zip")
"""Suffixes of files, whether they can be read or are refused with the reason; no dataset of the hub ends so."""


def is_file(name: str | None) -> bool:
    """Whether a dataset's name means a local file, existing or not."""
    return name is not None and (Path(name).is_file() or Path(name).suffix in _FILES)


class Data:
    """Pairs to train on and pairs to score, read in two steps: text before a model is looked for, then tokens."""

    def __init__(self, script: TrainArguments, config: InfoPOConfig, mixture: DatasetMixtureConfig) -> None:
        """Read and check the text of files.

        Raises:
            UserError: a file cannot be read, or a line is wrong; names line and field.
        """
        self._script, self._config, self._mixture = script, config, mixture
        self.has_eval = bool(script.held_out) or script.eval_dataset_name is not None
        if config.eval_strategy != "no" and is_file(script.dataset_name) and not self.has_eval:
            raise UserError(
                f"--eval_strategy {config.eval_strategy.value} needs pairs to score; add --held_out N or "
                f"--eval_dataset_name FILE"
            )
        names = (script.dataset_name, script.eval_dataset_name)
        self._texts = {name: self._read(name) for name in names if name is not None and is_file(name)}

    def _read(self, name: str) -> list[Preference]:
        with user_errors(), _warnings_said():
            return read_preferences(name, skip_bad_rows=self._script.skip_bad_rows)

    def features(self, processor: Any, model_config: Any) -> tuple[Any, Any]:
        """Datasets of features to train on and to score (None: nothing to score).

        Raises:
            UserError: a pair cannot be used, nothing is left to train on, or a split does not exist.
        """
        script, config = self._script, self._config
        with user_errors(), _warnings_said():
            train = self._split(script.dataset_name, script.dataset_train_split, processor, model_config)
            if script.held_out:
                return self._hold_out(train)
            if script.eval_dataset_name is None and config.eval_strategy == "no":
                return train, None
            scored = script.eval_dataset_name or script.dataset_name
            return train, self._split(scored, script.dataset_test_split, processor, model_config)

    def _hold_out(self, train: Any) -> tuple[Any, Any]:
        script = self._script
        if isinstance(train, datasets.IterableDataset):
            raise UserError("--held_out does not go with a stream; pass --eval_dataset_name")
        if script.held_out >= len(train):
            raise UserError(
                f"--held_out {script.held_out}: leaves nothing to train on, {script.dataset_name} has "
                f"{len(train)} pairs"
            )
        parts = train.train_test_split(test_size=script.held_out, seed=self._config.seed)
        return parts["train"], parts["test"]

    def _split(self, name: str | None, split: str, processor: Any, model_config: Any) -> Any:
        """One split of a dataset of the hub, or a whole file, as features."""
        script, config = self._script, self._config
        if name in self._texts:
            return datasets.Dataset.from_list(
                preference_features(
                    processor, self._texts[name], config.max_length, score_turns=config.score_turns,
                    skip_bad_rows=script.skip_bad_rows, model=model_config,
                )
            )  # fmt: skip
        if self._mixture.datasets and name == script.dataset_name:
            splits = get_dataset(self._mixture)
        else:
            splits = datasets.load_dataset(name, name=script.dataset_config, streaming=script.dataset_streaming)
        if split not in splits:
            raise UserError(f"{name}: has no split {split!r}, only {', '.join(splits)}")
        rows = splits[split]
        if {"image", "images"} & set(rows.column_names or ()):
            return rows  # images are turned into tokens batch by batch, by TRL
        with PartialState().local_main_process_first():
            features = feature_dataset(
                rows, processor, config.max_length, score_turns=config.score_turns,
                skip_bad_rows=script.skip_bad_rows, num_proc=config.dataset_num_proc, name=split,
            )  # fmt: skip
        if not isinstance(features, datasets.IterableDataset) and model_config is not None:
            check_features(features, model_config)
        return features


@contextlib.contextmanager
def _warnings_said() -> Iterator[None]:
    """Prints warnings about the data as plain lines."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PreferenceWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, PreferenceWarning):
            say(str(warning.message))
