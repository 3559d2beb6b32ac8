"""Promises of the public functions beyond one call on one batch."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infopo_kernels import (
    DPO,
    InfoPO,
    InfoPOLoss,
    InfoPOOptions,
    KernelOptions,
    LinearInfoPOLoss,
    LogitOptions,
    infopo_loss,
    linear_infopo_loss,
    linear_logps,
    linear_preference_loss,
    naive,
    ops,
)
from infopo_kernels.backends import dispatch
from infopo_kernels.packing import Rows
from tests import support
from tests.support import Case

B, T, H, V = 2, 7, 16, 53


def batch(seed: int = 0, pairs: int = B, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (2 * pairs, T), generator=g)
    labels[:, :2] = -100
    hidden = torch.randn(2 * pairs, T, H, generator=g).to(dtype)
    weight = (torch.randn(V, H, generator=g) / 4).to(dtype)
    return {"hidden": hidden.requires_grad_(), "weight": weight.requires_grad_(), "labels": labels}


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


# --- layouts --------------------------------------------------------------------------------------------------------


def test_shift_equals_slicing() -> None:
    x = batch()
    shifted = linear_logps(**x, shift=True)
    sliced = linear_logps(x["hidden"][:, :-1], x["weight"], x["labels"][:, 1:])
    assert torch.equal(shifted[:, :-1], sliced)
    assert shifted[:, -1].eq(0).all()


def test_packed_shift_stays_inside_each_sequence() -> None:
    x = batch()
    x["labels"] = x["labels"].clamp(min=0)
    cu = torch.arange(0, 2 * B * T + 1, T, dtype=torch.int32)
    packed = linear_logps(
        x["hidden"].reshape(-1, H), x["weight"], x["labels"].reshape(-1), cu_seqlens=cu, shift=True, reduction="sum"
    )
    assert torch.equal(packed, linear_logps(**x, shift=True, reduction="sum"))


def test_one_leading_dimension_is_packed_too() -> None:
    x = batch()
    cu, chosen = torch.arange(0, 2 * B * T + 1, T), torch.arange(2 * B) < B
    one = linear_infopo_loss(
        x["hidden"].reshape(1, -1, H), x["weight"], x["labels"].reshape(1, -1), cu_seqlens=cu, is_chosen=chosen
    )
    assert torch.equal(one.loss, linear_infopo_loss(**x).loss)


def test_halves_in_different_calls_add_up() -> None:
    """A call for the chosen half and a call for each rejected sequence, with the same `num_pairs`, equal one call."""
    x, ref = batch(), torch.tensor([-20.0, -22, -24, -18], dtype=torch.float64)
    leaves = x["hidden"], x["weight"]
    whole = linear_infopo_loss(**x, ref_logps=ref, sft_weight=0.2)
    expected = gradients(whole.loss, *leaves)
    chosen = torch.arange(2 * B) < B
    parts = [
        linear_infopo_loss(
            x["hidden"][rows], x["weight"], x["labels"][rows], ref_logps=ref[rows], is_chosen=chosen[rows],
            num_pairs=B, sft_weight=0.2,
        )
        for rows in (slice(0, B), slice(B, B + 1), slice(B + 1, 2 * B))
    ]  # fmt: skip
    total = sum(part.loss for part in parts)
    assert isinstance(total, Tensor)
    torch.testing.assert_close(total, whole.loss)
    torch.testing.assert_close(gradients(total, *leaves), expected)
    assert float(sum(p.mi_lower_bound for p in parts)) == pytest.approx(float(whole.mi_lower_bound))


def test_is_chosen_overrides_chosen_first() -> None:
    x = batch()
    order = torch.tensor([2, 0, 3, 1])
    mixed = linear_infopo_loss(x["hidden"][order], x["weight"], x["labels"][order], is_chosen=order < B)
    expected = linear_infopo_loss(**x)
    torch.testing.assert_close(mixed.loss, expected.loss)
    assert torch.equal(mixed.chosen_logps, expected.chosen_logps)
    assert torch.equal(mixed.rejected_logps, expected.rejected_logps.flip(0)[torch.tensor([1, 0])])


@pytest.mark.parametrize("trained", [True, False], ids=["trainable", "frozen"])
def test_the_sequence_of_each_row_is_derived_once(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds with a shift, a reference to form, and a backward pass. A padded batch needs no search."""
    searches, search = [], torch.bucketize

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        searches.append(args)
        return search(*args, **kwargs)

    monkeypatch.setattr(torch, "bucketize", counted)
    x, r = batch(), batch(seed=1)
    x["weight"].requires_grad_(trained)
    cu, chosen = torch.arange(0, 2 * B * T + 1, T), torch.arange(2 * B) < B
    packed = {"hidden": x["hidden"].reshape(-1, H), "weight": x["weight"], "labels": x["labels"].reshape(-1)}
    linear_infopo_loss(
        **packed, cu_seqlens=cu, is_chosen=chosen, shift=True, skip_chosen_reference=True,
        ref_hidden=r["hidden"].reshape(-1, H), ref_weight=r["weight"],
    ).loss.backward()  # fmt: skip
    assert len(searches) == 1
    linear_logps(**packed, cu_seqlens=cu, shift=True, reduction="mean").sum().backward()
    assert len(searches) == 2
    linear_infopo_loss(**x, shift=True).loss.backward()
    assert len(searches) == 2


# --- references -----------------------------------------------------------------------------------------------------


def test_reference_hidden_equals_reference_logps() -> None:
    x, r = batch(), batch(seed=1)
    ref = linear_logps(r["hidden"], r["weight"], x["labels"], reduction="sum").detach()
    by_logps = linear_infopo_loss(**x, ref_logps=ref)
    by_hidden = linear_infopo_loss(**x, ref_hidden=r["hidden"], ref_weight=r["weight"])
    assert torch.equal(by_logps.loss, by_hidden.loss)
    assert torch.equal(by_hidden.ref_logps, ref)
    by_hidden.loss.backward()
    assert r["hidden"].grad is None
    average = linear_infopo_loss(**x, ref_hidden=r["hidden"], ref_weight=r["weight"], average=True)
    mean = linear_logps(r["hidden"], r["weight"], x["labels"], reduction="mean").detach()
    torch.testing.assert_close(average.ref_logps, mean)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("how", ["logps", "rejected logps", "hidden", "rejected hidden"])
def test_skipped_chosen_reference_shifts_the_loss_and_no_gradient(how: str, packed: bool) -> None:
    x, r = batch(), batch(seed=1)
    leaves = x["hidden"], x["weight"]
    ref = linear_logps(r["hidden"], r["weight"], x["labels"], reduction="sum").detach()
    layout: dict[str, Any] = {}
    hidden, labels, ref_hidden = x["hidden"], x["labels"], r["hidden"]
    if packed:
        if how.startswith("rejected"):
            pytest.skip("only a padded batch has its rejected half in one piece")
        layout = {"cu_seqlens": torch.arange(0, 2 * B * T + 1, T), "is_chosen": torch.arange(2 * B) < B}
        hidden, labels, ref_hidden = hidden.reshape(-1, H), labels.reshape(-1), ref_hidden.reshape(-1, H)
    given_reference = {
        "logps": {"ref_logps": torch.where(torch.arange(2 * B) < B, torch.nan, ref)},
        "rejected logps": {"ref_logps": ref[B:]},
        "hidden": {"ref_hidden": ref_hidden, "ref_weight": r["weight"]},
        "rejected hidden": {"ref_hidden": ref_hidden[B:], "ref_weight": r["weight"]},
    }[how]
    exact = linear_infopo_loss(hidden, x["weight"], labels, **layout, ref_logps=ref)
    skipped = linear_infopo_loss(hidden, x["weight"], labels, **layout, **given_reference, skip_chosen_reference=True)
    assert skipped.chosen_reference_skipped
    assert not exact.chosen_reference_skipped
    assert skipped.mi_lower_bound.isnan()
    assert skipped.rewards[:B].isnan().all()
    torch.testing.assert_close(skipped.rewards[B:], exact.rewards[B:])
    torch.testing.assert_close(float(exact.loss - skipped.loss), float(0.1 * ref[:B].mean()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients(skipped.loss, *leaves), gradients(exact.loss, *leaves))


# --- autograd -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 3.0, 2.0**16])
def test_loss_scaled_and_gradients_accumulated(factor: float) -> None:
    x, y = batch(), batch(seed=2)
    y["weight"] = x["weight"]
    for micro in (x, y):
        (linear_infopo_loss(**micro).loss * factor / 2).backward()
    separate = [gradients(linear_infopo_loss(**m).loss, m["weight"])[0] for m in (x, y)]
    torch.testing.assert_close(x["weight"].grad, factor / 2 * (separate[0] + separate[1]))


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_second_backward_is_right_or_refused(factor: float) -> None:
    x = batch()
    loss = linear_infopo_loss(**x).loss * factor
    loss.backward(retain_graph=True)
    first = x["hidden"].grad.clone()  # type: ignore[union-attr]
    try:
        loss.backward()
    except RuntimeError as error:
        assert "ran a second time" in str(error)  # noqa: PT017
        assert "linear_logps" in str(error)  # noqa: PT017
    else:
        torch.testing.assert_close(x["hidden"].grad, 2 * first)


def test_linear_logps_allows_a_second_backward() -> None:
    x = batch()
    loss = linear_logps(**x, reduction="sum").sum()
    loss.backward(retain_graph=True)
    first = x["hidden"].grad.clone()  # type: ignore[union-attr]
    loss.backward()
    assert torch.equal(x["hidden"].grad, 2 * first)  # type: ignore[arg-type]


@pytest.mark.parametrize("which", ["linear_infopo_loss", "linear_preference_loss", "linear_logps"])
def test_double_backward_is_refused(which: str) -> None:
    x = batch()
    loss = {
        "linear_infopo_loss": lambda: linear_infopo_loss(**x).loss,
        "linear_preference_loss": lambda: linear_preference_loss(**x, objective=DPO()).loss,
        "linear_logps": lambda: linear_logps(**x).sum(),
    }[which]()
    with pytest.raises(RuntimeError, match=f"{which}: second derivatives are not available"):
        torch.autograd.grad(loss, x["hidden"], create_graph=True)


def test_only_the_loss_has_a_gradient() -> None:
    out = linear_infopo_loss(**batch())
    assert [name for name, value in out._asdict().items() if isinstance(value, Tensor) and value.requires_grad] == [
        "loss"
    ]
    with torch.no_grad():
        assert not linear_infopo_loss(**batch()).loss.requires_grad
    frozen = {key: value.detach() for key, value in batch().items()}
    assert not linear_infopo_loss(**frozen).loss.requires_grad


def test_head_tied_to_the_embedding() -> None:
    """The gradients of the head and of the embedding add up in one tensor."""
    x = batch()
    table = x["weight"].detach().clone().requires_grad_()
    ids = torch.randint(0, V, (2 * B, T))

    def loss_of(head: Tensor) -> Tensor:
        return linear_infopo_loss(torch.nn.functional.embedding(ids, table).tanh(), head, x["labels"]).loss

    (tied,) = gradients(loss_of(table), table)
    other = table.detach().clone().requires_grad_()
    through_embedding, through_head = gradients(loss_of(other), table, other)
    torch.testing.assert_close(tied, through_embedding + through_head)


def test_gradient_buffers_are_handed_over_not_copied() -> None:
    """weight.grad is the memory that the forward pass filled: a second copy would take V * H numbers."""
    x = batch()
    loss = linear_infopo_loss(**x).loss
    filled = loss.grad_fn.saved_tensors[1].data_ptr()  # type: ignore[union-attr]
    loss.backward()
    assert x["weight"].grad.data_ptr() == filled  # type: ignore[union-attr]


@pytest.mark.parametrize("trained", [("hidden",), ("hidden", "weight"), ("hidden", "weight", "bias")], ids="+".join)
def test_gradcheck_of_the_naive_loss(trained: tuple[str, ...]) -> None:
    case = Case(
        "gradcheck", pairs=1, length=4, prompt=1, hidden=3, vocab=5, bias=True, trained=trained,
        logit=LogitOptions(2.0, 1.5, 0.8), objective=InfoPOOptions(0.5, 0.0, 1.0, None, 0.3, True), scale=2.0,
    )  # fmt: skip
    inputs = support.make(case, torch.float64)
    leaves = inputs.fresh()

    def loss(*values: Tensor) -> Tensor:
        tensors = {**leaves, **dict(zip(trained, values, strict=True))}
        return naive.linear_preference_loss(
            **tensors, labels=inputs.labels, ref_logps=inputs.ref_logps, objective=case.objective, logit=case.logit
        )

    assert torch.autograd.gradcheck(loss, [leaves[name] for name in trained])
    got = support.fused(inputs, backend="torch")
    support.assert_result(got, support.plain(inputs))


# --- precision and types --------------------------------------------------------------------------------------------


def test_types_of_results() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = batch(dtype=dtype)
        assert linear_logps(**x).dtype == torch.float32
        assert linear_logps(**x, reduction="sum").dtype == torch.float64
        out = linear_infopo_loss(**x)
        assert (out.loss.dtype, out.logps.dtype, out.scored_tokens.dtype) == (
            torch.float32,
            torch.float64,
            torch.int64,
        )
        out.loss.backward()
        assert x["hidden"].grad.dtype == x["weight"].grad.dtype == dtype  # type: ignore[union-attr]


def test_autocast_casts_as_a_linear_layer_does() -> None:
    x = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_infopo_loss(**x)
        logps = linear_logps(**x)
    cast = {key: value.bfloat16() if value.is_floating_point() else value for key, value in x.items()}
    expected = linear_infopo_loss(**cast)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(logps, linear_logps(**cast))
    got, want = (gradients(o.loss, x["hidden"], x["weight"]) for o in (out, expected))
    assert got[0].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_products_inside_keep_their_type_under_autocast() -> None:
    """float64 inputs, and the arithmetic on them, stay float64."""
    x = batch(dtype=torch.float64)
    expected = linear_infopo_loss(**x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_infopo_loss(**x).loss, expected.loss)


# --- the loss on its own, modules, backends -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        InfoPOOptions(),
        InfoPOOptions(1.0, 0.0, -1.0),
        InfoPOOptions(0.5, min_log_weight=-1.5),
        InfoPOOptions(sft_weight=0.7),
        InfoPOOptions(beta=2.0, average=True, sft_weight=0.1),
    ],
    ids=str,
)
def test_loss_alone_equals_the_fused_loss(options: InfoPOOptions) -> None:
    x, ref = batch(dtype=torch.float64), torch.tensor([-21.0, -20, -23, -25], dtype=torch.float64)
    if options.average:
        ref = ref / 5
    fused = LinearInfoPOLoss(options)(**x, ref_logps=ref)
    logps = linear_logps(**x, reduction="sum")
    lengths = (x["labels"] != -100).sum(1)
    alone = InfoPOLoss(options)(
        logps[:B], logps[B:], ref[:B], ref[B:], chosen_lengths=lengths[:B], rejected_lengths=lengths[B:]
    )
    for name in ("loss", "mi_lower_bound", "logps", "ref_logps", "rewards", "weights", "scored_tokens"):
        torch.testing.assert_close(getattr(alone, name), getattr(fused, name), msg=name)
    leaves = x["hidden"], x["weight"]
    torch.testing.assert_close(gradients(alone.loss, *leaves), gradients(fused.loss, *leaves))


def test_loss_by_hand() -> None:
    """Two pairs computed by hand (beta 0.5, offset 1)."""
    out = infopo_loss(
        torch.tensor([-10.0, -20.0]), torch.tensor([-30.0, -8.0]), torch.tensor([-12.0, -18.0]),
        torch.tensor([-28.0, -12.0]), beta=0.5,
    )  # fmt: skip
    e = torch.tensor(1.0, dtype=torch.float64).exp()
    torch.testing.assert_close(out.rewards, torch.tensor([1.0, -1.0, -1.0, 2.0], dtype=torch.float64))
    assert float(out.loss) == pytest.approx(float((-1.0 + 1.0 + e**-2 + e**1) / 2))
    torch.testing.assert_close(out.weights, 0.5 * torch.stack([e**0, e**0, e**-2, e]))
    assert float(out.mi_lower_bound) == pytest.approx(-float(out.loss))
    assert out.chosen_rewards.tolist() == [1.0, -1.0]
    assert out.rejected_rewards.tolist() == [-1.0, 2.0]


def test_capped_exponential_is_continuous_with_its_derivative() -> None:
    at = torch.tensor([1.0 - 1e-7, 1.0, 1.0 + 1e-7, 500.0], dtype=torch.float64, requires_grad=True)
    out = infopo_loss(at.new_zeros(0), at, beta=1.0, offset=0.0, max_log_weight=1.0, num_pairs=1)
    (slope,) = gradients(out.loss, at)
    e = float(torch.tensor(1.0, dtype=torch.float64).exp())
    torch.testing.assert_close(slope, torch.full_like(slope, e), rtol=1e-6, atol=0)
    torch.testing.assert_close(slope, out.weights)
    each = [infopo_loss(at.new_zeros(0), a[None], beta=1.0, offset=0.0, max_log_weight=1.0).loss for a in at.detach()]
    assert float(each[2] - each[0]) == pytest.approx(2 * 2e-7 * e, rel=1e-3)  # one sequence is half a pair
    assert out.loss.isfinite()


def test_min_log_weight_drops_a_sequence_from_the_backward_pass_only() -> None:
    x = batch()
    ref = linear_logps(**x, reduction="sum").detach() + torch.tensor([0.0, 0, 0, 40])
    exact, dropped = (linear_infopo_loss(**x, ref_logps=ref, min_log_weight=m) for m in (None, -4.0))
    assert torch.equal(exact.loss, dropped.loss)
    assert dropped.weights[3] == 0 < exact.weights[3]
    (gradient,) = gradients(dropped.loss, x["hidden"])
    assert gradient[3].eq(0).all()
    torch.testing.assert_close(gradient[:3], gradients(exact.loss, x["hidden"])[0][:3])


def test_modules_say_what_they_hold() -> None:
    module = LinearInfoPOLoss(
        InfoPOOptions(beta=0.3), logit=LogitOptions(softcap=30.0), kernel=KernelOptions("torch", 8), shift=True
    )
    assert all(part in repr(module) for part in ("beta=0.3", "softcap=30.0", "backend='torch'", "shift=True"))
    x = batch()
    expected = linear_infopo_loss(**x, beta=0.3, softcap=30.0, backend="torch", workspace_mib=8, shift=True)
    assert torch.equal(module(**x).loss, expected.loss)


def test_auto_says_once_that_it_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "unavailable_reason", lambda name, *_: None if name == "torch" else "not built.")
    dispatch._warn_of_fallback.cache_clear()
    with pytest.warns(UserWarning, match=r"'cpp' backend cannot run here.*plain PyTorch.*not built"):
        linear_logps(**batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_logps(**batch())
        linear_logps(**batch(), backend="torch")
    with pytest.raises(ValueError, match=r"`backend='cpp'` cannot run: not built"):
        linear_logps(**batch(), backend="cpp")
    dispatch._warn_of_fallback.cache_clear()


def test_nothing_scored_costs_nothing_and_is_zero() -> None:
    x = batch()
    logps = linear_logps(x["hidden"], x["weight"], torch.full_like(x["labels"], -100))
    assert logps.eq(0).all()
    logps.sum().backward()
    assert x["hidden"].grad.eq(0).all()  # type: ignore[union-attr]
    assert linear_logps(x["hidden"][:0], x["weight"], x["labels"][:0]).shape == (0, T)


# --- torch.compile and torch.library --------------------------------------------------------------------------------


def _step(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    out = linear_infopo_loss(hidden * 2, weight, labels, shift=True, softcap=20.0, max_log_weight=3.0)
    return out.loss + linear_logps(hidden, weight, labels, reduction="mean").sum().float(), out.rewards


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(compiler: str) -> None:
    x = batch()
    compiled = torch.compile(_step, fullgraph=True, backend=compiler)
    results = []
    for run in (_step, compiled):
        loss, rewards = run(**x)
        results.append((loss.detach(), rewards, *gradients(loss * 3, x["hidden"], x["weight"])))
    torch.testing.assert_close(results[1], results[0])


def test_compiles_with_packed_rows() -> None:
    x, cu = batch(), torch.tensor([0, 5, 11, 2 * B * T])

    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        chosen = torch.tensor([False, True, False])
        return linear_infopo_loss(
            hidden.reshape(-1, H), weight, labels.reshape(-1), cu_seqlens=cu, is_chosen=chosen, shift=True
        ).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    leaves = x["hidden"], x["weight"]
    torch.testing.assert_close(compiled(**x), step(**x))
    torch.testing.assert_close(gradients(compiled(**x), *leaves), gradients(step(**x), *leaves))


def _op_arguments(backend: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    x = batch()
    hidden = x["hidden"].detach().reshape(-1, H).requires_grad_()
    weight, labels = x["weight"].detach().requires_grad_(), x["labels"].reshape(-1)
    bias = torch.zeros(V, requires_grad=True)
    cu, chosen = torch.arange(0, 2 * B * T + 1, T), torch.arange(2 * B) < B
    lse = torch.full((2 * B * T,), 4.0)
    ref = torch.full((2 * B,), -20.0, dtype=torch.float64)
    segments = torch.arange(2 * B).repeat_interleave(T)
    counts = (x["labels"] != -100).sum(1)
    rows, kernel = Rows(hidden, labels, cu, segments), KernelOptions(backend)
    plain = Rows(hidden.detach(), labels, cu, segments)
    head = vars(ops.HeadInputs.of(rows, weight, bias, LogitOptions(), kernel))
    frozen = vars(ops.HeadInputs.of(plain, weight.detach(), None, LogitOptions(), KernelOptions(backend, 4, 0.05)))
    given = {"cu_seqlens": cu, "segments": segments, "counts": counts, "is_chosen": chosen, "ref_logps": ref}
    loss = {
        name: ops.PreferenceInputs(
            **head, **given, sequence_weights=weights, num_pairs=2.0, objective=objective.name,
            options=objective.to_flat(), wanted=[True] * 3, report_tail=name == "dpo",
        )
        for name, objective, weights in (("infopo", InfoPO(), None), ("dpo", DPO(), torch.rand(2 * B).double()))
    }  # fmt: skip
    softcapped = ops.HeadInputs.of(rows, weight, bias, LogitOptions(5.0), kernel)
    backward = ops.LogprobBackwardInputs(
        **frozen, lse=lse, row_weight=torch.ones(2 * B * T), wanted=[True, True, False]
    )
    buffer = torch.zeros(V, H)
    into = ops.HeadIntoInputs(**vars(softcapped), parallel="", weight_gradient=buffer)
    backward_into = ops.LogprobBackwardIntoInputs(
        **{**vars(backward), "wanted": [True, False, False]}, parallel="", weight_gradient=buffer
    )
    objective = ops.ObjectiveInputs(
        torch.randn(2 * B * T).requires_grad_(), labels, backend, "", **given, sequence_weights=None, num_pairs=None,
        objective="dpo", options=DPO().to_flat(),
    )  # fmt: skip
    return {
        "row_segments": (ops.row_segments, (cu, 2 * B * T)),
        "scored_tokens": (ops.scored_tokens, (labels, segments, 2 * B)),
        "logprob": (ops._logprob.raw, ops._logprob.flat(softcapped)),
        "logprob_backward": (ops._logprob_backward.raw, ops._logprob_backward.flat(backward)),
        "logprob_into": (ops._logprob_into.raw, ops._logprob_into.flat(into)),
        "logprob_backward_into": (ops._logprob_backward_into.raw, ops._logprob_backward_into.flat(backward_into)),
        "objective": (ops._objective.raw, ops._objective.flat(objective)),
        **{name: (ops._linear_preference.raw, ops._linear_preference.flat(inputs)) for name, inputs in loss.items()},
    }


@pytest.mark.parametrize("backend", ["torch", "cpp"])
@pytest.mark.parametrize("name", list(_op_arguments("torch")))
def test_opcheck(name: str, backend: str) -> None:
    if reason := dispatch.unavailable_reason(backend, torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    op, arguments = _op_arguments(backend)[name]
    torch.library.opcheck(op, arguments)


# --- any shape, any pattern of labels -------------------------------------------------------------------------------


HERE = [name for name in support.CPU_BACKENDS if support.missing(name) is None]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    hidden=st.integers(1, 40),
    vocab=st.integers(1, 200),
    data=st.data(),
)
def test_any_packed_batch(lengths: list[int], hidden: int, vocab: int, data: st.DataObject) -> None:
    N, S = sum(lengths), len(lengths)
    seed = data.draw(st.integers(0, 2**31), label="seed")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), label="type")
    name = data.draw(st.sampled_from(HERE), label="backend")
    g = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    labels = torch.randint(0, vocab, (N,), generator=g)
    unscored = torch.rand(N, generator=g) < data.draw(st.floats(0, 1), label="share of unscored rows")
    unscored[cu[:-1]] = False  # each sequence keeps a scored token
    labels[unscored] = -100
    tensors = {
        "hidden": torch.randn(N, hidden, generator=g).to(dtype),
        "weight": (torch.randn(vocab, hidden, generator=g) / hidden**0.5).to(dtype),
        "bias": torch.randn(vocab, generator=g).to(dtype) if data.draw(st.booleans(), label="bias") else None,
    }
    layout = {"cu_seqlens": cu, "is_chosen": torch.rand(S, generator=g) < 0.5}
    trained = tuple(data.draw(st.sets(st.sampled_from(["hidden", "weight", "bias"]), min_size=1), label="trained"))
    if trained == ("bias",) and tensors["bias"] is None:
        trained = ("hidden",)
    softcap = data.draw(st.sampled_from([None, 2.0, 30.0]), label="softcap")
    average = data.draw(st.booleans(), label="average")
    case = Case(
        "any", trained=trained, logit=LogitOptions(softcap), objective=InfoPOOptions(0.5, 0.0, 2.0, None, 0.1, average)
    )
    inputs = support.Inputs(case, dtype, tensors, labels, layout, None)
    with pytest.MonkeyPatch.context() as patch:
        got = support.fused(inputs, backend=support.use_backend(name, patch))
        support.assert_result(got, support.plain(inputs))


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", ["scored", "ignored but for one", "outside one half"])
@pytest.mark.parametrize("workspace_mib", [1, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden_size", [48, 128], ids=["nothing kept", "kept logits"])
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_no_gradient_is_what_memory_held_before(
    backend: str, hidden_size: int, dtype: torch.dtype, workspace_mib: int, labels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight gradient that is assigned is not set to 0 first, so every entry has to be assigned."""
    if reason := dispatch.unavailable_reason(backend, torch.device("cpu"), dtype):
        pytest.skip(reason)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, T, hidden_size, generator=g).to(dtype).requires_grad_()
    weight = torch.randn(300, hidden_size, generator=g).div(4).to(dtype).requires_grad_()
    y = torch.randint(0, 300, (4, T), generator=g)
    if labels == "ignored but for one":
        y[:, 1:] = -100
    elif labels == "outside one half":
        y[2:, : T // 2] = -100

    def run() -> tuple[Tensor, ...]:
        output = linear_infopo_loss(hidden, weight, y, backend=backend, workspace_mib=workspace_mib)
        return gradients(output.loss, hidden, weight)

    expected, empty_like = run(), torch.empty_like

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        result = empty_like(*args, **kwargs)
        return result.fill_(float("nan")) if result.is_floating_point() else result

    monkeypatch.setattr(torch, "empty_like", poisoned)
    for got, wanted in zip(run(), expected, strict=True):
        assert torch.equal(got, wanted)
