"""What the server of fresh processes imports once; only imports, so that no thread runs before it forks."""

import atexit
import contextlib
import gc
import importlib

for _name in (
    "torch._dynamo",
    "torch._inductor.compile_fx",
    "infopo_kernels._C",
    "benchmarks.parts.memory",
    "trl.kernels",
    "liger_kernel.chunked_loss.fused_linear_preference",
    "cut_cross_entropy",
    "flash_attn.losses.cross_entropy",
    "transformers.models.llama.modeling_llama",
):
    with contextlib.suppress(Exception):  # a peer that cannot be imported is skipped where it is measured
        importlib.import_module(_name)

gc.freeze()  # a collection looks at what a process makes, not at half a million imported objects: 0.2 s each
atexit.register(gc.unfreeze)  # or extensions report as leaked what the last collection left alone
