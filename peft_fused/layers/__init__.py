"""Adapter layers: modules that own parameters, bind an op to a base layer, and know the dense weight change."""

from ..registry import offer
from .lora import LoraLinear

__all__ = ["LoraLinear", *offer(__name__)]
