"""The output head of a causal language model: it hands over its input, and returns log-probabilities on request.

Only the class of the modules changes: weights, hooks, names and `state_dict` stay as they are. In an attached forward
the head is called twice. The first call, by the model's own forward, only hands over its input. It runs no hook of
the module: FSDP2 frees the weights of a unit after its last module's call, Accelerate puts final norm and head into one
unit, and so the second call would find no weights. The second call is an ordinary one, with a request.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn

from infopo_kernels.distributed.parallel import VocabShard, Way
from infopo_kernels.distributed.sharded import is_sharded
from infopo_kernels.integrations.logit_transform import known_logits
from infopo_kernels.integrations.sealed import Sealed, least_cast


@dataclass(frozen=True)
class Request:
    """The request of the second call of the head."""

    run: Callable[[Tensor, Tensor, Tensor | None, VocabShard | None], tuple[Any, ...]]
    """Of hidden states, weight, bias, and which part of a head the weight is."""

    def answer(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab: VocabShard | None = None
    ) -> tuple[Any, ...]:
        """A plain tuple, which the hooks of every wrapper understand; its last entry is the same tuple, sealed."""
        values = self.run(hidden.to(weight.device), weight, bias, vocab)
        return (*values, Sealed(values))


def ask(
    head: HandsOver,
    hidden: Tensor,
    run: Callable[[Tensor, Tensor, Tensor | None, VocabShard | None], tuple[Any, ...]],
) -> Any:
    """Call `run` on hidden states and the head's weight inside the head's forward, where FSDP's weight is whole."""
    *seen, original = head(hidden, request=Request(run))
    return least_cast(tuple(seen), original.value)


class HandsOver(nn.Module):
    """A head that, while `handed_over` is active, hands over its input and returns known logits."""

    _handed_over: list[Tensor] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._handed_over is None:
            return super().__call__(*args, **kwargs)
        given: Tensor = args[0] if args else next(iter(kwargs.values()))
        self._handed_over.append(given)
        return known_logits(vocabulary_size(self), given)


class LogProbHead(HandsOver, nn.Linear):
    """A linear head that also answers requests."""

    _own_rows: Way | None = None
    """Set by `shard_head`: the way of a head whose ranks have rows of their own. A head that is split otherwise is one
    of tensor parallelism, with the same rows on every rank."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """A head that stays split (tensor parallelism, `shard_head`) answers without its hooks.

        Those of tensor parallelism would sum the gradient of the hidden states a second time, and expect logits. In a
        unit of its own the head has a class of FSDP2, whose hooks gather it.
        """
        if kwargs.get("request") is not None and type(self) is LogProbHead and is_sharded(self.weight):
            return LogProbHead.forward(self, *args, **kwargs)  # not the instance's, which `tp_plan` replaces
        return super().__call__(*args, **kwargs)

    def forward(self, input: Tensor, request: Request | None = None) -> Any:
        """Logits, or the answer to `request`."""
        if request is None and self._own_rows is None:
            return super().forward(input)
        if request is None:  # logits need the whole vocabulary
            parts: Any = (self.weight, self.bias)
            whole: Any = [x if x is None else x.full_tensor().to(input.dtype) for x in parts]
            return nn.functional.linear(input, *whole)
        if not is_sharded(self.weight):
            return request.answer(input, self.weight, self.bias)
        if self._own_rows is None:
            return request.answer(input, self.weight, self.bias, VocabShard.of(self.weight))
        # FSDP's mixed precision leaves this weight as it is, and hidden states come in its type of computation.
        weight, bias = (x if x is None else x.to(input.dtype) for x in (self.weight, self.bias))
        return request.answer(input, weight, bias, VocabShard.of(weight, way=self._own_rows, average=True))


class _WrappedHead(HandsOver):
    """One of PEFT's wrappers around a linear head, see `_wrapped`."""

    def forward(self, *args: Any, request: Request | None = None, **kwargs: Any) -> Any:
        if request is None:
            return super().forward(*args, **kwargs)
        if "token_adapter" in self._modules:  # it forms its logits from the weight with the trained rows put in
            weight: Any = self.weight
            return request.answer(args[0], weight, None)
        return super().forward(*args, request=request, **kwargs)  # hands both to its layer

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuilt, (type(self).__bases__[1],), self.__dict__


@functools.cache
def _wrapped(kind: Any) -> Any:
    """A class of PEFT (or FSDP2's class made of it) with `_WrappedHead` in front."""
    return type(kind.__name__, (_WrappedHead, kind), {"__module__": kind.__module__})


def _rebuilt(kind: Any) -> Any:
    cls = _wrapped(kind)
    return cls.__new__(cls)


_SHARDED = "is sharded already. Attach before the model is sharded or handed to `accelerator.prepare`."


def _is_quantised(head: Any) -> bool:
    """Whether the weight of a head is packed integers, or a tensor that only looks like floating point."""
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor):
        return weight is not None or hasattr(head, "qweight")
    plain = type(weight).__name__ in ("Parameter", "Tensor", "DTensor")
    return not (plain and weight.is_floating_point())


def linear_layers(causal: Any) -> list[Any]:
    """The linear layers that a model's head may run: one, or with PEFT's `modules_to_save` the original and its copies.

    Raises:
        TypeError: the head is anything else; says why it cannot be served, and the way out.
    """
    head = causal.get_output_embeddings()
    if head is None:
        raise TypeError(
            f"{type(causal).__name__} has no output embeddings; pass a causal language model (AutoModelForCausalLM)."
        )
    layers = _layers(head, causal)
    if "token_adapter" in head._modules and layers[0].bias is not None:
        raise _refusal(
            head,
            causal,
            "has a bias, which PEFT's `trainable_token_indices` leaves out of the logits. Name the embedding alone in "
            "`trainable_token_indices`, or train the head whole with `modules_to_save=['lm_head']`.",
        )
    return layers


def _layers(head: Any, causal: Any) -> list[nn.Linear]:
    parts = getattr(head, "_modules", {})
    if "modules_to_save" in parts:
        copies = [head.original_module, *head.modules_to_save.values()]
        return [layer for copy in copies for layer in _layers(copy, causal)]
    if "token_adapter" in parts:
        return _layers(head.token_adapter.base_layer, causal)
    quantised = _is_quantised(head)
    taught = isinstance(head, LogProbHead)
    if (taught or type(head) is nn.Linear) and not quantised:
        if is_sharded(head.weight) and not taught and type(causal).__name__.startswith("FSDP"):
            raise _refusal(head, causal, _SHARDED)
        _check_own_forward(head, causal)
        return [head]
    if hasattr(head, "base_layer"):
        reason = (
            "carries an adapter, which log-probabilities formed from its weight would leave untrained. Take the head "
            "out of `target_modules` (list the layers, or use 'all-linear', which leaves it out), or train it whole "
            "with `modules_to_save=['lm_head']`."
        )
    elif type(head).__name__.startswith("FSDP"):
        reason = _SHARDED
    elif quantised:
        reason = (
            "is quantised, and log-probabilities need its weight in floating point. Leave the head out of the "
            "quantisation (`llm_int8_skip_modules=['lm_head']`, `modules_to_not_convert=['lm_head']`)."
        )
    else:
        reason = "is not a plain torch.nn.Linear. Replace it by one, or use the model's own logits."
    raise _refusal(head, causal, reason)


def _refusal(head: Any, causal: Any, reason: str) -> TypeError:
    return TypeError(f"The head of {type(causal).__name__} (a {type(head).__name__}) {reason}")


def forward_attribute(module: nn.Module) -> str:
    """Where a module's forward is kept; Accelerate's hooks (of a `device_map`) wrap the one under another name."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"


def _check_own_forward(layer: nn.Linear, causal: Any) -> None:
    """A forward of the instance would run instead of ours."""
    present = layer.__dict__.get(forward_attribute(layer))
    if present is None or getattr(present, "__func__", None) in (nn.Linear.forward, LogProbHead.forward):
        return
    if is_sharded(layer.weight) and "TensorParallelLayer.install_forward" in getattr(present, "__qualname__", ""):
        return  # transformers' `tp_plan`, which requests pass by (`ask`)
    patch = getattr(present, "__qualname__", repr(present))
    raise _refusal(
        layer,
        causal,
        f"has a forward of another library or script ({patch}), which its log-probabilities would pass by. Undo that "
        f"patch of the head.",
    )


def prepare(causal: Any) -> HandsOver:
    """Turn a model's head into a `HandsOver`, and return it; a head that is one already stays as it is.

    Raises:
        TypeError: see `linear_layers`.
    """
    for layer in linear_layers(causal):
        if not isinstance(layer, LogProbHead):
            layer.__class__ = LogProbHead
        attribute = forward_attribute(layer)
        if getattr(layer.__dict__.get(attribute), "__func__", None) is nn.Linear.forward:
            setattr(layer, attribute, MethodType(LogProbHead.forward, layer))
    head = causal.get_output_embeddings()
    if not isinstance(head, HandsOver):
        kind: Any = type(head)
        head.__class__ = _wrapped(kind)
    taught: HandsOver = head
    return taught


def restore(causal: Any) -> None:
    """Undo `prepare`."""
    for layer in linear_layers(causal):
        layer.__class__ = nn.Linear
        attribute = forward_attribute(layer)
        if attribute in layer.__dict__:
            setattr(layer, attribute, MethodType(nn.Linear.forward, layer))
    head = causal.get_output_embeddings()
    if isinstance(head, _WrappedHead):
        head.__class__ = type(head).__bases__[1]


def vocabulary_size(head: Any) -> int:
    """V, the number of logits; also while the weight is sharded."""
    if isinstance(head, nn.Linear):
        return head.out_features
    inner = head.token_adapter.base_layer if "token_adapter" in head._modules else head.original_module
    return int(inner.out_features)


class handed_over:
    """While active, `head` hands over its input; yields the list that receives it."""

    def __init__(self, head: HandsOver) -> None:
        self._head = head

    def __enter__(self) -> list[Tensor]:
        hidden: list[Tensor] = []
        self._head._handed_over = hidden
        return hidden

    def __exit__(self, *exception: object) -> None:
        self._head._handed_over = None
