"""`TritonBackend`: the three primitives and the objective on GPUs (in Triton's interpreter, if TRITON_INTERPRET=1)."""

from __future__ import annotations

from typing import ClassVar

import torch

from infopo_kernels.backends.base import Gradients, Head, Wanted
from infopo_kernels.backends.triton.support import unsupported_reason
from infopo_kernels.backends.triton.tiles import TAIL_BLOCK
from infopo_kernels.objectives import Evaluation, InfoPO, Objective, Sequences
from infopo_kernels.packing import Rows

# Methods import kernels and launchers when they are called: the class has to load where Triton is missing, to say so.


class TritonBackend:
    """Triton kernels for NVIDIA GPUs from sm_80 on and AMD gfx942 and gfx950.

    The host waits for nothing but the number of live rows, where the library forms products, and for that only when the
    kernel before them is queued (`products.py`). Calls run on the current stream, on the device of their inputs, and
    can be captured in a CUDA graph once they have run (Triton compiles a kernel when it is first launched).

    Beyond the protocol's contract: a 16-bit `gradients.weight` costs `backward` a fourth product where the float32 sums
    of dX for all rows do not fit the workspace (`gradients.gradients_from_lse`), and keeps no logits then, because it
    would be rounded twice. `kept_rows` is less than the memory of `gradients.weight` holds where the workspace has no
    room for the sums of dX of so many rows, and more where it has room for the logits of further ones.
    """

    name: ClassVar[str] = "triton"
    tail_block: ClassVar[int] = TAIL_BLOCK
    tail_exact_above: ClassVar[float] = 1.0

    def unsupported_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if inputs of this device and type can be served, else why not and what to do, as a sentence."""
        return unsupported_reason(device, dtype)

    def kept_rows(self, head: Head, weight_gradient: torch.Tensor) -> int:
        """How many rows' logits the memory of `weight_gradient` can hold (about 2 H in a float32 one beside 16-bit
        inputs, H in one of the input type), and with it what wide pieces of G leave of the workspace."""
        from infopo_kernels.backends.triton.gradients import kept_rows
        from infopo_kernels.backends.triton.launch import on_device, prepare

        if head.hidden.numel() == 0:
            return 0
        with on_device(weight_gradient.device):
            return kept_rows(prepare(head), weight_gradient)

    def memory_for_logits(self, head: Head, weight_gradient: torch.Tensor, rows: int) -> torch.Tensor | None:
        """Bytes for those of the rows that the memory of `weight_gradient` has no room for."""
        from infopo_kernels.backends.triton.gradients import memory_for_logits
        from infopo_kernels.backends.triton.launch import on_device, prepare

        with on_device(weight_gradient.device):
            return memory_for_logits(prepare(head), weight_gradient, rows)

    def logprob(
        self, head: Head, labels: torch.Tensor, keep: Gradients | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token log-probabilities l [N] and logsumexp [N]. One product.

        `keep.weight` and `keep.logits` hold logits afterwards (`kernels/kept.py`).
        """
        from infopo_kernels.backends.triton.gradients import logprob_keeping
        from infopo_kernels.backends.triton.kernels.logprob import launch_logprob
        from infopo_kernels.backends.triton.kernels.rows import find_live_rows
        from infopo_kernels.backends.triton.launch import on_device, prepare

        logp, lse = _outputs(labels)
        if labels.numel() == 0:
            return logp, lse
        with on_device(labels.device):
            live = find_live_rows(labels, None, skip_zero=False, gain=False, cleared=(logp, lse))
            if keep is None or keep.weight is None:
                launch_logprob(prepare(head), labels, live, logp, lse)
            else:
                logprob_keeping(prepare(head), labels, live, (keep.weight, keep.logits), logp, lse)
        return logp, lse

    def logprob_and_grad(
        self, head: Head, labels: torch.Tensor, row_weight: torch.Tensor, gradients: Gradients
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`logprob`, and the gradients for row weights known beforehand, from one tile of logits.

        Two products with `gradients.hidden` alone, three with `gradients.weight`, where the workspace holds enough rows
        of logits for it to pay (`workspace.py`); with a 16-bit `gradients.weight` it must hold all rows. Elsewhere
        `logprob` and `backward` run: one product more, or two (see the class).
        """
        from infopo_kernels.backends.triton.gradients import gradients_from_tiles
        from infopo_kernels.backends.triton.kernels.rows import find_live_rows
        from infopo_kernels.backends.triton.launch import on_device, prepare
        from infopo_kernels.backends.triton.workspace import plan_tile

        if labels.numel() == 0 or not _any(gradients):
            return self.logprob(head, labels)
        with on_device(labels.device):
            launch = prepare(head)
            in_float32 = gradients.weight is None or gradients.weight.dtype == torch.float32
            plan = plan_tile(launch.sizes, Wanted.of(gradients)) if launch.keeps_logits else None
            if plan is None or not (in_float32 or plan.rows >= launch.rows):
                logp, lse = self.logprob(head, labels)
                _backward(head, labels, lse, row_weight, gradients, skip_zero=False)
                return logp, lse
            logp, lse = _outputs(labels)
            gain = head.hidden.dtype == torch.float16
            live = find_live_rows(labels, row_weight, skip_zero=False, gain=gain, cleared=(logp, lse))
            gradients_from_tiles(launch, plan, labels, row_weight, live, logp, lse, gradients)
        return logp, lse

    def backward(
        self,
        head: Head,
        labels: torch.Tensor,
        lse: torch.Tensor,
        row_weight: torch.Tensor,
        gradients: Gradients,
        kept: torch.Tensor | None = None,
    ) -> None:
        """The gradients for row weights c and a known logsumexp; rows with c = 0 are not computed, kept or not."""
        from infopo_kernels.backends.triton.gradients import gradients_from_kept
        from infopo_kernels.backends.triton.launch import on_device, prepare

        if kept is not None:
            with on_device(labels.device):
                gradients_from_kept(prepare(head), labels, kept, lse, row_weight, gradients)
            return
        _backward(head, labels, lse, row_weight, gradients, skip_zero=True)

    def scale_(self, values: torch.Tensor, factor: torch.Tensor) -> None:
        """values *= factor in one launch; where the factor is 1 nothing is touched."""
        from infopo_kernels.backends.triton.kernels.scale import launch_scale
        from infopo_kernels.backends.triton.launch import on_device

        with on_device(values.device):
            launch_scale(values, factor)

    def objective(
        self, objective: Objective, logp: torch.Tensor, rows: Rows, sequences: Sequences
    ) -> Evaluation | None:
        """InfoPO in two launches, behind one of PyTorch's that fills the row weights; None for other objectives."""
        if not isinstance(objective, InfoPO):
            return None
        from infopo_kernels.backends.triton.kernels.objective import launch_objective
        from infopo_kernels.backends.triton.launch import on_device

        with on_device(logp.device):
            return launch_objective(objective, logp, rows, sequences)


def _outputs(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logp = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
    return logp, torch.empty_like(logp)


def _backward(
    head: Head,
    labels: torch.Tensor,
    lse: torch.Tensor,
    row_weight: torch.Tensor,
    gradients: Gradients,
    *,
    skip_zero: bool,
) -> None:
    """`backward`; without `skip_zero` scored rows of weight zero are written as well (with zeros)."""
    from infopo_kernels.backends.triton.gradients import gradients_from_lse
    from infopo_kernels.backends.triton.kernels.rows import find_live_rows
    from infopo_kernels.backends.triton.launch import on_device, prepare

    if labels.numel() == 0 or not _any(gradients):
        return
    with on_device(labels.device):
        gain = head.hidden.dtype == torch.float16
        live = find_live_rows(labels, row_weight, skip_zero=skip_zero, gain=gain, cleared=None)
        gradients_from_lse(prepare(head), labels, lse, row_weight, live, gradients)


def _any(gradients: Gradients) -> bool:
    return any(buffer is not None for buffer in (gradients.hidden, gradients.weight, gradients.bias))
