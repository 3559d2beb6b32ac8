"""Log-probabilities and the InfoPO loss from inside the forward of any causal language model of transformers.

    attach_linear_logps(model)
    out = model(input_ids, attention_mask=mask, labels=labels, linear_logps="sum")         # out.logps
    out = model(input_ids, attention_mask=mask, labels=labels, infopo=InfoPOOptions())     # out.loss, out.infopo

How it works. The model's own forward runs, with its head told to hand over its input instead of multiplying it: so
whatever happens before the head (embedding scales, image features, projections, router losses) is the model's own. Then
the head is called a second time, as a module, with those hidden states, and forms log-probabilities or loss. Because
both calls go through `__call__` inside the forward of the wrapped model, the hooks of DDP, FSDP2, DeepSpeed ZeRO-3 and
Accelerate fire as they do for logits: the head's weight is whole where it is used, and results leave as outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from infopo_kernels.functional import Reduction, linear_infopo_loss
from infopo_kernels.functional import linear_logps as _linear_logps  # an argument of the forward has its name
from infopo_kernels.integrations.logit_transform import known_logits, logit_options, observed_transform
from infopo_kernels.objectives import InfoPOOptions
from infopo_kernels.options import KernelOptions, LogitOptions
from infopo_kernels.output import InfoPOOutput

try:
    from transformers.utils import ModelOutput
except ImportError as error:
    raise ImportError(
        "infopo_kernels.integrations.transformers needs the package `transformers` (5.0 or later); run: "
        "pip install 'infopo_kernels[train]'"
    ) from error

_ATTACHMENT = "_infopo_attachment"


@dataclass
class LinearLogpsOutput(ModelOutput):
    """What an attached model returns instead of logits."""

    loss: Tensor | None = None
    """[] float32, nats per pair: the InfoPO loss, plus the auxiliary loss of a mixture of experts with its configured
    coefficient; only of a call with `infopo`."""
    logps: Tensor | None = None
    """Of a call with `linear_logps`: [S, T] or [1, N] float32 ("none"; entry t belongs to token t + 1), or [S] float64
    ("sum", "mean"), nats, differentiable. Of a call with `infopo`: [S] float64, without gradient."""
    infopo: InfoPOOutput | None = None
    """Everything that `linear_infopo_loss` returns; its `loss` is without the auxiliary loss."""
    aux_loss: Tensor | None = None
    """[], the load-balancing loss of a mixture of experts, unscaled, if the model was asked for its router logits."""


@dataclass(frozen=True)
class _Request:
    """What the second call of the head is asked for."""

    run: Callable[[Tensor, Tensor, Tensor | None], tuple[Any, ...]]
    """Of hidden states, weight and bias; a plain tuple, which every wrapper's hooks know how to walk through."""


class _LogProbHead(nn.Linear):
    """The model's own head, of which only the class is changed: weight, bias, hooks and names stay as they are."""

    _handed_over: list[Tensor] | None = None

    def forward(self, input: Tensor, request: _Request | None = None) -> Any:
        """Logits; or the answer to `request`; or, while it hands over its input, a line of known logits."""
        if request is not None:
            return request.run(input.to(self.weight.device), self.weight, self.bias)
        if self._handed_over is None:
            return super().forward(input)
        self._handed_over.append(input)
        return known_logits(self.out_features, input)


@dataclass
class _Attachment:
    """What an attached model keeps."""

    forward: Callable[..., Any]
    """The forward that was there before."""
    attribute: str
    """Name under which it was."""
    logit: LogitOptions
    kernel: KernelOptions
    checked: bool = False
    """Whether the model's own treatment of its logits was compared with `logit`."""


def _forward_attribute(module: nn.Module) -> str:
    """Where a module's forward is kept; Accelerate's hooks (of a `device_map`) wrap the one under another name."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def _base(model: Any) -> Any:
    """The causal language model inside a `PeftModel`, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _is_quantised(head: Any) -> bool:
    """Whether the weight of a head is packed integers, or a tensor that only looks like floating point."""
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor):
        return weight is not None or hasattr(head, "qweight")
    plain = type(weight).__name__ in ("Parameter", "Tensor", "DTensor")
    return not (plain and weight.is_floating_point())


def _linear_layers(head: Any, model_name: str) -> list[nn.Linear]:
    """The linear layers that a head may run: one, or with PEFT's `modules_to_save` the original and its copies.

    Raises:
        TypeError: the head is anything else; says why it cannot be served, and the way out.
    """
    if head is None:
        raise TypeError(f"{model_name} has no output embeddings; pass a causal language model (AutoModelForCausalLM).")
    kind = type(head).__name__
    if kind == "ModulesToSaveWrapper":
        copies = [head.original_module, *head.modules_to_save.values()]
        return [layer for copy in copies for layer in _linear_layers(copy, model_name)]
    quantised = _is_quantised(head)
    if (isinstance(head, _LogProbHead) or type(head) is nn.Linear) and not quantised:
        return [head]
    if hasattr(head, "base_layer"):
        reason = (
            "carries an adapter, which log-probabilities formed from its weight would leave untrained. Take the head "
            "out of `target_modules` (list the layers, or use 'all-linear', which leaves it out), or train it whole "
            "with `modules_to_save=['lm_head']`."
        )
    elif quantised:
        reason = (
            "is quantised, and log-probabilities need its weight in floating point. Leave the head out of the "
            "quantisation (`llm_int8_skip_modules=['lm_head']`, `modules_to_not_convert=['lm_head']`)."
        )
    elif kind.startswith("FSDP"):
        reason = "is sharded already. Attach before the model is sharded or handed to `accelerator.prepare`."
    else:
        reason = "is not a plain torch.nn.Linear. Replace it by one, or use the model's own logits."
    raise TypeError(f"The head of {model_name} (a {kind}) {reason}")


def attach_linear_logps(model: Any, *, logit: LogitOptions | None = None, kernel: KernelOptions | None = None) -> Any:
    """Give a causal language model a forward path that returns log-probabilities or the InfoPO loss, not logits.

    The attached model's forward takes, besides its own arguments:

    - ``linear_logps="none" | "sum" | "mean"``: `LinearLogpsOutput.logps`, see `infopo_kernels.linear_logps`; or
    - ``infopo=InfoPOOptions(...)``: `LinearLogpsOutput.loss` and `.infopo`, see `infopo_kernels.linear_infopo_loss`,
      with its `ref_logps`, `is_chosen`, `num_pairs` and `skip_chosen_reference`;
    - with either, ``labels`` in the shape of `input_ids`, not shifted, -100 where a token is not scored; and
      ``cu_seqlens`` for a packed row (`input_ids` [1, N] with `position_ids` that start anew with each sequence);
    - ``rows`` [M], for packs in which sequences share a prompt: the row of the hidden states that each of the M
      `labels` is scored on; then labels [M] and `cu_seqlens` count these, and nothing is shifted.

    Without `linear_logps` and `infopo` it is the forward that it was: generation, evaluation and other losses go on.

    Equivalent to::

        logits = model(input_ids, attention_mask=attention_mask).logits[:, :-1].float()
        logps = logits.log_softmax(-1).gather(-1, labels[:, 1:, None]).squeeze(-1)     # where labels[:, 1:] != -100

    Softcap and logit scale come from the configuration (`logit_transform.logit_options`), and the first call compares
    them, without a further pass, with what the model's forward really does to its logits (not while it is traced by
    torch.compile: call the model once before compiling it). Tied embeddings stay tied. The auxiliary loss of a mixture
    of experts is the model's own.

    Attach before the model is wrapped (DDP, FSDP, `accelerator.prepare`); before or after `get_peft_model`.

    Args:
        model: an `AutoModelForCausalLM`, a vision-language model with a language head, or a `PeftModel` around one.
        logit: softcap and scale; None reads them from the configuration. `temperature` divides the logits further.
        kernel: backend and workspace; "auto" if None.

    Returns:
        `model`, changed in place. Attaching again replaces `logit` and `kernel`.

    Raises:
        TypeError: the head cannot be served (quantised, adapter on it, not a linear layer, sharded already); reason and
            way out in the message.
        ValueError: an encoder-decoder; or, at the first call, a model that does to its logits what is not known.
    """
    causal = _base(model)
    name = type(causal).__name__
    if getattr(causal.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; only decoders (causal language models) are served.")
    layers = _linear_layers(causal.get_output_embeddings(), name)
    if hasattr(causal, _ATTACHMENT):
        detach_linear_logps(causal)
    for layer in layers:
        layer.__class__ = _LogProbHead
        if _forward_attribute(layer) in layer.__dict__:  # Accelerate's hook keeps the old class's forward
            setattr(layer, _forward_attribute(layer), MethodType(_LogProbHead.forward, layer))
    attribute = _forward_attribute(causal)
    transform = logit_options(causal.config) if logit is None else logit
    attachment = _Attachment(getattr(causal, attribute), attribute, transform, kernel or KernelOptions())
    setattr(causal, _ATTACHMENT, attachment)

    # `generate` and the Trainer look at the signature of the model's forward.
    forward = functools.wraps(type(causal).forward)(_forward)
    setattr(causal, attribute, MethodType(forward, causal))
    return model


def detach_linear_logps(model: Any) -> Any:
    """Undo `attach_linear_logps`: the model's forward and head are what they were. Detach before wrapping, or after
    unwrapping.

    Raises:
        ValueError: nothing is attached, or something else wrapped the forward since.
    """
    causal = _base(model)
    attachment: _Attachment | None = getattr(causal, _ATTACHMENT, None)
    if attachment is None:
        raise ValueError(f"Nothing is attached to {type(causal).__name__}; attach_linear_logps(model) comes first.")
    present = causal.__dict__.get(attachment.attribute)
    if getattr(present, "__wrapped__", None) is not type(causal).forward:
        raise ValueError(
            f"The forward of {type(causal).__name__} was wrapped again after attach_linear_logps; undo that first."
        )
    if getattr(attachment.forward, "__func__", None) is type(causal).forward and attachment.attribute == "forward":
        delattr(causal, attachment.attribute)
    else:
        setattr(causal, attachment.attribute, attachment.forward)
    delattr(causal, _ATTACHMENT)
    for layer in _linear_layers(causal.get_output_embeddings(), type(causal).__name__):
        layer.__class__ = nn.Linear
        if _forward_attribute(layer) in layer.__dict__:
            setattr(layer, _forward_attribute(layer), MethodType(nn.Linear.forward, layer))
    return model


def is_attached(model: Any) -> bool:
    """Whether `attach_linear_logps` was called on the model."""
    return hasattr(_base(model), _ATTACHMENT)


def _forward(
    self: Any,
    *args: Any,
    labels: Tensor | None = None,
    linear_logps: Reduction | None = None,
    infopo: InfoPOOptions | None = None,
    ref_logps: Tensor | None = None,
    is_chosen: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rows: Tensor | None = None,
    num_pairs: float | None = None,
    skip_chosen_reference: bool = False,
    **kwargs: Any,
) -> Any:
    """The forward of an attached model; see `attach_linear_logps`."""
    attachment: _Attachment = getattr(self, _ATTACHMENT)
    _check_mode(linear_logps, infopo)
    if linear_logps is None and infopo is None:
        given = {
            "ref_logps": ref_logps,
            "is_chosen": is_chosen,
            "num_pairs": num_pairs,
            "cu_seqlens": cu_seqlens,
            "rows": rows,
        }
        if stray := [name for name, value in given.items() if value is not None]:
            raise TypeError(f"`{stray[0]}` was given without `infopo` or `linear_logps`; pass one of them too.")
        if labels is not None:
            kwargs["labels"] = labels
        return attachment.forward(*args, **kwargs)
    if labels is None:
        raise TypeError("`labels` is missing: log-probabilities need the input ids, with -100 where not scored.")
    if rows is not None:
        _check_shared_prompts(self.config)
    hidden, own = _hidden_states(self, attachment, args, kwargs)
    if rows is not None:
        hidden = hidden.reshape(-1, hidden.shape[-1])[rows.to(hidden.device)]
    shared = {"shift": rows is None, "cu_seqlens": cu_seqlens, **asdict(attachment.logit), **asdict(attachment.kernel)}

    def run(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
        y = labels.to(hidden.device)
        if linear_logps is not None:
            return (_linear_logps(hidden, weight, y, bias=bias, reduction=linear_logps, **shared),)
        assert infopo is not None
        loss = linear_infopo_loss(
            hidden, weight, y, bias=bias, is_chosen=is_chosen, num_pairs=num_pairs, ref_logps=ref_logps,
            skip_chosen_reference=skip_chosen_reference, **asdict(infopo), **shared,
        )  # fmt: skip
        return tuple(loss[:-1])

    answer = self.get_output_embeddings()(hidden, request=_Request(run))
    aux_loss = getattr(own, "aux_loss", None)
    if linear_logps is not None:
        return LinearLogpsOutput(logps=answer[0], aux_loss=aux_loss)
    output = InfoPOOutput._make((*answer, skip_chosen_reference))
    loss = output.loss
    if isinstance(aux_loss, Tensor):
        loss = loss + router_coefficient(self.config) * aux_loss.to(loss.device)
    return LinearLogpsOutput(loss=loss, logps=output.logps, infopo=output, aux_loss=aux_loss)


def _check_mode(reduction: Any, infopo: Any) -> None:
    if reduction is not None and infopo is not None:
        raise TypeError("`linear_logps` and `infopo` were both given; the InfoPO output holds `logps` already.")
    if infopo is not None and not isinstance(infopo, InfoPOOptions):
        raise TypeError(f"`infopo` must be an InfoPOOptions, got {type(infopo).__name__}.")


def _check_shared_prompts(config: Any) -> None:
    """A pack with shared prompts brings a mask [1, 1, N, N] that every layer has to apply as it is."""
    text = config.get_text_config()
    if text._attn_implementation != "sdpa":
        raise ValueError(
            f"Packs with shared prompts need attn_implementation='sdpa', which takes their mask, got "
            f"{text._attn_implementation!r}; load the model with it, or pack without share_prompt."
        )
    layers = set(getattr(text, "layer_types", None) or ["full_attention"])
    windowed = getattr(text, "sliding_window", None) and not getattr(text, "layer_types", None)
    if windowed or layers != {"full_attention"}:
        raise ValueError(
            f"Packs with shared prompts need layers that all attend without a window, got {sorted(layers)}; "
            f"pack without share_prompt."
        )


def router_coefficient(config: Any) -> float:
    """What a mixture of experts weights its auxiliary loss with; 0 if the configuration does not say."""
    return float(getattr(config.get_text_config(), "router_aux_loss_coef", None) or 0.0)


def _hidden_states(model: Any, attachment: _Attachment, args: tuple[Any, ...], kwargs: Any) -> tuple[Tensor, Any]:
    """What enters the head, and the outputs of the model's own forward."""
    name = type(model).__name__
    if kwargs.get("logits_to_keep"):
        raise TypeError("`logits_to_keep` has no meaning without logits; mask `labels` with -100 instead.")
    layers = _linear_layers(model.get_output_embeddings(), name)
    with _handed_over(layers) as hidden:
        own = attachment.forward(*args, **{**kwargs, "use_cache": False, "return_dict": True})
    if len(hidden) != 1:
        raise ValueError(
            f"{name} called its head {len(hidden)} times in a forward; expected once. Its log-probabilities cannot be "
            f"formed from its head's input: use its own logits."
        )
    if not attachment.checked and not torch.compiler.is_compiling():
        before = known_logits(layers[0].out_features, hidden[0])
        # A temperature is the caller's, not the model's.
        configured = replace(attachment.logit, temperature=1.0)
        seen = observed_transform(before, getattr(own, "logits", None), configured, name)
        attachment.logit = replace(seen, temperature=attachment.logit.temperature)
        attachment.checked = True
    return hidden[0], own


class _handed_over:
    """While active, the layers hand over what enters them; yields the list that it goes to."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        self._layers = layers

    def __enter__(self) -> list[Tensor]:
        hidden: list[Tensor] = []
        for layer in self._layers:
            layer._handed_over = hidden  # type: ignore[assignment]
        return hidden

    def __exit__(self, *exception: object) -> None:
        for layer in self._layers:
            layer._handed_over = None  # type: ignore[assignment]
