"""Import the installed package in an environment that has torch only, and use it.

Usage: check_wheel.py SKIPPED, with SKIPPED = 1 if the wheel was built without the extension.
"""

from __future__ import annotations

import sys
import warnings

import torch

import infopo_kernels

SKIPPED = sys.argv[1] == "1"

assert "site-packages" in infopo_kernels.__file__, f"imported {infopo_kernels.__file__}, not the installed wheel"
for name in ("triton", "transformers", "trl", "rich"):
    assert name not in sys.modules, f"importing the package brought in {name}"

reason = infopo_kernels.available_backends()["cpp"]
assert (reason is not None) == SKIPPED, f"extension skipped: {SKIPPED}, but the reason given is {reason!r}"

torch.manual_seed(0)
hidden, weight, labels = torch.randn(4, 5, 16), torch.randn(50, 16), torch.randint(50, (4, 5))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    logps = infopo_kernels.linear_logps(hidden, weight, labels)
    infopo_kernels.linear_logps(hidden, weight, labels)
said = [str(w.message) for w in caught if "fallback" in str(w.message) or "plain PyTorch" in str(w.message)]
assert len(said) == SKIPPED, f"a missing extension is to be said once, an existing one never; said: {said}"

truth = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
error = (logps - truth).abs().max().item()
assert error < 1e-4, f"log-probabilities are off by {error}"
print(f"wheel {'without' if SKIPPED else 'with'} the extension: imported from site-packages, error {error:.1e}")
