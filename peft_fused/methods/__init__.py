"""Methods: policies over training time. They set what the layers compute with at a step, and what is decayed."""

from .adamix import adamix_loss, consistency_loss, draw_route, set_adamix_pass, set_adamix_routing
from .aflora import Freezing, freezing_fraction, freezing_history
from .decay import decay_groups
from .dylora import draw_rank, evaluate_dylora_ranks, set_dylora_rank
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
    "evaluate_dylora_ranks",
    "freezing_fraction",
    "freezing_history",
    "on_step",
    "phase_of",
    "set_adamix_pass",
    "set_adamix_routing",
    "set_dylora_rank",
]
