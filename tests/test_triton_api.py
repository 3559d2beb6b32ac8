"""The public functions and the objective on the Triton backend: the table of cases that every backend passes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import triton_support as ts

# isort: split
# Triton is imported by the module above.

from infopo_kernels import DPO, IPO, SFT, InfoPO, SimPO, linear_infopo_loss
from infopo_kernels.backends import dispatch
from infopo_kernels.backends.base import Gradients, Head
from infopo_kernels.backends.triton import TritonBackend, gradients, launch
from infopo_kernels.backends.triton import support as support_of_triton
from infopo_kernels.libraries import TESTED
from infopo_kernels.objectives import Objective
from tests import support
from tests.support import CASES, Case

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


LONG = ("odd-sizes", "power-of-two")
"""Half a minute in the interpreter; test_triton_kernels.py has sizes of both kinds."""


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in LONG], ids=str)
def test_infopo_loss_and_gradients(case: Case) -> None:
    """float32; what rounding G to a 16-bit type adds has its own budget in test_triton_kernels.py."""
    inputs = support.make(case, torch.float32)
    got = support.fused(inputs, backend="triton")
    support.assert_result(got, support.plain(inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["plain", "everything", "frozen-head"])
def test_loss_from_16_bit_inputs(name: str, dtype: torch.dtype) -> None:
    """The loss has float32's budget: logits are never rounded to the input's type."""
    case = next(c for c in CASES if c.name == name)
    inputs = support.make(case, dtype)
    got = support.fused(inputs, backend="triton")
    support.assert_result(got, support.plain(inputs))


@pytest.mark.parametrize(("length", "beside"), [(9, False), (32, False), (32, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_kept_until_the_weight_gradient_is_written(
    dtype: torch.dtype, length: int, beside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejected rows first; of longer sequences the memory of dW has no room for all, the workspace beside it has."""
    kept, scored, room, own = [], [], [], TritonBackend.logprob

    def counted(
        self: TritonBackend, head: Head, labels: torch.Tensor, keep: Gradients | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (scored if keep is None else kept).append(int((labels != -100).sum()))
        room.append(keep is not None and keep.logits is not None)
        return own(self, head, labels, keep)

    monkeypatch.setattr(TritonBackend, "logprob", counted)
    if not beside:
        monkeypatch.setattr(gradients, "rows_beside", lambda *_: 0)
    inputs = support.make(Case("kept", hidden=32, length=length, bias=True), dtype)
    got = support.fused(inputs, backend="triton")
    assert len(kept) == 1
    assert kept[0] >= 16
    assert (sum(scored) > 0) == (length == 32 and not beside)
    assert any(room) == beside
    support.assert_result(got, support.plain(inputs))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("name", ["packed-shift", "bias", "softcap"])
def test_logps_and_gradients(name: str, reduction: str) -> None:
    case = next(c for c in CASES if c.name == name)
    inputs = support.make(case, torch.float32)
    got = support.fused_logps(inputs, reduction, backend="triton")
    support.assert_result(got, support.plain_logps(inputs, reduction))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["bias", "packed-shift"])
def test_the_weight_s_gradient_is_added_to_a_buffer_of_the_caller_s(name: str, dtype: torch.dtype) -> None:
    """Two steps, in float32 for 16-bit inputs too."""
    inputs = support.make(next(c for c in CASES if c.name == name), dtype)
    weight = inputs.tensors["weight"]
    assert weight is not None
    buffer = torch.zeros(weight.shape)
    got = [support.fused(inputs, backend="triton", grad_weight_into=buffer) for _ in range(2)][-1]
    support.assert_result(replace(got, gradients={**got.gradients, "weight": buffer / 2}), support.plain(inputs))


@pytest.mark.parametrize("trained", [("hidden", "weight"), ("hidden",)], ids="+".join)
@pytest.mark.parametrize("objective", [InfoPO(0.3), DPO(0.3), IPO(0.5), SimPO(2.0, 0.7), SFT()], ids=str)
def test_objectives(objective: Objective, trained: tuple[str, ...]) -> None:
    case = Case(f"objective-{objective.name}", objective=objective, packed=True, weighted=True, trained=trained)
    inputs = support.make(case, torch.float32)
    got = support.fused(inputs, backend="triton")
    support.assert_result(got, support.plain(inputs))


def test_other_objectives_are_left_to_plain_pytorch() -> None:
    labels, ref = torch.arange(4), torch.zeros(2).double()
    arguments = support.objective_arguments(labels, torch.tensor([0, 2, 4]), torch.tensor([True, False]), ref, 1.0)
    assert ts.backend().objective(DPO(), -torch.rand(4), *arguments) is None


def test_what_cannot_be_served_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, cpu = ts.backend(), torch.device("cpu")
    assert backend.unsupported_reason(cpu, torch.float32) is None
    assert "float64" in str(backend.unsupported_reason(cpu, torch.float64))
    assert "'mps'" in str(backend.unsupported_reason(torch.device("mps"), torch.float32))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "GPU" in str(backend.unsupported_reason(cpu, torch.float32))
    with pytest.raises(ValueError, match=r"triton.*cannot run: Triton kernels need a GPU"):
        dispatch.resolve("triton", cpu, torch.float32)
    if not torch.cuda.is_available():
        assert "no GPU" in str(backend.unsupported_reason(torch.device("cuda"), torch.float32))


@pytest.mark.parametrize(
    ("torch_version", "triton_version", "said"),
    [
        ("2.9.1+cu128", "3.5.1", "need PyTorch 2.10 or newer, this is 2.9.1+cu128"),
        ("2.11.0", "3.5.1", "need Triton 3.6 or newer, this is 3.5.1"),
        ("2.10.0a0+git1", "3.6.0+git2", None),
        ("3.0", "4.0", None),
    ],
)
def test_versions_below_the_floors_are_said(torch_version: str, triton_version: str, said: str | None) -> None:
    reason = support_of_triton.version_reason(torch_version, triton_version)
    assert reason is None if said is None else said in str(reason)


def test_the_floors_are_those_of_the_package() -> None:
    for library, oldest in (("torch", support_of_triton.OLDEST_TORCH), ("triton", support_of_triton.OLDEST_TRITON)):
        assert TESTED[library][0].split(".")[:2] == [str(number) for number in oldest]


def test_auto_falls_back_from_an_old_triton_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support_of_triton, "triton_version", lambda: "3.5.1")
    dispatch._warn_of_fallback.cache_clear()
    with pytest.warns(UserWarning, match=r"need Triton 3\.6 or newer, this is 3\.5\.1; install"):
        assert dispatch.resolve("auto", torch.device("cuda"), torch.float32).name == "torch"


@pytest.mark.parametrize("name", ["logprob", "logprob_and_grad", "backward", "kept_rows"])
def test_everything_is_prepared_on_the_device_of_the_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton says of a target, and what a capture is, belong to the current device."""
    inside = []
    prepare = launch.prepare

    @contextlib.contextmanager
    def on_device(device: torch.device) -> Iterator[None]:
        inside.append(device)
        yield
        inside.pop()

    def prepared(head: Head) -> launch.Launch:
        assert inside, "prepared before the device became the current one"
        return prepare(head)

    monkeypatch.setattr(launch, "on_device", on_device)
    monkeypatch.setattr(launch, "prepare", prepared)
    inputs = ts.make(ts.Problem("device", h=32), torch.float32)
    got, one = ts.buffers(inputs, "xw"), torch.ones(37)
    arguments = {
        "logprob": (inputs.labels,),
        "logprob_and_grad": (inputs.labels, inputs.c, got),
        "backward": (inputs.labels, one, inputs.c, got),
        "kept_rows": (got.weight,),
    }
    getattr(ts.backend(), name)(inputs.head, *arguments[name])
    assert inside == []


def test_too_small_a_workspace_is_refused() -> None:
    inputs = ts.make(ts.Problem("tiny", h=4000), torch.float32, 20_000)
    with pytest.raises(ValueError, match="`workspace_mib` must hold"):
        ts.backend().backward(inputs.head, inputs.labels, torch.zeros(37), inputs.c, ts.buffers(inputs, "xw"))


def test_importing_the_package_does_not_import_triton() -> None:
    code = (
        "import sys, torch, infopo_kernels, infopo_kernels.backends.triton as b\n"
        "b.TritonBackend().unsupported_reason(torch.device('cpu'), torch.float32)\n"
        "assert 'triton' not in sys.modules"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_unscored_rows_cost_nothing_and_are_never_read() -> None:
    """The interpreter executes what a device would: with 90 % of the rows unscored, far fewer loads."""
    loads = []
    for ignored in (0.0, 0.9):
        inputs = ts.make(ts.Problem("cost", n=80, ignored=ignored), torch.float32)
        with ts.checked_addresses() as spaces:
            ts.backend().logprob_and_grad(inputs.head, inputs.labels, inputs.c, ts.buffers(inputs, "xw"))
        loads.append(spaces.loads)
    assert loads[1] < 0.4 * loads[0]


def test_underflown_sequences_cost_their_forward_only() -> None:
    """A rejected sequence whose weight is 0 is dropped on the device: nothing is loaded but the list of rows."""
    inputs = ts.make(ts.Problem("underflown", ignored=0.0), torch.float32)
    with ts.checked_addresses() as spaces:
        ts.backend().backward(inputs.head, inputs.labels, torch.zeros(37), torch.zeros(37), ts.buffers(inputs, "xw"))
    with ts.checked_addresses() as full:
        ts.backend().backward(inputs.head, inputs.labels, torch.zeros(37), torch.ones(37), ts.buffers(inputs, "xw"))
    assert spaces.loads < 0.2 * full.loads


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Kernel and size class of every launch that the autotuner gets. Trials need a GPU: here a choice is taken."""
    asked: list[tuple[str, int]] = []

    class Chosen:
        """What `triton.autotune` makes of a kernel, once it has chosen."""

        def __init__(self, kernel: Any, key: tuple[str, ...], in_place: str | None) -> None:
            restored = () if in_place is None else (in_place,)
            assert {*key, *restored} <= set(kernel.arg_names)
            assert "ROWS" in key
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def run(*args: Any, **named: Any) -> Any:
                asked.append((self.kernel.__name__, named["ROWS"]))
                return self.kernel[grid](*args, **named, GROUP=4, num_warps=8, num_stages=2)

            return run

    monkeypatch.setenv("INFOPO_KERNELS_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_tuned", Chosen)
    monkeypatch.setattr(launch, "_TUNED", set())
    return asked


def test_the_autotuner_is_asked_with_names_that_kernels_have(tuned: list[tuple[str, int]]) -> None:
    """Every kernel with a product gets it, and its choice serves."""
    inputs = ts.make(ts.Problem("autotuned", ignored=0.0), torch.float32)
    inputs.c[:] = 0.1
    truth, before, got = ts.plain(inputs), ts.buffers(inputs, "xw"), ts.buffers(inputs, "xw")
    _, lse = ts.backend().logprob(inputs.head, inputs.labels)
    ts.backend().logprob_and_grad(inputs.head, inputs.labels, inputs.c, ts.buffers(inputs, "xw"))
    ts.backend().backward(inputs.head, inputs.labels, lse, inputs.c, got)
    ts.assert_gradients(inputs, truth, got, before, roundings=1, zero_rows=False)
    products = ("logprob", "softmax_tile", "gradient_tile", "hidden_product", "weight_product")
    assert {name for name, _ in tuned} == {f"{name}_kernel" for name in products}


@pytest.mark.parametrize("scored", [10, 60])
def test_launches_with_little_to_do_are_not_tuned(scored: int, tuned: list[tuple[str, int]]) -> None:
    """Trials of programs that leave at once would choose at random, and the choice be kept."""
    inputs = ts.make(ts.Problem("tuned", n=70, v=40, ignored=0.0), torch.float32)
    inputs.labels[scored:] = -100
    ts.backend().logprob(inputs.head, inputs.labels)
    assert tuned == [("logprob_kernel", 128)] * (scored == 60)
    inputs.labels[:] = 3
    ts.backend().logprob(inputs.head, inputs.labels)
    inputs.labels[10:] = -100
    ts.backend().logprob(inputs.head, inputs.labels)
    assert len(tuned) == 2 + (scored == 60), "a choice that is made serves every launch"


def test_halves_of_a_batch_in_two_calls() -> None:
    """The loss is a sum over sequences: chosen and rejected may come in different calls."""
    inputs = support.make(Case("halves", packed=True), torch.float32)
    whole = support.fused(inputs, backend="triton")
    total = torch.zeros((), dtype=torch.float64)
    cu = inputs.layout["cu_seqlens"].tolist()
    for s in range(len(cu) - 1):
        rows = slice(cu[s], cu[s + 1])
        hidden, weight = inputs.tensors["hidden"], inputs.tensors["weight"]
        assert hidden is not None
        assert weight is not None
        assert inputs.ref_logps is not None
        out = linear_infopo_loss(
            hidden[rows], weight, inputs.labels[rows], cu_seqlens=torch.tensor([0, cu[s + 1] - cu[s]]),
            is_chosen=inputs.layout["is_chosen"][s : s + 1], ref_logps=inputs.ref_logps[s : s + 1], num_pairs=2,
            backend="triton",
        )  # fmt: skip
        total += out.loss.double()
    assert total == pytest.approx(float(whole.loss), rel=1e-6)
