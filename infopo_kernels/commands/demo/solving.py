"""The share of word problems that a model solves: greedy decoding, and the last number of the answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

import torch

from infopo_kernels.commands.demo.word_problems import Pair

_NUMBER: Final = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")
_BATCH: Final = 32
"""Problems that are decoded together. Decoding reads all weights for each token: on two cores 32 problems take hardly
longer than 8."""


def last_number(text: str) -> float | None:
    """The last number of a text, which is its answer; None without one."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


@torch.inference_mode()
def answers(model: Any, tokenizer: Any, problems: Sequence[Pair], max_new_tokens: int) -> list[str]:
    """The model's answer to each problem: greedy decoding, at most `max_new_tokens` tokens."""
    model.eval()
    texts: list[str] = []
    for start in range(0, len(problems), _BATCH):
        prompts = [problem.row()["prompt"] for problem in problems[start : start + _BATCH]]
        # A causal model goes on where the row ends, so that padding has to stand before the prompt.
        batch = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, padding=True, tokenizer_kwargs={"padding_side": "left"},
            return_dict=True, return_tensors="pt",
        ).to(model.device)  # fmt: skip
        tokens = model.generate(
            **batch, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        texts += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def solved(texts: Sequence[str], problems: Sequence[Pair]) -> float:
    """Share of the problems whose answer is the right one."""
    right = sum(last_number(text) == problem.answer for text, problem in zip(texts, problems, strict=True))
    return right / len(problems)
