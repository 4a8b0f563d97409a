"""The one call by which a training loop drives the methods, and the protocol by which they answer.

A layer that takes part in a schedule defines `schedule_members()`, a list of objects whose `method` names the method
that sets them. A method is registered under that name and gets all its members of the model in one call, so that it
can make one choice for all of them, or compare them.

Per optimizer step a method is called before the forward passes, when the gradients are ready (clipped where the loop
clips), and after the update, while the gradients are still there. The last two come from hooks of the optimizer, so
that a loop has nothing more to call than `on_step`.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer

from ..layers.checks import check_module, check_size
from . import sync


@dataclass(frozen=True)
class Step:
    """Where in the run a method is called: the arguments of `on_step`, the optimizer unwrapped.

    model: as it was given, wrappers and all; only in `before_step`. grad_scale: in `gradients_ready`, the 0-d tensor by
    which the gradients are still multiplied, None as a rule: a fused optimizer divides by a loss scaler's scale itself.
    """

    step: int
    micro: int = 0
    total_steps: int | None = None
    epoch: int | None = None
    optimizer: Optimizer | None = None
    model: nn.Module | None = None
    grad_scale: torch.Tensor | None = None


class Method:
    """What `on_step` calls. `members` are those of all layers of the model, in the order of its modules.

    Whatever is chosen is a function of the members' configuration and the step's numbers, so that all processes agree.
    """

    def before_step(self, members: list, step: Step) -> None:
        """Before the forward passes of every micro-batch (step.micro) of every step. May be called again for one."""

    def gradients_ready(self, members: list, step: Step) -> None:
        """Before the optimizer's update, once per step; not called for a step that a loss scaler skips."""

    def after_step(self, members: list, step: Step) -> None:
        """After the optimizer's update."""


METHODS: dict[str, Method] = {}


def members_of(model: nn.Module) -> dict[str, list]:
    """The schedule members of all layers of the model, by method. TypeError if it is not a module."""
    check_module("model", model)
    found = defaultdict(list)
    for module in model.modules():
        # Asked of the type: PEFT's models forward unknown attributes of an instance to the model that they wrap.
        if hasattr(type(module), "schedule_members"):
            for member in module.schedule_members():
                found[member.method].append(member)
    return found


def unwrap_model(model: nn.Module, attribute: str) -> nn.Module:
    """The model that has the attribute, within wrappers that do not forward it, such as DistributedDataParallel."""
    while not hasattr(model, attribute) and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model


def unwrap_optimizer(optimizer: Optimizer | None) -> Optimizer | None:
    """The innermost torch optimizer of wrappers such as accelerate's. TypeError for anything else."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or wrap one, got {type(optimizer).__name__}")
    return optimizer


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
                METHODS[name].gradients_ready(members, replace(step, grad_scale=scale))

    def _after_step(self, optimizer, args, kwargs):
        for found, step in self.announced.values():
            for name, members in found.items():
                METHODS[name].after_step(members, step)
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
        METHODS[name].before_step(members, replace(now, model=model))
    sync.check_first_steps(model, found, (step, micro, total_steps, epoch))
    return sum(map(len, found.values()))
