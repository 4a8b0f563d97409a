"""Our methods as PEFT tuners. Importing this makes them known to PEFT's loaders."""

from ...ops import flops as flops  # PEFT has imported Triton by now, if it is there
from . import acceleration as acceleration  # which tells `explain` of PEFT's own layers
from .adamix import AdaMixConfig, AdaMixModel, merge_experts
from .aflora import AfLoraConfig, AfLoraModel
from .copying import copy_adapter
from .dylora import DyLoraConfig, DyLoraModel
from .export import export_lora
from .rosa import RosaConfig, RosaModel
from .surm import SurmConfig, SurmModel
from .tuner import FusedPeftType

__all__ = [
    "AdaMixConfig",
    "AdaMixModel",
    "AfLoraConfig",
    "AfLoraModel",
    "DyLoraConfig",
    "DyLoraModel",
    "FusedPeftType",
    "RosaConfig",
    "RosaModel",
    "SurmConfig",
    "SurmModel",
    "copy_adapter",
    "export_lora",
    "merge_experts",
]
