"""Preference training with the fused op: data in TRL's format, InfoPO or DPO, full tuning or LoRA.

`python -m infopo_kernels train` and `demo` are this package; needs the extra ``train``.
"""
