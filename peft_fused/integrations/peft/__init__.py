"""Our methods as PEFT tuners. Importing this makes them known to PEFT's loaders."""

from .dylora import DyloraConfig, DyloraModel
from .export import export_lora
from .tuner import FusedPeftType

__all__ = ["DyloraConfig", "DyloraModel", "FusedPeftType", "export_lora"]
