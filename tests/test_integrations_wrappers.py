"""Attached models inside wrappers: FSDP2 as Accelerate groups it, mixed precision, copies, patches of libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]

_FSDP2 = """
import sys, torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from infopo_kernels import InfoPOOptions
from infopo_kernels.integrations.sealed import Sealed
from infopo_kernels.integrations.transformers import attach_linear_logps
from tests.training_fixtures import tiny_model

dist.init_process_group("gloo")
ids = torch.randint(3, 259, (4, 300), generator=torch.Generator().manual_seed(1))
options = InfoPOOptions(beta=0.5, offset=0.0, sft_weight=0.5)


def made(tied=False):
    model = attach_linear_logps(tiny_model(initializer_range=0.1, tie_word_embeddings=tied is True))
    if tied == "modules_to_save":
        import peft

        config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config)
    return model


def gradients(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def backward(model, ref_logps):
    for _ in range(2):  # gradients add up over two micro-batches
        out = model(ids, labels=ids, infopo=options, ref_logps=ref_logps)
        out.loss.backward()
        model(ids, labels=ids, linear_logps="mean").logps.sum().backward()
    return out


def shard(model, tied, policy):
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    tail = [causal.model.norm, causal.get_output_embeddings()]
    for layer in causal.model.layers:
        fully_shard(layer, mp_policy=policy)
    tail += [causal.model.embed_tokens] if tied is True else []
    fully_shard(tail, mp_policy=policy, reshard_after_forward=False)
    return fully_shard(model, mp_policy=policy)


for tied in (False, True, "modules_to_save"):  # final norm and head in one unit, as Accelerate groups them
    one, model = made(tied), shard(made(tied), tied, MixedPrecisionPolicy())
    ref_logps = torch.full((4,), -1450.0, dtype=torch.float64)
    truth, found = backward(one, ref_logps), backward(model, ref_logps)
    torch.testing.assert_close(found.loss, truth.loss)
    expected, got = gradients(one), gradients(model)
    assert expected.keys() == got.keys(), set(expected) ^ set(got)
    for name, value in expected.items():
        assert float((got[name] - value).norm()) <= 1e-5 * float(value.norm()) + 1e-7, (tied, name)

half = torch.bfloat16
for policy in (MixedPrecisionPolicy(half), MixedPrecisionPolicy(half, half, half)):
    one, model = made(), shard(made(), False, policy)
    with torch.no_grad():
        logps = model(ids, labels=ids, linear_logps="sum").logps
        assert logps.dtype == torch.float64, logps.dtype
        assert (logps.bfloat16() != logps).all()  # a value that bfloat16 holds could be one that was rounded
        ref_logps = logps - 0.3
        out = model(ids, labels=ids, infopo=options, ref_logps=Sealed(ref_logps))
        torch.testing.assert_close(out.infopo.ref_logps, ref_logps, rtol=0, atol=0)
        torch.testing.assert_close(out.infopo.rewards, torch.full((4,), 0.15, dtype=torch.float64))
        assert out.loss.dtype == out.infopo.loss.dtype == torch.float32
        try:
            model(ids, labels=ids, infopo=options, ref_logps=ref_logps)
        except TypeError as error:
            assert "Sealed" in str(error), error
        else:
            raise AssertionError("rounded references were taken")
    # Of a loss that is divided for accumulation, a rounded third would be off by 0.1 %.
    (model(ids, labels=ids, infopo=options, ref_logps=Sealed(ref_logps)).loss / 3).backward()
    third = gradients(model)
    model.zero_grad()
    model(ids, labels=ids, infopo=options, ref_logps=Sealed(ref_logps)).loss.backward()
    value = gradients(model)["lm_head.weight"]
    assert abs(float((third["lm_head.weight"] * value).sum() / value.pow(2).sum()) - 1 / 3) < 2e-4
dist.barrier()
dist.destroy_process_group()
"""


def run_on_two(script: str, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "[rank" in line)


def test_fsdp2_as_accelerate_groups_it_and_its_mixed_precision(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    assert torch.distributed.is_available()
    run_on_two(_FSDP2, tmp_path)
