"""Runs the layers of PEFT's own methods on fused operations: `accelerate`, `restore`.

A further kind of adapter is a file beside `lora.py` and a line below. The file has its `AcceleratedLayer`, which says
in `adapter_step` what an adapter adds and when PEFT has to compute it, and the `Kind`, which says what it is for. A
variant of LoRA, which PEFT keeps in the same layers, is an entry in `lora.VARIANTS`.
"""

from ....ops.dispatch import explainers
from .frozen import explain_frozen
from .kinds import register
from .lora import LORA
from .replacing import accelerate, explain_left, restore
from .report import AccelerationReport

register(LORA)
explainers.extend([explain_left, explain_frozen])

__all__ = ["AccelerationReport", "accelerate", "restore"]
