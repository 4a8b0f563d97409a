"""AdaMix: stacks of experts, one of which works in each forward pass."""

from .blocks import AdaMixAdapter, AdaMixDelta
from .linear import AdaMixLinear
from .routes import RoutePolicy

__all__ = ["AdaMixAdapter", "AdaMixDelta", "AdaMixLinear", "RoutePolicy"]
