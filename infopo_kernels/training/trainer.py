"""The training loop's step, and evaluation: everything between a batch of pairs and a record of metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from infopo_kernels.objectives import InfoPOOptions
from infopo_kernels.options import IGNORE_INDEX
from infopo_kernels.training.batches import Batch, collate
from infopo_kernels.training.errors import UserError
from infopo_kernels.training.memory import peak_mib, reset_peak
from infopo_kernels.training.metrics import LossName, dpo_terms, pair_metrics
from infopo_kernels.training.policy import Policy
from infopo_kernels.training.tokens import Example

SCHEDULES: Final = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class TrainOptions:
    """Hyper-parameters of a run."""

    loss: LossName = "infopo"
    infopo: InfoPOOptions = field(default_factory=InfoPOOptions)
    """DPO takes its `beta` and `average`; the rest serves InfoPO, and the bound that is logged for both."""
    skip_chosen_reference: bool = False
    """The reference of chosen responses is not known: InfoPO's gradients are the same, its loss is shifted."""
    lr: float = 2e-5
    steps: int = 100
    batch: int = 4
    """Pairs that pass through the model at once."""
    accumulate: int = 1
    """Batches in an optimiser step; the loss is the mean over all their pairs."""
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises."""
    schedule: str = "linear"
    """One of `SCHEDULES`; how the learning rate falls after that."""
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0


def rate_factor(step: int, options: TrainOptions) -> float:
    """The learning rate of step 0, 1, ... over its peak. Neither the first nor the last step is wasted on rate 0."""
    warmup = round(options.warmup * options.steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if options.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, options.steps - warmup)
    return 1 - done if options.schedule == "linear" else 0.5 + 0.5 * math.cos(math.pi * done)


def scored_tokens(batch: Batch) -> Tensor:
    """[2B] int64: tokens of each response that are scored (a sequence's first token never is)."""
    return (batch.labels[:, 1:] != IGNORE_INDEX).sum(1)


class Trainer:
    """A policy, its optimiser and its loss."""

    def __init__(self, policy: Policy, options: TrainOptions) -> None:
        self.policy = policy
        self.options = options
        self._parameters = policy.trainable_parameters()
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=options.lr, betas=(0.9, 0.99), weight_decay=options.weight_decay, fused=True
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, lambda step: rate_factor(step, options))
        self.steps_done = 0

    def _backward(self, batch: Batch, ref_logps: Tensor, num_pairs: int) -> Tensor:
        """Add the gradients of one batch; its log-probabilities [2B]."""
        if self.options.loss == "infopo":
            loss, output = self.policy.infopo(
                batch, ref_logps, self.options.infopo, num_pairs, self.options.skip_chosen_reference
            )
            logps = output.logps
        else:
            logps = self.policy.logps(batch, self.options.infopo.average)
            loss = dpo_terms(logps - ref_logps, self.options.infopo.beta).sum() / num_pairs
        loss.backward()  # type: ignore[no-untyped-call]
        return logps.detach()

    def step(self, batches: Sequence[tuple[Batch, Tensor]]) -> dict[str, float]:
        """One optimiser step on batches with their reference log-probabilities [2B]; what `pair_metrics` says of them
        before the step, and learning rate, norm of the gradient, tokens, seconds, peak memory (MiB).

        Raises:
            UserError: the loss or the gradient is not finite any more.
        """
        device = self.policy.loading.device
        reset_peak(device)
        start = time.perf_counter()
        self.policy.model.train()
        num_pairs = sum(batch.num_pairs for batch, _ in batches)
        logps = [self._backward(batch, ref_logps, num_pairs) for batch, ref_logps in batches]
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self.options.max_grad_norm))
        if not norm < float("inf"):
            raise UserError(
                f"step {self.steps_done + 1}: the gradient's norm is {norm}; lower --lr, or cap the weight of rejected "
                f"responses with --max-log-weight."
            )
        rate = float(self._schedule.get_last_lr()[0])
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=False)  # kept: on a CPU fresh memory costs page faults at every step
        self.steps_done += 1
        seconds = time.perf_counter() - start
        tokens = [scored_tokens(batch) for batch, _ in batches]
        metrics = _metrics(logps, [ref for _, ref in batches], tokens, self.options)
        return {
            **metrics,
            "learning_rate": rate,
            "gradient_norm": norm,
            "scored_tokens": float(sum(count.sum().item() for count in tokens)),
            "seconds": seconds,
            "peak_memory_mib": peak_mib(device),
        }


def _metrics(
    logps: Sequence[Tensor], ref_logps: Sequence[Tensor], tokens: Sequence[Tensor], options: TrainOptions
) -> dict[str, float]:
    """`pair_metrics` of several batches."""
    return pair_metrics(
        _chosen_first(logps),
        _chosen_first(ref_logps),
        _chosen_first(tokens),
        options.loss,
        options.infopo,
        options.skip_chosen_reference,
    )


def _chosen_first(batches: Sequence[Tensor]) -> Tensor:
    """One [2B] of several, all chosen halves before all rejected ones."""
    halves = [values.chunk(2) for values in batches]
    return torch.cat([chosen for chosen, _ in halves] + [rejected for _, rejected in halves])


@torch.no_grad()
def all_logps(
    policy: Policy, examples: Sequence[Example], batch: int, average: bool, advance: Callable[[int], None] | None = None
) -> Tensor:
    """Log-probabilities [E, 2] (chosen, rejected) of every example, float64, on the CPU.

    Of the policy before its first step they are the reference's. `advance` is told how many pairs were done.
    """
    policy.model.eval()
    # Batches of like length waste less on padding; the order of the result is that of the examples.
    by_length = sorted(
        range(len(examples)),
        key=lambda i: len(examples[i].prompt) + len(examples[i].chosen) + len(examples[i].rejected),
    )
    result = torch.full((len(examples), 2), torch.nan, dtype=torch.float64)
    for start in range(0, len(by_length), batch):
        indices = by_length[start : start + batch]
        padded = collate([examples[i] for i in indices], policy.pad_token_id, policy.loading.device)
        result[indices] = policy.logps(padded, average).reshape(2, -1).T.cpu()
        if advance is not None:
            advance(len(indices))
    return result


def evaluation(
    logps: Tensor, ref_logps: Tensor, examples: Sequence[Example], options: TrainOptions
) -> dict[str, float]:
    """`pair_metrics` of examples whose log-probabilities [E, 2] are known."""
    tokens = torch.tensor([len(side) - (not e.prompt) for e in examples for side in (e.chosen, e.rejected)]).reshape(
        -1, 2
    )
    return pair_metrics(
        logps.T.reshape(-1), ref_logps.T.reshape(-1), tokens.T.reshape(-1), options.loss, options.infopo
    )
