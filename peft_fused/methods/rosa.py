"""ROSA (Gamboa et al. 2024): random subspace adaptation, which trains a few singular directions of a weight at a time.

At the start of every epoch, or every so many steps, what the factors learned is counted as part of the weights, these
are decomposed, and the factors drawn anew, which leaves the function as it was. A draw is a function of (seed, phase,
layer), where a phase is an epoch or so many steps; which phase a layer is in is saved with the adapter, so that a
resumed run draws neither twice nor not at all. A run that starts at step 0 goes on from the phase it finds, whatever
epoch it starts with.

The authors build the optimizer and scheduler anew; here only the state of the factors is reset, for it belongs to
directions that are no longer trained (of LBFGS the whole state, which it keeps for all parameters together). Their
`use_scale`, which scales the factors' part by alpha / r, is not offered: it would change the function at the start, for
that part is the pretrained weight's.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import LBFGS, Adagrad, Optimizer

from ..layers.rosa.state import Maker, RosaMember
from ..layers.rosa.subspace import EPOCH, SubspacePolicy
from .schedule import SCHEDULES, Schedule, Step, check_owned

__all__ = ["phase_of"]


def phase_of(policy: SubspacePolicy, step: Step) -> int:
    """Which phase of a run a step is in, from 0. ValueError if it takes an epoch that on_step was not given."""
    if policy.resample_every != EPOCH:
        return step.step // policy.resample_every
    if step.epoch is None:
        raise ValueError(
            "epoch must be passed to on_step for ROSA with resample_every='epoch'; or give a number of steps"
        )
    return step.epoch


class RosaSchedule(Schedule):
    """The method as `peft_fused.on_step` calls it."""

    def before_step(self, members: list[RosaMember], step: Step) -> None:
        phases = [phase_of(member.state.policy, step) for member in members]
        # What keeps an optimizer from being reset shows from the beginning, and not only when a draw is due.
        first = step.step == 0 or not all(member.state.scheduled for member in members)
        due, trained = [], []
        for member, phase in zip(members, phases, strict=True):
            state = member.state
            state.scheduled = True
            if step.micro > 0 or not any(p.requires_grad for p in member.factors()):
                continue
            trained.append(member)
            if step.step == 0:
                # Whether epochs count from 0 or 1: the run goes on from here.
                state.start = state.phase - phase
            if state.start + phase > state.phase:
                due.append((member, state.start + phase))
        distributed = dist.is_available() and dist.is_initialized()
        if distributed and (due or first):
            _reshard(step.model)
        if first and step.optimizer is not None:
            check_owned("ROSA", _trained_factors(trained), step.optimizer)
        if not due:
            return
        _check_due([member for member, _ in due], step.optimizer)
        for member, phase in due:
            member.resample(phase, _of_process_0 if distributed else None)
            for parameter in member.factors():
                _reset(step.optimizer, parameter)


SCHEDULES["rosa"] = RosaSchedule()


def _check_due(members: list[RosaMember], optimizer: Optimizer | None) -> None:
    """ValueError if the members cannot be resampled, before any is."""
    if any(member.merged for member in members):
        raise ValueError("ROSA: the adapter is merged into the base weights; unmerge it before training goes on")
    if optimizer is None:
        raise ValueError("ROSA resets the optimizer's state of what it draws anew: pass optimizer= to on_step")
    check_owned("ROSA", _trained_factors(members), optimizer)


def _trained_factors(members: list[RosaMember]) -> list[nn.Parameter]:
    return [factor for member in members for factor in member.factors() if factor.requires_grad]


def _reshard(model: nn.Module | None) -> None:
    """Ends what an evaluation may have left: parameters gathered by FSDP2, which are copies, written to in vain."""
    from torch.distributed.fsdp import FSDPModule

    for module in () if model is None else model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def _reset(optimizer: Optimizer, parameter: torch.nn.Parameter) -> None:
    """What the optimizer knows of a parameter, as it is before the first step; its gradient is dropped.

    LBFGS forgets all: its history, under the first of its parameters, is of steps along all of them together.
    """
    parameter.grad = None
    if isinstance(optimizer, LBFGS):
        optimizer.state.clear()
    elif not isinstance(optimizer, Adagrad):
        optimizer.state.pop(parameter, None)
    elif parameter in optimizer.state:  # filled by the constructor and expected by the step
        (group,) = (g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))
        optimizer.state[parameter]["step"].zero_()
        optimizer.state[parameter]["sum"].fill_(group["initial_accumulator_value"])


def _of_process_0(make: Maker, W: torch.Tensor, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors that process 0 computes, on all processes: decompositions may differ in signs and last digits."""
    device = torch.device("cpu") if dist.get_backend() == "gloo" else W.device
    if dist.get_rank() == 0:
        factors = [factor.to(device).contiguous() for factor in make()]
    else:
        factors = [torch.empty(shape, dtype=W.dtype, device=device) for shape in ((r, W.shape[1]), (W.shape[0], r))]
    for factor in factors:
        dist.broadcast(factor, 0)
    A, B = (factor.to(W.device) for factor in factors)
    return A, B
