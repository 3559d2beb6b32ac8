"""The result of a preference loss."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TailSummary(NamedTuple):
    """What a call with a `tail_threshold` pooled (`infopo_kernels.backends.base`). Float64 tensors of shape []."""

    mass_mean: Tensor
    """Mean, over the rows with a gradient, of the probability that the row gives to pooled words."""
    mass_max: Tensor
    """Its maximum."""
    kept_share: Tensor
    """Share of the gradient's columns that were kept, 0 to 1."""


class PreferenceOutput(NamedTuple):
    """The loss and the values to log. Only `loss` has a gradient.

    S is the number of sequences, in the order of the call. u_s are their `sequence_weights` (1 if none are given).
    Delta_s is the difference between the log-probabilities of policy and reference. The properties below select by
    `is_chosen`: on a GPU the host then waits for the number of chosen sequences.
    """

    loss: Tensor
    """[] float32 (float64 for float64 inputs), nats per pair; differentiable."""
    mi_lower_bound: Tensor
    """[] float64, nats: a lower bound of the mutual information between a response and its being preferred.

    InfoPO: the NWJ estimate, ``-loss`` without the SFT term; NaN if the chosen reference was skipped, because an
    unknown constant shifts the bound then. DPO: the InfoNCE estimate, ``log(2) - loss`` (for weights u_s, the weighted
    mean of the pairs' ``log(2) - term``). IPO, SimPO, SFT: NaN; they give no bound."""
    logps: Tensor
    """[S] float64, nats: sequence log-probabilities (means over scored tokens where the objective averages)."""
    ref_logps: Tensor
    """[S] float64, nats: the reference's log-probabilities; 0 without a reference, NaN where the reference of a chosen
    sequence was skipped."""
    rewards: Tensor
    """[S] float64: ``beta * (logps - ref_logps)``; NaN for chosen sequences whose reference was skipped.

    SimPO: ``beta * logps``. SFT: `logps`. Neither has a reference, so these compare sequences, not policies."""
    weights: Tensor
    """[S] float64: size of the derivative of the preference loss by the sequence's log-probability, times the number of
    pairs; u_s is included.

    InfoPO: `beta` for chosen, ``beta * exp(min(reward - offset, max_log_weight))`` for rejected sequences. DPO, SimPO,
    IPO: the same for both sequences of a pair, ``beta * sigmoid(-margin)``, ``beta * sigmoid(gamma - margin)`` and
    ``2 * abs(margin - 1/2) / beta`` with the margin of their rewards. SFT: 1 for chosen, 0 for rejected sequences."""
    scored_tokens: Tensor
    """[S] int64."""
    is_chosen: Tensor
    """[S] bool."""
    chosen_reference_skipped: bool
    """True if the chosen reference was left out. Gradients are exact. The loss is shifted by a constant:
    ``beta / num_pairs`` times the sum of the chosen references (each times u_s)."""
    tail: TailSummary | None = None
    """With `report_tail`: what was pooled. 0, 0 and 1 where nothing was."""

    @property
    def chosen_logps(self) -> Tensor:
        """`logps` of the chosen sequences."""
        return self.logps[self.is_chosen]

    @property
    def rejected_logps(self) -> Tensor:
        """`logps` of the rejected sequences."""
        return self.logps[~self.is_chosen]

    @property
    def chosen_rewards(self) -> Tensor:
        """`rewards` of the chosen sequences."""
        return self.rewards[self.is_chosen]

    @property
    def rejected_rewards(self) -> Tensor:
        """`rewards` of the rejected sequences."""
        return self.rewards[~self.is_chosen]

    @property
    def rejected_weights(self) -> Tensor:
        """`weights` of the rejected sequences."""
        return self.weights[~self.is_chosen]

    def without_chosen_reference(self) -> PreferenceOutput:
        """The same output, with NaN in the values that an unknown chosen reference shifts."""
        return self._replace(
            mi_lower_bound=self.mi_lower_bound.new_full((), float("nan")),
            ref_logps=self.ref_logps.masked_fill(self.is_chosen, float("nan")),
            rewards=self.rewards.masked_fill(self.is_chosen, float("nan")),
            chosen_reference_skipped=True,
        )


InfoPOOutput = PreferenceOutput
"""The name under which `linear_infopo_loss` and `infopo_loss` return it."""
