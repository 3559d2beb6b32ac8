"""Adapters of PEFT: which parameters are an adapter's, whether it changes the model, and models that are saved as one.

The place of a parameter says whether it belongs to an adapter: PEFT keeps the original in `base_layer` (of a tuner's
layer) or `original_module` (of a wrapper), and puts its own parameters beside it. Names do not help: each of PEFT's
forty methods has its own.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from infopo_kernels.integrations.randomness import in_mode

WAYS: Final = ("continue", "merge", "refuse")
"""What to do with an adapter in the model's directory: train it on, merge it into the weights first, or refuse the
directory."""

_PROBE: Final = 16
"""Tokens that a model is run on to see whether an adapter changes it."""


@dataclass(frozen=True)
class Adapters:
    """The parameters of a model: its own and those of its adapters."""

    base: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    """The model's own, under their names in the model without adapters."""
    active: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    """Those of the adapters that are switched on."""
    layers: list[Any] = field(default_factory=list)
    """The modules that PEFT has put in the place of the model's own."""
    kinds: tuple[str, ...] = ()
    """PEFT's types of the adapters that are switched on: "LORA", "PROMPT_TUNING", ..."""
    prompt: bool = False
    """Whether one of them is a learned prompt, which always changes the model."""


def adapters_of(model: Any) -> Adapters:
    """Tell the parameters of a model's adapters from its own.

    Args:
        model: of transformers, with or without adapters, in a `PeftModel` or injected.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if importlib.util.find_spec("peft") is None:
        return Adapters(base=list(model.named_parameters()))
    # Imported here: PEFT is optional, and a model without it has no adapter.
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    wrapped = isinstance(model, (PeftModel, PeftMixedModel))
    configs: dict[str, Any] = getattr(model, "peft_config", None) or {}
    off = getattr(model, "_adapters_disabled", False)
    causal = model.get_base_model() if isinstance(model, PeftModel) else model.base_model.model if wrapped else model
    found = Adapters()
    switched_on: set[str] = set()
    seen: set[int] = set()

    def inside(module: nn.Module) -> str | None:
        """Name of the child that was there before PEFT came; None for a module of the model's own."""
        if isinstance(module, BaseTunerLayer):
            return "base_layer"
        if isinstance(module, AuxiliaryTrainingWrapper):
            return "original_module"
        # Attention with an adaption prompt, which is not a tuner's layer.
        return "model" if hasattr(module, "adaption_prompt") and hasattr(module, "adaption_gate") else None

    def walk(module: Any, plain: str, adapter: str | None) -> None:
        """`plain`: the name without PEFT's parts; `adapter`: the path inside an adapter's part, None outside."""
        own = inside(module)
        if own is not None and adapter is None:
            found.layers.append(module)
            if own == "model":
                active = [] if off else list(configs)
            else:
                active = [] if off or module.disable_adapters else list(module.active_adapters)
            switched_on.update(active)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if adapter is None and own is None:
                found.base.append((f"{plain}{name}", parameter))
            else:
                parts.append((f"{plain}{adapter or ''}{name}", parameter))
        for name, child in module.named_children():
            if name == "_orig_mod":
                walk(child, plain, adapter)
            elif own is not None and name == own:
                walk(child, plain, None)
            elif own is not None or adapter is not None:
                walk(child, plain, f"{adapter or ''}{name}.")
            else:
                walk(child, f"{plain}{name}.", None)

    parts: list[tuple[str, nn.Parameter]] = []
    walk(causal, "", None)
    prompt = isinstance(model, PeftModel) and not off and model.active_peft_config.is_prompt_learning
    if wrapped:  # parameters that a method shares between layers (VB-LoRA), and learned prompts
        if prompt:
            switched_on.update(model.active_adapters)
        if switched_on:
            parts += [(f"shared.{name}", p) for name, p in model.named_parameters() if id(p) not in seen]
    for name, parameter in parts:
        owners = set(name.split(".")) & set(configs)
        if switched_on and (not owners or owners & switched_on):
            found.active.append((name, parameter))
    kinds = sorted(
        {str(getattr(configs[name].peft_type, "value", configs[name].peft_type)) for name in switched_on & set(configs)}
    )
    if switched_on and not kinds:  # injected into the model, which then has no configuration of it
        kinds = ["injected"]
    return Adapters(found.base, found.active, found.layers, tuple(kinds), bool(prompt))


def has_virtual_tokens(model: Any) -> bool:
    """Whether one of the model's adapters is a learned prompt, switched on or off."""
    return any(config.is_prompt_learning for config in getattr(model, "peft_config", {}).values())


def changes_model(model: Any, adapters: Adapters) -> bool:
    """Whether the adapters that are switched on change the model's outputs.

    A fresh LoRA, IA3, LoHa, ... does not: its product is zero or its factor one. For LoRA, retrained tokens and whole
    trained modules the values tell. For other methods the model runs on a few tokens with and without the adapter: a
    difference beyond rounding is a change. A learned prompt always is one.

    Raises:
        ValueError: the answer takes a run, and the weights are partitioned (ZeRO-3).
    """
    # Imported here: PEFT is optional, and a model without it has no adapter.
    from peft.tuners.adalora import AdaLoraLayer
    from peft.tuners.lora import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils.other import ModulesToSaveWrapper

    if not adapters.active and not adapters.prompt:
        return False
    if adapters.prompt:
        return True
    unknown = False
    for layer in adapters.layers:
        if getattr(layer, "disable_adapters", False):
            continue
        tokens = getattr(layer, "token_adapter", layer)
        if isinstance(layer, ModulesToSaveWrapper):
            if _saved_module_differs(layer):
                return True
        elif isinstance(tokens, TrainableTokensLayer):
            if _tokens_differ(tokens):
                return True
        elif isinstance(layer, LoraLayer) and not isinstance(layer, AdaLoraLayer) and not any(layer.use_dora.values()):
            if any(map(_product_is_not_zero, _factors(layer))):
                return True
        else:
            unknown = True
    return unknown and _runs_differently(model, adapters)


def _factors(layer: Any) -> Iterator[tuple[Tensor, Tensor, list[Tensor]]]:
    """The two factors of each active LoRA of a layer, and other parameters trained with them (a bias)."""
    for first, second in ((layer.lora_A, layer.lora_B), (layer.lora_embedding_A, layer.lora_embedding_B)):
        for name in second:
            if name in layer.active_adapters:
                A, B = (each[name] if isinstance(each[name], Tensor) else each[name].weight for each in (first, second))
                rest = [] if isinstance(second[name], Tensor) else [p for p in second[name].parameters() if p is not B]
                yield A, B, rest


def _product_is_not_zero(factors: tuple[Tensor, Tensor, list[Tensor]]) -> bool:
    """Whether B A x is more than rounding for a random x: a fresh LoRA has a factor of zeros, or orthogonal ones."""
    A, B, rest = factors
    if any(map(_any_nonzero, rest)):
        return True
    with whole(A) as a, whole(B) as b:
        a, b = a.float().reshape(len(a), -1), b.float().reshape(-1, len(a))
        x = torch.randn(a.shape[1], generator=torch.Generator().manual_seed(0)).to(a.device)
        h = a @ x
        return float((b @ h).norm()) > 32 * torch.finfo(A.dtype).eps * float(b.norm()) * float(h.norm())


def _any_nonzero(parameter: Tensor) -> bool:
    with whole(parameter) as value:
        return bool(value.any())


def _saved_module_differs(wrapper: Any) -> bool:
    for name in wrapper.active_adapters:
        copy = dict(wrapper.modules_to_save[name].named_parameters())
        for key, original in wrapper.original_module.named_parameters():
            with whole(copy[key]) as ours, whole(original) as theirs:
                if not torch.equal(ours, theirs.to(ours.dtype)):
                    return True
    return False


def _tokens_differ(layer: Any) -> bool:
    for name in layer.active_adapters:
        with whole(layer.trainable_tokens_delta[name]) as rows:
            original = layer.trainable_tokens_original[name]
            if not torch.equal(rows, original.to(rows.dtype)):
                return True
    return False


@contextlib.contextmanager
def whole(parameter: Tensor) -> Iterator[Tensor]:
    """A parameter with all its values, also one that ZeRO-3 or FSDP2 has partitioned (then every rank has to ask)."""
    if hasattr(parameter, "ds_id"):
        # Imported here: DeepSpeed is optional, and only its own parameters have an id.
        with importlib.import_module("deepspeed").zero.GatheredParameters([parameter]):
            yield parameter.detach()
    else:
        value: Any = parameter.detach()
        yield value.full_tensor() if hasattr(value, "full_tensor") else value


@torch.no_grad()
def _runs_differently(model: Any, adapters: Adapters) -> bool:
    partitioned = next((name for name, p in adapters.base if hasattr(p, "ds_id") or hasattr(p, "full_tensor")), None)
    if partitioned is not None:
        raise ValueError(
            f"whether the {'+'.join(adapters.kinds)} adapter changes the model cannot be told while its weights are "
            f"partitioned ({partitioned}); start from the base without it, or from a model into which it is merged."
        )
    embedding = model.get_input_embeddings()
    vocabulary = int(embedding.weight.shape[0])
    ids = torch.arange(_PROBE, device=embedding.weight.device)[None] * (vocabulary - 1) // (_PROBE - 1)
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with in_mode(model, "evaluation"):
            with_adapter = model(input_ids=ids, use_cache=False).logits.float()
            with _switched_off(model, adapters):
                without = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        for parameter, mode in trained.items():  # PEFT sets these when it switches adapters on
            parameter.requires_grad_(mode)
    rounding = 16 * torch.finfo(next(model.parameters()).dtype).eps
    return float((with_adapter - without).abs().max()) > rounding * float(without.abs().max())


@contextlib.contextmanager
def _switched_off(model: Any, adapters: Adapters) -> Iterator[None]:
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
        return
    for layer in adapters.layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in adapters.layers:
            layer.enable_adapters(True)


def adapter_in(name: str, **hub: Any) -> dict[str, Any] | None:
    """The configuration of the adapter in a directory (or repository); None if it holds no adapter.

    Args:
        name: directory or hub id.
        hub: `revision`, `token`, ... for a repository.

    Raises:
        ValueError: the configuration cannot be read.
    """
    # Imported here: the rest of the file needs PEFT and torch alone.
    from transformers.utils import find_adapter_config_file

    try:
        path = find_adapter_config_file(name, **hub)
    except OSError:
        return None
    if path is None:
        return None
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        if not config["peft_type"] or not config["base_model_name_or_path"]:
            raise KeyError("peft_type, base_model_name_or_path")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: is no whole configuration of an adapter ({type(error).__name__}: {error}). Save the adapter "
            f"again, with the name of its base (`base_model_name_or_path`); or remove the file if the directory holds "
            f"a model."
        ) from None
    return dict(config)


def check_start(model: Any) -> None:
    """Refuse a directory with an adapter, and the model that transformers loads from it.

    transformers injects such an adapter frozen. A trainer would train the base's weights under it, and then
    `save_pretrained` would save the adapter only.

    Args:
        model: a name, or a model.

    Raises:
        ValueError: it is the name of an adapter, or a model with nothing but a frozen adapter injected into it.
    """
    if isinstance(model, str):
        found = adapter_in(model) is not None
        name = model
    else:
        name = getattr(getattr(model, "config", None), "_name_or_path", "DIRECTORY")
        injected = getattr(model, "_hf_peft_config_loaded", False)
        found = injected and not any(parameter.requires_grad for _, parameter in adapters_of(model).active)
    if found:
        raise ValueError(
            f"{name}: holds an adapter, which transformers loads frozen, inside its base. Load it with load_policy of "
            f"infopo_kernels.integrations.adapters: adapter='continue' trains it on, adapter='merge' merges it into "
            f"the weights first."
        )


def load_policy(name: str, *, adapter: str = "refuse", trainable: bool = True, **kwargs: Any) -> Any:
    """Load a causal language model to start from: a directory of weights, or a directory with an adapter.

    Equivalent, without an adapter in the directory, to ``AutoModelForCausalLM.from_pretrained(name, **kwargs)``. That
    call takes a directory with an adapter too, injects it frozen, and trainers then take the model for its bare base.

    Args:
        name: directory or hub id.
        adapter: what to do with an adapter in `name`. "continue": a `PeftModel` with it, to be trained on (leave
            `peft_config` out of the trainer); "merge": the base with the adapter merged into its weights (save it
            before you put a new adapter on it: an adapter names its base by the directory); "refuse".
        trainable: whether a continued adapter takes gradients.
        kwargs: for `from_pretrained`.

    Raises:
        ValueError: `name` holds an adapter and is refused; the adapter cannot be merged; nothing can be loaded.
    """
    if adapter not in WAYS:
        raise ValueError(f"`adapter` must be one of {', '.join(map(repr, WAYS))}, got {adapter!r}.")
    # Imported here: the rest of the file needs PEFT and torch alone.
    from transformers import AutoModelForCausalLM

    hub = {key: kwargs[key] for key in ("revision", "token", "cache_dir") if kwargs.get(key) is not None}
    config = adapter_in(name, **hub)
    if config is None:
        return _loaded(AutoModelForCausalLM, name, **kwargs)
    kind = f"{config.get('peft_type', 'PEFT')} adapter of {config.get('base_model_name_or_path')}"
    if adapter == "refuse":
        raise ValueError(
            f"{name}: holds an adapter ({kind}), not a model. Pass adapter='continue' to train that adapter on, or "
            f"adapter='merge' to merge it into the weights first; or start from the base model."
        )
    # Imported here: PEFT is optional, and needed for such a directory only.
    from peft import AutoPeftModelForCausalLM

    model = _loaded(AutoPeftModelForCausalLM, name, is_trainable=trainable and adapter == "continue", **kwargs)
    if adapter == "continue":
        return model
    if model.active_peft_config.is_prompt_learning or not hasattr(model.base_model, "merge_and_unload"):
        raise ValueError(f"{name}: its adapter ({kind}) has no weights to merge it into; pass adapter='continue'.")
    merged = model.merge_and_unload()
    merged.config._name_or_path = name
    return merged


def _loaded(factory: Any, name: str, **kwargs: Any) -> Any:
    try:
        return factory.from_pretrained(name, **kwargs)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 300 else reason[:297] + "..."
        raise ValueError(
            f"{name}: cannot be loaded; pass a directory written by save_pretrained, or the id of a causal language "
            f"model on the hub. Reason: {reason}"
        ) from error
