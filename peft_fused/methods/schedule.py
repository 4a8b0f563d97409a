"""The protocol by which the methods answer a training loop.

A layer that takes part in a schedule defines `schedule_members()`, a list of objects whose `method` names the method
that sets them. A schedule is registered under that name and gets all its members of the model in one call, so that it
can make one choice for all of them, or compare them.

Per optimizer step a schedule is called before the forward passes, when the gradients are ready (clipped where the loop
clips), and after the update, while the gradients are still there.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from ..layers.checks import check_module


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


class Schedule:
    """What `on_step` calls. `members` are those of all layers of the model, in the order of its modules.

    Whatever is chosen is a function of the members' configuration and the step's numbers, so that all processes agree.

    needs_unused: of a method that stops training parameters, what to say to a DistributedDataParallel that waits for
    their gradients.
    """

    needs_unused: str | None = None

    def before_step(self, members: list, step: Step) -> None:
        """Before the forward passes of every micro-batch (step.micro) of every step. May be called again for one."""

    def gradients_ready(self, members: list, step: Step) -> None:
        """Before the optimizer's update, once per step; not called for a step that a loss scaler skips."""

    def after_step(self, members: list, step: Step) -> None:
        """After the optimizer's update."""


# By the `method` of their members; each is put in by its own module.
SCHEDULES: dict[str, Schedule] = {}


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


def adapters_meant(caller: str, title: str, names: Iterable[str], adapter_name: str | None) -> set[str]:
    """Of the names of a model's adapters of a method the one asked for, or all. ValueError if there is none."""
    names = sorted(set(names))
    if not names:
        raise ValueError(f"{caller}: the model has no {title} layers")
    if adapter_name is not None and adapter_name not in names:
        raise ValueError(f"{caller}: adapter_name must be one of {names}, got {adapter_name!r}")
    return set(names) if adapter_name is None else {adapter_name}


def check_owned(what: str, parameters: Iterable[nn.Parameter], optimizer: Optimizer) -> None:
    """ValueError, for `what`, if the optimizer does not have one of these parameters."""
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if any(id(parameter) not in owned for parameter in parameters):
        raise ValueError(
            f"{what}: an adapter parameter is not among the optimizer's; create the optimizer from the adapted model "
            "(flattened or partitioned parameters, as FSDP1 and DeepSpeed make them, are not supported)"
        )


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
