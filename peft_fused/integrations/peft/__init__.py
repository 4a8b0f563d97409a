"""Our methods as PEFT tuners. Importing this makes them known to PEFT's loaders."""

from ...ops import flops as flops  # PEFT has imported Triton by now, if it is there
from .dylora import DyLoraConfig, DyLoraModel
from .export import export_lora
from .surm import SurmConfig, SurmModel
from .tuner import FusedPeftType

__all__ = ["DyLoraConfig", "DyLoraModel", "FusedPeftType", "SurmConfig", "SurmModel", "export_lora"]
