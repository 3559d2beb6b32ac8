"""Three optimiser steps of a tiny model, spread over ranks in every way that is served, against one process.

A `Way` says how a model is wrapped and which part of the batch a rank gets; the loop is the same for all of them.
`test_matrix.py` runs it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import random
import sys
from dataclasses import dataclass
from typing import Any

import peft
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from infopo_kernels import InfoPO
from infopo_kernels.integrations.collators import PackedPreferenceCollator, PreferenceCollator
from infopo_kernels.integrations.trainer import compute_infopo_loss
from infopo_kernels.integrations.transformers import attach_linear_logps, causal_model
from tests.distributed import parts_attention
from tests.training_fixtures import tiny_model

STEPS, PAIRS, LR = 3, 8, 1e-2

TUNINGS = ("full", "lora", "lora+head")
EXTRAS = ("accumulation", "checkpointing", "padding_free", "references")

Features = list[dict[str, Any]]
Batch = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One entry of the matrix."""

    way: str
    tuning: str
    extra: str

    @property
    def name(self) -> str:
        return f"{self.way}, {self.tuning}, {self.extra}"


def features(step: int) -> Features:
    """8 pairs of unequal lengths with references."""
    draw = random.Random(step)

    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(3, 259) for _ in range(draw.randint(least, most))]

    def reference() -> float:
        return -6.0 + draw.random()  # a mean over tokens

    return [
        {
            "prompt_ids": ids(2, 5), "chosen_ids": ids(3, 9), "rejected_ids": ids(3, 9),
            "ref_chosen_logps": reference(), "ref_rejected_logps": reference(),
        }
        for _ in range(PAIRS)
    ]  # fmt: skip


def collated(case: Case, pairs: Features) -> Batch:
    if case.extra != "references":
        pairs = [{key: value for key, value in pair.items() if not key.startswith("ref_")} for pair in pairs]
    batch: Batch = (PackedPreferenceCollator() if case.extra == "padding_free" else PreferenceCollator())(pairs)
    return batch


def made(case: Case, **config: Any) -> Any:
    """The attached model, with an adapter if the case has one."""
    config = {"initializer_range": 0.2, **config}
    model = attach_linear_logps(tiny_model(**config))
    if case.extra == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if case.tuning != "full":
        whole = ["lm_head"] if case.tuning == "lora+head" else None
        torch.manual_seed(5)
        adapter = peft.LoraConfig(
            task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], modules_to_save=whole
        )
        model = peft.get_peft_model(model, adapter)
    return model.train()


def loss(case: Case, model: Any, batch: Batch) -> Tensor:
    """Full tuning has no reference unless the batch holds one; an adapter is switched off for it."""
    free = case.tuning == "full" and case.extra != "references"
    objective = InfoPO(beta=0.5, sft_weight=0.3, average=True)
    value: Tensor = compute_infopo_loss(model, batch, objective, reference_free=free).loss
    return value


@functools.cache
def mesh(*sizes: int) -> DeviceMesh:
    """A mesh makes process groups, of which there should not be hundreds."""
    return init_device_mesh("cpu", sizes, mesh_dim_names=("outer", "inner")[-len(sizes) :])


@functools.cache
def mesh_of_one() -> DeviceMesh:
    """This rank alone."""
    return DeviceMesh.from_group(dist.new_subgroups(1)[0], "cpu")


class Way:
    """One process, the whole batch; the others derive from it."""

    tied = False
    """Whether the head is the embedding."""

    def __init__(self, world: int, rank: int) -> None:
        self.world, self.rank = world, rank

    def config(self) -> dict[str, Any]:
        """Of the model."""
        return {"tie_word_embeddings": self.tied}

    def wrapped(self, case: Case, model: Any) -> Any:
        """The model as this way runs it; makes the optimiser too."""
        # With the usual epsilon of 1e-8 an entry whose gradient is little more than rounding would move by a rate.
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, eps=1e-4)
        return model

    def own(self, pairs: Features) -> Features:
        """This rank's pairs."""
        return pairs

    def micro_batches(self, case: Case, pairs: Features) -> list[Batch]:
        """This rank's batches of a step."""
        own = self.own(pairs)
        count = 2 if case.extra == "accumulation" else 1
        size = len(own) // count
        return [collated(case, own[k * size : (k + 1) * size]) for k in range(count)]

    def forward_and_backward(self, case: Case, model: Any, batches: list[Batch]) -> None:
        for k, batch in enumerate(batches):
            with self.last_of_step(model, k + 1 == len(batches)):
                (loss(case, model, batch) / len(batches)).backward()

    def last_of_step(self, model: Any, last: bool) -> Any:
        """What a wrapper wants to know about accumulation."""
        return contextlib.nullcontext()

    def step(self, model: Any) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self, model: Any) -> dict[str, Tensor]:
        """Trained weights, whole, on every rank."""
        named = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
        return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in named.items()}


class Ddp(Way):
    def wrapped(self, case: Case, model: Any) -> Any:
        return super().wrapped(case, DistributedDataParallel(model))

    def own(self, pairs: Features) -> Features:
        size = len(pairs) // self.world
        return pairs[self.rank * size : (self.rank + 1) * size]

    def last_of_step(self, model: Any, last: bool) -> Any:
        return contextlib.nullcontext() if last else model.no_sync()


class Fsdp2(Ddp):
    """FSDP2 with the head in a unit of its own, in the root's, or in one with its neighbours."""

    def __init__(self, world: int, rank: int, unit: str, half: bool) -> None:
        super().__init__(world, rank)
        self.unit, self.half = unit, half
        self.tied = "embed" in unit
        self.mesh = mesh(world)

    def wrapped(self, case: Case, model: Any) -> Any:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if self.half else MixedPrecisionPolicy()
        causal = causal_model(model)
        neighbours = {"norm": causal.model.norm, "embed": causal.model.embed_tokens}
        for layer in causal.model.layers:
            fully_shard(layer, mesh=self.mesh, mp_policy=policy)
        if self.unit != "root":
            unit = [neighbours[name] for name in self.unit.split("+") if name in neighbours]
            fully_shard([*unit, causal.get_output_embeddings()], mesh=self.mesh, mp_policy=policy)
        fully_shard(model, mesh=self.mesh, mp_policy=policy)
        return Way.wrapped(self, case, model)

    def last_of_step(self, model: Any, last: bool) -> Any:
        return contextlib.nullcontext()  # it reduces each micro-batch, and adds up what it keeps


class Fsdp1(Ddp):
    """The older FSDP: units of flat parameters; the layers, and the root with the head."""

    def wrapped(self, case: Case, model: Any) -> Any:
        layers = {type(causal_model(model).model.layers[0])}
        policy = functools.partial(transformer_auto_wrap_policy, transformer_layer_cls=layers)
        cpu = torch.device("cpu")
        whole = FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=True, device_id=cpu)
        return Way.wrapped(self, case, whole)

    def last_of_step(self, model: Any, last: bool) -> Any:
        return contextlib.nullcontext()

    def weights(self, model: Any) -> dict[str, Tensor]:
        with FullyShardedDataParallel.summon_full_params(model):
            found = super().weights(model)
        return {name.replace("_fsdp_wrapped_module.", ""): value for name, value in found.items()}


class Alone16(Fsdp2):
    """The truth for mixed precision: one process that rounds where FSDP2 rounds, batch by batch of the ranks."""

    def __init__(self, world: int, rank: int, unit: str) -> None:
        super().__init__(1, 0, "root", True)
        self.ranks, self.tied = world, "embed" in unit
        self.mesh = mesh_of_one()

    def micro_batches(self, case: Case, pairs: Features) -> list[Batch]:
        size = len(pairs) // self.ranks
        parts = [pairs[r * size : (r + 1) * size] for r in range(self.ranks)]
        return list(itertools.chain(*(super(Alone16, self).micro_batches(case, part) for part in parts)))


class Zero(Ddp):
    """DeepSpeed."""

    def __init__(self, world: int, rank: int, stage: int) -> None:
        super().__init__(world, rank)
        self.stage = stage

    def wrapped(self, case: Case, model: Any) -> Any:
        import deepspeed  # slow, and not installed everywhere

        os.environ["LOCAL_RANK"] = str(self.rank)  # as a launcher sets it
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined] # takes a minute
        Way.wrapped(self, case, model)
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 2 if case.extra == "accumulation" else 1,
            "zero_optimization": {"stage": self.stage},
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        return deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)[0]

    def forward_and_backward(self, case: Case, model: Any, batches: list[Batch]) -> None:
        for batch in batches:
            model.backward(loss(case, model, batch))
            model.step()

    def step(self, model: Any) -> None:
        """Done: the engine steps after each micro-batch."""

    def weights(self, model: Any) -> dict[str, Tensor]:
        import deepspeed

        parameters = [p for p in model.parameters() if p.requires_grad]
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.stage == 3):
            return super().weights(model)


class TensorParallel(Way):
    """The same pairs on every rank; the head is split along the vocabulary, in a whole plan or alone."""

    def __init__(self, world: int, rank: int, *, layers: bool) -> None:
        super().__init__(world, rank)
        self.layers, self.mesh = layers, mesh(world)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "num_attention_heads": 4, "num_key_value_heads": 4}

    def wrapped(self, case: Case, model: Any) -> Any:
        heads = ("original_module", "modules_to_save.default") if case.tuning == "lora+head" else ()
        plan: dict[str, Any] = {
            name: ColwiseParallel() for name in [f"lm_head.{copy}" for copy in heads] or ["lm_head"]
        }
        if self.layers:
            columns, rows = ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]
            if case.tuning == "full":  # layers with an adapter stay whole
                columns += [f"self_attn.{name}_proj" for name in "qkv"]
                rows += ["self_attn.o_proj"]
            plan |= {f"model.layers.*.{name}": ColwiseParallel() for name in columns}
            plan |= {f"model.layers.*.{name}": RowwiseParallel() for name in rows}
        parallelize_module(causal_model(model), self.mesh, plan)
        return super().wrapped(case, model)


class NeverGathered(Ddp):
    """FSDP2 with a head that stays where it lives."""

    def __init__(self, world: int, rank: int, how: str) -> None:
        super().__init__(world, rank)
        self.how, self.mesh = how, mesh(world)

    def wrapped(self, case: Case, model: Any) -> Any:
        from infopo_kernels.integrations.shard_head import shard_head

        causal = causal_model(model)
        ignored = shard_head(model, self.mesh, way=self.how)
        for layer in causal.model.layers:
            fully_shard(layer, mesh=self.mesh)
        fully_shard(model, mesh=self.mesh, ignored_params=ignored)
        return Way.wrapped(self, case, model)

    def last_of_step(self, model: Any, last: bool) -> Any:
        return contextlib.nullcontext()


class Sequences(Ddp):
    """Two ranks hold the parts of a sequence; with four ranks, two pairs of them hold different sequences."""

    parts = 2

    def __init__(self, world: int, rank: int, *, zig_zag: bool) -> None:
        super().__init__(world, rank)
        self.zig_zag = zig_zag
        self.mesh = mesh(world // self.parts, self.parts)
        self.group = self.mesh["inner"].get_group()
        parts_attention.register()

    def config(self) -> dict[str, Any]:
        return {**super().config(), "attn_implementation": "parts"}

    def own(self, pairs: Features) -> Features:
        size = len(pairs) * self.parts // self.world
        first = self.rank // self.parts * size
        return pairs[first : first + size]

    def forward_and_backward(self, case: Case, model: Any, batches: list[Batch]) -> None:
        for k, batch in enumerate(batches):
            batch, layout = self.cut(batch)
            # The backward pass is inside too: checkpointed layers run again there.
            with self.last_of_step(model, k + 1 == len(batches)), parts_attention.parts_of(layout, self.group):
                (loss(case, model, batch) / len(batches)).backward()

    def cut(self, batch: Batch) -> tuple[Batch, parts_attention.Layout]:
        """This rank's part of a batch, and where its tokens stand."""
        batch = dict(batch)
        ids, labels = batch.pop("input_ids"), batch.pop("labels")
        batch.pop("attention_mask", None)  # padding is at the end, where no token sees it
        T, bounds = ids.shape[1], batch.pop("cu_seqlens", None)
        whole = -(-T // (2 * self.parts)) * 2 * self.parts
        document = torch.zeros(whole, dtype=torch.int64)
        positions = torch.arange(whole)
        ends = [T]
        if bounds is not None:
            ends = bounds[1:].tolist()
            document = torch.bucketize(torch.arange(whole), bounds[1:].long(), right=True).clamp_(max=len(ends) - 1)
            positions = positions - bounds.long()[document]
        for end in ends[:-1] if bounds is not None else []:
            labels[0, end] = -100  # the first token of a sequence is predicted by no row
        pad = (0, whole - T)
        ids = torch.nn.functional.pad(ids, pad, value=0)
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, pad[1] + 1), value=-100)
        columns = [parts_attention.slices(whole, self.parts, r, zig_zag=self.zig_zag) for r in range(self.parts)]
        mine, everywhere = columns[self.mesh.get_local_rank("inner")], torch.cat(columns)
        layout = parts_attention.Layout(
            torch.arange(whole)[mine], document[mine], torch.arange(whole)[everywhere], document[everywhere]
        )
        if bounds is not None:
            counts = torch.bincount(document[mine], minlength=len(ends))
            batch["cu_seqlens"] = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        batch |= {
            "input_ids": ids[:, mine], "shift_labels": shifted[:, mine],
            "position_ids": positions[mine].expand(len(ids), -1),
            "sequence_group": self.group, "data_group": dist.group.WORLD,
        }  # fmt: skip
        return batch, layout


_UNITS = ("root", "head", "norm+head", "norm+embed+head")
WAYS: dict[str, Any] = {
    "ddp": Ddp,
    "fsdp1": Fsdp1,
    **{f"fsdp2 [{unit}]": (lambda w, r, unit=unit: Fsdp2(w, r, unit, False)) for unit in _UNITS},
    **{f"fsdp2 [{unit}] bfloat16": (lambda w, r, unit=unit: Fsdp2(w, r, unit, True)) for unit in _UNITS},
    **{f"zero-{stage}": (lambda w, r, stage=stage: Zero(w, r, stage)) for stage in (1, 2, 3)},
    "vocabulary": lambda w, r: TensorParallel(w, r, layers=False),
    "tp_plan": lambda w, r: TensorParallel(w, r, layers=True),
    "rows": lambda w, r: NeverGathered(w, r, "rows"),
    "ring": lambda w, r: NeverGathered(w, r, "ring"),
    "sequence": lambda w, r: Sequences(w, r, zig_zag=False),
    "sequence zig-zag": lambda w, r: Sequences(w, r, zig_zag=True),
}

CASES = [Case(*each) for each in itertools.product(WAYS, TUNINGS, EXTRAS)]


def trained(case: Case, way: Way, config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights before and after three steps."""
    model = made(case, **config)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model = way.wrapped(case, model)
    for step in range(STEPS):
        way.forward_and_backward(case, model, way.micro_batches(case, features(step)))
        way.step(model)
    return before, way.weights(model)


def largest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys(), set(one) ^ set(other)
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


def compare(case: Case) -> dict[str, float]:
    """How far the weights are from one process's, and how far three steps moved them; on every rank."""
    world, rank = dist.get_world_size(), dist.get_rank()
    way = WAYS[case.way](world, rank)
    config = way.config()
    before, found = trained(case, way, config)
    if config.get("attn_implementation") == "parts":
        config = {**config, "attn_implementation": "sdpa"}
    alone = Alone16(world, rank, way.unit) if getattr(way, "half", False) else Way(1, 0)
    _, truth = trained(case, alone, config)
    return {"difference": largest(found, truth), "moved": largest(before, truth)}
