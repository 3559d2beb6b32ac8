"""Every check of user input, in one voice: the argument, what was expected, what came, what to do.

`layout` and its neighbours look at shapes and types only, so that they trace under `torch.compile`; the checks of
values (`label_values`, `segment_values`, ...) run inside the ops, on a CPU only: on a GPU each would make the host
wait for the device. There a bad value makes the log-probability, and with it the loss, NaN.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from infopo_kernels.options import IGNORE_INDEX

_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_INTEGER = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


def tensor(name: str, value: object) -> torch.Tensor:
    """`value` if it is a plain tensor."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(value).__name__}.")
    if type(value).__name__ == "DTensor":
        raise TypeError(
            f"`{name}` must be a plain tensor, got a DTensor (a shard). Call the loss inside the model's forward, "
            f"where FSDP has gathered the head, or pass `{name}.full_tensor()`."
        )
    if value.is_sparse or value.is_quantized:
        raise TypeError(
            f"`{name}` must be a dense floating-point tensor, got a sparse or quantized one; dequantize it."
        )
    return value


def flag(name: str, value: object) -> None:
    """Raise unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {type(value).__name__} {value!r}.")


def _same_device(name: str, value: torch.Tensor, hidden: torch.Tensor) -> None:
    if value.device != hidden.device:
        raise ValueError(
            f"`{name}` must be on the device of `hidden`, {hidden.device}, got {value.device}; move it with "
            f"`{name}.to({str(hidden.device)!r})`."
        )


def head(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, prefix: str = "") -> None:
    """Types, devices and shapes of hidden states [..., H], weight [V, H] and bias [V]; `prefix` is "ref_" or ""."""
    names = {key: prefix + key for key in ("hidden", "weight", "bias")}
    tensor(names["hidden"], hidden)
    tensor(names["weight"], weight)
    if hidden.dtype not in _FLOATING:
        raise TypeError(
            f"`{names['hidden']}` must be float32, bfloat16, float16 or float64, got {hidden.dtype}; pass the hidden "
            f"states that enter the LM head, not token ids."
        )
    if weight.ndim != 2:
        raise ValueError(f"`{names['weight']}` must have shape [V, H], got {_shape(weight)}.")
    if hidden.ndim not in (2, 3) or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"`{names['hidden']}` must have shape [2B, T, H] (padded) or [N, H] (packed) with H = {weight.shape[1]} as "
            f"in `{names['weight']}` {_shape(weight)}, got {_shape(hidden)}."
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"`{names['weight']}` must not be empty, got shape {_shape(weight)}.")
    for key, value in (("weight", weight), ("bias", bias)):
        if value is None:
            continue
        tensor(names[key], value)
        _same_device(names[key], value, hidden)
        if value.dtype != hidden.dtype:
            raise TypeError(
                f"`{names[key]}` must have the type of `{names['hidden']}`, {hidden.dtype}, got {value.dtype}; cast "
                f"one of them, or run under torch.autocast, which casts both."
            )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"`{names['bias']}` must have shape [V] = [{weight.shape[0]}], got {_shape(bias)}.")


def layout(hidden: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor | None, ignore_index: object) -> None:
    """Shapes and types of labels and `cu_seqlens` against the hidden states."""
    tensor("labels", labels)
    if labels.dtype not in _INTEGER:
        raise TypeError(f"`labels` must hold integers (torch.int64), got {labels.dtype}.")
    _same_device("labels", labels, hidden)
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"`labels` must have shape {list(hidden.shape[:-1])}, one label for each row of `hidden` {_shape(hidden)}, "
            f"got {_shape(labels)}."
        )
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"`ignore_index` must be an integer, got {type(ignore_index).__name__} {ignore_index!r}.")
    if cu_seqlens is None:
        return
    tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"`cu_seqlens` must be int32 or int64, got {cu_seqlens.dtype}.")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(f"`cu_seqlens` must have shape [S + 1] for S >= 1 sequences, got {_shape(cu_seqlens)}.")
    _same_device("cu_seqlens", cu_seqlens, hidden)
    if hidden.ndim == 3 and hidden.shape[0] != 1:
        raise ValueError(
            f"`cu_seqlens` goes with packed rows, `hidden` [N, H] or [1, N, H], got {_shape(hidden)}; leave it out for "
            f"a padded batch."
        )


def pairs(
    labels: torch.Tensor, cu_seqlens: torch.Tensor | None, is_chosen: torch.Tensor | None, num_pairs: object
) -> int:
    """Number of sequences S; checks that the halves are known and that `num_pairs` is a positive number."""
    if cu_seqlens is None and labels.ndim == 1:
        raise ValueError("`cu_seqlens` is missing: packed `hidden` [N, H] needs the bounds [S + 1] of its sequences.")
    S = labels.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if is_chosen is None:
        if cu_seqlens is not None:
            raise ValueError("`is_chosen` is missing: packed sequences need a bool [S], True for a chosen response.")
        if S % 2 or S == 0:
            raise ValueError(
                f"`hidden` must hold an even number of sequences, chosen first, then rejected, got {S}; drop the odd "
                f"one or say with `is_chosen` [S] which are chosen."
            )
    else:
        tensor("is_chosen", is_chosen)
        if is_chosen.dtype != torch.bool:
            raise TypeError(f"`is_chosen` must be torch.bool, got {is_chosen.dtype}.")
        if is_chosen.shape != (S,):
            raise ValueError(
                f"`is_chosen` must have shape [S] = [{S}], one for each sequence, got {_shape(is_chosen)}."
            )
        _same_device("is_chosen", is_chosen, labels)
    if num_pairs is not None:
        if isinstance(num_pairs, bool) or not isinstance(num_pairs, (int, float)):
            raise TypeError(f"`num_pairs` must be a number, got {type(num_pairs).__name__} {num_pairs!r}.")
        if not 0 < num_pairs < float("inf"):
            raise ValueError(f"`num_pairs` must be positive and finite, got {num_pairs}.")
    return S


def reference_logps(name: str, value: torch.Tensor, expected: int, meaning: str, device: torch.device) -> None:
    """A vector of sequence log-probabilities of the expected length."""
    tensor(name, value)
    if not value.is_floating_point():
        raise TypeError(f"`{name}` must be floating point (float64 keeps sums of long sequences), got {value.dtype}.")
    if value.shape != (expected,):
        raise ValueError(f"`{name}` must have shape [{expected}], {meaning}, got {_shape(value)}.")
    if value.device != device:
        raise ValueError(f"`{name}` must be on {device}, got {value.device}.")


# --- values; inside the ops, on a CPU -------------------------------------------------------------------------------


def label_values(labels: torch.Tensor, vocabulary: int) -> None:
    """Every scored label lies in [0, V)."""
    bad = ((labels < 0) | (labels >= vocabulary)) & (labels != IGNORE_INDEX)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"`labels` must lie in [0, {vocabulary}) or equal `ignore_index`, got {int(labels[row])} at row {row} of "
            f"the flattened labels ({int(bad.sum())} such labels); check `ignore_index` and that `weight` belongs to "
            f"this tokenizer."
        )


def segment_values(cu_seqlens: torch.Tensor, num_rows: int) -> None:
    """`cu_seqlens` starts at 0, increases, and ends at N."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"`cu_seqlens` must start at 0, got {bounds[0]}.")
    for s, (first, last) in enumerate(pairwise(bounds)):
        if last <= first:
            raise ValueError(
                f"`cu_seqlens` must increase, got {first} then {last} at position {s + 1}; every sequence needs a row."
            )
    if bounds[-1] != num_rows:
        raise ValueError(f"`cu_seqlens` must end at N = {num_rows}, the number of rows, got {bounds[-1]}.")


def scored_sequences(counts: torch.Tensor) -> None:
    """Every sequence has a scored token."""
    if (counts == 0).any():
        s = int((counts == 0).nonzero()[0])
        raise ValueError(
            f"`labels` must score at least one token of every sequence, got none in sequence {s} (of {len(counts)}); "
            f"its response may have been truncated away: drop the pair or raise the maximum length."
        )


def reference_values(ref_logps: torch.Tensor) -> None:
    """Reference log-probabilities are finite."""
    bad = ~ref_logps.isfinite()
    if bad.any():
        s = int(bad.nonzero()[0])
        raise ValueError(
            f"`ref_logps` must be finite, got {float(ref_logps[s])} for sequence {s}; is a pair missing from the "
            f"precomputed reference?"
        )
