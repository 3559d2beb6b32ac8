"""The tables of heads and cases, and the batches that they are measured on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from infopo_kernels.options import IGNORE_INDEX

DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

UNDERFLOWED_BETA: Final = 100.0
"""A rejected weight of 100 exp(100 L - 1) is 0 in float32 for any mean log-probability L below about -1.1 nats."""


@dataclass(frozen=True)
class Shape:
    """One LM head."""

    name: str
    hidden: int
    """H."""
    vocab: int
    """V."""

    def tokens_for(self, gflop: float) -> int:
        """The power of two N whose product 2 N V H comes nearest to `gflop` from below, at least 64."""
        fitting = gflop * 1e9 / (2 * self.vocab * self.hidden)
        return max(64, 1 << (int(fitting).bit_length() - 1 if fitting >= 1 else 0))

    def step_gib(self, tokens: int, bytes_per_element: int) -> float:
        """What a naive step and its check hold at once: head, gradients and their float32 truth, logits three times."""
        head = self.vocab * self.hidden * (3 * bytes_per_element + 2 * 4)
        return (head + tokens * self.vocab * (bytes_per_element + 3 * 4)) / 2**30


SHAPES: Final = {
    shape.name: shape
    for shape in (
        Shape("SmolLM2-135M", 576, 49152),
        Shape("Qwen3-0.6B", 1024, 151936),
        Shape("Gemma-3-1B", 1152, 262144),
        Shape("Llama-3.2-1B", 2048, 128256),
        Shape("Llama-3-8B", 4096, 128256),
    )
}
MAIN_SHAPE: Final = "SmolLM2-135M"
NARROW: Final = Shape("narrow head", 64, 49152)
"""A head with SmolLM2's vocabulary and few hidden units, so that memory ends a sweep on a CPU, not its products."""


@dataclass(frozen=True)
class Case:
    """What is done with a batch."""

    name: str
    text: str
    trained: tuple[str, ...] = ("hidden", "weight")
    prompt: float = 0.0
    """Share of each sequence's tokens that are not scored."""
    packed: bool = False
    underflowed: bool = False

    @property
    def beta(self) -> float:
        """Of the loss."""
        return UNDERFLOWED_BETA if self.underflowed else 0.1

    @property
    def products(self) -> tuple[int, int]:
        """Products of size N V H that any implementation needs, for chosen and for rejected scored rows."""
        full = 1 + len(self.trained)
        return full, 1 if self.underflowed else full


CASES: Final = {
    case.name: case
    for case in (
        Case("forward", "loss without gradient", trained=()),
        Case("step", "forward and backward, trainable head"),
        Case("frozen", "forward and backward, frozen head", trained=("hidden",)),
        Case("half-prompt", "step; the first half of each sequence is prompt", prompt=0.5),
        Case("packed", "step on packed sequences of unequal length", packed=True),
        Case("underflowed", "step; every rejected weight has underflowed", underflowed=True),
    )
}


@dataclass
class Batch:
    """Inputs of a case. Sequences are chosen first; the loss is reference-free InfoPO on mean log-probabilities.

    Without a reference and with means the rejected weights are of order one at beta = 0.1, as in training, whatever
    the random inputs; the arithmetic is that of any other setting.
    """

    case: Case
    hidden: Tensor
    """[S, T, H] padded, [N, H] packed."""
    weight: Tensor
    """[V, H]."""
    labels: Tensor
    """[S, T] or [N]."""
    cu_seqlens: Tensor
    """[S + 1] int64."""
    beta: float

    @property
    def sequences(self) -> int:
        """S."""
        return len(self.cu_seqlens) - 1

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Hidden states [N, H] and labels [N]."""
        return self.hidden.flatten(0, -2), self.labels.flatten()

    @property
    def is_chosen(self) -> Tensor:
        """[S] bool."""
        return torch.arange(self.sequences, device=self.labels.device) < self.sequences // 2

    @property
    def scored(self) -> tuple[int, int]:
        """Scored tokens of the chosen and of the rejected half."""
        scored, middle = self.rows[1] != IGNORE_INDEX, int(self.cu_seqlens[self.sequences // 2])
        return int(scored[:middle].sum()), int(scored[middle:].sum())

    def sequence_means(self, token_logps: Tensor) -> Tensor:
        """[S]: means over scored tokens of log-probabilities [N] that are 0 elsewhere, in their own type."""
        scored = (self.rows[1] != IGNORE_INDEX).to(token_logps.dtype)
        return self.sequence_sums(token_logps) / self.sequence_sums(scored)

    def sequence_sums(self, token_logps: Tensor) -> Tensor:
        """[S]: sums of [N], in their own type: what trainers do with what these implementations return."""
        if not self.case.packed:
            return token_logps.view(self.labels.shape).sum(-1)
        segments = torch.repeat_interleave(torch.arange(self.sequences, device=token_logps.device), self.lengths)
        return torch.zeros(self.sequences, dtype=token_logps.dtype, device=token_logps.device).index_add(
            0, segments, token_logps
        )

    @property
    def lengths(self) -> Tensor:
        """[S] tokens, scored or not."""
        return self.cu_seqlens.diff()

    def loss(self, sequence_means: Tensor) -> Tensor:
        """Reference-free InfoPO, offset 1, of mean log-probabilities [S]."""
        chosen, rejected = sequence_means.chunk(2)
        return (-self.beta * chosen + torch.exp(self.beta * rejected - 1)).mean()

    def clear(self) -> None:
        """Drop the gradients, so that every implementation pays for its own."""
        self.hidden.grad = self.weight.grad = None

    @property
    def gradients_mib(self) -> float:
        """What the gradients take."""
        return sum(t.numel() * t.element_size() for t in (self.hidden, self.weight) if t.requires_grad) / 2**20

    def as_case(self, case: Case) -> Batch:
        """The same numbers in the same memory as another case, neither of them packed."""
        hidden, weight = (
            getattr(self, name).detach().requires_grad_(name in case.trained) for name in ("hidden", "weight")
        )
        return replace(self, case=case, hidden=hidden, weight=weight, beta=case.beta)


def make_batch(
    case: Case, shape: Shape, pairs: int, length: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Batch:
    """A batch of `pairs` times two sequences of `length` tokens; packed, every second one is half as long.

    Logits have a standard deviation of 3 and labels are drawn at random: few of the probabilities are negligible.
    """
    g = torch.Generator(device).manual_seed(seed)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, device=device, dtype=dtype if device.type == "cuda" else None).to(dtype)

    S, T = 2 * pairs, length
    lengths = [T if s % 2 == 0 or not case.packed else max(1, T // 2) for s in range(S)]
    size = (sum(lengths),) if case.packed else (S, T)
    hidden = randn(*size, shape.hidden).mul_(3.0).requires_grad_("hidden" in case.trained)
    weight = randn(shape.vocab, shape.hidden).div_(shape.hidden**0.5).requires_grad_("weight" in case.trained)
    labels = torch.randint(shape.vocab, size, generator=g, device=device)
    if case.prompt:
        labels[:, : int(T * case.prompt)] = IGNORE_INDEX
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0)
    return Batch(case, hidden, weight, labels, cu_seqlens, case.beta)
