"""Methods: policies over training time. They set what the layers compute with at a step."""

from .dylora import draw_rank, evaluate_ranks, set_rank
from .stepping import on_step

__all__ = ["draw_rank", "evaluate_ranks", "on_step", "set_rank"]
