"""Mathematical functions with one signature and several interchangeable implementations. Stateless."""

from . import dispatch, native, structured
from .bottleneck import bottleneck_adapter, bottleneck_adapter_reference
from .lowrank import lowrank_adapter, lowrank_adapter_reference, lowrank_linear, lowrank_linear_reference

__all__ = [
    "bottleneck_adapter",
    "bottleneck_adapter_reference",
    "dispatch",
    "lowrank_adapter",
    "lowrank_adapter_reference",
    "lowrank_linear",
    "lowrank_linear_reference",
    "native",
    "structured",
]
