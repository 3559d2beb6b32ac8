"""What is logged of a set of pairs, the same for every loss, so that two losses can be laid side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from infopo_kernels.functional import infopo_loss
from infopo_kernels.objectives import InfoPOOptions

LossName = Literal["infopo", "dpo"]
LOSSES: Final[tuple[LossName, ...]] = ("infopo", "dpo")
TITLES: Final = {"infopo": "InfoPO", "dpo": "DPO"}


def dpo_terms(log_ratios: Tensor, beta: float) -> Tensor:
    """-log sigma(beta (Delta_w - Delta_l)) of each pair; `log_ratios` is [2B], chosen first."""
    chosen, rejected = log_ratios.chunk(2)
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected))


def pair_metrics(
    logps: Tensor,
    ref_logps: Tensor,
    scored_tokens: Tensor,
    loss: LossName,
    options: InfoPOOptions,
    skip_chosen_reference: bool = False,
) -> dict[str, float]:
    """Means over B pairs; `logps`, `ref_logps` and `scored_tokens` are [2B], chosen first, without gradient.

    loss                 the loss, nats
    chosen_logps         log-probability of a response (mean over its tokens with `average`), nats
    chosen_log_ratio     the same minus the reference's, nats; both also for `rejected_`
    reward_accuracy      share of pairs whose chosen reward is the higher one; a tie counts half
    reward_margin        beta * (chosen - rejected log-ratio)
    mi_lower_bound       the NWJ estimate of the mutual information for these log-ratios, nats
    rejected_weight      size of the loss's derivative by the log-probability of a rejected response

    With `skip_chosen_reference` the chosen half of `ref_logps` is not known: `loss` is shifted by a constant, and what
    needs that half (chosen_log_ratio, reward_accuracy, reward_margin, mi_lower_bound) is NaN.
    """
    references: list[Tensor | None] = list(ref_logps.chunk(2))
    if skip_chosen_reference:
        ref_logps, references[0] = ref_logps.clone(), None
        ref_logps[: len(ref_logps) // 2] = torch.nan
    log_ratios = logps - ref_logps
    chosen, rejected = logps.chunk(2)
    chosen_ratio, rejected_ratio = log_ratios.chunk(2)
    # The objective takes sums and divides by the lengths; with `average` these are means already.
    lengths = (scored_tokens if options.average else torch.ones_like(scored_tokens)).to(logps.dtype)
    sums, tokens = (logps * lengths).chunk(2), scored_tokens.chunk(2)
    output = infopo_loss(
        *sums, *references, chosen_lengths=tokens[0], rejected_lengths=tokens[1],
        beta=options.beta, offset=options.offset, max_log_weight=options.max_log_weight,
        min_log_weight=options.min_log_weight, sft_weight=options.sft_weight, average=options.average,
    )  # fmt: skip
    margin = options.beta * (chosen_ratio - rejected_ratio)
    if loss == "dpo":
        value, weight = dpo_terms(log_ratios, options.beta).mean(), options.beta * torch.sigmoid(-margin).mean()
    else:
        value, weight = output.loss, output.rejected_weights.mean()
    wins = (chosen_ratio > rejected_ratio).double() + 0.5 * (chosen_ratio == rejected_ratio).double()
    values = {
        "loss": value,
        "chosen_logps": chosen.mean(),
        "rejected_logps": rejected.mean(),
        "chosen_log_ratio": chosen_ratio.mean(),
        "rejected_log_ratio": rejected_ratio.mean(),
        "reward_accuracy": wins.mean() + 0 * margin.mean(),  # a comparison with NaN is not NaN
        "reward_margin": margin.mean(),
        "mi_lower_bound": output.mi_lower_bound,
        "rejected_weight": weight,
    }
    return dict(zip(values, torch.stack([v.double() for v in values.values()]).tolist(), strict=True))


class MetricsFile:
    """A JSONL file of records, written as they come, so that a run that is cut short leaves what it had."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """One line. Numbers that are not finite become null: JSON has no NaN."""
        finite = {k: None if isinstance(v, float) and not abs(v) < float("inf") else v for k, v in record.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Done."""
        self._file.close()
