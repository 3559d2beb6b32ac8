"""The imports of the server of fresh processes. Nothing else happens here, so that no thread runs before it forks."""

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
    with contextlib.suppress(Exception):  # the measurement skips a contender that cannot be imported
        importlib.import_module(_name)

gc.freeze()  # a collection then skips half a million imported objects, which take 0.2 s each time
atexit.register(gc.unfreeze)  # else extensions report leaks, because the last collection skips their objects
