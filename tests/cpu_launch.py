"""For tests: `infopo_kernels` on a CPU, under a launcher that expects GPUs.

Accelerate takes FSDP and DeepSpeed on a GPU only; on a CPU it silently runs plain data parallelism instead. Here its
state says that there are GPUs, while the device is the CPU and the process group is gloo.

    accelerate launch --config_file F --num_processes 2 tests/cpu_launch.py train ...
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

import torch
from accelerate import state
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from infopo_kernels.commands import train
from infopo_kernels.commands.cli import main


def pretend_gpus() -> None:
    """Change `PartialState`, which tells Accelerate which devices there are; see the top of the file."""
    begin = state.PartialState.__init__
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"

    def init(self: Any, cpu: bool = False, **kwargs: Any) -> None:
        begin(self, cpu and not deepspeed, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            state.PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    def prepare_backend(self: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: Any = None) -> Any:
        return "gloo", DistributedType.MULTI_GPU

    def set_device(self: Any) -> None:
        self.device = torch.device("cpu")

    state.PartialState.__init__ = init
    if deepspeed:
        # DeepSpeed would first compile shared-memory collectives, which takes a minute; those of gloo are enough.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        state.PartialState._prepare_backend, state.PartialState.set_device = prepare_backend, set_device


class Kill(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Kills the first process after this many steps, without a message."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """At the beginning of a step the checkpoint of the step before is complete."""
        if state.global_step == self.step and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        pretend_gpus()
    if step := os.environ.get("KILL_AFTER"):
        make = train.make_trainer

        def killed(*args: Any, **kwargs: Any) -> Any:
            trainer = make(*args, **kwargs)
            trainer.add_callback(Kill(int(step)))
            return trainer

        train.make_trainer = killed
    sys.exit(main())
