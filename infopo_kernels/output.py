"""What a preference loss returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PreferenceOutput(NamedTuple):
    """The loss and what one logs. Everything but `loss` is without gradient.

    The properties below select by `is_chosen`: on a GPU the host then waits for the number of chosen sequences. S is
    the number of sequences, in the order of the call; u_s their `sequence_weights` (1 unless given), Delta_s the
    difference between the log-probabilities of policy and reference.
    """

    loss: Tensor
    """[] float32 (float64 for float64 inputs), nats per pair; differentiable."""
    mi_lower_bound: Tensor
    """[] float64, nats: a lower bound of the mutual information between a response and its being preferred.

    InfoPO: the NWJ estimate, ``-loss`` without the SFT term; NaN if the chosen reference was skipped, since the bound
    is shifted by an unknown constant then. DPO: the InfoNCE estimate, ``log(2) - loss`` (for weights u_s, the weighted
    mean of the pairs' ``log(2) - term``). IPO, SimPO, SFT: NaN, they bound none."""
    logps: Tensor
    """[S] float64, nats: sequence log-probabilities (means over scored tokens where the objective averages)."""
    ref_logps: Tensor
    """[S] float64, nats: the reference's; 0 without a reference, NaN for chosen sequences that were skipped."""
    rewards: Tensor
    """[S] float64: ``beta * (logps - ref_logps)``; NaN for chosen sequences whose reference was skipped.

    SimPO: ``beta * logps``, SFT: `logps`; neither has a reference, so they compare sequences, not policies."""
    weights: Tensor
    """[S] float64: size of the preference loss's derivative by the sequence's log-probability, times the number of
    pairs and with u_s.

    InfoPO: `beta` for chosen, ``beta * exp(min(reward - offset, max_log_weight))`` for rejected sequences. DPO, SimPO,
    IPO: the same for both sequences of a pair, ``beta * sigmoid(-margin)``, ``beta * sigmoid(gamma - margin)`` and
    ``2 * abs(margin - 1/2) / beta`` with the margin of their rewards. SFT: 1 for chosen, 0 for rejected sequences."""
    scored_tokens: Tensor
    """[S] int64."""
    is_chosen: Tensor
    """[S] bool."""
    chosen_reference_skipped: bool
    """True if the chosen reference was left out: gradients are exact, the loss is shifted by a constant,
    ``beta / num_pairs`` times the sum of the chosen references (each times u_s)."""

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
        """The same, saying NaN for what an unknown chosen reference shifts."""
        return self._replace(
            mi_lower_bound=self.mi_lower_bound.new_full((), float("nan")),
            ref_logps=self.ref_logps.masked_fill(self.is_chosen, float("nan")),
            rewards=self.rewards.masked_fill(self.is_chosen, float("nan")),
            chosen_reference_skipped=True,
        )


InfoPOOutput = PreferenceOutput
"""The name under which `linear_infopo_loss` and `infopo_loss` return it."""
