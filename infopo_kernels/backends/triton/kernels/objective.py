# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""InfoPO (`infopo_kernels.objectives.infopo`, equations (1) to (8)) in two launches.

For sequence s, rows cu[s] .. cu[s + 1], n_s of them scored, u_s its weight (1 if none is given), all in float64:

    L_s      = sum_t l_t  (or L_s / n_s)                Delta_s = L_s - ref_s           a_s = beta Delta_s - offset
    term_s   = -beta Delta_s                            chosen
             = exp(min(a_s, m)) (1 + max(a_s - m, 0))   rejected, m = max_log_weight (inf without a cap)
    weight_s = beta                                     chosen
             = beta exp(min(a_s, m))                    rejected; 0 where a_s < min_log_weight
    dl_t     = -u_s (weight_s k_s + sft / n_s) / P      chosen, k_s = 1 (or 1 / n_s)
             = u_s weight_s k_s / P                     rejected
    loss     = (sum_s u_s term_s - sft sum_{chosen} u_s sum_t l_t / n_s) / P          bound = -sum_s u_s term_s / P

One program a sequence; a last one adds their terms in one order, so that two runs agree bitwise. Bounds that nobody
could check without waiting for the device never lead outside the rows: a sequence whose bounds are wrong has L_s = NaN.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from infopo_kernels.backends.triton.launch import FUSED
from infopo_kernels.objectives import Evaluation, InfoPO, Sequences
from infopo_kernels.options import IGNORE_INDEX
from infopo_kernels.packing import Rows

BLOCK = 1024
"""Rows a step: 4 warps with 8 loads in flight each; a sequence has hundreds to thousands of rows."""

TOTAL_BLOCK = 256
"""Sequences a step of the last program."""


@triton.jit(do_not_specialize=["N", "S"])
def objective_kernel(
    logp_ptr,
    labels_ptr,
    cu_ptr,
    chosen_ptr,
    ref_ptr,
    u_ptr,
    terms_ptr,
    logps_ptr,
    rewards_ptr,
    weights_ptr,
    dl_ptr,
    N,
    S,
    beta: tl.float64,
    offset: tl.float64,
    max_log_weight: tl.float64,
    min_log_weight: tl.float64,
    sft_weight: tl.float64,
    num_pairs: tl.float64,
    AVERAGE: tl.constexpr,
    WEIGHTED: tl.constexpr,
    IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """terms[s] = u_s term_s, sft[s]; logps[s] = L_s, rewards[s] = beta Delta_s, weights[s] = u_s weight_s;
    dl[t] = d loss / d l_t for the rows of one sequence."""
    s = tl.program_id(0)
    first = tl.load(cu_ptr + s).to(tl.int64)
    last = tl.load(cu_ptr + s + 1).to(tl.int64)
    sound = (first < last) & (first >= 0) & (last <= N) & ((s > 0) | (first == 0)) & ((s < S - 1) | (last == N))
    begin = tl.where(sound, first, 0).to(tl.int32)
    end = tl.where(sound, last, 0).to(tl.int32)
    offs = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    counts = tl.zeros((BLOCK,), tl.int32)
    for start in range(begin, end, BLOCK):
        offs_n = start + offs
        inside = offs_n < end
        scored = tl.load(labels_ptr + offs_n, mask=inside, other=IGNORE) != IGNORE
        sums += tl.load(logp_ptr + offs_n, mask=scored, other=0.0).to(tl.float64)
        counts += scored.to(tl.int32)
    count = tl.sum(counts, axis=0)
    # A sequence without a scored token has no log-probability; 0 would be a plausible number.
    total = tl.where(count > 0, tl.sum(sums, axis=0), float("nan"))
    length = count.to(tl.float64)
    mean = total / length
    level = mean if AVERAGE else total

    chosen = tl.load(chosen_ptr + s) != 0
    reward = beta * (level - tl.load(ref_ptr + s))
    log_weight = reward - offset
    # Comparisons are written so that NaN stays: minimum and maximum would drop it.
    over = log_weight > max_log_weight
    growth = tl.exp(tl.where(over, max_log_weight, log_weight))
    term = tl.where(chosen, -reward, growth * (1.0 + tl.where(over, log_weight - max_log_weight, 0.0)))
    weight = beta * tl.where(chosen, 1.0, tl.where(log_weight < min_log_weight, 0.0, growth))
    # 0 times the mean of a response with a label at -inf would be NaN.
    sft_term = tl.where(chosen & (sft_weight != 0.0), -sft_weight * mean, 0.0)
    if WEIGHTED:
        u = tl.load(u_ptr + s)
        term, weight, sft_term, sft = u * term, u * weight, u * sft_term, u * sft_weight
    else:
        sft = sft_weight
    per_row = weight / length if AVERAGE else weight
    per_row = tl.where(chosen, -per_row - sft / length, per_row) / num_pairs
    tl.store(terms_ptr + s, term)
    tl.store(terms_ptr + S + s, sft_term)
    tl.store(logps_ptr + s, level)
    tl.store(rewards_ptr + s, reward)
    tl.store(weights_ptr + s, weight)
    for start in range(begin, end, BLOCK):
        offs_n = start + offs
        inside = offs_n < end
        scored = tl.load(labels_ptr + offs_n, mask=inside, other=IGNORE) != IGNORE
        tl.store(dl_ptr + offs_n, tl.where(scored, per_row, 0.0).to(dl_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["S"])
def total_kernel(terms_ptr, loss_ptr, bound_ptr, S, num_pairs: tl.float64, BLOCK: tl.constexpr):
    """loss and bound from the terms [2, S]."""
    offs = tl.arange(0, BLOCK)
    terms = tl.zeros((BLOCK,), tl.float64)
    sft_terms = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, S, BLOCK):
        inside = start + offs < S
        terms += tl.load(terms_ptr + start + offs, mask=inside, other=0.0)
        sft_terms += tl.load(terms_ptr + S + start + offs, mask=inside, other=0.0)
    total = tl.sum(terms, axis=0)
    tl.store(loss_ptr, (total + tl.sum(sft_terms, axis=0)) / num_pairs)
    tl.store(bound_ptr, -total / num_pairs)


def launch_objective(objective: InfoPO, logp: torch.Tensor, rows: Rows, sequences: Sequences) -> Evaluation:
    """InfoPO of a call, from its token log-probabilities [N] float32."""
    assert rows.cu_seqlens is not None
    n, s, device = logp.numel(), sequences.is_chosen.numel(), logp.device
    loss, bound = (torch.empty((), dtype=torch.float64, device=device) for _ in range(2))
    logps, rewards, weights = (torch.empty(s, dtype=torch.float64, device=device) for _ in range(3))
    terms = torch.empty(2, s, dtype=torch.float64, device=device)
    # Rows that no sequence has, where bounds are wrong, are NaN too.
    row_weight = torch.full((n,), math.nan, dtype=logp.dtype, device=device)
    objective_kernel[(s,)](
        logp,
        rows.labels,
        rows.cu_seqlens.contiguous(),
        sequences.is_chosen.contiguous(),
        sequences.ref_logps.contiguous(),
        None if sequences.weights is None else sequences.weights.contiguous(),
        terms,
        logps,
        rewards,
        weights,
        row_weight,
        n,
        s,
        float(objective.beta),
        float(objective.offset),
        math.inf if objective.max_log_weight is None else float(objective.max_log_weight),
        -math.inf if objective.min_log_weight is None else float(objective.min_log_weight),
        float(objective.sft_weight),
        float(sequences.num_pairs),
        AVERAGE=objective.average,
        WEIGHTED=sequences.weights is not None,
        IGNORE=IGNORE_INDEX,
        BLOCK=BLOCK,
        num_warps=4,
        **FUSED,
    )
    total_kernel[(1,)](terms, loss, bound, s, float(sequences.num_pairs), BLOCK=TOTAL_BLOCK, num_warps=1, **FUSED)
    return Evaluation(loss, bound, logps, rewards, weights, row_weight)
