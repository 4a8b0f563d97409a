"""DyLoRA (Valipour et al. 2023): one adapter trained to work at every rank up to r.

Per step one rank b is drawn for all layers, and the layers compute with the first b rows of A and columns of B at scale
alpha / b (eq. 5-7), in training and in evaluation alike. A draw is a function of (seed, step, micro-batch); the layers
read it from tensors that are set here, outside their forward pass, so that a recomputed forward sees the same rank.
"""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from .. import draws
from ..layers.checks import check_rank
from ..layers.dylora import RankMember, RankPolicy, RankState, use_ranks, write_ranks
from .schedule import SCHEDULES, Schedule, Step, adapters_meant, members_of
from .strict import Kept, check_guarded

__all__ = ["draw_rank", "evaluate_dylora_ranks", "set_dylora_rank"]


def draw_rank(policy: RankPolicy, r: int, step: int, micro: int = 0) -> int:
    """The rank of a step, in r_min..r: a pure function of its arguments. micro counts only if resample is "micro"."""
    key = dict(purpose="dylora rank", index=micro if policy.resample == "micro" else 0)
    if policy.rank_distribution == "geometric":
        return draws.draw_geometric(policy.r_min, r, policy.geometric_p, policy.seed, step, **key)
    return draws.draw_int(policy.r_min, r, policy.seed, step, **key)


class DyLoraSchedule(Schedule):
    """The method as `peft_fused.on_step` calls it."""

    def before_step(self, members: list[RankMember], step: Step) -> None:
        strict = [parameter for member in _strict(members) for parameter in (member.A, member.B)]
        if strict:
            check_guarded("strict_frozen", step.optimizer, strict)
        groups = defaultdict(list)
        for member in members:
            groups[member.state.policy, member.state.group].append(member.state)
        states, ranks = [], []
        for (policy, _), group in groups.items():
            if step.micro > 0 and policy.resample == "step":
                continue
            rank = draw_rank(policy, max(state.r for state in group), step.step, step.micro)
            for state in group:
                state.scheduled = True
                states.append(state)
                ranks.append(min(rank, state.r))
                state.used = {ranks[-1]} if step.micro == 0 else state.used | {ranks[-1]}
        write_ranks(states, train=ranks)

    def gradients_ready(self, members: list[RankMember], step: Step) -> None:
        for member in _strict(members):
            trained = [(p, dim) for dim, p in enumerate((member.A, member.B)) if p.requires_grad]
            member.state.kept = [Kept(step.optimizer, p, dim) for p, dim in trained]

    def after_step(self, members: list[RankMember], step: Step) -> None:
        for state in (member.state for member in _strict(members)):
            for kept in state.kept:
                kept.restore(_live(state))
            state.kept = []


SCHEDULES["dylora"] = DyLoraSchedule()


def _strict(members: list[RankMember]) -> list[RankMember]:
    return [member for member in members if member.state.policy.strict_frozen]


def _live(state: RankState) -> Iterable[int]:
    """Rows of A, and columns of B, that the gradients of the step under way belong to."""
    return {rank - 1 for rank in state.used} if state.policy.frozen else range(max(state.used))


def _states(model: nn.Module, adapter_name: str | None, caller: str) -> list[RankState]:
    members = members_of(model).get("dylora", [])
    meant = adapters_meant(caller, "DyLoRA", (member.state.group for member in members), adapter_name)
    members = [member for member in members if member.state.group in meant]
    if any(member.merged for member in members):
        raise ValueError(f"{caller}: the adapter is merged into the base weights at a fixed rank; unmerge it first")
    return [member.state for member in members]


def set_dylora_rank(model: nn.Module, rank: int | None, *, adapter_name: str | None = None) -> None:
    """Sets the rank at which the model's DyLoRA layers evaluate, and train until the schedule's next step.

    rank: 1..r, where r is the largest of the layers; a layer with a smaller r (`rank_pattern`) uses all of its own.
    None goes back to the full rank. The scale follows: alpha / rank. adapter_name: None means every DyLoRA adapter. A
    PEFT adapter is saved with all its ranks, and with this one as its config's `eval_rank`. Recompiles nothing. Raises
    TypeError or ValueError for a bad rank, a model without DyLoRA layers, or merged adapters.
    """
    states = _states(model, adapter_name, "set_dylora_rank")
    if rank is not None:
        check_rank("rank", rank, max(state.r for state in states))
    use_ranks(states, [state.r if rank is None else min(rank, state.r) for state in states])
    most: dict[str, int] = {}
    for state in states:
        most[state.group] = max(state.r, most.get(state.group, 0))
    for module in model.modules():
        configs = module.__dict__.get("peft_config", {})
        for name in configs.keys() & most.keys():
            if hasattr(configs[name], "eval_rank"):
                # The config itself may be the user's, for other adapters and models as well.
                configs[name] = copy.copy(configs[name])
                configs[name].eval_rank = None if rank is None else min(rank, most[name])


def evaluate_dylora_ranks(
    model: nn.Module,
    fn: Callable[[nn.Module], Any],
    ranks: Iterable[int] | None = None,
    *,
    adapter_name: str | None = None,
) -> dict[int, Any]:
    """{rank: fn(model)} with the model set to each rank; by default every rank from 1 to the largest r.

    The ranks before, of training and of evaluation, are restored even if fn raises. The model is put into evaluation
    mode for the calls and returned to the mode it was in. Raises as `set_dylora_rank`.
    """
    if not callable(fn):
        raise TypeError(f"fn must be callable, got {type(fn).__name__}")
    if isinstance(ranks, torch.Tensor) or not (ranks is None or isinstance(ranks, Iterable)):
        raise TypeError(f"ranks must be an iterable of ints or None, got {type(ranks).__name__}")
    states = _states(model, adapter_name, "evaluate_dylora_ranks")
    most = max(state.r for state in states)
    ranks = range(1, most + 1) if ranks is None else list(ranks)
    for rank in ranks:
        check_rank("ranks", rank, most)
    before = [(state.train_value, state.eval_value, state.used) for state in states]
    modes = [(module, module.training) for module in model.modules()]
    results = {}
    try:
        model.eval()
        for rank in ranks:
            states = _states(model, adapter_name, "evaluate_dylora_ranks")  # looked up again: fn may have merged them
            use_ranks(states, [min(rank, state.r) for state in states])
            results[rank] = fn(model)
    finally:
        model.train(modes[0][1])  # what a model does besides when its mode changes
        for module, training in modes:
            module.training = training
        train, evaluation, used = zip(*before, strict=True)
        write_ranks(states, train=list(train), evaluation=list(evaluation))
        for state, value in zip(states, used, strict=True):
            state.used = value
    return results
