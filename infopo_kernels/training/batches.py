"""Padded batches, chosen half first, and the order in which pairs are visited."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infopo_kernels.options import IGNORE_INDEX
from infopo_kernels.training.tokens import Example


@dataclass(frozen=True)
class Batch:
    """B pairs, the first B sequences chosen, the last B rejected."""

    input_ids: Tensor
    """[2B, T] int64, padded at the end."""
    attention_mask: Tensor
    """[2B, T] int64."""
    labels: Tensor
    """[2B, T] int64, `IGNORE_INDEX` for prompt and padding; not shifted."""

    @property
    def num_pairs(self) -> int:
        """B."""
        return len(self.input_ids) // 2


def collate(examples: Sequence[Example], pad_token_id: int, device: torch.device) -> Batch:
    """One batch of the examples in their order."""
    rows = [(e.prompt, e.chosen) for e in examples] + [(e.prompt, e.rejected) for e in examples]
    shape = len(rows), max(len(prompt) + len(response) for prompt, response in rows)
    input_ids, attention_mask = torch.full(shape, pad_token_id), torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        input_ids[row, :end] = torch.tensor(prompt + response)
        attention_mask[row, :end] = 1
        labels[row, len(prompt) : end] = torch.tensor(response)
    return Batch(input_ids.to(device), attention_mask.to(device), labels.to(device))


def visiting_order(num_examples: int, num_visits: int, seed: int) -> list[int]:
    """Indices of the examples to visit: shuffled epochs, one after the other."""
    rng = random.Random(seed)
    order: list[int] = []
    while len(order) < num_visits:
        order += rng.sample(range(num_examples), num_examples)
    return order[:num_visits]


def split_held_out(num_examples: int, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices (training, held out), each in the file's order."""
    away = set(random.Random(seed).sample(range(num_examples), held_out))
    return [i for i in range(num_examples) if i not in away], sorted(away)
