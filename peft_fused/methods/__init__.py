"""Methods: policies over training time. They set what the layers compute with at a step, and what is decayed."""

from .decay import decay_groups
from .dylora import draw_rank, evaluate_ranks, set_rank
from .stepping import on_step
from .sync import check_sync

__all__ = ["check_sync", "decay_groups", "draw_rank", "evaluate_ranks", "on_step", "set_rank"]
