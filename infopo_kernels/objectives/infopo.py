"""InfoPO: the Nguyen-Wainwright-Jordan bound of the mutual information as a loss.

With equations (1) to (4) of `infopo_kernels.objectives.base`, k_s = 1 (or 1 / n_s with `average`):

    chosen:    term_s  = -beta * Delta_s                                                             (5)
    rejected:  a_s     =  beta * Delta_s - offset
               term_s  =  exp(a_s)                        for a_s <= max_log_weight                  (6)
               term_s  =  exp(m) * (1 + a_s - m)          for a_s >  m = max_log_weight (the tangent)

For a chosen sequence, sft_weight * (-sum_t l_t / n_s) is added to term_s. No term depends on both sequences of a pair,
so each sequence has its own derivative:

    weight_s = beta                               for a chosen sequence                              (7)
             = beta * exp(min(a_s, m))            for a rejected one; 0 where a_s < min_log_weight
    slope_s  = -weight_s * k_s - sft_weight / n_s for a chosen sequence, known beforehand            (8)
             =  weight_s * k_s                    for a rejected one

Without the added term, -sum_s u_s term_s / P is the Nguyen-Wainwright-Jordan estimate of the mutual information between
a response and its being preferred, in nats.

Sources: Xiao et al., "InfoPO: On Mutual Information Maximization for Large Language Model Alignment", NAACL 2025;
Nguyen, Wainwright, Jordan, "Estimating divergence functionals and the likelihood ratio by convex risk minimization",
IEEE Transactions on Information Theory 56 (2010).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from infopo_kernels.objectives.base import Known, Objective, References, Sequences, Terms, levels
from infopo_kernels.options import require_bool, require_finite, require_positive


@dataclass(frozen=True)
class InfoPO(Objective):
    """InfoPO with its options.

    Args:
        beta: scale β of the log-ratios (the strength of the implicit KL constraint); positive.
        offset: constant inside the exponential; 1 is the Nguyen-Wainwright-Jordan bound, 0 its unshifted form.
        max_log_weight: log-weight of a rejected sequence above which its exponential continues as its tangent, so that
            its weight is at most ``beta * exp(max_log_weight)``; None sets no cap.
        min_log_weight: rejected sequences with a log-weight ``beta * log_ratio - offset`` below this take no part in
            the backward pass. Their weight counts as 0, which is at most ``beta * exp(min_log_weight)`` too little; the
            loss value does not change. None drops only weights that float32 cannot hold (about -103).
        sft_weight: α of the added term ``α * (-mean token log-probability of the chosen response)``; 0 adds none.
        average: sequence log-probabilities are means over the scored tokens instead of sums.

    Raises:
        ValueError, TypeError: a value is out of range or not a number; the message names it.
    """

    beta: float = 0.1
    offset: float = 1.0
    max_log_weight: float | None = None
    min_log_weight: float | None = None
    sft_weight: float = 0.0
    average: bool = False

    name: ClassVar[str] = "infopo"
    known: ClassVar[Known] = "some"
    reference: ClassVar[References] = "rejected"

    def __post_init__(self) -> None:
        require_positive("beta", self.beta, "typical values lie between 0.01 and 1.")
        require_finite("offset", self.offset)
        if self.max_log_weight is not None:
            require_finite("max_log_weight", self.max_log_weight)
        if self.min_log_weight is not None:
            require_finite("min_log_weight", self.min_log_weight)
            if self.max_log_weight is not None and self.min_log_weight >= self.max_log_weight:
                raise ValueError(
                    f"`min_log_weight` must lie below `max_log_weight`, got {self.min_log_weight} and "
                    f"{self.max_log_weight}."
                )
        require_finite("sft_weight", self.sft_weight)
        if self.sft_weight < 0:
            raise ValueError(f"`sft_weight` must not be negative, got {self.sft_weight}; pass 0 to leave it out.")
        require_bool("average", self.average)

    def terms(self, sums: Tensor, sequences: Sequences) -> Terms:
        is_chosen = sequences.is_chosen
        logps = levels(sums, sequences, self.average)
        rewards = self.beta * (logps - sequences.ref_logps)
        # The exponential of a chosen reward is not used, but an infinite one would turn autograd's 0 into NaN.
        log_weights = (rewards - self.offset).masked_fill(is_chosen, 0.0)
        if self.max_log_weight is None:
            growth = log_weights.exp()
            weights = growth.detach()
        else:
            # Not by clamp and relu: from torch 2.14 on the gradient of both is 0 at the bound.
            beyond = log_weights > self.max_log_weight
            exponential = torch.where(beyond, self.max_log_weight, log_weights).exp()
            growth = exponential * (1 + torch.where(beyond, log_weights - self.max_log_weight, 0.0))
            weights = exponential.detach()
        if self.min_log_weight is not None:
            negligible = log_weights.detach() < self.min_log_weight
            growth = torch.where(negligible, growth.detach(), growth)
            weights = torch.where(negligible, 0.0, weights)
        weights = self.beta * torch.where(is_chosen, 1.0, weights)
        terms = torch.where(is_chosen, -rewards, growth)
        loss = terms
        if self.sft_weight:
            loss = terms - self.sft_weight * torch.where(is_chosen, sums / sequences.counts, 0.0)
        return Terms(logps, rewards, loss, self._slopes(weights, sequences), weights, bound=-terms.detach())

    def known_slopes(self, sequences: Sequences) -> Tensor:
        beta = torch.full(sequences.counts.shape, self.beta, dtype=torch.float64, device=sequences.counts.device)
        return torch.where(sequences.is_chosen, self._slopes(beta, sequences), torch.nan)

    def _slopes(self, weights: Tensor, sequences: Sequences) -> Tensor:
        """Equation (8)."""
        scale = levels(weights, sequences, self.average)
        down = -scale
        if self.sft_weight:
            down = down - self.sft_weight / sequences.counts.to(torch.float64)
        return torch.where(sequences.is_chosen, down, scale)
