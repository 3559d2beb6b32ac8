"""Resuming an interrupted run: finds a complete checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from infopo_kernels.commands.console import say
from infopo_kernels.commands.errors import UserError

LAST: Final = ("last", "true", "True")
"""Values of --resume_from_checkpoint that mean the newest checkpoint of the output directory."""


def last_checkpoint(directory: Path, processes: int) -> Path | None:
    """The newest whole checkpoint in `directory`; None if there is none.

    The trainer writes the state last, and each process its own random state: a run that was killed while it saved
    leaves a checkpoint without one of them. If no checkpoint has random states for `processes` (their number was
    changed), the newest one with a state is taken.
    """
    found = sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    whole = [path for path in found if _state_is_whole(path / "trainer_state.json")]
    names = [f"rng_state_{rank}.pth" for rank in range(processes)] if processes > 1 else ["rng_state.pth"]
    same = [path for path in whole if all((path / name).exists() for name in names)]
    return next(iter(same or whole), None)


def _state_is_whole(path: Path) -> bool:
    try:
        return "global_step" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def checkpoint_to_resume(named: str | None, directory: Path, processes: int) -> str | None:
    """The checkpoint that --resume_from_checkpoint names, or None to begin.

    Raises:
        UserError: it names a directory that is no whole checkpoint.
    """
    if named is None:
        return None
    if named in LAST:
        found = last_checkpoint(directory, processes)
        say(f"Going on from {found}." if found else f"{directory} holds no checkpoint yet: beginning.")
        return None if found is None else str(found)
    if not _state_is_whole(Path(named) / "trainer_state.json"):
        raise UserError(
            f"--resume_from_checkpoint {named}: is not a whole checkpoint (no trainer_state.json to read); pass a "
            f"directory OUTPUT/checkpoint-STEP, or no directory for the last one"
        )
    return str(named)
