"""Switches off dropout, noise on embeddings and jitter of routers: with them, two passes of one model differ.

The policy is trained with them, the reference runs without, and the difference enters every log-ratio: we saw +2.3 and
-3.3 nats at the first step, where 0 is right. Implementations of DPO therefore switch dropout off (TRL:
`disable_dropout=True`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, Final

from torch import nn

_RANDOM: Final = re.compile(r"(^|_|layer|path|p)drop|jitter", re.IGNORECASE)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts every module into evaluation mode, and afterwards each one back into its own mode."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def random_parts(model: nn.Module) -> dict[tuple[nn.Module, str], float]:
    """Attributes of a model's modules that make its forward random in training mode: probabilities and noise widths.

    `torch.nn.Dropout` and similar modules (PEFT's too) hold one as `p`; attention layers and routers hold a number
    under a telling name (`attention_dropout`, `layerdrop`, `jitter_noise`).
    """
    found: dict[tuple[nn.Module, str], float] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            of_dropout = name == "p" and "Dropout" in type(module).__name__
            if isinstance(value, float) and value > 0 and (of_dropout or _RANDOM.search(name)):
                found[module, name] = value
    return found


def disable_dropout(model: Any) -> list[str]:
    """Make a model's forward in training mode that of its evaluation mode: dropout, layer dropout and jitter to 0.

    Args:
        model: any module; changed in place.

    Returns:
        What was changed, as text: ["attn_dropout.p = 0.1 (12 times)"]; empty if nothing was random.

    Raises:
        ValueError: NEFTune's hook is on the embeddings; it adds noise whenever the model is in training mode.
    """
    check_no_neftune(model)
    changed: dict[str, int] = {}
    names = {module: name.rsplit(".", 1)[-1] or type(module).__name__ for name, module in model.named_modules()}
    for (module, attribute), value in random_parts(model).items():
        setattr(module, attribute, 0.0)
        text = f"{names[module]}.{attribute} = {value:g}"
        changed[text] = changed.get(text, 0) + 1
    return [f"{text} ({times} times)" if times > 1 else text for text, times in changed.items()]


def check_no_neftune(model: Any, alpha: float | None = None) -> None:
    """Raise ValueError if NEFTune is asked for (`neftune_noise_alpha`), or its hook is on a module already."""
    hooked = [
        name
        for name, module in model.named_modules()
        for hook in module._forward_hooks.values()
        if "neftune" in getattr(hook, "__qualname__", type(hook).__qualname__).lower()
    ]
    if alpha or hooked:
        where = f"`neftune_noise_alpha={alpha}`" if alpha else f"NEFTune's hook on `{hooked[0]}`"
        raise ValueError(
            f"{where} adds noise to the policy's embeddings and none to the reference's, which enters every log-ratio. "
            f"Leave it out, or pass disable_dropout=False to train with noise all the same."
        )
