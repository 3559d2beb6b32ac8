"""Does a model keep the sequences of a packed row apart? Asked once, of a few tokens.

transformers tells packed sequences apart by positions that start anew. Many models ignore them: recurrent and
convolutional layers, learned positions that are counted from the mask, ALiBi, attention that builds its own mask. No
error follows: every sequence but the first is scored as if those before it were its prompt.

The probe is two forwards of at most 64 tokens, without gradient, in evaluation mode: [A | B | A] and [A] alone, with A
and B cut from the batch. All three copies of A must come out alike. (The two in one row agree where every token sees
every other; the one alone is computed in another shape, and rounds otherwise.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from infopo_kernels.integrations.randomness import in_mode

LENGTH: Final = 16
"""Tokens of a sequence in the probe, at most: longer than the convolutions in use (4), short enough to cost nothing."""


def check_call(name: str, kwargs: dict[str, Any]) -> None:
    """Raise ValueError if a packed call lacks what tells its sequences apart."""
    for stranger in ("past_key_values", "inputs_embeds"):
        if kwargs.get(stranger) is not None:
            raise ValueError(
                f"{name} was given `{stranger}` with a packed row: learned prompts (PEFT's prefix and prompt tuning) "
                f"stand before the row once, not before each of its sequences. Use padded batches (PreferenceCollator, "
                f"padding_free=False)."
            )
    if kwargs.get("position_ids") is None:
        raise ValueError(
            f"`position_ids` are missing: without them {name} takes a packed row for one sequence. Pass positions "
            f"[1, N] that start anew with each sequence, as PackedPreferenceCollator does; PEFT's learned prompts drop "
            f"them: use padded batches with those."
        )


def _parts(ids: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A and B: the beginning of the row's first sequence, the end of its last; likewise of a padded batch's rows."""
    row = ids.reshape(-1) if ids.shape[0] == 1 else torch.cat([ids[0], ids[-1]])
    positions = kwargs.get("position_ids")
    starts = [0]
    if isinstance(positions, Tensor) and positions.numel() == row.numel():
        starts = (positions.reshape(-1) == 0).nonzero().flatten().tolist() or [0]
    first = min(starts[1] if len(starts) > 1 else len(row) // 2, LENGTH)
    A = row[: max(first, 1)]
    B = row[-min(LENGTH, max(1, len(row) - len(A))) :]
    return A, B


def probe_inputs(ids: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The packed row [A | B | A] in the layout of the call: with positions, with a mask if it has one, with bounds."""
    A, B = _parts(ids, kwargs)
    row = torch.cat([A, B, A])
    lengths = [len(A), len(B), len(A)]
    positions = torch.cat([torch.arange(n, device=ids.device) for n in lengths])
    inputs: dict[str, Any] = {"input_ids": row[None], "position_ids": positions[None]}
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 4:  # shared prompts
        part = torch.repeat_interleave(torch.arange(3, device=ids.device), torch.tensor(lengths, device=ids.device))
        order = torch.arange(len(row), device=ids.device)
        inputs["attention_mask"] = ((part[:, None] == part) & (order[:, None] >= order))[None, None]
    if "cu_seq_lens_q" in kwargs:
        bounds = torch.tensor([0, *lengths], dtype=torch.int32, device=ids.device).cumsum(0, dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        inputs |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return inputs


def difference(hidden: Tensor, other: Tensor) -> float:
    """How far two copies of A, [n, H], are apart, relative to their size."""
    return float((hidden.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30))


def allowed(dtype: torch.dtype) -> tuple[float, float]:
    """Bounds of the difference between copies in one row, and between a copy in a row and one alone.

    Tried on 147 architectures of transformers with random weights: those that keep sequences apart stay below 1e-6 in
    float32 and below 1e-3 in bfloat16; decoders that do not lie above 0.1 (roformer: 0.02, cpmant: 0.07).
    """
    step = torch.finfo(dtype).eps
    return max(1e-3, 8 * step), max(1e-3, 32 * step)


def verdict(model: Any, forward: Callable[..., Tensor], ids: Tensor, kwargs: dict[str, Any]) -> str | None:
    """Why the model cannot take packed rows; None if it can. `forward` gives what enters the head."""
    A = _parts(ids, kwargs)[0]
    with torch.no_grad(), in_mode(model, "evaluation"):
        try:
            row = forward(**probe_inputs(ids, kwargs))[0]
            alone = forward(input_ids=A[None])[0]
        except Exception as error:  # a model may raise anything for a layout that it was not made for
            return f"its forward does not take packed rows ({type(error).__name__}: {error})"
    first, last = row[: len(A)], row[-len(A) :]
    for (other, where), bound in zip(
        ((first, "at the beginning of the row"), (alone, "in a row of their own")), allowed(row.dtype), strict=True
    ):
        if (apart := difference(last, other)) > bound:
            return f"{len(A)} tokens behind other sequences come out {apart:.2g} away (relative) from the same {where}"
    return None
