"""AFLoRA (Liu et al. 2024): projection matrices are frozen one after another, those that change the loss least first.

The score of a matrix is the mean over its elements of mean |gradient| times the mean change of it, both exponential
averages over windows of steps. From step t_i on a growing share of the matrices is frozen, after T - t_f all of them;
the vectors train on. Frozen matrices never thaw: their gradients, optimizer state and statistics are gone.

Gradients are read as the optimizer gets them: averaged over the micro-batches and over all processes, without a loss
scaler's scale, and clipped where the loop clips (the authors' program reads them before). t is the number of steps done
before the step, as in the authors' program, and what is frozen at t is frozen after that step's update. Windows end,
and decisions fall, at multiples of the window.
"""

import math
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..layers.aflora import FROM_THE_START, MATRICES, NOT_FROZEN, AfLoraMember, AfLoraState, FreezingPolicy, keep_frozen
from ..layers.checks import check_module
from ..layers.sharded import is_sharded, local
from .schedule import SCHEDULES, Schedule, Step, adapters_meant, check_owned

__all__ = ["Freezing", "freezing_fraction", "freezing_history"]

NEEDS_UNUSED = (
    "AFLoRA stops training parameters, for which DistributedDataParallel waits: wrap the model with "
    "find_unused_parameters=True (Trainer: ddp_find_unused_parameters=True) and without static_graph"
)


def freezing_fraction(policy: FreezingPolicy, step: int, total_steps: int) -> float:
    """k(t), the share of the matrices to be frozen at a step: 0 up to t_i, 1 after T - t_f, in between
    1 - (1 - x)^3 (cubic) or x^2 (quadratic) of x = (t - t_i) / (T - t_i - t_f). ValueError if t_i + t_f > T.
    """
    start, end = policy.bounds(total_steps)
    if step <= start:
        return 0.0
    if step > end:
        return 1.0
    x = (step - start) / (end - start)
    return x**2 if policy.ramp == "quadratic" else 1.0 - (1.0 - x) ** 3


class _Matrix(NamedTuple):
    """A projection matrix that is still trained."""

    state: AfLoraState
    name: str
    parameter: nn.Parameter

    def statistics(self) -> tuple[torch.Tensor, ...]:
        return self.state.statistics(self.name, self.parameter)


class _Adapter:
    """The layers of one adapter that follow one policy, while it trains: they share one schedule."""

    def __init__(self, members: list[AfLoraMember]):
        self.policy = members[0].state.policy
        self.states = [member.state for member in members]
        self.alive = [
            _Matrix(member.state, name, getattr(member, name))
            for member in members
            for name in MATRICES
            if not member.state.is_frozen(name)
        ]
        frozen_at = [at for state in self.states for at in state.frozen_at.values()]
        self.started = sum(at != FROM_THE_START for at in frozen_at)
        self.frozen = sum(at not in (FROM_THE_START, NOT_FROZEN) for at in frozen_at)


def _adapters(members: list[AfLoraMember]) -> list[_Adapter]:
    """The adapters with a matrix left to freeze."""
    groups = defaultdict(list)
    for member in members:
        if member.trains:
            groups[member.state.group, member.state.policy].append(member)
    return [adapter for adapter in map(_Adapter, groups.values()) if adapter.alive]


class AfLoraSchedule(Schedule):
    """The method as `peft_fused.on_step` calls it."""

    needs_unused = NEEDS_UNUSED

    def before_step(self, members: list[AfLoraMember], step: Step) -> None:
        if step.micro > 0:
            return
        adapters = _adapters(members)
        for adapter in adapters:
            _check(adapter, step)
        for member in members:
            member.state.scheduled = True
            if member.trains:  # whoever asks for gradients of everything means what is not frozen
                keep_frozen(member.state, member.A, member.B, True)

    @torch.no_grad()
    def gradients_ready(self, members: list[AfLoraMember], step: Step) -> None:
        for adapter in _adapters(members):
            if step.step % adapter.policy.window == 0:
                _absorb(adapter)
            _accumulate(adapter, step.grad_scale)

    @torch.no_grad()
    def after_step(self, members: list[AfLoraMember], step: Step) -> None:
        for adapter in _adapters(members):
            share = freezing_fraction(adapter.policy, step.step, step.total_steps)
            if share >= 1.0:
                chosen = adapter.alive
            elif share > 0.0 and step.step % adapter.policy.window == 0:
                chosen = (_least if adapter.policy.rule == "paper" else _below_quantile)(adapter, share)
            else:
                continue
            _freeze(chosen, step)


SCHEDULES["aflora"] = AfLoraSchedule()


def _check(adapter: _Adapter, step: Step) -> None:
    """ValueError naming what keeps the schedule from working."""
    if step.total_steps is None:
        raise ValueError("AFLoRA freezes by a schedule over the whole run: pass total_steps= to on_step")
    if step.optimizer is None:
        raise ValueError("AFLoRA reads gradients and drops optimizer state: pass optimizer= to on_step")
    adapter.policy.bounds(step.total_steps)
    for module in step.model.modules() if not all(state.scheduled for state in adapter.states) else ():
        if isinstance(module, DistributedDataParallel) and (module.static_graph or not module.find_unused_parameters):
            raise ValueError(NEEDS_UNUSED)
    # Every time: a checkpoint loaded meanwhile may have brought back what the optimizer was relieved of.
    check_owned("AFLoRA", (matrix.parameter for matrix in adapter.alive), step.optimizer)
    for matrix in adapter.alive:
        if tuple(matrix.parameter.shape) != matrix.state.shapes[matrix.name]:
            raise ValueError(
                f"AFLoRA: {matrix.name} has shape {list(matrix.parameter.shape)} instead of "
                f"{list(matrix.state.shapes[matrix.name])}: parameters that are flattened or partitioned, as FSDP1 and "
                "DeepSpeed make them, are not supported"
            )
        if adapter.policy.rule == "code" and is_sharded(matrix.parameter):
            raise ValueError(
                "rule must be 'paper' for sharded parameters (FSDP2), got 'code', which ranks all elements"
            )


def _absorb(adapter: _Adapter) -> None:
    """Takes the mean |gradient| I of the window that has ended into the averages, and begins a new one:

    mean <- beta1 mean + (1 - beta1) I,  change <- beta2 change + (1 - beta2) |I - mean|.
    """
    ended = [matrix for matrix in adapter.alive if matrix.state.gradients > 0]
    if not ended:
        return
    window, mean, change = map(list, zip(*(matrix.statistics() for matrix in ended), strict=True))
    torch._foreach_div_(window, [float(matrix.state.gradients) for matrix in ended])
    torch._foreach_lerp_(mean, window, 1.0 - adapter.policy.beta1)
    torch._foreach_sub_(window, mean)
    torch._foreach_abs_(window)
    torch._foreach_lerp_(change, window, 1.0 - adapter.policy.beta2)
    torch._foreach_zero_(window)
    for state in adapter.states:
        state.gradients = 0


def _accumulate(adapter: _Adapter, grad_scale: torch.Tensor | None) -> None:
    """Adds |gradient| to the windows. A matrix that no forward pass has used has the gradient zero."""
    used = [matrix for matrix in adapter.alive if matrix.parameter.grad is not None]
    if used:
        windows = [matrix.statistics()[0] for matrix in used]
        sizes = torch._foreach_abs([local(matrix.parameter.grad) for matrix in used])
        if grad_scale is not None:
            torch._foreach_div_(sizes, grad_scale)
        torch._foreach_add_(windows, sizes)
    for state in adapter.states:
        state.gradients += 1


def _products(matrices: list[_Matrix]) -> list[torch.Tensor]:
    """mean . change of every element, of the local shards."""
    _, mean, change = map(list, zip(*(matrix.statistics() for matrix in matrices), strict=True))
    return torch._foreach_mul(mean, change)


def _sums(matrices: list[_Matrix], products: list[torch.Tensor]) -> torch.Tensor:
    """Their sums over the whole matrices, [len(matrices)]."""
    first = products[0].device
    sums = torch.stack([total.to(first) for total in torch._foreach_norm(products, 1)])  # nothing here is negative
    sharded = defaultdict(list)
    for index, matrix in enumerate(matrices):
        if is_sharded(matrix.parameter):
            mesh = matrix.parameter.device_mesh
            for dim, placement in enumerate(matrix.parameter.placements):
                if placement.is_shard():
                    sharded[mesh, dim].append(index)
    for (mesh, dim), indices in sharded.items():
        part = sums[indices]
        torch.distributed.all_reduce(part, group=mesh.get_group(dim))
        sums[indices] = part
    return sums


def _least(adapter: _Adapter, share: float) -> list[_Matrix]:
    """The paper's choice: as many as it takes to have the share frozen, those of the least mean score."""
    count = math.floor(share * adapter.started) - adapter.frozen
    if count <= 0:
        return []
    sums = _sums(adapter.alive, _products(adapter.alive)).tolist()
    scores = [total / matrix.parameter.numel() for total, matrix in zip(sums, adapter.alive, strict=True)]
    order = sorted(range(len(scores)), key=scores.__getitem__)
    return [adapter.alive[index] for index in order[:count]]


def _below_quantile(adapter: _Adapter, share: float) -> list[_Matrix]:
    """The authors' program's choice: all whose mean score is below that quantile of the scores of all elements."""
    products = _products(adapter.alive)
    first = products[0].device
    elements = torch.cat([product.flatten().to(first) for product in products])
    nth = int(share * elements.numel())
    if nth == 0:
        return []
    threshold = elements.sort().values[nth - 1]  # on CUDA kthvalue is not deterministic
    sizes = torch.tensor([float(product.numel()) for product in products]).to(first, non_blocking=True)
    below = (_sums(adapter.alive, products) / sizes < threshold).tolist()
    return [matrix for matrix, freezes in zip(adapter.alive, below, strict=True) if freezes]


def _freeze(matrices: list[_Matrix], step: Step) -> None:
    """Ends the training of the matrices, and takes them out of the optimizer with their state.

    A run that resumes makes its optimizer of what is trained then: it has to find the same parameters in the groups.
    """
    gone = {id(matrix.parameter) for matrix in matrices}
    for state, name, parameter in matrices:
        parameter.requires_grad_(False)
        parameter.grad = None
        step.optimizer.state.pop(parameter, None)
        state.freeze(name, step.step + 1)
    for group in step.optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]


class Freezing(NamedTuple):
    """When one projection matrix was frozen: steps done until then, 0 for from the start, None for not yet."""

    layer: str
    matrix: str
    step: int | None


def freezing_history(model: nn.Module, *, adapter_name: str | None = None) -> list[Freezing]:
    """(layer, "A" or "B", step) of every projection matrix of the model's AFLoRA layers, in the order of its modules.

    step: optimizer steps done when it was frozen; 0 if it never was trained, None if it still is. It is part of a
    checkpoint. adapter_name: None means every AFLoRA adapter. Raises TypeError if model is not a module, ValueError for
    a model without AFLoRA layers or an unknown adapter.
    """
    check_module("model", model)
    states = [
        (name, member.state)
        for name, module in model.named_modules()
        if hasattr(type(module), "schedule_members")
        for member in module.schedule_members()
        if isinstance(member, AfLoraMember)
    ]
    meant = adapters_meant("freezing_history", "AFLoRA", (state.group for _, state in states), adapter_name)
    return [
        Freezing(name, matrix, None if at == NOT_FROZEN else at)
        for name, state in states
        if state.group in meant
        for matrix, at in state.frozen_at.items()
    ]
