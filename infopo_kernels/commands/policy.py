"""The model that training starts from, for `train` and `precompute-reference` alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import AutoConfig, AutoProcessor
from trl import ModelConfig, get_quantization_config

from infopo_kernels.commands.console import is_main, say
from infopo_kernels.commands.errors import UserError, user_errors
from infopo_kernels.commands.options import TrainArguments
from infopo_kernels.commands.smollm2 import SMOLLM2, smollm2_directory
from infopo_kernels.integrations.adapters import adapter_in, load_policy
from infopo_kernels.integrations.trl import InfoPOConfig


def load_model_files(model: ModelConfig, config: InfoPOConfig) -> tuple[Any, Any]:
    """The model's tokenizer (or processor) and configuration, after `smollm2` has become a directory.

    Of a directory with an adapter there is no configuration: the adapter may have added tokens to its base's.

    Raises:
        UserError: there is no such model.
    """
    name = str(model.model_name_or_path)
    if name == SMOLLM2 and not Path(name).exists():
        model.model_name_or_path = str(smollm2_directory())
    options = {"revision": model.model_revision, "trust_remote_code": config.trust_remote_code}
    with user_errors(
        f"`--model_name_or_path {name}` cannot be loaded; pass a directory written by save_pretrained, the id of a "
        f"causal language model on the hub, or {SMOLLM2!r}. Reason: "
    ):
        if (adapter := saved_adapter(model)) is not None:
            return _load_adapter_processor(str(model.model_name_or_path), adapter, options), None
        model_config = AutoConfig.from_pretrained(model.model_name_or_path, **options)
        return AutoProcessor.from_pretrained(model.model_name_or_path, **options), model_config


def init_options(model: ModelConfig, config: InfoPOConfig) -> dict[str, Any]:
    """What `from_pretrained` is given."""
    return {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(config.model_init_kwargs or {}),
    }


def saved_adapter(model: ModelConfig) -> dict[str, Any] | None:
    """Configuration of the adapter in --model_name_or_path; None if it holds no adapter."""
    with user_errors("--model_name_or_path "):
        return adapter_in(str(model.model_name_or_path), revision=model.model_revision)


def _load_adapter_processor(name: str, saved: dict[str, Any], options: dict[str, Any]) -> Any:
    """The tokenizer beside an adapter, which may have tokens added; where there is none, that of its base."""
    try:
        return AutoProcessor.from_pretrained(name, **options)
    except (OSError, ValueError):
        options = {**options, "revision": saved.get("revision") or "main"}
        return AutoProcessor.from_pretrained(saved["base_model_name_or_path"], **options)


def check_adapter(script: TrainArguments, model: ModelConfig) -> str:
    """What to do with the adapter in --model_name_or_path; "refuse" where there is none.

    Raises:
        UserError: there is an adapter but no --adapter, or --adapter but no adapter; or the options ask for an adapter
            of another rank.
    """
    name, saved = model.model_name_or_path, saved_adapter(model)
    if saved is None:
        if script.adapter in ("continue", "merge"):
            raise UserError(f"--adapter {script.adapter}: {name} holds no adapter; leave the option out")
        return "refuse"
    kind, rank = saved.get("peft_type"), saved.get("r")
    way = script.adapter or ("continue" if model.use_peft else "refuse")
    if way == "refuse":
        raise UserError(
            f"--model_name_or_path {name}: holds a {kind} adapter of {saved.get('base_model_name_or_path')}, not a "
            f"model; pass --adapter continue to train that adapter on, or --adapter merge to merge it into the weights "
            f"first"
        )
    if way == "continue" and model.lora_r not in (ModelConfig.lora_r, rank):
        raise UserError(
            f"--lora_r {model.lora_r}: the {kind} adapter in {name} has r={rank}; leave --lora_r out to train that "
            f"adapter on, or pass --adapter merge to train a new one on top of it"
        )
    return way


def load_start(
    way: str, model: ModelConfig, config: InfoPOConfig, *, trainable: bool = True, merged_into: Path | None = None
) -> Any:
    """The model of a directory with an adapter, or of any directory or hub id; `way`: see `check_adapter`.

    `merged_into`: where a merged model is saved, for a new adapter on it, which names its base by its directory.
    """
    options = {**init_options(model, config), "trust_remote_code": config.trust_remote_code}
    if (quantization := get_quantization_config(model)) is not None:
        options["quantization_config"] = quantization
    with user_errors("--model_name_or_path "):
        policy = load_policy(str(model.model_name_or_path), adapter=way, trainable=trainable, **options)
    if way == "merge" and merged_into is not None:
        if is_main():
            policy.save_pretrained(merged_into)
        PartialState().wait_for_everyone()
        policy.name_or_path = policy.config._name_or_path = str(merged_into)
        say(f"The merged model, on which the new adapter lies, is in {merged_into}.")
    return policy
