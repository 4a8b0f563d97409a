"""Our methods as PEFT tuners. Importing this makes them known to PEFT's loaders."""

from ...ops import flops as flops  # PEFT has imported Triton by now, if it is there
from ...registry import offer
from . import acceleration as acceleration  # which tells `explain` of PEFT's own layers
from .copying import copy_adapter
from .export import export_lora
from .registration import FusedPeftType

__all__ = ["FusedPeftType", "copy_adapter", "export_lora", *offer(__name__)]
