"""Methods: policies over training time. They set what the layers compute with at a step, and what is decayed."""

from ..registry import offer
from .decay import decay_groups
from .stepping import on_step
from .sync import check_sync

__all__ = ["check_sync", "decay_groups", "on_step", *offer(__name__)]
