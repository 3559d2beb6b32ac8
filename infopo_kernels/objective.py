"""The InfoPO objective, in one place: every path of the library takes its loss, weights and metrics from here.

For sequence s with token log-probabilities l_t (t in s, n_s scored tokens), a reference, and P pairs:

    L_s     = sum_t l_t                      (or its mean, sum_t l_t / n_s, with `average`)          (1)
    Delta_s = L_s - L_s(reference)           (L_s(reference) = 0 without a reference)                (2)
    chosen:    term_s = -beta * Delta_s                                                              (3)
    rejected:  a_s    =  beta * Delta_s - offset
               term_s =  exp(a_s)                        for a_s <= max_log_weight                   (4)
               term_s =  exp(m) * (1 + a_s - m)          for a_s >  m = max_log_weight (the tangent)
    loss = sum_s term_s / P  +  sft_weight * sum_{chosen} (-sum_t l_t / n_s) / P                     (5)

and, because the two halves of a pair never meet, each sequence's derivative on its own:

    weight_s = |d term_s / d L_s| = beta                               for a chosen sequence         (6)
                                  = beta * exp(min(a_s, m))            for a rejected one            (7)
    d loss / d l_t = (-weight_s * k_s - sft_weight / n_s) / P          chosen, k_s = 1 or 1 / n_s    (8)
                   =   weight_s * k_s / P                              rejected

-sum_s term_s / P is the Nguyen-Wainwright-Jordan estimate of the mutual information between a response and its being
preferred, in nats.

Sources: Xiao et al., "InfoPO: On Mutual Information Maximization for Large Language Model Alignment", NAACL 2025;
Nguyen, Wainwright, Jordan, "Estimating divergence functionals and the likelihood ratio by convex risk minimization",
IEEE Transactions on Information Theory 56 (2010).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from infopo_kernels.options import IGNORE_INDEX, InfoPOOptions
from infopo_kernels.packing import row_segments, sequence_sums


class SequenceObjective(NamedTuple):
    """What the objective says of each sequence; all [S] float64."""

    logps: torch.Tensor
    """L_s of equation (1), nats."""
    rewards: torch.Tensor
    """beta * Delta_s."""
    weights: torch.Tensor
    """Equations (6) and (7), without gradient; 0 for a rejected sequence below `min_log_weight`."""
    terms: torch.Tensor
    """Equations (3) and (4); differentiable with respect to the sums."""
    sft_terms: torch.Tensor
    """The summands of equation (5)'s second sum, with `sft_weight`; 0 for rejected sequences."""


class Objective(NamedTuple):
    """The objective of a call, from its token log-probabilities. What a backend's own `objective` returns too."""

    loss: torch.Tensor
    """[] float64, equation (5)."""
    mi_lower_bound: torch.Tensor
    """[] float64, nats."""
    logps: torch.Tensor
    """[S] float64, nats."""
    rewards: torch.Tensor
    """[S] float64."""
    weights: torch.Tensor
    """[S] float64."""
    scored_tokens: torch.Tensor
    """[S] int64."""
    row_weight: torch.Tensor
    """[N] in the type of the token log-probabilities, equation (8); 0 for rows that are not scored."""


def sequence_objective(
    sums: torch.Tensor,  # [S] float64, sum_t l_t
    counts: torch.Tensor,  # [S] integers, n_s
    is_chosen: torch.Tensor,  # [S] bool
    ref_logps: torch.Tensor,  # [S] float64
    options: InfoPOOptions,
) -> SequenceObjective:
    """Equations (1) to (7) in float64."""
    beta = options.beta
    means = sums / counts
    logps = means if options.average else sums
    rewards = beta * (logps - ref_logps)
    log_weights = rewards - options.offset  # a_s
    if options.max_log_weight is None:
        growth = log_weights.exp()
        weights = growth.detach()
    else:
        exponential = log_weights.clamp(max=options.max_log_weight).exp()
        growth = exponential * (1 + (log_weights - options.max_log_weight).relu())
        weights = exponential.detach()
    if options.min_log_weight is not None:
        negligible = log_weights.detach() < options.min_log_weight
        growth = torch.where(negligible, growth.detach(), growth)
        weights = torch.where(negligible, 0.0, weights)
    return SequenceObjective(
        logps=logps,
        rewards=rewards,
        weights=beta * torch.where(is_chosen, 1.0, weights),
        terms=torch.where(is_chosen, -rewards, growth),
        sft_terms=torch.where(is_chosen, -options.sft_weight * means, 0.0),
    )


def sequence_row_weights(
    weights: torch.Tensor,  # [S] float64
    counts: torch.Tensor,  # [S] integers
    is_chosen: torch.Tensor,  # [S] bool
    options: InfoPOOptions,
    num_pairs: float,
) -> torch.Tensor:
    """Equation (8): the weight d loss / d l_t that all tokens of a sequence share, [S] float64."""
    scale = weights / counts if options.average else weights
    return torch.where(is_chosen, -scale - options.sft_weight / counts.to(scale.dtype), scale) / num_pairs


def known_row_weights(
    counts: torch.Tensor, is_chosen: torch.Tensor, options: InfoPOOptions, num_pairs: float
) -> torch.Tensor:
    """Equation (8) as far as it is known before any log-probability is: right for chosen sequences, [S] float64."""
    beta = torch.full(counts.shape, options.beta, dtype=torch.float64, device=counts.device)
    return sequence_row_weights(beta, counts, is_chosen, options, num_pairs)


def objective(
    logp: torch.Tensor,  # [N] float32 or float64
    labels: torch.Tensor,  # [N] int64, IGNORE_INDEX where not scored
    cu_seqlens: torch.Tensor,  # [S + 1] first row of each sequence, and N
    is_chosen: torch.Tensor,  # [S] bool
    ref_logps: torch.Tensor,  # [S] float64
    options: InfoPOOptions,
    num_pairs: float,
) -> Objective:
    """Equations (1) to (8) from token log-probabilities, in plain PyTorch."""
    segments = row_segments(cu_seqlens, len(labels))
    scored = labels != IGNORE_INDEX
    counts = sequence_sums(scored, segments, len(is_chosen))
    sums = sequence_sums(logp, segments, len(is_chosen))
    # A sequence without a scored token has no log-probability; 0 would be a plausible number.
    sums = torch.where(counts > 0, sums, torch.nan)
    each = sequence_objective(sums, counts, is_chosen, ref_logps, options)
    bound = -each.terms.sum() / num_pairs
    per_sequence = sequence_row_weights(each.weights, counts, is_chosen, options, num_pairs)
    return Objective(
        loss=each.sft_terms.sum() / num_pairs - bound,
        mi_lower_bound=bound,
        logps=each.logps,
        rewards=each.rewards,
        weights=each.weights,
        scored_tokens=counts,
        row_weight=torch.where(scored, per_sequence[segments], 0.0).to(logp.dtype),
    )
