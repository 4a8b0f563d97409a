"""Mathematical functions with one signature and several interchangeable implementations. Stateless."""

from . import dispatch, native
from .bottleneck import bottleneck, bottleneck_reference
from .lowrank import lowrank, lowrank_linear, lowrank_linear_reference, lowrank_reference

__all__ = [
    "bottleneck",
    "bottleneck_reference",
    "dispatch",
    "lowrank",
    "lowrank_linear",
    "lowrank_linear_reference",
    "lowrank_reference",
    "native",
]
