"""Ranks that disagree: an error on every rank, which names what differs, and never a hang."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from infopo_kernels import linear_logps, linear_preference_loss
from infopo_kernels.distributed import VocabShard
from infopo_kernels.objectives import DPO, InfoPO
from tests.distributed.launcher import RankError, on_ranks

V, H, S, T = 40, 8, 4, 6


def arguments(**change: Any) -> dict[str, Any]:
    """What both ranks pass, the parts of a head of 40 entries, and what this rank changes."""
    g = torch.Generator().manual_seed(0)
    given = {
        "hidden": torch.randn(S, T, H, generator=g, requires_grad=True),
        "labels": torch.randint(0, V, (S, T), generator=g),
        "weight": torch.randn(V, H, generator=g)[dist.get_rank() * 20 :][:20].clone().requires_grad_(),
        "objective": InfoPO(),
        "vocab": VocabShard(dist.group.WORLD, vocabulary=V),
        "backend": "torch",
    }
    return {**given, **change}


def on_last(**change: Any) -> dict[str, Any]:
    """A change on the last rank only."""
    return arguments(**(change if dist.get_rank() == dist.get_world_size() - 1 else {}))


def shard(**change: Any) -> VocabShard:
    return VocabShard(dist.group.WORLD, **{"vocabulary": V, **change})


def changed(what: str) -> dict[str, Any]:
    rank = dist.get_rank()
    if what == "rows":
        fewer = arguments()
        return on_last(hidden=fewer["hidden"][:, 1:], labels=fewer["labels"][:, 1:])
    if what == "labels":
        return on_last(labels=arguments()["labels"].flip(0))
    if what == "sequences":
        return on_last(hidden=arguments()["hidden"].view(2, 12, H), labels=arguments()["labels"].view(2, 12))
    if what == "objective":
        return on_last(objective=DPO())
    if what == "option of the objective":
        return on_last(objective=InfoPO(beta=0.2))
    if what == "softcap":
        return on_last(softcap=3.0)
    if what == "num_pairs":
        return on_last(num_pairs=7)
    if what == "type":
        return arguments(**{k: v.double() for k, v in arguments().items() if k in ("hidden", "weight")} if rank else {})
    if what == "hidden size":
        return on_last(hidden=arguments()["hidden"][..., 1:], weight=arguments()["weight"][:, 1:])
    if what == "trained":
        return on_last(hidden=arguments()["hidden"].detach())
    if what == "bias":
        return on_last(bias=torch.zeros(20))
    if what == "gap":
        return arguments(vocab=shard(start=21 if rank else 0))
    if what == "overlap":
        return arguments(vocab=shard(start=15 if rank else 0))
    if what == "too few":
        return arguments(vocab=shard(vocabulary=50))
    if what == "vocabulary":
        return on_last(vocab=shard(vocabulary=39), labels=arguments()["labels"].clamp(max=38))
    if what == "order":
        return arguments(vocab=shard(start=0 if rank else 20))
    if what == "way":
        return on_last(vocab=shard(way="ring"))
    if what == "average":
        return on_last(vocab=shard(way="ring", average=True)) if rank else arguments(vocab=shard(way="ring"))
    assert what == "label of one rank"
    return arguments(vocab=shard(way="rows"), labels=arguments()["labels"] + 20 * rank)


def case(what: str) -> None:
    linear_preference_loss(**changed(what))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("rows", "`hidden.shape\\[:-1\\]` must be the same on all 2 ranks of the group, got 24 on rank 0 and 20"),
        ("labels", "`labels` must be the same"),
        ("sequences", "`number of sequences` must be the same"),
        ("objective", "`objective` must be the same on all 2 ranks of the group, got InfoPO"),
        ("option of the objective", "`objective` must be the same.*beta=0.2"),
        ("softcap", "`softcap, logit_scale / temperature` must be the same"),
        ("num_pairs", "`num_pairs` must be the same"),
        ("type", "`hidden.dtype` must be the same"),
        ("hidden size", "`hidden.shape\\[-1\\]` must be the same on all 2 ranks of the group, got 8 on rank 0 and 7"),
        ("trained", "`requires_grad of hidden, weight and bias` must be the same"),
        ("bias", "`bias` must be the same"),
        ("gap", "cover \\[0, 40\\) in the order of the ranks, got \\[0, 20\\), \\[21, 41\\)"),
        ("overlap", "got \\[0, 20\\), \\[15, 35\\)"),
        ("too few", "cover \\[0, 50\\)"),
        ("vocabulary", "`vocab.vocabulary` must be the same"),
        ("order", "got \\[20, 40\\), \\[0, 20\\)"),
        ("way", "`vocab.way` must be the same"),
        ("average", "`vocab.average` must be the same"),
        ("label of one rank", "Rank 1 of the group refused its input"),
    ],
)
def test_every_rank_raises(what: str, said: str) -> None:
    with pytest.raises(RankError, match=said) as caught:
        on_ranks(2, case, what)
    assert all(isinstance(error, ValueError) for error in caught.value.errors)


def group_case(what: str) -> None:
    if what == "size":  # a group of each rank alone, whose part is not the whole
        vocab = VocabShard(dist.new_subgroups(1)[0], vocabulary=V)
    elif what == "another's":
        vocab = VocabShard([dist.new_group([rank]) for rank in range(2)][1 - dist.get_rank()])
    else:
        vocab = VocabShard("world")  # type: ignore[arg-type]
    linear_logps(**{k: v for k, v in arguments(vocab=vocab).items() if k != "objective"})


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("size", "cover \\[0, 40\\) in the order of the ranks, got \\[0, 20\\)"),
        ("another's", "`group` must be a group that this rank is in"),
        ("a name", "`group` must be a torch.distributed.ProcessGroup, got str"),
    ],
)
def test_wrong_groups(what: str, said: str) -> None:
    with pytest.raises(RankError, match=said) as caught:
        on_ranks(2, group_case, what)
    assert all(isinstance(error, (ValueError, TypeError)) for error in caught.value.errors)


def gradient_case(way: str) -> None:
    """dW of the forward pass is scaled once, so that each rank's loss has to be scaled alike."""
    out = linear_preference_loss(**arguments(vocab=shard(way=way)))
    (out.loss * (1 + dist.get_rank())).backward()


@pytest.mark.parametrize("way", ["rows", "ring", "gather"])
def test_losses_that_are_scaled_differently(way: str) -> None:
    with pytest.raises(RankError, match=r"gradient of the loss must be the same on all ranks .* \[1.0, 2.0\]"):
        on_ranks(2, gradient_case, way)


def functions_case() -> None:
    given = arguments()
    if dist.get_rank():
        given.pop("objective")
        linear_logps(**given)
    else:
        linear_preference_loss(**given)


def test_different_functions() -> None:
    with pytest.raises(RankError, match="`kind of call` must be the same") as caught:
        on_ranks(2, functions_case)
    assert all(isinstance(error, ValueError) for error in caught.value.errors)
