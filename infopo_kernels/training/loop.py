"""A whole run: reference, steps, held-out pairs before and after. One trainer, or several in lockstep."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from infopo_kernels.training.batches import collate, visiting_order
from infopo_kernels.training.metrics import MetricsFile
from infopo_kernels.training.progress import Progress
from infopo_kernels.training.tokens import Example
from infopo_kernels.training.trainer import Trainer, all_logps, evaluation

Record = dict[str, Any]

_REFERENCE_SHARE: Final = 0.25
"""Of a limited time, at most this much goes into the reference: a step costs three to four times as much for a pair."""

_STEPS_A_GROUP: Final = 4
"""Pairs of this many steps are sorted by length together, to waste little on padding."""


@dataclass
class History:
    """What a run leaves behind, in the order in which it happened."""

    records: list[Record] = field(default_factory=list)
    """The lines of `metrics.jsonl`: `step`, `objective`, `split` ("train" or "held_out"), and the metrics."""
    out_of_time: bool = False
    """Whether the run stopped before its last step because its time was up."""

    def select(self, objective: str, split: str) -> list[Record]:
        """The records of one loss on one split."""
        return [r for r in self.records if r["objective"] == objective and r["split"] == split]


def run(
    trainers: Sequence[Trainer],
    examples: Sequence[Example],
    held_out: Sequence[Example],
    progress: Progress,
    metrics: MetricsFile,
    *,
    reference: Tensor | None = None,
    held_out_reference: Tensor | None = None,
    eval_every: int | None = None,
    seconds: float | None = None,
    after_step: Callable[[int], None] = lambda step: None,
) -> History:
    """Take all trainers, which start from the same policy, through the same batches, a step of each in turn.

    Args:
        trainers: their options agree in everything but the loss.
        examples: pairs to train on, visited in shuffled epochs.
        held_out: pairs that are only scored, before, after, and every `eval_every` steps; may be empty.
        progress: shows how far it is.
        metrics: takes each record as it comes.
        reference: [E, 2] log-probabilities (chosen, rejected) of `examples` under the policy before its first step, or
            None to form them here. With `TrainOptions.skip_chosen_reference` the chosen ones may be NaN.
        held_out_reference: [K, 2], the same of `held_out`.
        eval_every: see `held_out`.
        seconds: end in about this time, even before the last step.
        after_step: called with the number of steps done.
    """
    begin = time.perf_counter()
    options, first = trainers[0].options, trainers[0].policy
    history = History()

    def note(record: Record) -> None:
        history.records.append(record)
        metrics.write(record)

    pairs_a_step = options.batch * options.accumulate
    pairs_a_group = _STEPS_A_GROUP * pairs_a_step
    order = visiting_order(len(examples), options.steps * pairs_a_step, options.seed)
    average = options.infopo.average
    # In the order of need: a run that is short of time scores the pairs of its first steps.
    wanted, ready = list(dict.fromkeys(order)), set[int]()
    if reference is not None:
        wanted, ready = [], set(order)
    else:
        reference = torch.full((len(examples), 2), torch.nan, dtype=torch.float64)
    to_score = len(wanted) + (len(held_out) if held_out_reference is None else 0)
    with progress.stage("Reference log-probabilities", to_score) as advance:
        if held_out_reference is None:
            held_out_reference = all_logps(first, held_out, options.batch, average, advance)
        seconds_to_evaluate = time.perf_counter() - begin
        for start in range(0, len(wanted), pairs_a_group):
            if seconds is not None and ready and time.perf_counter() - begin > _REFERENCE_SHARE * seconds:
                break
            group = wanted[start : start + pairs_a_group]
            reference[group] = all_logps(first, [examples[i] for i in group], options.batch, average, advance)
            ready.update(group)
    in_order = (ready.issuperset(order[k : k + pairs_a_step]) for k in range(0, len(order), pairs_a_step))
    steps = sum(itertools.takewhile(bool, in_order))

    def score_held_out(step: int, trainer: Trainer, logps: Tensor) -> None:
        scores = evaluation(logps, held_out_reference, held_out, trainer.options)
        note({"step": step, "objective": trainer.options.loss, "split": "held_out", **scores})

    def evaluate(step: int) -> None:
        if not held_out:
            return
        with progress.stage("Held-out pairs", len(held_out) * len(trainers)) as advance:
            for trainer in trainers:
                score_held_out(step, trainer, all_logps(trainer.policy, held_out, options.batch, average, advance))

    if held_out:
        for trainer in trainers:
            score_held_out(0, trainer, held_out_reference)
    done = 0
    with progress.stage("Training", options.steps) as advance:
        while done < steps:
            started = time.perf_counter()
            chunk = order[done * pairs_a_step : (done + 1) * pairs_a_step]
            batches = []
            for start in range(0, pairs_a_step, options.batch):
                indices = chunk[start : start + options.batch]
                batch = collate([examples[i] for i in indices], first.pad_token_id, first.loading.device)
                batches.append((batch, reference[indices].T.reshape(-1).to(first.loading.device)))
            done += 1
            for trainer in trainers:
                scores_of_step = trainer.step(batches)
                note({"step": done, "objective": trainer.options.loss, "split": "train", **scores_of_step})
            advance(1, history.records[-len(trainers) :])
            after_step(done)
            if eval_every and done % eval_every == 0 and done < steps:
                evaluate(done)
            now = time.perf_counter()
            needed = (now - started) + seconds_to_evaluate * len(trainers)
            if seconds is not None and now - begin + needed > seconds:
                break
    history.out_of_time = done < options.steps
    evaluate(done)
    return history
