"""The one call by which a training loop drives the schedules, see `schedule.py`.

Two of the three calls that a schedule gets per step come from hooks of the optimizer, so that a loop has nothing more
to call than `on_step`.
"""

from dataclasses import replace
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import Optimizer

from ..layers.checks import check_size
from . import sync
from .schedule import SCHEDULES, Step, members_of, unwrap_optimizer


class _Hooks:
    """The two later calls of the protocol, made by one optimizer for the steps that on_step has announced."""

    def __init__(self, optimizer: Optimizer):
        self.announced: WeakKeyDictionary[nn.Module, tuple[dict[str, list], Step]] = WeakKeyDictionary()
        optimizer.register_step_pre_hook(self._gradients_ready)
        optimizer.register_step_post_hook(self._after_step)

    def _gradients_ready(self, optimizer, args, kwargs):
        # A loss scaler leaves it to a fused optimizer to skip a step, and to unscale unless that was asked for before.
        if (found_inf := getattr(optimizer, "found_inf", None)) is not None and found_inf.item():
            self.announced.clear()
        scale = getattr(optimizer, "grad_scale", None)
        for found, step in self.announced.values():
            for name, members in found.items():
                SCHEDULES[name].gradients_ready(members, replace(step, grad_scale=scale))

    def _after_step(self, optimizer, args, kwargs):
        for found, step in self.announced.values():
            for name, members in found.items():
                SCHEDULES[name].after_step(members, step)
        # A step that nobody announces is none of the schedule's.
        self.announced.clear()


_HOOKS: WeakKeyDictionary[Optimizer, _Hooks] = WeakKeyDictionary()


def on_step(
    model: nn.Module,
    *,
    step: int,
    micro: int = 0,
    total_steps: int | None = None,
    epoch: int | None = None,
    optimizer: Optimizer | None = None,
) -> int:
    """Call before the forward passes of every optimizer step: drives what the model's methods choose and change.

    step: number of optimizer steps done, from 0; a resumed run passes the step it resumes at. micro: index of the
    micro-batch, from 0, where gradients are accumulated; a method that chooses once per step ignores calls with micro >
    0. total_steps: of the run, for methods with a ramp. epoch: number of epochs done, for methods that act once per
    epoch. optimizer: for methods that read gradients, change its state or mask its update; may be wrapped. model: may
    be wrapped or compiled.

    Every choice is a function of the configuration and these numbers, so all processes of a distributed run agree; the
    first calls compare notes, see `check_sync`. Returns the number of adapters told; 0 means that the model has no
    method with a schedule. Raises TypeError or ValueError naming the argument, RuntimeError where processes disagree.
    """
    check_size("step", step, 0)
    check_size("micro", micro, 0)
    for name, value, least in (("total_steps", total_steps, 1), ("epoch", epoch, 0)):
        if value is not None:
            check_size(name, value, least)
    optimizer = unwrap_optimizer(optimizer)
    found = members_of(model)
    if not found:
        return 0
    sync.refuse_zero3(model)
    now = Step(step, micro, total_steps, epoch, optimizer)
    if optimizer is not None:
        hooks = _HOOKS.get(optimizer)
        if hooks is None:
            hooks = _HOOKS[optimizer] = _Hooks(optimizer)
        hooks.announced[model] = (found, now)
    for name, members in found.items():
        SCHEDULES[name].before_step(members, replace(now, model=model))
    sync.check_first_steps(model, found, (step, micro, total_steps, epoch))
    return sum(map(len, found.values()))
