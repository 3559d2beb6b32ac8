"""Parts of the same sequences on several ranks, and wrappers that average gradients, against one process in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure.collectives import Counted
from infopo_kernels import LinearPreferenceLoss, linear_infopo_loss, linear_logps, linear_preference_loss
from infopo_kernels.distributed import VocabShard
from infopo_kernels.objectives import DPO, IPO, SFT, InfoPO, Objective, SimPO
from tests.distributed.launcher import RankError, on_ranks

V, H, S, T = 61, 64, 6, 24  # 64 rows of logits fit into the gradient of the weight: more than some ranks have
OBJECTIVES = (
    InfoPO(),
    InfoPO(0.3, 0.0, 1.0, None, 0.5, True),
    InfoPO(sft_weight=0.5, min_log_weight=-4.0),
    DPO(), IPO(), SimPO(), SFT(),
)  # fmt: skip
CUTS = ("contiguous", "zig-zag", "a rank with prompts only", "packed")


def problem(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Labels are shifted already; responses of unequal lengths begin after 10 tokens of prompt."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (S, T), generator=g)
    labels[:, :10] = -100
    for s in range(S):
        labels[s, T - 2 * s :] = -100
    tensors = {
        "hidden": torch.randn(S, T, H, generator=g), "weight": torch.randn(V, H, generator=g) * 0.25,
        "bias": torch.randn(V, generator=g),
    }  # fmt: skip
    return {**{name: value.to(dtype).requires_grad_() for name, value in tensors.items()}, "labels": labels}


def references() -> Tensor:
    return -30 - torch.rand(S, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def columns(cut: str, group: Any) -> Tensor:
    """The columns of the padded problem that this rank holds."""
    R, rank, every = dist.get_world_size(group), dist.get_rank(group), torch.arange(T)
    if cut == "zig-zag":
        pieces = every.chunk(2 * R)
        return torch.cat([pieces[rank], pieces[2 * R - 1 - rank]])
    if cut == "a rank with prompts only":
        bounds = [0, *torch.linspace(8, T, R).int().tolist()]
        return every[bounds[rank] : bounds[rank + 1]]
    return every.chunk(R)[rank]


def part(whole: dict[str, Tensor], cut: str, group: Any) -> dict[str, Tensor]:
    """This rank's part; the packed one lays all sequences into one row, so that a rank has no row of some of them."""
    if cut != "packed":
        mine = columns(cut, group)
        own = {name: whole[name][:, mine] for name in ("hidden", "labels")}
    else:
        mine = torch.arange(S * T).chunk(dist.get_world_size(group))[dist.get_rank(group)]
        counts = torch.bincount(mine // T, minlength=S)
        own = {name: whole[name].flatten(0, 1)[mine] for name in ("hidden", "labels")}
        own["cu_seqlens"] = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    tensors = {**own, **{name: whole[name] for name in ("weight", "bias")}}
    return {
        name: value.detach().clone().requires_grad_() if value.is_floating_point() else value
        for name, value in tensors.items()
    }


def assert_gradients(own: dict[str, Tensor], whole: dict[str, Tensor], cut: str, group: Any, limit: float) -> None:
    """dX of this rank's rows is whole; dW and db add up over the ranks."""
    for name in ("hidden", "weight", "bias"):
        got, expected = own[name].grad, whole[name].grad
        assert (got is None) == (expected is None), name
        if got is None or expected is None:
            continue
        if name == "hidden":
            flat = expected.flatten(0, 1).chunk(dist.get_world_size(group))[dist.get_rank(group)]
            expected = flat if cut == "packed" else expected[:, columns(cut, group)]
        else:
            dist.all_reduce(got, group=group)
        assert (got.double() - expected).abs().max() <= limit * max(1.0, float(expected.abs().max())), name


def loss_case(objective: Objective, cut: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    group, whole = dist.group.WORLD, problem()
    arguments: dict[str, Any] = {"objective": objective, "is_chosen": torch.arange(S) % 2 == 0, **options}
    if objective.reference != "none":
        arguments["ref_logps"] = references()
    truth = linear_preference_loss(**whole, **arguments, backend="torch")
    (truth.loss * 3).backward()
    own = part({k: v.detach().to(dtype) if v.is_floating_point() else v for k, v in whole.items()}, cut, group)
    got = linear_preference_loss(**own, **arguments, sequence_group=group)
    (got.loss * 3).backward()
    limit = 1e-11 if dtype == torch.float64 else 1e-5
    for name in ("loss", "logps", "rewards", "weights", "mi_lower_bound", "scored_tokens"):
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(truth, name).double(), rtol=limit, atol=limit, equal_nan=True
        )
    assert_gradients(own, whole, cut, group, limit)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_every_objective_and_cut(objective: Objective, cut: str) -> None:
    on_ranks(2, loss_case, objective, cut, torch.float64, {"softcap": 4.0})
    for size in (2, 4):
        on_ranks(size, loss_case, objective, cut, torch.float32, {"workspace_mib": 1})


def frozen_case(trained: str, cut: str) -> None:
    """One input is trained; the reference comes as hidden states and a head."""
    group, whole = dist.group.WORLD, problem()
    for name in ("hidden", "weight", "bias"):
        whole[name].requires_grad_(name == trained)
    more = {"skip_chosen_reference": True, "average": True, "is_chosen": torch.arange(S) < 3}
    other = {name: whole[name].detach() * 0.9 for name in ("hidden", "weight", "bias")}
    linear_infopo_loss(**whole, **{f"ref_{k}": v for k, v in other.items()}, **more, backend="torch").loss.backward()
    own = part(whole, cut, group)
    mine = part({**other, "labels": whole["labels"]}, cut, group)
    for name in ("hidden", "weight", "bias"):
        own[name].requires_grad_(name == trained)
    reference = {f"ref_{name}": mine[name].detach() for name in other}
    linear_infopo_loss(**own, **reference, **more, sequence_group=group).loss.backward()
    assert_gradients(own, whole, cut, group, 1e-11)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_one_input_trained_with_a_reference_head(trained: str) -> None:
    for cut in ("contiguous", "packed"):
        on_ranks(2, frozen_case, trained, cut)


def logps_case(reduction: Any, cut: str) -> None:
    group, whole = dist.group.WORLD, problem()
    truth = linear_logps(**whole, reduction=reduction, backend="torch")
    truth.square().sum().backward()
    own = part(whole, cut, group)
    got = linear_logps(**own, reduction=reduction, sequence_group=group)
    got.square().sum().backward()
    if reduction != "none":
        torch.testing.assert_close(got, truth)
    assert_gradients(own, whole, cut, group, 1e-11)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_log_probabilities(reduction: str) -> None:
    for cut in ("zig-zag", "packed"):
        on_ranks(2, logps_case, reduction, cut)


def buffer_case(objective: Objective | None, cut: str) -> None:
    """dW goes to a buffer of each rank's own; they add up as gradients of the weight do."""
    group, whole = dist.group.WORLD, problem()
    arguments: dict[str, Any] = {"objective": objective, "is_chosen": torch.arange(S) % 2 == 0}

    def loss(x: dict[str, Tensor], **more: Any) -> Tensor:
        if objective is None:
            return linear_logps(**x, reduction="mean", **more).square().sum()
        return linear_preference_loss(**x, **arguments, **more).loss

    loss(whole, backend="torch").backward()
    own = part(whole, cut, group)
    buffer = torch.zeros_like(own["weight"])
    loss(own, sequence_group=group, grad_weight_into=buffer).backward()
    assert own["weight"].grad is None
    own["weight"].grad = buffer
    assert_gradients(own, whole, cut, group, 1e-11)


@pytest.mark.parametrize("objective", [None, InfoPO(sft_weight=0.5), DPO()], ids=str)
def test_buffers_of_the_caller_s(objective: Objective | None) -> None:
    for cut in ("zig-zag", "packed"):
        on_ranks(2, buffer_case, objective, cut)


def both_case() -> None:
    """Four ranks: the vocabulary in two parts, the sequences in two."""
    groups = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3], [0, 2], [1, 3])]
    rank = dist.get_rank()
    vocabulary, sequences = groups[rank // 2], groups[2 + rank % 2]
    whole = problem()
    arguments: dict[str, Any] = {"objective": InfoPO(0.3, sft_weight=0.5), "ref_logps": references()}
    truth = linear_preference_loss(**whole, **arguments, backend="torch")
    truth.loss.backward()
    own = part(whole, "zig-zag", sequences)
    first, last = ((0, 20), (20, V))[rank % 2]
    own |= {name: own[name].detach()[first:last].clone().requires_grad_() for name in ("weight", "bias")}
    got = linear_preference_loss(**own, **arguments, vocab=VocabShard(vocabulary, first, V), sequence_group=sequences)
    got.loss.backward()
    torch.testing.assert_close(got.loss, truth.loss)
    shard = {name: whole[name] for name in whole}
    for name in ("weight", "bias"):
        cut = whole[name].detach()[first:last].clone()
        cut.grad = whole[name].grad[first:last]  # type: ignore[index]
        shard[name] = cut
    assert_gradients(own, shard, "zig-zag", sequences, 1e-11)


def test_parts_of_vocabulary_and_of_sequences() -> None:
    on_ranks(4, both_case)


def counted_case(objective: Objective, trained: list[str]) -> list[tuple[str, int]]:
    """Collectives of a step, without the comparison of the ranks."""
    own = part(problem(torch.float32), "zig-zag", dist.group.WORLD)
    for name in ("hidden", "weight", "bias"):
        own[name].requires_grad_(name in trained)
    with Counted() as counted:
        loss = LinearPreferenceLoss(objective)  # the module hands the groups on
        loss(**own, ref_logps=references(), sequence_group=dist.group.WORLD).loss.backward()
    return [(each.name, each.elements) for each in counted.transfers if "gather" not in each.name]


@pytest.mark.parametrize(
    ("objective", "trained", "sums"),
    [(DPO(), ["hidden", "weight"], 1), (InfoPO(), ["hidden"], 1), (InfoPO(), ["hidden", "weight"], 2)],
    ids=str,
)
def test_few_bytes_a_sequence_travel(objective: Objective, trained: list[str], sums: int) -> None:
    """Counts, then sums of log-probabilities, 8 bytes each: 16 a sequence, 24 for InfoPO with a trained head."""
    for transfers in on_ranks(2, counted_case, objective, trained):
        assert [elements for _, elements in transfers] == [S] * (1 + sums), transfers


# --- data_group ---------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body, self.head = nn.Linear(H, H, dtype=torch.float64), nn.Linear(H, V, dtype=torch.float64)

    def forward(self, hidden: Tensor, labels: Tensor, **arguments: Any) -> Tensor:
        arguments = {"ref_logps": None, "beta": 0.2, "sft_weight": 0.4, **arguments}
        loss: Tensor = linear_infopo_loss(
            self.body(hidden), self.head.weight, labels, bias=self.head.bias, **arguments
        ).loss
        return loss


def averaged_case(how: str) -> None:
    """Unequal numbers of sequences, or halves of pairs, on the ranks of DDP; or parts of them; in two micro-batches."""
    whole, is_chosen, rank, R = problem(), torch.arange(S) % 2 == 0, dist.get_rank(), dist.get_world_size()
    hidden, labels, ref_logps = whole["hidden"].detach(), whole["labels"], references()
    one, model = Model(), DistributedDataParallel(Model())
    truth = one(hidden, labels, is_chosen=is_chosen, ref_logps=ref_logps)
    truth.backward()
    data: Any = dist.group.WORLD
    shares, mine, sequences = {
        "unequal": ([torch.arange(1), torch.arange(1, S)], slice(None), None),
        "halves": ([is_chosen.nonzero()[:, 0], (~is_chosen).nonzero()[:, 0]], slice(None), None),
        "parts": ([torch.arange(S)] * 2, columns("zig-zag", data), data),
    }[how]
    share, total = shares[rank % 2], torch.zeros((), dtype=torch.float64)
    for micro in (share[::2], share[1::2]):
        if not len(micro):
            continue
        arguments = {"is_chosen": is_chosen[micro], "ref_logps": ref_logps[micro]}
        given = {"data_group": data, "sequence_group": sequences} if how != "unequal" else {"num_pairs": S / 2 / R}
        if how == "halves":  # each micro-batch of a rank counts with the pairs of the whole step
            given = {"num_pairs": len(share) / 2, "data_group": data}
        if how == "parts":
            given["num_pairs"] = len(share) / 2
        with model.no_sync():
            loss = model(hidden[micro][:, mine], labels[micro][:, mine], **arguments, **given)
            loss.backward()
        total += loss.detach()
    for parameter, expected in zip(model.parameters(), one.parameters(), strict=True):
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        torch.testing.assert_close(parameter.grad / R, expected.grad)
    dist.all_reduce(total)
    torch.testing.assert_close(total / R, truth.detach())


@pytest.mark.parametrize("how", ["unequal", "halves", "parts"])
def test_wrappers_that_average(how: str) -> None:
    """Chosen and rejected on different ranks and in different micro-batches; the average is the loss of all pairs."""
    on_ranks(2, averaged_case, how)


# --- bad input ----------------------------------------------------------------------------------------------------


def refused_case(what: str) -> None:
    group, rank = dist.group.WORLD, dist.get_rank()
    own = part(problem(), "contiguous", group)
    arguments: dict[str, Any] = {"ref_logps": references(), "sequence_group": group}
    if what == "beta":
        arguments["beta"] = 0.1 + rank
    if what == "num_pairs":
        arguments["num_pairs"] = 1.0 + rank
    if what == "number of sequences" and rank:
        own |= {name: own[name][:4].detach() for name in ("hidden", "labels")}
        arguments["ref_logps"] = references()[:4]
    if what == "ref_logps" and rank:
        arguments["ref_logps"] = references() + 1
    if what == "trained" and rank:
        own["weight"] = own["weight"].detach()
    if what == "labels" and rank:
        own["labels"][0, -1] = V
    if what == "nothing scored":
        own["labels"][2] = -100
    if what == "shift":
        arguments["shift"] = True
    if what == "group":
        arguments["sequence_group"] = "world"
    linear_infopo_loss(**own, **arguments)


@pytest.mark.parametrize(
    ("what", "messages"),
    [
        ("beta", ["`objective` must be the same.*infopo.*0.1", "`objective` must be the same.*infopo.*1.1"]),
        ("num_pairs", ["`num_pairs` must be the same on all 2 ranks", "`num_pairs`.*2.0 on rank 1"]),
        ("number of sequences", ["`number of sequences`.*6 on rank 0 and 4 on rank 1", "4 on rank 1 and 6 on rank 0"]),
        ("ref_logps", ["`ref_logps` must be the same", "`ref_logps` must be the same"]),
        ("trained", ["`requires_grad", "`requires_grad of hidden, weight, bias` must be the same"]),
        ("labels", ["Rank 1 of the group refused its input", r"`labels` must lie in \[0, 61\)"]),
        ("nothing scored", ["at least one token of every sequence, got none in sequence 2"] * 2),
        ("shift", ["Shift before the cut"] * 2),
        ("group", ["`sequence_group` must be a torch.distributed.ProcessGroup, got str"] * 2),
    ],
)
def test_what_ranks_disagree_in_is_named_on_every_rank(what: str, messages: list[str]) -> None:
    with pytest.raises(RankError) as raised:
        on_ranks(2, refused_case, what)
    for error, message in zip(raised.value.errors, messages, strict=True):
        with pytest.raises((ValueError, TypeError), match=message):
            raise error  # type: ignore[misc]


def compiled_case() -> None:
    group = dist.group.WORLD
    own, ref_logps = part(problem(), "contiguous", group), references()

    def loss(**tensors: torch.Tensor) -> torch.Tensor:
        return linear_infopo_loss(**tensors, ref_logps=ref_logps, sequence_group=group).loss

    expected = loss(**own)
    assert torch.equal(torch.compile(loss, fullgraph=True, backend="aot_eager")(**own), expected)


def test_one_graph() -> None:
    """What the ranks compare and add up is ops that torch.compile can trace."""
    on_ranks(2, compiled_case)
