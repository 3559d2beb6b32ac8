"""Ops whose arguments and results are objects. Only this file makes and reads the flat schema of `torch.library`.

    @define("infopo_kernels::double", DoubleInputs, DoubleResults)
    def double(inputs): ...
    double.register_fake(...)                  # of the inputs' object too
    double(DoubleInputs(...)).doubled

The inputs are a dataclass of tensors, numbers, strings and lists of them, in the order of the schema. The results are a
NamedTuple of tensors.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    float | None: "float?",
    int: "SymInt",
    int | None: "int?",
    str: "str",
    bool: "bool",
    list[float]: "float[]",
    list[bool]: "bool[]",
}

_FIRST_BACKWARD_ONLY = (
    "is not available through {what}: the fused ops have gradients for backward() and torch.autograd.grad only. Call "
    "one of these (torch.func.functional_call works with both), or use the plain functions of infopo_kernels.naive."
)

Inputs = TypeVar("Inputs")
Results = TypeVar("Results", bound=tuple[Tensor, ...])


class Op(Generic[Inputs, Results]):
    """A custom op that takes one object of inputs and returns one object of results."""

    def __init__(
        self,
        name: str,
        inputs: type[Inputs],
        results: type[Results],
        run: Callable[[Inputs], Results],
        adds_to: tuple[str, ...] = (),
    ) -> None:
        self._inputs, self._results = inputs, results
        self.run = run
        self._names = tuple(field.name for field in dataclasses.fields(inputs))  # type: ignore[arg-type]
        self.raw = torch.library.custom_op(
            name,
            lambda *flat: tuple(run(inputs(*flat))),
            mutates_args=adds_to,
            schema=_schema(inputs, results, adds_to),
        )

    def __call__(self, inputs: Inputs) -> Results:
        flat = self.flat(inputs)
        if torch.compiler.is_compiling():
            return self._results(*self.raw(*flat))
        _refuse_tangents(flat)
        try:
            return self._results(*self.raw(*flat))
        except RuntimeError as error:
            if "setup_context" not in str(error):
                raise
            why = _FIRST_BACKWARD_ONLY.format(what="torch.func.grad, vjp, jacrev and their kin")
            raise RuntimeError(f"A derivative {why}") from error

    def flat(self, inputs: Inputs) -> tuple[Any, ...]:
        """The op's arguments. `vars(inputs)` is beyond torch.compile of torch 2.10."""
        return tuple([getattr(inputs, name) for name in self._names])

    def register_fake(self, fake: Callable[[Inputs], Results]) -> None:
        """Register the version that `torch.compile` sees: results of the right shapes and types."""
        self.raw.register_fake(lambda *flat: tuple(fake(self._inputs(*flat))))

    def register_autograd(
        self, save: Callable[[Any, Inputs, Results], None], backward: Callable[..., tuple[Tensor | None, ...]]
    ) -> None:
        """`save(ctx, inputs, results)` keeps what `backward(ctx, *gradients of the results)` needs.

        `backward` returns the gradients of the first inputs; the others have none.
        """

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
            save(ctx, self._inputs(*inputs), self._results(*output))

        def padded(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            first = backward(ctx, *grads)
            return *first, *(None,) * (len(self._names) - len(first))

        self.raw.register_autograd(padded, setup_context=setup_context)


def _refuse_tangents(flat: tuple[Any, ...]) -> None:
    """Raise if an argument has a tangent: `torch.library` would drop it, and the derivative would be 0."""
    if forward_ad._current_level < 0:  # type: ignore[attr-defined]
        return
    tensors = (x for x in flat if isinstance(x, Tensor))
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):  # type: ignore[no-untyped-call]
        what = "torch.func.jvp, jacfwd and forward-mode derivatives"
        raise RuntimeError(f"A derivative {_FIRST_BACKWARD_ONLY.format(what=what)}")


def _schema(inputs: type, results: type, adds_to: tuple[str, ...]) -> str:
    arguments = (
        f"{'Tensor(a!)' if name in adds_to else _TYPES[kind]} {name}" for name, kind in _fields(inputs).items()
    )
    return f"({', '.join(arguments)}) -> ({', '.join('Tensor' for _ in _fields(results))})"


def _fields(cls: type) -> dict[str, Any]:
    """Names and types of the fields in order, first those of a base class."""
    return typing.get_type_hints(cls)


def define(
    name: str, inputs: type[Inputs], results: type[Results], *, adds_to: tuple[str, ...] = ()
) -> Callable[[Callable[[Inputs], Results]], Op[Inputs, Results]]:
    """Turn a function of an inputs object into an op called `name`; `adds_to` are the tensors that it changes."""
    return lambda run: Op(name, inputs, results, run, adds_to)
