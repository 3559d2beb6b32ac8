"""What travels: no collective moves a head in the ways that promise it, and bytes are those of the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.measure.collectives import Counted
from infopo_kernels import linear_preference_loss
from infopo_kernels.distributed import VocabShard
from infopo_kernels.distributed.choice import Sizes, Work, cheapest, received_bytes
from infopo_kernels.objectives import DPO, InfoPO, Objective
from tests.distributed.launcher import on_ranks

V, H, S, T = 4096, 64, 4, 40
NUMBERS_OF_ROWS = 40 * S * T * 8
"""Bytes of labels, lse, weights and the comparison of the ranks, at most: what the formulas leave out."""


def counted_step(way: str, objective: Objective, trained: str) -> tuple[list[tuple[str, int, float]], int]:
    size, rank = dist.get_world_size(), dist.get_rank()
    g = torch.Generator().manual_seed(0 if way == "same_rows" else rank)
    hidden, labels = torch.randn(S, T, H, generator=g), torch.randint(0, V, (S, T), generator=g)
    weight = torch.randn(V // size, H, generator=torch.Generator().manual_seed(rank)) * 0.05
    hidden.requires_grad_("hidden" in trained)
    weight.requires_grad_("weight" in trained)
    vocab = VocabShard(dist.group.WORLD, way=way)  # type: ignore[arg-type]
    with Counted() as counted:
        out = linear_preference_loss(hidden, weight, labels, objective=objective, vocab=vocab)
        out.loss.backward()
    transfers = [(each.name, each.elements, each.received_bytes) for each in counted.transfers]
    return transfers, S * T


CASES: dict[str, tuple[Objective, str, Work]] = {
    "dpo": (DPO(), "hidden weight", Work(logits=True, known=False, hidden=True, weight=True)),
    "infopo": (InfoPO(), "hidden weight", Work(logits=True, known=False, hidden=True, weight=True)),
    "infopo, frozen head": (InfoPO(), "hidden", Work(logits=True, known=True, hidden=True, weight=False)),
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("way", ["same_rows", "rows", "ring"])
@pytest.mark.parametrize("case", CASES)
def test_no_collective_moves_a_head(case: str, way: str, size: int) -> None:
    objective, trained, _ = CASES[case]
    for transfers, _ in on_ranks(size, counted_step, way, objective, trained):
        assert transfers
        assert max(elements for _, elements, _ in transfers) < V * H


def test_a_gathered_head_is_seen() -> None:
    """The check above can fail."""
    transfers, _ = on_ranks(2, counted_step, "gather", DPO(), "hidden weight")[0]
    assert max(elements for _, elements, _ in transfers) >= V * H


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("way", ["rows", "ring", "gather"])
@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_of_the_formula(case: str, way: Any, size: int) -> None:
    objective, trained, work = CASES[case]
    expected = received_bytes(way, Sizes(size, S * T, V, H, 4), work)
    for transfers, _ in on_ranks(size, counted_step, way, objective, trained):
        got = sum(received for _, _, received in transfers)
        least = 5 / 6 if way == "rows" and case == "infopo" else 1  # the chosen half travels once
        assert least * expected <= got <= expected + NUMBERS_OF_ROWS * size, (got, expected)


def test_the_cheapest_way() -> None:
    """Llama-3-8B on 8 ranks with 4096 scored rows each: rows; with 32 times as many, the parts of the head."""
    work = Work(logits=True, known=False, hidden=True, weight=True)
    few = Sizes(8, 4096, 128256, 4096, 2)
    assert cheapest(few, work, 256 << 20) == "rows"
    many = Sizes(8, 4096 * 32, 128256, 4096, 2)
    assert cheapest(many, work, 256 << 20) == "ring"
    assert received_bytes("ring", many, work) < received_bytes("rows", many, work)
    small = Sizes(8, 4096, 1000, 64, 2)
    assert cheapest(small, work, 256 << 20) == "gather", "a head that fits the workspace"
    assert received_bytes("gather", small, work) < received_bytes("ring", small, work)
