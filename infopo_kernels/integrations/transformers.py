"""Log-probabilities and preference losses from inside the forward of any causal language model of transformers.

    attach_linear_logps(model)
    out = model(input_ids, attention_mask=mask, labels=labels, linear_logps="sum")         # out.logps
    out = model(input_ids, attention_mask=mask, labels=labels, infopo=InfoPO())            # out.loss, out.infopo
    out = model(input_ids, attention_mask=mask, labels=labels, objective=DPO())            # the same, of DPO

How it works. The model's own forward runs, but its head hands over its input instead of multiplying it. So everything
before the head (embedding scales, image features, projections, router losses) is the model's own. Then the head is
called as a module, once, with those hidden states, and forms log-probabilities or loss. This happens inside the forward
of the wrapped model, so the hooks of DDP, FSDP2, DeepSpeed ZeRO-3 and Accelerate fire as they do for logits: the head's
weight is whole where it is used, and results leave as outputs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from infopo_kernels.distributed.parallel import VocabShard
from infopo_kernels.distributed.sharded import is_sharded
from infopo_kernels.functional import Reduction, linear_preference_loss
from infopo_kernels.functional import linear_logps as _linear_logps  # an argument of the forward has its name
from infopo_kernels.integrations import packing_probe
from infopo_kernels.integrations.heads import (
    HandsOver,
    ask,
    forward_attribute,
    handed_over,
    prepare,
    restore,
    vocabulary_size,
)
from infopo_kernels.integrations.logit_transform import known_logits, logit_options, observed_transform
from infopo_kernels.integrations.sealed import Sealed, least_cast, unsealed
from infopo_kernels.libraries import import_failure, warn_untested
from infopo_kernels.objectives import InfoPO, Objective
from infopo_kernels.options import KernelOptions, LogitOptions, arguments
from infopo_kernels.output import PreferenceOutput, TailSummary

try:
    from transformers.utils import ModelOutput
except ImportError as error:
    raise import_failure(__name__, ("transformers",), "train", error) from error
warn_untested("transformers")

_ATTACHMENT = "_infopo_attachment"
_TENSORS = PreferenceOutput._fields.index("chosen_reference_skipped")  # the first fields, which are tensors


@dataclass
class LinearLogpsOutput(ModelOutput):
    """What an attached model returns instead of logits."""

    loss: Tensor | None = None
    """[] float32, nats per pair: the loss of the objective, plus the auxiliary loss of a mixture of experts with its
    configured coefficient; only of a call with `infopo` or `objective`."""
    logps: Tensor | None = None
    """Of a call with `linear_logps`: [S, T] or [1, N] float32 ("none"; entry t belongs to token t + 1), or [S] float64
    ("sum", "mean"), nats, differentiable. Of a call with `infopo` or `objective`: [S] float64, without gradient."""
    infopo: PreferenceOutput | None = None
    """Everything that `linear_preference_loss` returns; its `loss` is without the auxiliary loss."""
    aux_loss: Tensor | None = None
    """[], the load-balancing loss of a mixture of experts, unscaled, if the model was asked for its router logits."""
    exact: Sealed | None = None
    """`loss`, `logps` and `infopo` as they left the head. If a wrapper casts them later, we restore them from here."""

    def __post_init__(self) -> None:
        super().__post_init__()  # also where a wrapper makes the output anew from what it has cast
        if self.exact is not None:
            for name, original in zip(("loss", "logps", "infopo"), self.exact.value, strict=True):
                if original is not None:
                    setattr(self, name, least_cast(getattr(self, name), original))


@dataclass
class _Attachment:
    """What an attached model keeps."""

    forward: Callable[..., Any]
    """The forward that was there before."""
    attribute: str
    """Name under which it was."""
    logit: LogitOptions
    kernel: KernelOptions
    checked_vocabulary: int | None = None
    """Size of the vocabulary for which the model's own treatment of its logits was compared with `logit`."""
    packing: dict[tuple[bool, Any], str | None] = field(default_factory=dict)
    """By shared prompts and attention implementation: why packed rows would be mixed; None where they are not."""


class _AttachedForward:
    """The forward of an attached model; an object of its own for each model.

    It takes the place of a bound method on the instance: `generate` and the Trainer read its signature, Accelerate
    reads `__func__`. Unlike a bound method it survives pickling. It has no `__wrapped__`, because code that removes all
    wrappers (`accelerator.unwrap_model(keep_fp32_wrapper=False)`) must stop here.
    """

    __name__ = "forward"

    def __init__(self, causal: Any, attachment: _Attachment) -> None:
        self.__setstate__((causal, attachment))

    def __getstate__(self) -> Any:
        return self.__self__, self._attachment

    def __setstate__(self, state: Any) -> None:
        self.__self__, self._attachment = state
        own = type(self.__self__).forward
        self.__doc__, self.__qualname__ = own.__doc__, own.__qualname__
        self.__signature__ = inspect.signature(functools.partial(own, self.__self__))
        # Accelerate may bind it again, to a copy of the model: the function then uses the attachment of that copy.
        function = FunctionType(_of_model.__code__, _of_model.__globals__, "forward")
        function.__doc__, function.__qualname__ = own.__doc__, own.__qualname__
        function.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
        self.__func__ = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _forward(self.__self__, self._attachment, *args, **kwargs)


def _of_model(self: Any, *args: Any, **kwargs: Any) -> Any:
    return _forward(self, vars(self)[_ATTACHMENT], *args, **kwargs)


def causal_model(model: Any) -> Any:
    """The causal language model inside PEFT's models, `torch.compile`, DDP, FSDP1, DeepSpeed's engine; or the model."""
    while True:
        inner = vars(model).get("_modules", {}).get("_orig_mod")
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if inner is None and not hasattr(type(model), "get_output_embeddings"):
            children = vars(model).get("_modules", {})
            inner = children.get("module") or children.get("_fsdp_wrapped_module")
            if type(model).__name__ == "PeftMixedModel":  # which has no `get_base_model`
                inner = children["base_model"].model
        if inner is None:
            return model
        model = inner


def attach_linear_logps(model: Any, *, logit: LogitOptions | None = None, kernel: KernelOptions | None = None) -> Any:
    """Give a causal language model a forward path that returns log-probabilities or a preference loss, not logits.

    The attached model's forward takes, besides its own arguments:

    - ``linear_logps="none" | "sum" | "mean"``: `LinearLogpsOutput.logps`, see `infopo_kernels.linear_logps`; or
    - ``infopo=InfoPO(...)``, or ``objective=`` any of `infopo_kernels.objectives`: `LinearLogpsOutput.loss` and
      `.infopo`, see `infopo_kernels.linear_preference_loss`, with its `ref_logps`, `is_chosen`, `num_pairs`,
      `sequence_weights` and `skip_chosen_reference`. Under a wrapper that averages gradients over R ranks (DDP, FSDP,
      DeepSpeed), `num_pairs` is the number of all ranks over R (`step.pairs_per_rank`);
    - with either, ``labels`` in the shape of `input_ids`, not shifted, -100 where a token is not scored; and
      ``cu_seqlens`` for a packed row (`input_ids` [1, N] with `position_ids` that start anew with each sequence);
    - ``rows`` [M], for packs in which sequences share a prompt: the row of the hidden states that each of the M
      `labels` is scored on; then labels [M] and `cu_seqlens` count these, and nothing is shifted;
    - ``shift_labels`` in place of `labels`: entry t is the label of token t + 1, -100 at the end of each sequence and
      where a token is not scored. This is transformers' name for labels that were shifted before a cut;
    - ``sequence_group``, for ranks that hold parts of the same sequences (context parallelism): their process group,
      see `linear_logps`; with `shift_labels`, since a shift inside a part would lose the label of its last token. The
      model's attention has to see the other parts by itself;
    - ``data_group``, the ranks over which a wrapper averages gradients, see `linear_preference_loss`.

    Without any of these it is the model's own forward: generation, evaluation and other losses work as before.

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
        kernel: backend, workspace and `tail_threshold`; "auto" and exact gradients if None. With a threshold and
            with gradients the loss's output reports what was pooled (`out.infopo.tail`), unless ranks share the head.

    Returns:
        `model`, changed in place. Attaching again replaces `logit` and `kernel`.

    Raises:
        TypeError: the head cannot be served (quantised, adapter on it, not a linear layer, sharded already); reason and
            way out in the message.
        ValueError: an encoder-decoder; or, at the first call, a model that does to its logits what is not known; or, at
            the first call with a packed row, a model that mixes its sequences.
    """
    causal = causal_model(model)
    name = type(causal).__name__
    if getattr(causal.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder; only decoders (causal language models) are served.")
    prepare(causal)
    transform = logit_options(causal.config) if logit is None else logit
    kernel = kernel or KernelOptions()
    attachment: _Attachment | None = vars(causal).get(_ATTACHMENT)
    if attachment is not None and is_attached(causal):
        attachment.logit, attachment.kernel, attachment.checked_vocabulary = transform, kernel, None
        return model
    attribute = forward_attribute(causal)
    attachment = _Attachment(getattr(causal, attribute), attribute, transform, kernel)
    setattr(causal, _ATTACHMENT, attachment)
    setattr(causal, attribute, _AttachedForward(causal, attachment))
    return model


def detach_linear_logps(model: Any) -> Any:
    """Undo `attach_linear_logps`: the model's forward and head are what they were. Detach before wrapping, or after
    unwrapping.

    Raises:
        ValueError: nothing is attached, or something else wrapped the forward since.
    """
    causal = causal_model(model)
    attachment: _Attachment | None = vars(causal).get(_ATTACHMENT)
    if attachment is None:
        raise ValueError(f"Nothing is attached to {type(causal).__name__}; attach_linear_logps(model) comes first.")
    present = vars(causal).get(attachment.attribute)
    if _stands_for(present, causal):
        if getattr(attachment.forward, "__func__", None) is type(causal).forward and attachment.attribute == "forward":
            delattr(causal, attachment.attribute)
        else:
            setattr(causal, attachment.attribute, attachment.forward)
    elif is_attached(causal):
        raise ValueError(
            f"The forward of {type(causal).__name__} was wrapped again after attach_linear_logps; undo that first."
        )
    delattr(causal, _ATTACHMENT)
    restore(causal)
    return model


def _stands_for(forward: Any, causal: Any) -> bool:
    """Whether this is the model's attached forward: the object, or its function, bound again by who unwrapped it."""
    if isinstance(forward, _AttachedForward):
        return forward.__self__ is causal
    return getattr(getattr(forward, "__func__", forward), "__code__", None) is _of_model.__code__


def is_attached(model: Any) -> bool:
    """Whether the forward that a call of `model` runs is the one that `attach_linear_logps` put there.

    It is not if something replaced the forward since: another library's patch (Liger's), a wrapper whose removal took
    it away too, a copy without it.
    """
    causal = causal_model(model)
    if _ATTACHMENT not in vars(causal):
        return False
    forward = vars(causal).get("forward")
    if hasattr(causal, "_hf_hook"):  # Accelerate's wrapper looks `_old_forward` up when it is called
        forward = vars(causal).get("_old_forward")
    return _leads_to_attached(forward, causal)


def _leads_to_attached(forward: Any, causal: Any, depth: int = 12) -> bool:
    """Whether a forward is the attached one, or wraps it: by `functools.wraps`, by `partial`, or in a closure."""
    if forward is None or depth == 0:
        return False
    if _stands_for(forward, causal):
        return True
    function = getattr(forward, "__func__", forward)
    inner = [getattr(function, "__wrapped__", None), getattr(function, "func", None)]
    for cell in getattr(function, "__closure__", None) or ():
        with contextlib.suppress(ValueError):  # an empty cell
            inner += [cell.cell_contents] if callable(cell.cell_contents) else []
    return any(_leads_to_attached(each, causal, depth - 1) for each in inner)


def own_output(model: Any, output: Any) -> LinearLogpsOutput:
    """`output`, if it is what an attached model returns to a call with `linear_logps`, `infopo` or `objective`.

    Raises:
        RuntimeError: it is something else, whose loss must not be trained on; says what happened and what to do.
    """
    if isinstance(output, LinearLogpsOutput):
        return output
    name = type(causal_model(model)).__name__
    raise RuntimeError(
        f"{name} returned a {type(output).__name__}, not log-probabilities: {_lost(model)} Its loss, which would be "
        f"cross-entropy over chosen and rejected responses alike, was not used."
    )


def check_attached(model: Any) -> None:
    """Raise RuntimeError, which says what to do, unless `is_attached`."""
    if not is_attached(model):
        raise RuntimeError(f"{type(causal_model(model)).__name__} does not return log-probabilities: {_lost(model)}")


def _lost(model: Any) -> str:
    causal = causal_model(model)
    if _ATTACHMENT not in vars(causal):
        return "nothing is attached to it. Call attach_linear_logps(model) before the model is wrapped."
    runs = getattr(causal, "forward", None)
    function = getattr(runs, "__func__", runs)
    origin = f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', '?')}"
    return (
        f"the forward that attach_linear_logps put there is gone, and {origin} runs in its place. Something replaced "
        f"it: a patch of the forward by another library (Liger's; leave it out with `liger_kernel_config="
        f"{{'fused_linear_cross_entropy': False}}`), a wrapper that was taken off half-way, a copy that left it "
        f"behind. Call attach_linear_logps(model) again, after whatever did that."
    )


def _forward(
    self: Any,
    attachment: _Attachment,
    *args: Any,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    linear_logps: Reduction | None = None,
    infopo: InfoPO | None = None,
    objective: Objective | None = None,
    ref_logps: Tensor | Sealed | None = None,
    is_chosen: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    rows: Tensor | None = None,
    num_pairs: float | None = None,
    sequence_weights: Tensor | Sealed | None = None,
    skip_chosen_reference: bool = False,
    sequence_group: Any = None,
    data_group: Any = None,
    num_rejected: list[int] | None = None,
    rejected_start: int | None = None,
    **kwargs: Any,
) -> Any:
    """The forward of an attached model; see `attach_linear_logps`. The last two are of batches, for other functions."""
    objective = _asked_for(linear_logps, infopo, objective)
    if linear_logps is None and objective is None:
        given = {
            "ref_logps": ref_logps,
            "is_chosen": is_chosen,
            "num_pairs": num_pairs,
            "sequence_weights": sequence_weights,
            "cu_seqlens": cu_seqlens,
            "rows": rows,
            "sequence_group": sequence_group,
            "data_group": data_group,
            "num_rejected": num_rejected,
            "rejected_start": rejected_start,
        }
        if stray := [name for name, value in given.items() if value is not None]:
            raise TypeError(
                f"`{stray[0]}` was given without `infopo`, `objective` or `linear_logps`; pass one of them too."
            )
        own_labels = {"labels": labels, "shift_labels": shift_labels}
        return attachment.forward(*args, **kwargs, **{k: v for k, v in own_labels.items() if v is not None})
    targets = _targets(labels, shift_labels, rows, sequence_group)
    if rows is not None:
        _check_shared_prompts(self.config)
    head = prepare(self)
    if sequence_group is None:
        _check_packing(self, head, attachment, cu_seqlens is not None, args, kwargs)
    hidden, own = _hidden_states(self, head, attachment, args, kwargs)
    if rows is not None:
        hidden = hidden.reshape(-1, hidden.shape[-1])[rows.to(hidden.device)]
    kernel = arguments(attachment.kernel)
    report_tail = kernel.pop("report_tail")
    pools = kernel["tail_threshold"] > 0 and torch.is_grad_enabled()
    shared = {
        "shift": rows is None and shift_labels is None, "cu_seqlens": cu_seqlens, "sequence_group": sequence_group,
        **arguments(attachment.logit), **kernel,
    }  # fmt: skip

    def run(hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab: VocabShard | None) -> tuple[Any, ...]:
        y = targets.to(hidden.device)
        if linear_logps is not None:
            return (_linear_logps(hidden, weight, y, bias=bias, reduction=linear_logps, **shared, vocab=vocab),)
        assert objective is not None
        loss = linear_preference_loss(
            hidden, weight, y, bias=bias, objective=objective, is_chosen=is_chosen, num_pairs=num_pairs,
            sequence_weights=unsealed("sequence_weights", sequence_weights, hidden.device),
            ref_logps=unsealed("ref_logps", ref_logps, hidden.device), skip_chosen_reference=skip_chosen_reference,
            data_group=data_group, report_tail=report_tail or (pools and vocab is None), **shared, vocab=vocab,
        )  # fmt: skip
        return (*loss[:_TENSORS], *(loss.tail or ()))

    answer = ask(head, hidden, run)
    aux_loss = getattr(own, "aux_loss", None)
    if linear_logps is not None:
        return LinearLogpsOutput(logps=answer[0], aux_loss=aux_loss, exact=Sealed((None, answer[0], None)))
    tail = TailSummary(*answer[_TENSORS:]) if len(answer) > _TENSORS else None
    output = PreferenceOutput._make((*answer[:_TENSORS], skip_chosen_reference, tail))
    loss = output.loss
    if isinstance(aux_loss, Tensor):
        loss = loss + router_coefficient(self.config) * aux_loss.to(loss.device)
    exact = Sealed((loss, output.logps, output))
    return LinearLogpsOutput(loss=loss, logps=output.logps, infopo=output, aux_loss=aux_loss, exact=exact)


def _targets(labels: Tensor | None, shift_labels: Tensor | None, rows: Tensor | None, sequence_group: Any) -> Tensor:
    """The labels that are scored: `shift_labels` where they are given, as in transformers' own losses."""
    if shift_labels is not None:
        if rows is not None:
            raise TypeError("`shift_labels` and `rows` were both given; with `rows` pass `labels`, which do not move.")
        return shift_labels
    if labels is None:
        raise TypeError("`labels` is missing: log-probabilities need the input ids, with -100 where not scored.")
    if sequence_group is not None and rows is None:
        raise TypeError(
            "`shift_labels` is missing: with `sequence_group` this rank holds a part of each sequence, and the label "
            "of its last token lies on another rank. Shift before the cut: "
            "shift_labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)."
        )
    return labels


def _asked_for(reduction: Any, infopo: Any, objective: Any) -> Objective | None:
    """The objective of a call; None if it asks for none."""
    given = {"linear_logps": reduction, "infopo": infopo, "objective": objective}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise TypeError(
            f"`{names[0]}` and `{names[1]}` were both given; pass one. The loss's output holds `logps` too."
        )
    if infopo is not None and not isinstance(infopo, InfoPO):
        raise TypeError(f"`infopo` must be an InfoPO (InfoPOOptions), got {type(infopo).__name__}.")
    if objective is not None and not isinstance(objective, Objective):
        raise TypeError(f"`objective` must be one of infopo_kernels.objectives, got {type(objective).__name__}.")
    chosen: Objective | None = infopo if objective is None else objective
    return chosen


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


def _check_packing(
    model: Any, head: HandsOver, attachment: _Attachment, packed: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Refuse packed rows that the model would mix; asks it once (see `packing_probe`).

    Where the weights travel between ranks in a forward, all ranks have to make as many: so there a padded call asks
    too, since another rank's may be packed.
    """
    if torch.compiler.is_compiling():
        return
    name, mask = type(model).__name__, kwargs.get("attention_mask")
    if packed:
        packing_probe.check_call(name, kwargs)
    elif not (_gathers(model) and model.config.get_text_config() is model.config):
        return
    key = isinstance(mask, Tensor) and mask.ndim == 4, getattr(model.config, "_attn_implementation", None)
    if key not in attachment.packing:

        def forward(**inputs: Any) -> Tensor:
            with handed_over(head) as hidden:
                attachment.forward(**inputs, use_cache=False, return_dict=True)
            return hidden[0]

        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        attachment.packing[key] = packing_probe.verdict(model, forward, ids, kwargs)
    reason = attachment.packing[key]
    if packed and reason is not None:
        raise ValueError(
            f"{name} mixes the sequences of a packed row: {reason}. It does not go by `position_ids` alone, as "
            f"recurrent and convolutional layers, learned positions and ALiBi do not. Use padded batches "
            f"(PreferenceCollator, padding_free=False)."
        )


def _gathers(model: Any) -> bool:
    """Whether a forward gathers weights from other ranks (FSDP, ZeRO-3)."""
    return any(
        is_sharded(weight) or hasattr(weight, "ds_id") or type(weight).__name__ == "FlatParameter"
        for weight in model.parameters()
    )


def router_coefficient(config: Any) -> float:
    """What a mixture of experts weights its auxiliary loss with; 0 if the configuration does not say."""
    return float(getattr(config.get_text_config(), "router_aux_loss_coef", None) or 0.0)


def _hidden_states(
    model: Any, head: HandsOver, attachment: _Attachment, args: tuple[Any, ...], kwargs: Any
) -> tuple[Tensor, Any]:
    """What enters the head, and the outputs of the model's own forward."""
    name = type(model).__name__
    if kwargs.get("logits_to_keep"):
        raise TypeError("`logits_to_keep` has no meaning without logits; mask `labels` with -100 instead.")
    with handed_over(head) as hidden:
        own = attachment.forward(*args, **{**kwargs, "use_cache": False, "return_dict": True})
    if len(hidden) != 1:
        raise ValueError(
            f"{name} called its head {len(hidden)} times in a forward; expected once. Its log-probabilities cannot be "
            f"formed from its head's input: use its own logits."
        )
    vocabulary = vocabulary_size(head)
    if attachment.checked_vocabulary != vocabulary and not torch.compiler.is_compiling():
        before = known_logits(vocabulary, hidden[0])
        # A temperature is the caller's, not the model's.
        configured = replace(attachment.logit, temperature=1.0)
        seen = observed_transform(before, getattr(own, "logits", None), configured, name)
        attachment.logit = replace(seen, temperature=attachment.logit.temperature)
        attachment.checked_vocabulary = vocabulary
    return hidden[0], own
