"""Methods: policies over training time. They set what the layers compute with at a step, and what is decayed."""

from .adamix import adamix_loss, consistency_loss, draw_route, set_pass, set_routing
from .aflora import Freezing, freezing_fraction, freezing_history
from .decay import decay_groups
from .dylora import draw_rank, evaluate_ranks, set_rank
from .rosa import phase_of
from .stepping import on_step
from .sync import check_sync

__all__ = [
    "Freezing",
    "adamix_loss",
    "check_sync",
    "consistency_loss",
    "decay_groups",
    "draw_rank",
    "draw_route",
    "evaluate_ranks",
    "freezing_fraction",
    "freezing_history",
    "on_step",
    "phase_of",
    "set_pass",
    "set_rank",
    "set_routing",
]
