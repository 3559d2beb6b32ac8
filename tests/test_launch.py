"""`train` on several processes, and after it was killed, against one process that ran through."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

for needed in ("trl", "datasets", "accelerate"):
    pytest.importorskip(needed)

from safetensors.torch import load_file  # noqa: E402

from .training_fixtures import save_tiny_model, write_pairs  # noqa: E402

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "tests" / "cpu_launch.py")
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
STEPS = 3
# A rate at which the weights move by far more than what is compared: by some 0.01 in a step.
TRAIN = ("--lr", "1e-2", "--steps", str(STEPS), "--warmup", "0", "--beta", "0.1", "--logging_steps", "1")
TRAIN += ("--disable_tqdm", "true")


class Runs:
    """A model, pairs, and the weights of one process that took all steps; batches of 4 pairs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = save_tiny_model(root / "model")
        self.data = write_pairs(root / "pairs.jsonl", 16)

    def words(self, output: str, pairs: int, *more: str) -> list[str]:
        paths = ("--model", str(self.model), "--data", str(self.data), "--output", str(self.root / output))
        return ["train", *paths, *TRAIN, "--batch", str(pairs), *more]

    def run(self, launcher: list[str], words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
        command = [sys.executable, *launcher, *words]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)

    def weights(self, output: str) -> dict[str, torch.Tensor]:
        return load_file(self.root / output / "model.safetensors")

    def difference(self, one: str, other: str) -> float:
        a, b = self.weights(one), self.weights(other)
        assert a.keys() == b.keys()
        return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("launch"))
    done = runs.run([SCRIPT], runs.words("one", 4))
    assert done.returncode == 0, done.stderr
    return runs


def test_killed_and_started_again_is_uninterrupted(runs: Runs) -> None:
    """In one process, to the last bit; a checkpoint that was being written is passed over."""
    save = ("--save-every", "1", "--resume_from_checkpoint")
    killed = runs.run([SCRIPT], runs.words("again", 4, *save), KILL_AFTER="2")
    assert killed.returncode == -9
    assert "holds no checkpoint yet: beginning" in killed.stdout
    shutil.copytree(runs.root / "again", runs.root / "again on two")
    half = runs.root / "again" / "checkpoint-3"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_st')
    done = runs.run([SCRIPT], runs.words("again", 4, *save))
    assert done.returncode == 0, done.stderr
    assert "Going on from" in done.stdout
    assert "checkpoint-2" in done.stdout
    assert runs.difference("one", "again") == 0
    assert runs.difference("one", "again/checkpoint-2") > 1e-3, "steps move the weights"
    records = (runs.root / "again" / "metrics.jsonl").read_text().splitlines()
    assert [line.split(",")[0] for line in records[:STEPS]] == ['{"step": 1', '{"step": 2', '{"step": 3']
    done = runs.run([*TWO, "-m", "infopo_kernels"], runs.words("again on two", 2, *save))
    assert done.returncode == 0, done.stderr
    assert "Going on from" in done.stdout
    assert runs.difference("one", "again on two") < 5e-5


def test_torchrun_is_one_process_also_after_it_was_killed(runs: Runs) -> None:
    words = runs.words("two", 2, "--save-every", "1")
    assert runs.run([*TWO, SCRIPT], words, KILL_AFTER="2").returncode != 0
    shutil.copytree(runs.root / "two", runs.root / "two on one")
    done = runs.run([*TWO, "-m", "infopo_kernels"], [*words, "--resume_from_checkpoint"])
    assert done.returncode == 0, done.stderr
    assert runs.difference("one", "two") < 5e-5
    assert done.stdout.count("4 pairs a step on 2 processes") == 1, "one process speaks"
    assert done.stdout.count("The model is in") == 1
    done = runs.run([SCRIPT], runs.words("two on one", 4, "--save-every", "1", "--resume_from_checkpoint"))
    assert done.returncode == 0, done.stderr
    assert "Going on from" in done.stdout
    assert runs.difference("one", "two on one") < 5e-5


@pytest.mark.parametrize(
    ("file", "more"),
    [("ddp.yaml", ()), ("fsdp2.yaml", ()), ("zero3.yaml", ()), ("zero3.yaml", ("--zero_stage", "2"))],
    ids=["ddp", "fsdp2", "zero3", "zero2"],
)
def test_the_configurations_of_accelerate_are_one_process(runs: Runs, file: str, more: tuple[str, ...]) -> None:
    if file == "zero3.yaml" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    options = ["--config_file", str(ROOT / "examples" / "accelerate" / file), "--num_processes", "2", *more]
    launcher = ["-m", "accelerate.commands.launch", *options, "--mixed_precision", "no", SCRIPT]
    output = "".join((file, *more))
    done = runs.run(launcher, runs.words(output, 2))
    assert done.returncode == 0, done.stderr
    assert "4 pairs a step on 2 processes" in done.stdout
    assert runs.difference("one", output) < 5e-5
