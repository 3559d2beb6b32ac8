"""The table of contenders: each implementation through its public interface, in its own best setting.

An implementation gives the reference-free InfoPO loss of a `Batch`, differentiable, and log-probabilities. If it only
knows token losses, the same few lines of plain PyTorch (`Batch.loss`) form the loss from them. Each package is
optional, so a contender imports its own when it is called.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Batch, Case
from infopo_kernels.backends import dispatch
from infopo_kernels.functional import linear_infopo_loss, linear_logps
from infopo_kernels.options import IGNORE_INDEX

TokenNll = Callable[[Tensor, Tensor, Tensor], Tensor]


def _missing(module: str, install: str) -> str | None:
    return None if importlib.util.find_spec(module) else f"{module} is not installed (pip install {install})"


class Contender:
    """One implementation."""

    name: ClassVar[str]
    setting: ClassVar[str]
    """Interface and setting, with the reason for each choice."""
    module: ClassVar[tuple[str, str] | None] = None
    """The modules that it needs, and how to install them."""
    compiles: ClassVar[bool] = False
    skips_unscored: ClassVar[tuple[str, ...]] = ()
    """Types of device on which unscored tokens take no product."""

    def unsupported_reason(self, case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
        """None if it can run, else why not."""
        return None if self.module is None else _missing(*self.module)

    def loss(self, batch: Batch) -> Tensor:
        """The loss [], with gradients of the tensors that `batch.case` trains."""
        return batch.loss(batch.sequence_means(self.token_logps(batch)))

    def token_logps(self, batch: Batch) -> Tensor:
        """[N] nats, 0 where not scored; float32, or 16-bit if the implementation returns that."""
        raise NotImplementedError(f"{self.name} does not return token log-probabilities")

    def sequence_logps(self, batch: Batch) -> Tensor:
        """[S] nats, sums over scored tokens, in the type that the implementation returns."""
        return batch.sequence_sums(self.token_logps(batch))


class Ours(Contender):
    """This library."""

    name = "infopo_kernels"
    setting = "`linear_infopo_loss(..., average=True)`, default backend and workspace"
    skips_unscored = ("cpu", "cuda")

    def unsupported_reason(self, case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
        try:
            dispatch.resolve("auto", device, dtype)
        except ValueError as error:
            return str(error)
        return None

    def _bounds(self, batch: Batch) -> Tensor | None:
        return batch.cu_seqlens if batch.case.packed else None

    def loss(self, batch: Batch) -> Tensor:
        return linear_infopo_loss(
            batch.hidden,
            batch.weight,
            batch.labels,
            cu_seqlens=self._bounds(batch),
            is_chosen=batch.is_chosen,
            beta=batch.beta,
            average=True,
        ).loss

    def token_logps(self, batch: Batch) -> Tensor:
        return linear_logps(batch.hidden, batch.weight, batch.labels).flatten()

    def sequence_logps(self, batch: Batch) -> Tensor:
        return linear_logps(batch.hidden, batch.weight, batch.labels, cu_seqlens=self._bounds(batch), reduction="sum")


def _naive_nll(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="none", ignore_index=IGNORE_INDEX)


class Naive(Contender):
    """Logits of every position."""

    name = "naive PyTorch"
    setting = "`F.cross_entropy((hidden @ weight.T).float(), labels, reduction='none')`, every position"

    def token_logps(self, batch: Batch) -> Tensor:
        hidden, labels = batch.rows
        return -_naive_nll(hidden, batch.weight, labels)


@cache
def _compiled_nll() -> TokenNll:
    compiled: TokenNll = torch.compile(_naive_nll)
    return compiled


class Compiled(Contender):
    """`torch.compile` of the naive function, compiled for the shape of the batch."""

    name = "torch.compile"
    setting = "`torch.compile` of naive PyTorch, static shapes"
    compiles = True

    def token_logps(self, batch: Batch) -> Tensor:
        hidden, labels = batch.rows
        return -_compiled_nll()(hidden, batch.weight, labels)


def torch_chunked_by_sequence(dtype: torch.dtype, length: int) -> bool:
    """Whether `F.linear_cross_entropy` is faster with `reduction="sum"`, one call for each sequence, than with "none".

    "sum" forms gradients in the forward pass; "none" forms logits twice. From about 256 tokens on, "sum" is faster in
    spite of a call for each sequence (float32 on a CPU). For 16-bit inputs the sums would be rounded to 16 bits.
    """
    return dtype == torch.float32 and length >= 256


def torch_chunked_nll(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """`F.linear_cross_entropy` with its fastest options for the device, type and width.

    On a CPU its default chunks of a few rows took 4 to 15 times as long as chunks of 512. In 16 bits its default
    products accumulate in float32. From 1024 hidden units on they took up to 3 times as long as
    `acc_policy="balanced"`; with fewer units they took less time.
    """
    own: dict[str, Any] = {}
    if hidden.device.type == "cpu":
        own["batch_chunk_size"] = 512
        if hidden.dtype != torch.float32 and hidden.shape[-1] >= 1024:
            own["acc_policy"] = "balanced"
    options = torch.nn.LinearCrossEntropyOptions(**own)
    return F.linear_cross_entropy(
        hidden, weight, labels, reduction=reduction, ignore_index=IGNORE_INDEX, options=options
    )


class TorchChunked(Contender):
    """PyTorch's own chunked linear cross-entropy."""

    name = "F.linear_cross_entropy"
    setting = (
        "`F.linear_cross_entropy(options=...)`: on a CPU chunks of 512 rows, and in 16 bits from 1024 hidden units on "
        "`acc_policy='balanced'` (its defaults took 4 to 15 times as long), elsewhere the defaults. float32 sequences "
        "of 256 tokens or more: one call each with `reduction='sum'` (gradients formed in the forward pass); shorter "
        "ones (that is slower there) and 16-bit (sums would be 16-bit): `reduction='none'`"
    )

    def unsupported_reason(self, case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
        return None if hasattr(torch.nn, "LinearCrossEntropyOptions") else "needs torch 2.13 or newer"

    def token_logps(self, batch: Batch) -> Tensor:
        hidden, labels = batch.rows
        return -torch_chunked_nll(hidden, batch.weight, labels, "none").float()

    def sequence_logps(self, batch: Batch) -> Tensor:
        lengths = batch.lengths.tolist()
        if not torch_chunked_by_sequence(batch.hidden.dtype, max(lengths)):
            return super().sequence_logps(batch)
        hidden, labels = batch.rows
        parts = zip(torch.split(hidden, lengths), torch.split(labels, lengths), strict=True)
        return -torch.stack([torch_chunked_nll(rows, batch.weight, own, "sum") for rows, own in parts])

    def loss(self, batch: Batch) -> Tensor:
        counts = batch.sequence_sums((batch.rows[1] != IGNORE_INDEX).float())
        return batch.loss(self.sequence_logps(batch) / counts)


class Trl(Contender):
    """The fused head of TRL's trainers."""

    name = "TRL"
    setting = (
        "`trl.kernels.ChunkedLogProbFunction`, chunks of 32768 words, no optional outputs, as its DPO trainer calls "
        "it: scored positions on a GPU, every position on a CPU"
    )
    module = ("trl", "trl")
    skips_unscored = ("cuda",)

    def token_logps(self, batch: Batch) -> Tensor:
        from trl.kernels import ChunkedLogProbFunction

        hidden, labels = batch.rows
        scored = labels != IGNORE_INDEX
        compact = hidden.device.type == "cuda"
        logps: Tensor = ChunkedLogProbFunction.apply(
            hidden[scored] if compact else hidden,
            batch.weight,
            None,
            labels[scored] if compact else labels.clamp(min=0),
            1.0,
            32768,
            None,
            1.0,
            (),
        )[0]
        return logps.new_zeros(scored.shape).masked_scatter(scored, logps) if compact else logps.masked_fill(~scored, 0)


@cache
def _liger_function() -> Any:
    from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase

    class LigerInfoPO(LigerFusedLinearPreferenceBase):  # type: ignore[misc]
        """Liger's base class with the InfoPO loss, as its documentation describes."""

        @staticmethod
        def preference_loss_fn(
            chosen_logps: Tensor, rejected_logps: Tensor, full_target: Tensor, beta: float = 0.1
        ) -> Tensor:
            terms = -beta * chosen_logps + torch.exp(beta * rejected_logps - 1)
            return terms.sum() / (full_target.shape[0] // 2)

        @classmethod
        def forward(
            cls, ctx: Any, _input: Tensor, weight: Tensor, target: Tensor, beta: float, average_log_prob: bool
        ) -> Any:
            return super().forward(
                cls=cls, ctx=ctx, _input=_input, weight=weight, target=target, beta=beta, alpha=0.0,
                ignore_index=IGNORE_INDEX, compute_nll_loss=False, compiled=True, average_log_prob=average_log_prob,
            )  # fmt: skip

        @staticmethod
        def backward(ctx: Any, *grad_output: Any) -> Any:
            return (*LigerFusedLinearPreferenceBase.backward(ctx, grad_output)[:2], None, None, None)

    return LigerInfoPO


class Liger(Contender):
    """Liger's chunked preference loss."""

    name = "Liger"
    setting = "`LigerFusedLinearPreferenceBase` with the InfoPO loss, one pair a chunk (its default), compiled"
    module = ("liger_kernel", "liger-kernel")
    compiles = True

    def unsupported_reason(self, case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
        return "takes padded batches only" if case.packed else super().unsupported_reason(case, device, dtype)

    def loss(self, batch: Batch) -> Tensor:
        result: Tensor = _liger_function().apply(batch.hidden, batch.weight, batch.labels, batch.beta, True)[0]
        return result

    def sequence_logps(self, batch: Batch) -> Tensor:
        chosen, rejected, *_ = _liger_function().apply(batch.hidden, batch.weight, batch.labels, batch.beta, False)[1]
        return torch.cat([chosen, rejected]).float()


class Cce(Contender):
    """Apple's Cut Cross-Entropy."""

    name = "Cut Cross-Entropy"
    setting = "`linear_cross_entropy(reduction='none')`: its kernel on a GPU, `impl='torch_compile'` on a CPU"
    module = ("cut_cross_entropy", "cut-cross-entropy")
    compiles = True
    skips_unscored = ("cpu", "cuda")

    def token_logps(self, batch: Batch) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        hidden, labels = batch.rows
        impl = "cce" if hidden.device.type == "cuda" else "torch_compile"
        nll: Tensor = linear_cross_entropy(hidden, batch.weight, labels, reduction="none", impl=impl)
        return -nll.float()


class FlashAttn(Contender):
    """flash-attn's cross-entropy on naive logits."""

    name = "flash-attn"
    setting = "`flash_attn.losses.cross_entropy.CrossEntropyLoss(reduction='none', inplace_backward=True)` on logits"
    module = ("flash_attn", "flash-attn")

    def unsupported_reason(self, case: Case, device: torch.device, dtype: torch.dtype) -> str | None:
        return super().unsupported_reason(case, device, dtype) or (
            None if device.type == "cuda" else "runs on CUDA devices only"
        )

    def token_logps(self, batch: Batch) -> Tensor:
        from flash_attn.losses.cross_entropy import CrossEntropyLoss

        hidden, labels = batch.rows
        criterion = CrossEntropyLoss(ignore_index=IGNORE_INDEX, reduction="none", inplace_backward=True)
        nll: Tensor = criterion(hidden @ batch.weight.T, labels)
        return -nll


OURS: Final = Ours.name
FLOOR: Final = "bare products"

CONTENDERS: Final[dict[str, Contender]] = {
    contender.name: contender
    for contender in (Ours(), Naive(), Compiled(), TorchChunked(), Trl(), Liger(), Cce(), FlashAttn())
}


def floor(batch: Batch, rejected_products: int | None = None) -> Callable[[], None]:
    """The bare matrix products that the batch's case needs, at full size, into memory that is already allocated.

    Args:
        rejected_products: number of products for each rejected row, if not the case's; 4 means that logits are formed
            twice.
    """
    hidden, weight = batch.rows[0].detach(), batch.weight.detach()
    chosen, rejected = batch.case.products
    parts = list(zip(batch.scored, (chosen, rejected_products or rejected), strict=True))
    if parts[0][1] == parts[1][1]:
        parts = [(sum(batch.scored), chosen)]
    held = []
    for rows, products in parts:
        X = hidden[:rows].contiguous()
        held.append((X, X.new_empty(rows, len(weight)), torch.empty_like(X), products))
    dW = torch.empty_like(weight) if "weight" in batch.case.trained else None

    def run() -> None:
        for X, G, dX, products in held:
            for _ in range(2 if products > 3 else 1):
                torch.mm(X, weight.T, out=G)
            if products > 1:
                torch.mm(G, weight, out=dX)
            if products > 2 and dW is not None:
                torch.mm(G.T, X, out=dW)

    return run
