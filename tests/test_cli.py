"""The command line: commands, short names, exit codes."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from infopo_kernels.backends import cpp
from infopo_kernels.commands import cli
from infopo_kernels.commands.cli import expand, main
from infopo_kernels.commands.errors import UserError
from tests import support

WORDS = [
    (["--model", "m"], ["--model_name_or_path", "m"]),
    (["--lr=1e-3", "--average"], ["--learning_rate", "1e-3", "--average"]),
    (["--lora-rank", "4", "--lora-alpha", "8"], ["--use_peft", "--lora_r", "4", "--lora-alpha", "8"]),
    (["--eval-every", "5"], ["--eval_strategy", "steps", "--eval_steps", "5"]),
    (["--loss", "dpo"], ["--loss_type", "sigmoid"]),
    (["--loss", "ipo"], ["--loss_type", "ipo"]),
    (["--device", "cpu", "--seed", "1"], ["--use_cpu", "--seed", "1"]),
    (["--device", "cuda"], []),
    (["--lr_scheduler_type", "cosine", "--data"], "--data expects a value"),
    (["--steps", "--batch", "2"], "--steps expects a value"),
    (["--device", "cuda:1"], "--device expects one of auto, cpu, cuda, got 'cuda:1'"),
]


@pytest.mark.parametrize(("words", "expected"), WORDS, ids=[" ".join(words) for words, _ in WORDS])
def test_short_names_are_written_out(words: list[str], expected: list[str] | str) -> None:
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            expand(words)
    else:
        assert expand(words) == expected


def test_help_names_every_command(capsys: Any) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in ("train", "precompute-reference", "demo", "info"))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("infopo_kernels ")


def test_unknown_and_missing_commands(capsys: Any) -> None:
    for words, said in (
        (["nonsense"], "there is no command 'nonsense'; choose one of train,"),
        ([], "expected a COMM"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_a_missing_package_is_named(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli._NEEDED, "train", ("no_such_package",))
    assert main(["train"]) == 2
    assert "train: needs the package `no_such_package`; run: pip install" in capsys.readouterr().err


def test_an_interruption_is_no_traceback(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*words: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("infopo_kernels.commands.info.main", interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "info: interrupted\n"


def test_only_the_first_process_of_a_machine_says_what_is_wrong(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["nonsense"]) == 2
    assert capsys.readouterr().err == ""


def test_info_names_versions_and_backends(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # the interpreter, which other tests use, stands in for a GPU
    assert main(["info"]) == 0
    said = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in said
    for backend in ("cpp", "triton", "torch"):
        assert f"  {backend}: " in said
    assert "triton: not available: " in said or torch.cuda.is_available()


@pytest.mark.parametrize("name", [name for name in support.CPU_BACKENDS if name != "torch"])
def test_info_names_the_instructions_in_use(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the kernels for each type, and what chose them; one that the machine lacks is an answer, not a traceback."""
    instructions = name.removeprefix("cpp-")
    reason = support.missing(name)
    if support.missing("cpp-portable") is not None:
        pytest.skip("needs the extension")
    monkeypatch.setenv("INFOPO_KERNELS_CPU_ISA", instructions)
    assert main(["info"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  cpp: ")]
    if reason is not None:
        assert line == f"  cpp: not available: {reason}"
        return
    assert f"bfloat16 {instructions}" in line
    assert f"float32 {cpp.isa(torch.float32)}" in line
    assert f"INFOPO_KERNELS_CPU_ISA={instructions}" in line


def test_info_needs_torch_only() -> None:
    code = (
        "import sys\n"
        "from infopo_kernels.commands.cli import main\n"
        "assert main(['info']) == 0\n"
        "print([m for m in ('transformers', 'rich', 'matplotlib', 'peft', 'trl') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
