"""Peak memory of the head and the loss, fused and with naive logits, each measured in a fresh process on a CPU.

A process that has trained has freed memory to reuse, which would hide what a call takes; so each case gets its own.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import Final, Literal

import torch

from infopo_kernels.functional import infopo_loss, linear_infopo_loss
from infopo_kernels.options import IGNORE_INDEX
from infopo_kernels.training.memory import peak_mib, present_mib, reset_peak

Way = Literal["fused", "naive"]
WAYS: Final[tuple[Way, ...]] = ("fused", "naive")
_CPU: Final = torch.device("cpu")


@dataclass(frozen=True)
class HeadShape:
    """One batch as the head sees it, float32."""

    sequences: int
    """2B."""
    length: int
    """T."""
    prompt: int
    """Leading tokens of each sequence that are not scored."""
    width: int
    """H."""
    vocabulary: int
    """V."""
    backend: str = "auto"
    workspace_mib: int | None = None


def _forward_backward(way: Way, shape: HeadShape, hidden: torch.Tensor, weight: torch.Tensor) -> None:
    labels = torch.randint(shape.vocabulary, hidden.shape[:2])
    labels[:, : shape.prompt] = IGNORE_INDEX
    # About what these random hidden states give. Without a reference the rejected weights would be as good as 0, and
    # both ways would crawl through denormal numbers.
    ref_logps = (labels[:, 1:] != IGNORE_INDEX).sum(1).double() * -math.log(shape.vocabulary)
    if way == "fused":
        linear_infopo_loss(
            hidden,
            weight,
            labels,
            shift=True,
            ref_logps=ref_logps,
            backend=shape.backend,
            workspace_mib=shape.workspace_mib,
        ).loss.backward()  # type: ignore[no-untyped-call]
        return
    # What a plain training loop does with the output of a model: logits of every position, in float32.
    logits, targets = (hidden @ weight.T)[:, :-1], labels[:, 1:]
    scored = targets != IGNORE_INDEX
    logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1)
    infopo_loss(*(logps * scored).sum(-1).chunk(2), *ref_logps.chunk(2)).loss.backward()  # type: ignore[no-untyped-call]


def peak_beyond_gradients_mib(way: Way, shape: HeadShape) -> float | None:
    """Peak of one forward and backward beyond inputs and gradients, MiB, in this process; None if it cannot be told."""
    torch.manual_seed(0)
    tiny = HeadShape(2, 8, 2, 16, 64, shape.backend, shape.workspace_mib)
    for case in (tiny, shape):  # the tiny one brings in libraries and threads
        hidden = torch.randn(case.sequences, case.length, case.width).requires_grad_()
        weight = (torch.randn(case.vocabulary, case.width) / case.width).requires_grad_()
        before = present_mib(_CPU)
        if not reset_peak(_CPU) or not before:
            return None
        _forward_backward(way, case, hidden, weight)
    gradients = (hidden.numel() + weight.numel()) * hidden.element_size() / 2**20
    return max(0.0, peak_mib(_CPU) - before - gradients)


def measure_head_memory(shape: HeadShape) -> dict[Way, float | None]:
    """`peak_beyond_gradients_mib` of each way, in a process of its own."""
    result: dict[Way, float | None] = {}
    for way in WAYS:
        command = [sys.executable, "-m", __name__, way, json.dumps(asdict(shape))]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result[way] = json.loads(done.stdout)
    return result


def _main(way: Way, shape: str) -> None:
    print(json.dumps(peak_beyond_gradients_mib(way, HeadShape(**json.loads(shape)))))


if __name__ == "__main__":
    _main(*sys.argv[1:])  # type: ignore[arg-type]
