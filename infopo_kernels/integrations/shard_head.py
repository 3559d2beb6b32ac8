"""A head that FSDP2 never gathers: each rank keeps its part of the vocabulary, and the scored rows travel.

    attach_linear_logps(model)
    own = shard_head(model, mesh)                              # before the model is wrapped
    fully_shard(model, mesh=mesh, ignored_params=own)          # the other parameters, as always
    out = model(**batch, infopo=InfoPO(), num_pairs=pairs)     # and so on: nothing else changes

The parts are DTensors on the mesh of FSDP, so AdamW, `clip_grad_norm_` and checkpoints treat them like the parameters
that FSDP shards. Their gradients are averaged over the ranks, as FSDP's are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import nn

from infopo_kernels.distributed.choice import OwnRows
from infopo_kernels.integrations.heads import linear_layers
from infopo_kernels.integrations.transformers import causal_model, check_attached

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

RowsWay = Literal["auto", OwnRows]


def shard_head(model: Any, mesh: DeviceMesh, *, way: RowsWay = "auto") -> set[nn.Parameter]:
    """Cut the head of an attached model along its vocabulary; no forward with a loss gathers it again.

    Nothing travels here: each rank keeps its part of the weight that it has, as `fully_shard` does. Every rank has to
    make the same calls of the model: a loss and its backward pass on each rank, as under FSDP. Logits themselves
    (generation) gather the head for the call.

    Args:
        model: a model after `attach_linear_logps`, before `fully_shard`, DDP or `accelerator.prepare`.
        mesh: the mesh, of one dimension, that `fully_shard` gets.
        way: "rows" (scored rows travel to the parts), "ring" (the parts travel to the rows), "gather" (the whole head
            comes to every rank), or "auto": the one of them that moves the fewest bytes for a batch, see
            `infopo_kernels.distributed.choice`.

    Returns:
        The parameters of the head, for `fully_shard(..., ignored_params=...)`. With Accelerate pass the head as
        `ignored_modules` of its FSDP plugin.

    Raises:
        ValueError: the head is tied to the embedding, the mesh has more than one dimension, or `way` is unknown.
        TypeError: the head is cut already.
        RuntimeError: nothing is attached to the model.
    """
    from torch.distributed.tensor import Shard, distribute_tensor  # takes 0.3 s, which other users do not need

    check_attached(model)
    if way not in (ways := ("auto", *get_args(OwnRows))):
        raise ValueError(f"`way` must be one of {', '.join(map(repr, ways))}, got {way!r}.")
    if mesh.ndim != 1:
        raise ValueError(
            f"`mesh` must have one dimension, the one that shards parameters, got {mesh}; pass mesh[name]."
        )
    causal = causal_model(model)
    name, layers, embedding = type(causal).__name__, linear_layers(causal), causal.get_input_embeddings()
    for layer in layers:
        if type(layer.weight) is not nn.Parameter:
            raise TypeError(f"The head of {name} is a {type(layer.weight).__name__} already; call shard_head before.")
        if embedding is not None and embedding.weight is layer.weight:
            raise ValueError(
                f"The head of {name} is tied to its embedding, which looks up words of this rank's own batch: of all "
                f"the vocabulary, so FSDP has to gather this weight anyway. Leave it to FSDP, or untie the two "
                f"(`tie_word_embeddings=False` with a copy of the weight)."
            )
    for layer in layers:
        for key, value in layer._parameters.items():
            if value is not None:
                # A copy, so that the whole weight can be freed; without a source rank nothing is sent.
                part = distribute_tensor(value.detach(), mesh, [Shard(0)], src_data_rank=None).clone()
                layer._parameters[key] = nn.Parameter(part, requires_grad=value.requires_grad)
        layer._own_rows = way
    return {value for layer in layers for value in layer.parameters()}
