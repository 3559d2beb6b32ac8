"""Both trainers on sequences that Accelerate cuts, against one process: context parallelism and Ulysses."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

for needed in ("trl", "accelerate", "peft"):
    pytest.importorskip(needed)

import peft  # noqa: E402
from accelerate import Accelerator, ParallelismConfig  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402
from accelerate.utils import DeepSpeedSequenceParallelConfig, DistributedType  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import TrainingArguments  # noqa: E402
from transformers.integrations.deepspeed import unset_hf_deepspeed_config  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

from infopo_kernels import DPO, InfoPO  # noqa: E402
from infopo_kernels.integrations.collators import PackedPreferenceCollator, PreferenceCollator  # noqa: E402
from infopo_kernels.integrations.trainer import PreferenceTrainer  # noqa: E402
from infopo_kernels.integrations.trl import InfoPOConfig, InfoPOTrainer  # noqa: E402
from tests.distributed.launcher import on_ranks  # noqa: E402
from tests.distributed.parts_attention import context_parallel  # noqa: E402
from tests.test_integrations_checks import features  # noqa: E402
from tests.training_fixtures import byte_tokenizer, tiny_model  # noqa: E402

MULTIPLE = 32  # so that all batches have one length, which gloo needs of those that Ulysses sends round
# With AdamW's usual epsilon of 1e-8 an entry whose gradient is little more than rounding would move by a whole rate.
COMMON = {
    "adam_epsilon": 1e-4,
    "max_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": [],
    "save_strategy": "no", "disable_tqdm": True, "optim": "adamw_torch", "bf16": False, "max_grad_norm": 1.0,
    "dataloader_drop_last": True, "eval_strategy": "steps", "eval_steps": 3, "train_sampling_strategy": "sequential",
}  # fmt: skip
LOGGED = (
    "num_tokens",
    "loss",
    "grad_norm",
    "rewards/margins",
    "scored_tokens",
    "eval_loss",
    "eval_rewards/chosen",
    "eval_scored_tokens",
)


@contextlib.contextmanager
def accelerate_on_a_cpu(way: str) -> Iterator[None]:
    """Accelerate as a launcher starts it, on gloo and a CPU; it takes FSDP2, cuts and DeepSpeed on GPUs only."""
    before, begin, attention = dict(os.environ), PartialState.__init__, ALL_ATTENTION_FUNCTIONS["sdpa"]
    kept = PartialState._prepare_backend, PartialState.set_device, Accelerator.maybe_context_parallel
    rank, world = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}

    def init(self: Any, cpu: bool = False, **kwargs: Any) -> None:
        begin(self, cpu and way != "sp", **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    def set_device(self: Any) -> None:
        self.device = torch.device("cpu")

    PartialState.__init__ = init
    Accelerator.maybe_context_parallel = contextlib.contextmanager(context_parallel.__wrapped__)
    if way == "sp":
        os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # takes a minute, and is not needed
        importlib.reload(importlib.import_module("deepspeed.runtime.sequence_parallel.parallel_state_sp"))
        importlib.import_module("deepspeed.utils.groups").mpu = None  # of the case before
        PartialState._prepare_backend = lambda self, *a, **k: ("gloo", DistributedType.MULTI_GPU)
        PartialState.set_device = set_device
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
        PartialState.__init__ = begin
        PartialState._prepare_backend, PartialState.set_device, Accelerator.maybe_context_parallel = kept
        os.environ.clear()
        os.environ.update(before)
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def arguments(kind: Any, way: str, output: str, **more: Any) -> Any:
    parts = {"": 1}.get(way, 2)
    world = dist.get_world_size() if way else 1
    settings: dict[str, Any] = {**COMMON, "output_dir": output, "use_cpu": way != "sp"}
    settings["per_device_train_batch_size"] = settings["per_device_eval_batch_size"] = 4 * parts // world
    if way == "cp":
        settings["parallelism_config"] = ParallelismConfig(cp_size=parts, dp_shard_size=world // parts)
        settings["fsdp"] = "full_shard auto_wrap"
        wrap = {
            "version": 2,
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
            "cpu_ram_efficient_loading": False,
        }
        settings["fsdp_config"] = wrap
    if way == "sp":
        handler = DeepSpeedSequenceParallelConfig(sp_seq_length_is_variable=True, sp_attn_implementation="sdpa")
        settings["parallelism_config"] = ParallelismConfig(
            sp_size=parts, sp_backend="deepspeed", dp_replicate_size=world // parts, sp_handler=handler
        )
        settings["deepspeed"] = {
            "zero_optimization": {"stage": more.pop("stage", 2)}, "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": 1, "gradient_clipping": 1.0, "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False, "sequence_parallel_size": parts,
        }  # fmt: skip
    return kind(**{**settings, **more})


def weights(trainer: Any) -> dict[str, Any]:
    """Trained weights, whole, as arrays: tensors do not travel between the processes of a test."""
    found = {}
    if trainer.is_deepspeed_enabled:
        import deepspeed  # slow, and not installed everywhere
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            with (
                deepspeed.zero.GatheredParameters(parameter)
                if hasattr(parameter, "ds_id")
                else contextlib.nullcontext()
            ):
                whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
                found[name] = whole.detach().numpy().copy()
    return found


def in_order(way: str, rows: list[Any]) -> list[Any]:
    """Rows such that every step has the pairs that it has in one process: with Ulysses on four ranks, a step takes the
    batches of ranks 0 and 2, the next one those of ranks 1 and 3."""
    if way != "sp" or dist.get_world_size() != 4:
        return rows
    return [rows[first + k] for first in range(0, len(rows), 8) for k in (0, 1, 4, 5, 2, 3, 6, 7)]


def preference(way: str, output: str, options: dict[str, Any]) -> Any:
    """transformers' Trainer: full tuning with a reference model, or an adapter."""
    objective = options.get("objective", InfoPO(beta=0.5, sft_weight=0.3, average=True))
    stage = {"stage": 3} if way == "sp" and "ZeRO-3" in options else {}
    model, reference = tiny_model(num_key_value_heads=2), tiny_model(seed=1, num_key_value_heads=2)
    if options.get("lora"):
        torch.manual_seed(2)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
        model, reference = peft.get_peft_model(model, config), None
    return PreferenceTrainer(
        model, arguments(TrainingArguments, way, output, **stage), train_dataset=in_order(way, features(16)),
        eval_dataset=features(8, 3),
        data_collator=PreferenceCollator(pad_to_multiple_of=MULTIPLE), objective=objective, ref_model=reference,
    )  # fmt: skip


def trl(way: str, output: str, options: dict[str, Any]) -> Any:
    """TRL's trainer on text."""
    rows = [
        {"prompt": "count: " + "1 " * (k % 3), "chosen": "2 " * (k % 5 + 3), "rejected": "3 " * (k % 4 + 2)}
        for k in range(16)
    ]
    more = {"beta": 0.3, "average": True, "max_length": 64, "pad_to_multiple_of": MULTIPLE, **options}
    more["model_init_kwargs"] = None
    lora = more.pop("lora", False)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]) if lora else None
    torch.manual_seed(2)
    return InfoPOTrainer(
        tiny_model(num_key_value_heads=2), args=arguments(InfoPOConfig, way, output, **more), peft_config=config,
        ref_model=None if lora or options.get("reference_free") else tiny_model(seed=1, num_key_value_heads=2),
        train_dataset=Dataset.from_list(in_order(way, rows)), eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=byte_tokenizer(),
    )  # fmt: skip


def train(make: Any, way: str, options: dict[str, Any]) -> tuple[dict[str, Any], list[float]]:
    """Weights after three steps, and what was logged."""
    output = tempfile.mkdtemp()
    try:
        trainer = make(way, output, options)
        trainer.train()
        logs = trainer.state.log_history
        return weights(trainer), [entry[name] for entry in logs for name in LOGGED if name in entry]
    finally:
        shutil.rmtree(output, ignore_errors=True)


def in_parts(make: Any, way: str, options: dict[str, Any]) -> tuple[dict[str, Any], list[float]]:
    """On every rank."""
    with accelerate_on_a_cpu(way):
        try:
            return train(make, way, options)
        finally:
            # The process goes on to other cases, and ZeRO-3 would split the weights of their models as they are made.
            unset_hf_deepspeed_config()


def incomplete(way: str, output: str, options: dict[str, Any]) -> Any:
    """5 pairs in batches of 4: Accelerate fills the last one, also of an evaluation, with pairs of the first."""
    return PreferenceTrainer(
        tiny_model(num_key_value_heads=2),
        arguments(TrainingArguments, way, output, dataloader_drop_last=False, max_steps=2, eval_steps=2),
        train_dataset=features(5), eval_dataset=features(5, 3), ref_model=tiny_model(seed=1, num_key_value_heads=2),
        data_collator=PreferenceCollator(pad_to_multiple_of=MULTIPLE), objective=InfoPO(beta=0.5, average=True),
    )  # fmt: skip


CASES = {
    "InfoPO with a reference": (preference, {}),
    "DPO with a reference": (preference, {"objective": DPO(0.5), "ZeRO-3": True}),
    "LoRA and a whole head": (preference, {"lora": True}),
    "an incomplete batch": (incomplete, {}),
    "TRL with a reference": (trl, {}),
    "TRL and LoRA": (trl, {"lora": True, "skip_chosen_reference": True}),
    "TRL and SimPO": (trl, {"loss_type": ["simpo"], "average": False, "reference_free": True}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", ["cp", "sp"])
@pytest.mark.parametrize("size", [2, 4])
def test_parts_of_sequences_are_one_process(
    size: int, way: str, case: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Weights, losses, gradient norms, metrics, evaluation; 4 processes are 2 pairs of parts."""
    if way == "sp" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    if way == "sp" and case == "an incomplete batch":
        pytest.skip("refused, see below")
    if (
        size == 4
        and case not in ("InfoPO with a reference", "an incomplete batch")
        and not request.config.getoption("--every-case")
    ):
        pytest.skip("--every-case")
    make, options = CASES[case]
    truth, logged = train(make, "", options)
    for found, seen in on_ranks(size, in_parts, make, way, options, timeout=300):
        assert found.keys() == truth.keys()
        worst = max(float(abs(found[name] - truth[name]).max()) for name in truth)
        assert worst < 5e-5, worst
        assert seen == pytest.approx(logged, rel=2e-4, abs=1e-5)


def refused(way: str, collator: Any, more: dict[str, Any]) -> str:
    """The error of a trainer that cannot be served."""
    with accelerate_on_a_cpu(way):
        args = arguments(TrainingArguments, way, tempfile.mkdtemp(), **{"eval_strategy": "no", **more.pop("args", {})})
        try:
            PreferenceTrainer(
                tiny_model(), args, train_dataset=features(8), data_collator=collator, reference_free=True, **more
            )
        except ValueError as error:
            return str(error)
    return ""


@pytest.mark.parametrize(
    ("way", "collator", "more", "message"),
    [
        ("cp", PackedPreferenceCollator(), {}, "takes padded batches of PreferenceCollator, got PackedPreference"),
        ("cp", PreferenceCollator(pad_to_multiple_of=6), {}, "multiple of 4 .* got 6; pass pad_to_multiple_of=4"),
        ("sp", PreferenceCollator(), {}, "multiple of 2 .* got None; pass pad_to_multiple_of=2"),
        ("sp", PreferenceCollator(pad_to_multiple_of=2), {"disable_dropout": False}, "needs disable_dropout=True"),
        ("sp", PreferenceCollator(pad_to_multiple_of=2), {"args": {"dataloader_drop_last": False}}, "drop_last=True"),
    ],
)
def test_what_would_train_another_loss_is_refused(way: str, collator: Any, more: Any, message: str) -> None:
    if way == "sp" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    for text in on_ranks(2, refused, way, collator, more):
        assert text
        with pytest.raises(ValueError, match=message):
            raise ValueError(text)
