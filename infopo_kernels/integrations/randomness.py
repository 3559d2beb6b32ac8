"""Switches off dropout, noise on embeddings and jitter of routers: with them, two passes of one model differ.

The policy is trained with them, the reference runs without, and the difference enters every log-ratio: we saw +2.3 and
-3.3 nats at the first step, where 0 is right. Implementations of DPO therefore switch dropout off (TRL:
`disable_dropout=True`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
from collections.abc import Iterator
from typing import Any, Final, Literal, cast

from torch import nn

_RANDOM: Final = re.compile(r"(^|_|layer|path|p)drop|jitter", re.IGNORECASE)


Mode = Literal["evaluation", "training"]


@contextlib.contextmanager
def in_mode(model: nn.Module, mode: Mode = "evaluation") -> Iterator[None]:
    """Puts every module into a mode, and afterwards each one back into its own."""
    training = mode == "training"
    others = [module for module in model.modules() if module.training != training]
    for module in others:
        module.training = training
    try:
        yield
    finally:
        for module in others:
            module.training = not training


def random_parts(model: nn.Module) -> dict[tuple[nn.Module, str], float]:
    """Attributes of a model's modules that make its forward random in training mode: probabilities and noise widths.

    `torch.nn.Dropout` and similar modules (PEFT's too) hold one as `p`; attention layers and routers hold a number
    under a telling name (`attention_dropout`, `layerdrop`, `jitter_noise`). Layers of PEFT hold one for each adapter,
    in a dictionary (`rank_dropout` and `module_dropout` of LoHa and LoKr); the largest counts. Some models (Persimmon,
    BLT) read it from the configuration at each call: "config.attention_dropout".
    """
    found: dict[tuple[nn.Module, str], float] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            numbers = list(value.values()) if isinstance(value, dict) else [value]
            if not numbers or not all(isinstance(each, float) for each in numbers) or max(numbers) <= 0:
                continue
            of_dropout = name == "p" and "Dropout" in type(module).__name__
            if of_dropout or _RANDOM.search(name):
                found[module, name] = max(numbers)
        config, kind = vars(module).get("config"), cast(Any, type(module))
        for name in _read_from_config(kind):
            value = getattr(config, name, None)
            if isinstance(value, float) and value > 0:
                found[module, f"config.{name}"] = value
    return found


@functools.cache
def _read_from_config(kind: Any) -> list[str]:
    """Random parts that a class's forward reads from `self.config`, judged by the names in its code."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    names = () if code is None else code.co_names
    return [name for name in names if _RANDOM.search(name)] if "config" in names else []


def _switch_off(module: nn.Module, attribute: str) -> None:
    owner: Any = module
    *path, name = attribute.split(".")
    for part in path:
        owner = getattr(owner, part)
    value = getattr(owner, name)
    setattr(owner, name, dict.fromkeys(value, 0.0) if isinstance(value, dict) else 0.0)


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
        _switch_off(module, attribute)
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
