"""The table of shapes: LM heads of models that people tune."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


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
