"""Bad input, one row for each case. Each error names the argument, what was expected and what came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from infopo_kernels import (
    DPO,
    IPO,
    SFT,
    InfoPOOptions,
    KernelOptions,
    LinearPreferenceLoss,
    LogitOptions,
    SimPO,
    infopo_loss,
    linear_infopo_loss,
    linear_logps,
    linear_preference_loss,
)

B, T, H, V = 2, 5, 8, 13
NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch off Triton's interpreter: other tests use it, and with it the backend would run without a GPU."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


def padded(**change: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    arguments: dict[str, Any] = {
        "hidden": torch.randn(2 * B, T, H, generator=g),
        "weight": torch.randn(V, H, generator=g),
        "labels": torch.randint(0, V, (2 * B, T), generator=g),
    }
    return {**arguments, **change}


def packed(**change: Any) -> dict[str, Any]:
    arguments = padded()
    arguments["hidden"] = arguments["hidden"].reshape(-1, H)
    arguments["labels"] = arguments["labels"].reshape(-1)
    arguments["cu_seqlens"] = torch.tensor([0, 4, 12, 20], dtype=torch.int32)
    arguments["is_chosen"] = torch.tensor([True, False, False])
    return {**arguments, **change}


def label(value: int) -> torch.Tensor:
    labels = padded()["labels"]
    labels[1, 2] = value
    return labels


def unscored(sequence: int) -> torch.Tensor:
    labels = padded()["labels"]
    labels[sequence] = -100
    return labels


def bounds(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


LINEAR: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("hidden is no tensor", padded(hidden=[1.0]), TypeError, r"`hidden` must be a torch.Tensor, got list"),
    ("hidden of token ids", padded(hidden=torch.zeros(4, T, H, dtype=torch.int64)), TypeError, r"`hidden`.*int64"),
    ("hidden of wrong width", padded(hidden=torch.zeros(4, T, 9)), ValueError, r"`hidden`.*H = 8.*\[4, 5, 9\]"),
    ("hidden of four dimensions", padded(hidden=torch.zeros(1, 4, T, H)), ValueError, r"`hidden`.*\[1, 4, 5, 8\]"),
    ("weight of one dimension", padded(weight=torch.zeros(V)), ValueError, r"`weight`.*\[V, H\].*\[13\]"),
    ("weight without entries", padded(weight=torch.zeros(0, H)), ValueError, r"`weight`.*empty.*\[0, 8\]"),
    ("weight of another type", padded(weight=torch.zeros(V, H).half()), TypeError, r"`weight`.*float32.*float16.*cast"),
    ("weight elsewhere", padded(weight=torch.zeros(V, H, device="meta")), ValueError, r"`weight`.*device.*cpu.*meta"),
    ("bias of wrong length", padded(bias=torch.zeros(12)), ValueError, r"`bias`.*\[13\].*\[12\]"),
    ("bias of another type", padded(bias=torch.zeros(V).double()), TypeError, r"`bias`.*float32.*float64"),
    ("labels of wrong shape", padded(labels=torch.zeros(4, 6, dtype=torch.int64)), ValueError, r"`labels`.*\[4, 5\]"),
    ("labels of floats", padded(labels=torch.zeros(4, T)), TypeError, r"`labels`.*integers.*float32"),
    ("labels elsewhere", padded(labels=label(0).to("meta")), ValueError, r"`labels`.*cpu.*meta"),
    ("label beyond the vocabulary", padded(labels=label(V)), ValueError, r"`labels`.*\[0, 13\).*got 13 at row 7"),
    ("negative label", padded(labels=label(-1)), ValueError, r"`labels`.*got -1"),
    ("-100 with another ignore_index", padded(labels=label(-100), ignore_index=-7), ValueError, r"`labels`.*got -1"),
    ("ignore_index of a float", padded(ignore_index=1.5), TypeError, r"`ignore_index`.*float 1.5"),
    ("sequence without scored token", padded(labels=unscored(3)), ValueError, r"`labels`.*none in sequence 3 \(of 4\)"),
    ("one token and a shift", padded(hidden=torch.zeros(4, 1, H), labels=label(0)[:, :1], shift=True), ValueError,
     r"`labels`.*at least one token"),
    ("shift of a number", padded(shift=1), TypeError, r"`shift`.*True or False.*int 1"),
    ("bounds not from 0", packed(cu_seqlens=bounds(1, 4, 12, 20)), ValueError, r"`cu_seqlens` must start at 0, got 1"),
    ("bounds not increasing", packed(cu_seqlens=bounds(0, 12, 4, 20)), ValueError, r"`cu_seqlens`.*12 then 4"),
    ("bounds of an empty sequence", packed(cu_seqlens=bounds(0, 4, 4, 20)), ValueError, r"`cu_seqlens`.*4 then 4"),
    ("bounds not to the end", packed(cu_seqlens=bounds(0, 4, 12, 19)), ValueError, r"`cu_seqlens`.*end at N = 20.*19"),
    ("bounds beyond the end", packed(cu_seqlens=bounds(0, 4, 12, 21)), ValueError, r"`cu_seqlens`.*N = 20.*21"),
    ("bounds of floats", packed(cu_seqlens=torch.tensor([0.0, 4, 12, 20])), TypeError, r"`cu_seqlens`.*float32"),
    ("bounds of int16", packed(cu_seqlens=bounds(0, 4, 12, 20, dtype=torch.int16)), TypeError, r"`cu_seqlens`.*int16"),
    ("bounds of one entry", packed(cu_seqlens=bounds(0)), ValueError, r"`cu_seqlens`.*\[S \+ 1\].*\[1\]"),
    ("bounds of two dimensions", packed(cu_seqlens=bounds(0, 4)[None]), ValueError, r"`cu_seqlens`.*\[1, 2\]"),
    ("bounds with a padded batch", padded(cu_seqlens=bounds(0, 20), is_chosen=torch.tensor([True])), ValueError,
     r"`cu_seqlens`.*packed"),
    ("softcap of zero", padded(softcap=0.0), ValueError, r"`softcap`.*positive.*0.0.*None"),
    ("logit scale of zero", padded(logit_scale=0.0), ValueError, r"`logit_scale`.*0"),
    ("logit scale of text", padded(logit_scale="1"), TypeError, r"`logit_scale`.*str '1'"),
    ("temperature of zero", padded(temperature=0), ValueError, r"`temperature`.*positive"),
    ("temperature without end", padded(temperature=INF), ValueError, r"`temperature`.*finite"),
    ("unknown backend", padded(backend="cuda"), ValueError, r"`backend`.*'auto', 'cpp', 'triton', 'torch'.*'cuda'"),
    ("backend without its device", padded(backend="triton"), ValueError, r"`backend='triton'` cannot run: "),
    ("backend without the type", {**padded(), "hidden": padded()["hidden"].double(),
                                  "weight": padded()["weight"].double(), "backend": "cpp"}, ValueError,
     r"`backend='cpp'` cannot run: "),
    ("workspace of nothing", padded(workspace_mib=0), ValueError, r"`workspace_mib`.*at least 1.*0"),
    ("threshold above 1", padded(tail_threshold=2), ValueError, r"`tail_threshold`.*< 1, got 2"),
    ("workspace of a float", padded(workspace_mib=1.5), TypeError, r"`workspace_mib`.*float 1.5"),
]  # fmt: skip

ref = torch.zeros(2 * B, dtype=torch.float64)
INFOPO_ONLY: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("an odd sequence", padded(hidden=torch.zeros(3, T, H), labels=label(0)[:3]), ValueError, r"even number.*got 3"),
    ("no sequence", padded(hidden=torch.zeros(0, T, H), labels=label(0)[:0]), ValueError, r"even number.*got 0"),
    ("packed without bounds", {k: v for k, v in packed().items() if k != "cu_seqlens"}, ValueError,
     r"`cu_seqlens` is missing"),
    ("packed without halves", packed(is_chosen=None), ValueError, r"`is_chosen` is missing"),
    ("halves of integers", packed(is_chosen=bounds(1, 0, 0)), TypeError, r"`is_chosen`.*bool.*int32"),
    ("halves of wrong length", packed(is_chosen=torch.tensor([True])), ValueError, r"`is_chosen`.*\[3\].*\[1\]"),
    ("no pairs", padded(num_pairs=0), ValueError, r"`num_pairs`.*positive.*0"),
    ("pairs of text", padded(num_pairs="2"), TypeError, r"`num_pairs`.*str"),
    ("reference of wrong length", padded(ref_logps=ref[:3]), ValueError, r"`ref_logps`.*\[4\].*\[3\]"),
    ("reference of one half", padded(ref_logps=ref[:2]), ValueError, r"`ref_logps`.*\[4\].*\[2\]"),
    ("reference of two dimensions", padded(ref_logps=ref[None]), ValueError, r"`ref_logps`.*\[1, 4\]"),
    ("reference of integers", padded(ref_logps=ref.long()), TypeError, r"`ref_logps`.*floating.*int64"),
    ("reference with a gap", padded(ref_logps=ref + torch.tensor([0, 0, NAN, 0])), ValueError,
     r"`ref_logps`.*finite.*nan for sequence 2"),
    ("both references", padded(ref_logps=ref, ref_hidden=torch.zeros(4, T, H)), ValueError, r"`ref_logps` and `ref_h"),
    ("reference without its head", padded(ref_hidden=torch.zeros(4, T, H)), ValueError, r"`ref_weight` is missing"),
    ("head without its reference", padded(ref_weight=torch.zeros(V, H)), ValueError, r"`ref_weight`.*`ref_hidden`"),
    ("reference of another shape", padded(ref_hidden=torch.zeros(2, T, H), ref_weight=torch.zeros(V, H)), ValueError,
     r"`ref_hidden`.*\[2, 5, 8\]"),
    ("reference head of another width", padded(ref_hidden=torch.zeros(4, T, H), ref_weight=torch.zeros(V, 9)),
     ValueError, r"`ref_hidden`.*H = 9.*`ref_weight`"),
    ("nothing to skip", padded(skip_chosen_reference=True), ValueError, r"`skip_chosen_reference=True`"),
    ("beta of zero", padded(beta=0.0), ValueError, r"`beta`.*positive.*0.0"),
    ("negative beta", padded(beta=-0.1), ValueError, r"`beta`.*-0.1"),
    ("beta of NaN", padded(beta=NAN), ValueError, r"`beta`.*finite.*nan"),
    ("infinite beta", padded(beta=INF), ValueError, r"`beta`.*finite.*inf"),
    ("beta of text", padded(beta="0.1"), TypeError, r"`beta`.*str"),
    ("offset of NaN", padded(offset=NAN), ValueError, r"`offset`.*finite"),
    ("infinite cap", padded(max_log_weight=INF), ValueError, r"`max_log_weight`.*finite"),
    ("floor above the cap", padded(min_log_weight=1.0, max_log_weight=0.0), ValueError, r"`min_log_weight`.*below"),
    ("negative sft weight", padded(sft_weight=-1.0), ValueError, r"`sft_weight`.*negative.*-1"),
    ("average of a number", padded(average=1), TypeError, r"`average`.*True or False"),
]  # fmt: skip


u = torch.ones(2 * B, dtype=torch.float64)
three_chosen = torch.tensor([True, True, True, False])
WEIGHTS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("weights of integers", padded(sequence_weights=u.long(), num_pairs=2), TypeError, r"`sequence_weights`.*int64"),
    ("weights of wrong length", padded(sequence_weights=u[:3], num_pairs=2), ValueError,
     r"`sequence_weights`.*\[4\].*\[3\]"),
    ("weights of a list", padded(sequence_weights=[1.0], num_pairs=2), TypeError, r"`sequence_weights`.*list"),
    ("weights elsewhere", padded(sequence_weights=u.to("meta"), num_pairs=2), ValueError, r"`sequence_weights`.*meta"),
    ("negative weight", padded(sequence_weights=-u, num_pairs=2), ValueError,
     r"`sequence_weights`.*not negative.*-1.0 for sequence 0"),
    ("weight of NaN", padded(sequence_weights=u * NAN, num_pairs=2), ValueError, r"`sequence_weights`.*finite.*nan"),
    ("infinite weight", padded(sequence_weights=u * INF, num_pairs=2), ValueError, r"`sequence_weights`.*finite.*inf"),
    ("weights without pairs", padded(sequence_weights=u), ValueError, r"`num_pairs` is missing.*`sequence_weights`"),
]  # fmt: skip
OBJECTIVE: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("a name", padded(objective="dpo"), TypeError, r"`objective`.*DPO\(beta=0.1\).*str 'dpo'"),
    ("a class", padded(objective=DPO), TypeError, r"`objective`.*an object.*the class DPO"),
    ("three chosen to one", padded(objective=DPO(), is_chosen=three_chosen), ValueError,
     r"`is_chosen`.*as many chosen as rejected.*DPO pairs.*got 3 and 1"),
    ("an odd number", packed(objective=IPO()), ValueError, r"`is_chosen`.*IPO pairs.*odd number of sequences, 3"),
    ("unequal weights need pairs too", padded(objective=SimPO(), is_chosen=~three_chosen), ValueError,
     r"SimPO pairs.*got 1 and 3"),
    ("a reference for SimPO", padded(objective=SimPO(), ref_logps=ref), ValueError,
     r"`ref_logps`.*SimPO has no reference; leave it out"),
    ("a reference for SFT", padded(objective=SFT(), ref_hidden=torch.zeros(4, T, H), ref_weight=torch.zeros(V, H)),
     ValueError, r"`ref_hidden`.*SFT has no reference"),
    ("chosen reference skipped in DPO", padded(objective=DPO(), ref_logps=ref, skip_chosen_reference=True), ValueError,
     r"`skip_chosen_reference=True`.*InfoPO.*got DPO"),
]  # fmt: skip


def _rows(rows: list[tuple[str, dict[str, Any], type[Exception], str]]) -> list[Any]:
    return [pytest.param(*row[1:], id=row[0]) for row in rows]


@pytest.mark.parametrize(("arguments", "error", "match"), _rows(LINEAR + INFOPO_ONLY + WEIGHTS))
def test_linear_infopo_loss(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments = {"backend": "torch", **arguments}
    with pytest.raises(error, match=match):
        linear_infopo_loss(**arguments)


@pytest.mark.parametrize(("arguments", "error", "match"), _rows(LINEAR + WEIGHTS + OBJECTIVE))
def test_linear_preference_loss(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments = {"backend": "torch", "objective": DPO(), **arguments}
    with pytest.raises(error, match=match):
        linear_preference_loss(**arguments)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(("arguments", "error", "match"), _rows(LINEAR))
def test_linear_logps(arguments: dict[str, Any], error: type[Exception], match: str, reduction: str) -> None:
    arguments = {"backend": "torch", **{k: v for k, v in arguments.items() if k != "is_chosen"}}
    with pytest.raises(error, match=match):
        linear_logps(**arguments, reduction=reduction)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"reduction": "avg"}, r"`reduction`.*'none', 'sum' or 'mean'.*'avg'"),
        ({"reduction": "sum", "hidden": torch.zeros(3, H), "labels": bounds(0, 1, 2)}, r"`cu_seqlens` is missing"),
    ],
)
def test_reduction(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        linear_logps(**padded(**arguments))


P = torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: infopo_loss(P[None], P), ValueError, r"`chosen_logps`.*\[1, 3\]"),
        (lambda: infopo_loss(P, P.long()), TypeError, r"`rejected_logps`.*floating.*int64"),
        (lambda: infopo_loss([0.0], P), TypeError, r"`chosen_logps`.*list"),  # type: ignore[arg-type]
        (lambda: infopo_loss(P, P, P[:2], P), ValueError, r"`ref_chosen_logps`.*\[3\].*\[2\]"),
        (lambda: infopo_loss(P, P, P, None), ValueError, r"`ref_rejected_logps` is missing"),
        (lambda: infopo_loss(P, P, P, P, average=True), ValueError, r"`chosen_lengths` is missing.*average"),
        (lambda: infopo_loss(P, P, P, P, sft_weight=1.0), ValueError, r"`chosen_lengths` is missing.*sft_weight"),
        (lambda: infopo_loss(P, P, chosen_lengths=P), ValueError, r"`chosen_lengths`.*3 integers.*float32"),
        (
            lambda: infopo_loss(P, P, chosen_lengths=P.long(), sft_weight=1.0),
            ValueError,
            r"`chosen_lengths`.*at least 1.*0",
        ),
        (lambda: infopo_loss(P, P, num_pairs=-1), ValueError, r"`num_pairs`.*-1"),
        (lambda: infopo_loss(P[:0], P[:0]), ValueError, r"both empty"),
        (lambda: infopo_loss(P, P.to("meta")), ValueError, r"`rejected_logps`.*cpu.*meta"),
        (lambda: infopo_loss(P, P, num_pairs="3"), TypeError, r"`num_pairs`.*str"),  # type: ignore[arg-type]
        (lambda: InfoPOOptions(beta=True), TypeError, r"`beta`.*bool"),
        (lambda: DPO(beta=0), ValueError, r"`beta`.*positive.*0"),
        (lambda: IPO(average=1), TypeError, r"`average`.*True or False"),  # type: ignore[arg-type]
        (lambda: SimPO(gamma=NAN), ValueError, r"`gamma`.*finite.*nan"),
        (lambda: SFT(average=None), TypeError, r"`average`.*NoneType"),  # type: ignore[arg-type]
        (lambda: LinearPreferenceLoss("dpo"), TypeError, r"`objective`.*str"),  # type: ignore[arg-type]
        (lambda: KernelOptions(backend="gpu"), ValueError, r"`backend`.*'gpu'"),
        (lambda: KernelOptions(tail_threshold=-0.1), ValueError, r"`tail_threshold`.*0 <= .*-0.1.*2\*\*-13"),
        (lambda: KernelOptions(tail_threshold=1), ValueError, r"`tail_threshold`.*< 1, got 1"),
        (lambda: KernelOptions(tail_threshold=NAN), ValueError, r"`tail_threshold`.*finite.*nan"),
        (lambda: KernelOptions(tail_threshold="2**-13"), TypeError, r"`tail_threshold`.*number.*str"),  # type: ignore[arg-type]
        (lambda: KernelOptions(report_tail=1), TypeError, r"`report_tail`.*True or False"),  # type: ignore[arg-type]
        (lambda: LogitOptions(softcap=-1), ValueError, r"`softcap`.*-1"),
    ],
)
def test_loss_alone_and_options(call: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_a_refused_call_leaves_nothing_behind() -> None:
    """After an error the same tensors work, and no gradient was written."""
    arguments = padded(labels=label(V))
    arguments["hidden"].requires_grad_()
    with pytest.raises(ValueError, match="labels"):
        linear_infopo_loss(**arguments)
    assert arguments["hidden"].grad is None
    linear_infopo_loss(**{**arguments, "labels": label(0)}).loss.backward()
    assert arguments["hidden"].grad is not None
