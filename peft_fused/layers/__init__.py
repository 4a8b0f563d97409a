"""Adapter layers: modules that own parameters, bind an op to a base layer, and know the dense weight change."""

from .dylora import DyLoRALinear, RankPolicy
from .lora import LoRALinear

__all__ = ["DyLoRALinear", "LoRALinear", "RankPolicy"]
