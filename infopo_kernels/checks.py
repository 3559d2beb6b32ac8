"""Every check of user input. Each error names the argument, what was expected, what came, and what to do.

`layout` and its neighbours look at shapes and types only, so that `torch.compile` can trace them. The checks of values
(`label_values`, `segment_values`, ...) run inside the ops, and on a CPU only: on a GPU each of them would make the host
wait for the device. On a GPU a bad value makes the log-probability NaN, and so the loss.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from infopo_kernels.objectives import InfoPO, Objective
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


def head(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, prefix: str = "", part: bool = False
) -> None:
    """Types, devices and shapes of hidden states [..., H], weight [V, H] and bias [V]; `prefix` is "ref_" or "".

    `part`: the weight is one rank's part of a head, which may have no entries.
    """
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
    if (weight.shape[0] == 0 and not part) or weight.shape[1] == 0:
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


def weight_gradient_buffer(buffer: object, weight: torch.Tensor, hidden: torch.Tensor) -> None:
    """`grad_weight_into`: a plain tensor that dW can be added to in place, in the accumulator type."""
    name, value = "grad_weight_into", tensor("grad_weight_into", buffer)
    accumulator = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if value.dtype != accumulator:
        raise TypeError(
            f"`{name}` must be {accumulator}, in which gradients of {hidden.dtype} inputs are summed, got "
            f"{value.dtype}; leave it out to get a gradient in the type of `weight`."
        )
    if value.shape != weight.shape:
        raise ValueError(f"`{name}` must have the shape of `weight`, {_shape(weight)}, got {_shape(value)}.")
    _same_device(name, value, hidden)
    if not value.is_contiguous():
        raise ValueError(
            f"`{name}` must be contiguous, because it is added to in place, got strides {list(value.stride())}; pass "
            f"the buffer itself, not a transpose or a slice of columns."
        )
    if value.requires_grad:
        raise ValueError(
            f"`{name}` must not require a gradient, because it is added to in place, got one that does; pass the "
            f"buffer of the gradient, not the weight, or `{name}.detach()`."
        )


def trained_weight(weight: torch.Tensor) -> None:
    """`weight` needs a gradient, which `grad_weight_into` is for."""
    if not weight.requires_grad:
        raise ValueError(
            "`grad_weight_into` was given and `weight` needs no gradient (requires_grad is False); leave the buffer "
            "out for a frozen head, or call weight.requires_grad_()."
        )


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
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"`cu_seqlens` must have shape [S + 1] for S >= 1 sequences, got {_shape(cu_seqlens)}.")
    _same_device("cu_seqlens", cu_seqlens, hidden)
    if hidden.ndim == 3 and hidden.shape[0] != 1:
        raise ValueError(
            f"`cu_seqlens` goes with packed rows, `hidden` [N, H] or [1, N, H], got {_shape(hidden)}; leave it out for "
            f"a padded batch."
        )


def objective(value: object) -> Objective:
    """`value` if it is an objective."""
    if not isinstance(value, Objective):
        what = f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__} {value!r}"
        raise TypeError(
            f"`objective` must be an object of infopo_kernels.objectives, as DPO(beta=0.1), got {what}; your own "
            f"objective derives from infopo_kernels.objectives.Objective."
        )
    return value


def pairs(
    labels: torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    is_chosen: torch.Tensor | None,
    num_pairs: object,
    sequence_weights: torch.Tensor | None,
    objective: Objective,
) -> int:
    """The number of sequences S. Checks `is_chosen`, the weights of the sequences, and `num_pairs`."""
    if cu_seqlens is None and labels.ndim == 1:
        raise ValueError("`cu_seqlens` is missing: packed `hidden` [N, H] needs the bounds [S + 1] of its sequences.")
    S = labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
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
    if objective.pairwise and S % 2:
        raise ValueError(
            f"`is_chosen` must name as many chosen as rejected sequences, because {type(objective).__name__} pairs the "
            f"i-th chosen with the i-th rejected one, got an odd number of sequences, {S}; give each rejected sequence "
            f"its own chosen one, or use an objective that does not compare them (InfoPO)."
        )
    if sequence_weights is not None:
        tensor("sequence_weights", sequence_weights)
        if not sequence_weights.is_floating_point():
            raise TypeError(f"`sequence_weights` must be floating point (float64), got {sequence_weights.dtype}.")
        if sequence_weights.shape != (S,):
            raise ValueError(
                f"`sequence_weights` must have shape [S] = [{S}], one for each sequence, got "
                f"{_shape(sequence_weights)}."
            )
        _same_device("sequence_weights", sequence_weights, labels)
        if num_pairs is None:
            raise ValueError(
                "`num_pairs` is missing: with `sequence_weights` the number of prompts does not follow from the number "
                "of sequences; pass the number that the loss is averaged over."
            )
    number_of_pairs(num_pairs)
    return S


def number_of_pairs(num_pairs: object) -> None:
    """`num_pairs` is None or a positive finite number."""
    if num_pairs is None:
        return
    if isinstance(num_pairs, bool) or not isinstance(num_pairs, (int, float)):
        raise TypeError(f"`num_pairs` must be a number, got {type(num_pairs).__name__} {num_pairs!r}.")
    if not 0 < num_pairs < float("inf"):
        raise ValueError(f"`num_pairs` must be positive and finite, got {num_pairs}.")


def reference(
    objective: Objective,
    ref_logps: torch.Tensor | None,
    ref_hidden: torch.Tensor | None,
    ref_weight: torch.Tensor | None,
    ref_bias: torch.Tensor | None,
    skip_chosen: object,
) -> None:
    """The caller gives the reference in one of two ways or not at all, and the objective uses it."""
    flag("skip_chosen_reference", skip_chosen)
    kind = type(objective).__name__
    if ref_logps is not None and ref_hidden is not None:
        raise ValueError("`ref_logps` and `ref_hidden` were both given; pass one of them.")
    if ref_hidden is not None and ref_weight is None:
        raise ValueError(
            "`ref_weight` is missing: `ref_hidden` needs the reference's head; if the policy's head is frozen and "
            "shared, pass `ref_weight=weight`."
        )
    if ref_hidden is None and (ref_weight is not None or ref_bias is not None):
        given = "ref_weight" if ref_weight is not None else "ref_bias"
        raise ValueError(f"`{given}` was given without `ref_hidden`; pass the reference's hidden states too.")
    if ref_logps is None and ref_hidden is None:
        if skip_chosen:
            raise ValueError(
                "`skip_chosen_reference=True` goes with `ref_logps` or `ref_hidden`; without either the loss is "
                "reference-free already."
            )
        return
    if objective.reference == "none":
        given = "ref_logps" if ref_logps is not None else "ref_hidden"
        raise ValueError(f"`{given}` was given, and {kind} has no reference; leave it out.")
    if skip_chosen and objective.reference != "rejected":
        raise ValueError(
            f"`skip_chosen_reference=True` must go with an objective whose gradients do not depend on the chosen "
            f"reference (InfoPO), got {kind}; pass the reference of all sequences."
        )


def reference_hidden(ref_hidden: torch.Tensor, hidden: torch.Tensor, labels_shape: torch.Size) -> None:
    """The hidden states of the reference have the layout of the policy's."""
    if ref_hidden.shape[:-1] != labels_shape:
        raise ValueError(
            f"`ref_hidden` must have shape {[*labels_shape, 'H']}, the layout of `hidden`, got {_shape(ref_hidden)}."
        )
    _same_device("ref_hidden", ref_hidden, hidden)


def infopo_logps(
    half: str,
    logps: torch.Tensor,
    reference: torch.Tensor | None,
    lengths: torch.Tensor | None,
    objective: InfoPO,
    device: torch.device,
) -> None:
    """The arguments of `infopo_loss` for one half, "chosen" or "rejected"."""
    tensor(f"{half}_logps", logps)
    if logps.ndim != 1:
        raise ValueError(
            f"`{half}_logps` must have shape [P], one log-probability for each sequence, got {_shape(logps)}; "
            f"sum token log-probabilities first."
        )
    reference_logps(f"{half}_logps", logps, len(logps), "one for each sequence", device)
    if reference is not None:
        meaning = f"one for each of `{half}_logps`"
        reference_logps(f"ref_{half}_logps", reference, len(logps), meaning, device)
    needed = objective.average or (objective.sft_weight > 0 and half == "chosen")
    if lengths is None:
        if needed:
            why = "average=True" if objective.average else "sft_weight > 0"
            raise ValueError(f"`{half}_lengths` is missing: {why} needs the number of scored tokens of each sequence.")
        return
    if lengths.shape != logps.shape or lengths.is_floating_point():
        raise ValueError(
            f"`{half}_lengths` must hold {len(logps)} integers, one for each of `{half}_logps`, got "
            f"{_shape(lengths)} of {lengths.dtype}."
        )
    if needed and lengths.device.type == "cpu" and (lengths < 1).any():
        raise ValueError(
            f"`{half}_lengths` must be at least 1, got {int(lengths.min())}; drop sequences without a scored token."
        )


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


def segment_values(cu_seqlens: torch.Tensor, num_rows: int, *, parts: bool = False) -> None:
    """`cu_seqlens` starts at 0, increases, and ends at N. With `parts`, a sequence may have no row on this rank."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0:
        raise ValueError(f"`cu_seqlens` must start at 0, got {bounds[0]}.")
    for s, (first, last) in enumerate(pairwise(bounds)):
        if last < first or (last == first and not parts):
            order = "not decrease" if parts else "increase"
            meaning = "its bounds are those of this rank's rows." if parts else "every sequence needs a row."
            raise ValueError(f"`cu_seqlens` must {order}, got {first} then {last} at position {s + 1}; {meaning}")
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


def sequence_weight_values(weights: torch.Tensor) -> None:
    """Weights of sequences are finite and not negative."""
    bad = ~(weights >= 0) | weights.isinf()
    if bad.any():
        s = int(bad.nonzero()[0])
        raise ValueError(
            f"`sequence_weights` must be finite and not negative, got {float(weights[s])} for sequence {s}."
        )


def pairing_values(is_chosen: torch.Tensor, objective: Objective) -> None:
    """As many chosen sequences as rejected ones."""
    chosen = int(is_chosen.sum())
    if 2 * chosen != len(is_chosen):
        raise ValueError(
            f"`is_chosen` must name as many chosen as rejected sequences, because {type(objective).__name__} pairs the "
            f"i-th chosen with the i-th rejected one, got {chosen} and {len(is_chosen) - chosen}; give each rejected "
            f"sequence its own chosen one, or use an objective that does not compare them (InfoPO)."
        )
