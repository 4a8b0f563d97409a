"""The one call by which a training loop tells the methods that a step begins.

A layer that takes part in a schedule defines `schedule_members()`, a list of objects whose `method` names the method
that sets them. A method is registered under that name and gets all its members of the model in one call, so that it
can make one choice for all of them, or compare them.
"""

from collections import defaultdict
from typing import Protocol

from torch import nn
from torch.optim import Optimizer

from ..layers.checks import check_int


class Method(Protocol):
    def before_step(
        self, members: list, *, step: int, micro: int, total_steps: int | None, optimizer: Optimizer | None
    ) -> None: ...


METHODS: dict[str, Method] = {}


def members_of(model: nn.Module) -> dict[str, list]:
    """The schedule members of all layers of the model, by method. TypeError if it is not a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = defaultdict(list)
    for module in model.modules():
        # Asked of the type: PEFT's models forward unknown attributes of an instance to the model that they wrap.
        if hasattr(type(module), "schedule_members"):
            for member in module.schedule_members():
                found[member.method].append(member)
    return found


def unwrap_optimizer(optimizer: Optimizer | None) -> Optimizer | None:
    """The innermost torch optimizer of wrappers such as accelerate's. TypeError for anything else."""
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or wrap one, got {type(optimizer).__name__}")
    return optimizer


def on_step(
    model: nn.Module,
    *,
    step: int,
    micro: int = 0,
    total_steps: int | None = None,
    optimizer: Optimizer | None = None,
) -> int:
    """Call before the forward passes of every optimizer step: sets what the model's methods choose per step.

    step: number of optimizer steps done, from 0; a resumed run passes the step it resumes at, and nothing else has to
    be saved. micro: index of the micro-batch, from 0, where gradients are accumulated; a method that chooses once per
    step ignores calls with micro > 0. total_steps: of the run, for methods with a ramp. optimizer: for methods that
    change its state or mask its update; may be wrapped. model: may be wrapped or compiled.

    Every choice is a function of the configuration and these numbers, so all processes of a distributed run agree.
    Returns the number of adapters told; 0 means that the model has no method with a schedule. Raises TypeError or
    ValueError naming the argument.
    """
    check_int("step", step)
    check_int("micro", micro)
    if total_steps is not None:
        check_int("total_steps", total_steps)
    optimizer = unwrap_optimizer(optimizer)
    found = members_of(model)
    for name, members in found.items():
        METHODS[name].before_step(members, step=step, micro=micro, total_steps=total_steps, optimizer=optimizer)
    return sum(map(len, found.values()))
