"""What a model does to its logits: read from its configuration, and checked against what the model really does.

Every family names softcap and scale differently. `observed_transform` finds what the table does not know: it looks at
what the model's own forward does to a line of known logits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from infopo_kernels.options import LogitOptions

_SOFTCAPS: Final = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Gemma 2, 3n, 4, VaultGemma, NanoChat; RecurrentGemma; xLSTM."""
_MULTIPLIERS: Final = ("logit_scale", "lm_head_multiplier")
"""Cohere; Falcon-H1."""
_DIVISORS: Final = ("logits_scaling",)
"""Granite."""
_MULTIPLIED_BY_SCALING: Final = ("hyperclovax",)
"""Model types that multiply by what Granite divides by."""

PROBE_RANGE: Final = 32.0
"""Known logits run from -32 to 32: wide enough to bend under any softcap in use (15 to 50)."""


def logit_options(config: Any) -> LogitOptions:
    """Softcap and scale of the logits of a transformers configuration.

    Equivalent to what the model's forward does after its head: ``scale * softcap * tanh(logits / softcap)``.

    Args:
        config: a `PretrainedConfig`; of a vision-language wrapper, its text model's part is read.
    """
    text = config.get_text_config()

    def number(name: str) -> float | None:
        value = getattr(text, name, None)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    softcap = next((cap for cap in map(number, _SOFTCAPS) if cap), None)
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= number(name) or 1.0
    for name in _DIVISORS:
        factor = number(name) or 1.0
        scale = scale * factor if text.model_type in _MULTIPLIED_BY_SCALING else scale / factor
    return LogitOptions(softcap=softcap, logit_scale=scale)


def known_logits(vocabulary: int, like: Tensor) -> Tensor:
    """[1, 1, V] of known values, in the type and on the device of `like`."""
    return torch.linspace(-PROBE_RANGE, PROBE_RANGE, vocabulary, device=like.device).to(like.dtype)[None, None]


def _agrees(before: Tensor, after: Tensor, options: LogitOptions) -> Tensor:
    """[V] bool: entries that `options` explain."""
    logits, cap = before.double(), options.softcap
    expected = options.scale * (logits if cap is None else cap * torch.tanh(logits / cap))
    # A handful of roundings in the type of the logits, each relative to the value at hand.
    step = max(torch.finfo(before.dtype).eps, torch.finfo(after.dtype).eps)
    return ((after.double() - expected).abs() <= 8 * step * (expected.abs() + abs(options.scale))).flatten()


def observed_transform(before: Tensor, after: Any, configured: LogitOptions, model_name: str) -> LogitOptions:
    """Softcap and scale that a model applied to known logits `before` [1, 1, V]: all or part of its configuration.

    Some vision-language wrappers carry a softcap or a scale in the configuration of their text model and do not apply
    it. What counts is what the model does.

    Raises:
        ValueError: it does something else; says what, and how to go on.
    """
    way_out = (
        "Pass what it does as `logit=LogitOptions(softcap=..., logit_scale=...)` to attach_linear_logps, or, if it is "
        "none of those, form the log-probabilities from its own logits."
    )
    if not isinstance(after, Tensor) or after.shape != before.shape:
        came = list(after.shape) if isinstance(after, Tensor) else type(after).__name__
        raise ValueError(f"{model_name} does not return its head's logits as they are (got {came}). {way_out}")
    softcap_only, scale_only = replace(configured, logit_scale=1.0), replace(configured, softcap=None)
    for options in (configured, replace(softcap_only, softcap=None), softcap_only, scale_only):
        if bool(_agrees(before, after, options).all()):
            return options
    wrong = (~_agrees(before, after, configured)).nonzero().flatten()
    entry = int(wrong[0])
    raise ValueError(
        f"{model_name} does something to its logits that its configuration does not say: of {len(wrong)} of "
        f"{before.numel()} vocabulary entries, the first is {entry}: logit {float(before.flatten()[entry]):.4g} became "
        f"{float(after.flatten()[entry]):.4g}, which {configured} does not explain. {way_out}"
    )
