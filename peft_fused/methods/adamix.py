"""AdaMix (Wang et al. 2022): a mixture of adapters, one drawn per forward pass, averaged for inference.

A route is drawn for every layer, side (down and up) and forward pass of a micro-batch, as a function of (seed, step,
layer, side, micro-batch, pass). The layers read it from tensors that are set here, outside their forward pass.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from .. import draws
from ..layers.adamix.blocks import Experts
from ..layers.adamix.routes import PASSES, RouteMember, RoutePolicy, RouteState, write_eval_routes, write_routes
from ..layers.checks import check_alpha, check_choice, check_flag, check_int, check_module
from .schedule import SCHEDULES, Schedule, Step, adapters_meant, members_of, unwrap_model
from .strict import Kept, check_guarded

__all__ = ["adamix_loss", "consistency_loss", "draw_route", "set_adamix_pass", "set_adamix_routing"]

SIDES = ("down", "up")
EVAL_ROUTINGS = ("merged", "random")


def draw_route(policy: RoutePolicy, layer: int, side: str, step: int, micro: int = 0, index: int = 0) -> int:
    """The expert, in 0..num_experts-1, of a layer's side in pass `index` of a micro-batch; 0 for a side that is shared.

    With routing="sequence" the key of the sequences' experts, 62 bits. layer: its place among the adapter's layers.
    """
    if not policy.stacks[SIDES.index(side)]:
        return 0
    key = dict(purpose=f"adamix {side} {index}", layer=layer, index=micro)
    if policy.routing == "sequence":
        return draws.draw_bits(policy.seed, step, **key) >> 2
    return draws.draw_int(0, policy.num_experts - 1, policy.seed, step, **key)


def _by_adapter(members: list[RouteMember]) -> Iterable[tuple[int, RouteMember]]:
    """(place among the layers of its adapter, member)."""
    places = defaultdict(int)
    for member in members:
        yield places[member.state.group], member
        places[member.state.group] += 1


class AdaMixSchedule(Schedule):
    """The method as `peft_fused.on_step` calls it: new routes for every micro-batch."""

    def before_step(self, members: list[RouteMember], step: Step) -> None:
        strict = [p for member in _strict(members) for stack in (member.down, member.up) for p in _stacked(stack)]
        if strict:
            check_guarded("strict_experts", step.optimizer, strict)
        distributed = dist.is_available() and dist.is_initialized()
        values = []
        for layer, member in _by_adapter(members):
            state, policy = member.state, member.state.policy
            drawn = [
                tuple(draw_route(policy, layer, side, step.step, step.micro, i) for i in range(PASSES))
                for side in SIDES
            ]
            values.append(tuple(drawn))
            state.scheduled = True
            if step.micro == 0:
                state.used = (set(), set())
            # The processes hold parts of one batch, in order, so that it is routed as a single process would.
            state.process = dist.get_rank() if distributed else 0
        states = [member.state for member in members]
        write_routes(states, values)
        for state in states:
            state.note_used(0)

    def gradients_ready(self, members: list[RouteMember], step: Step) -> None:
        for member in _strict(members):
            member.state.kept = [
                (side, Kept(step.optimizer, parameter, 0))
                for side, stack in enumerate((member.down, member.up))
                for parameter in _stacked(stack)
                if parameter.requires_grad
            ]

    def after_step(self, members: list[RouteMember], step: Step) -> None:
        for state in (member.state for member in _strict(members)):
            for side, kept in state.kept:
                kept.restore(state.used[side])
            state.kept = []


SCHEDULES["adamix"] = AdaMixSchedule()


def _strict(members: list[RouteMember]) -> list[RouteMember]:
    return [member for member in members if member.state.policy.strict_experts]


def _stacked(stack: Experts) -> list[nn.Parameter]:
    return list(stack.parameters()) if stack.stacked else []


def _states(model: nn.Module, adapter_name: str | None, caller: str) -> list[tuple[int, RouteState]]:
    found = [(layer, member.state) for layer, member in _by_adapter(members_of(model).get("adamix", []))]
    meant = adapters_meant(caller, "AdaMix", (state.group for _, state in found), adapter_name)
    return [(layer, state) for layer, state in found if state.group in meant]


def set_adamix_pass(
    model: nn.Module, index: int | None, *, sequences: int | None = None, adapter_name: str | None = None
) -> None:
    """Says which of a micro-batch's routes the following training forwards use.

    index: 0 or 1, or None for both at once: then the first half of every batch takes the routes of pass 0 and the
    second those of pass 1. sequences: of that doubled batch; a layer whose input has another first dimension then
    raises instead of halving something else. on_step goes back to 0. `adamix_loss` and AdaMixTrainerMixin call this
    themselves. Raises TypeError or ValueError for a bad index or a model without AdaMix layers.
    """
    if index is not None and check_int("index", index) >= PASSES:
        raise ValueError(f"index must be in 0..{PASSES - 1} or None, got {index}")
    if sequences is not None:
        check_int("sequences", sequences, 1)
    for _, state in _states(model, adapter_name, "set_adamix_pass"):
        state.begin_pass(index, sequences)


def set_adamix_routing(model: nn.Module, routing: str, *, index: int = 0, adapter_name: str | None = None) -> None:
    """Sets what the model's AdaMix layers evaluate with: routing="merged", the default, or "random" experts.

    index: number of the random draw, for as many different ones as wanted. Raises TypeError or ValueError naming the
    argument, ValueError for a model without AdaMix layers.
    """
    check_choice("routing", routing, EVAL_ROUTINGS)
    check_int("index", index)
    found = _states(model, adapter_name, "set_adamix_routing")
    values = [
        None
        if routing == "merged"
        # Training counts its steps from 0, so these draws are none of its.
        else tuple(draw_route(state.policy, layer, side, -1 - index) for side in SIDES)
        for layer, state in found
    ]
    write_eval_routes([state for _, state in found], values)


def consistency_loss(
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    detach: bool = True,
    num_items: float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric Kullback-Leibler divergence between the predictions of two passes: 1/2 (KL(p2 || p1) + KL(p1 || p2)).

    first, second: logits [..., classes]. mask: [...], true where a prediction counts, such as the tokens that are not
    padding; None counts all. detach: the distribution that the other is compared with gets no gradient, as the authors
    have it. num_items: what the sum is divided by; None means the number of predictions that count. Computed in fp32
    (fp64 for fp64). Zero for a single logit, which is a regression. Source: AdaMix, Wang et al. 2022, sec. 3.2.
    Returns a 0-d tensor. Raises TypeError or ValueError naming the argument.
    """
    for name, logits in (("first", first), ("second", second)):
        if not isinstance(logits, torch.Tensor) or not logits.is_floating_point() or logits.dim() < 1:
            raise TypeError(f"{name} must be a floating-point tensor of logits, got {_shown(logits)}")
    if first.shape != second.shape:
        raise ValueError(f"second must have first's shape {list(first.shape)}, got {list(second.shape)}")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool):
        raise TypeError(f"mask must be a bool tensor or None, got {_shown(mask)}")
    if mask is not None and mask.shape != first.shape[:-1]:
        raise ValueError(f"mask must have shape {list(first.shape[:-1])}, got {_shown(mask)}")
    check_flag("detach", detach)
    if isinstance(num_items, torch.Tensor):
        if num_items.numel() != 1 or num_items.is_complex() or (num_items.is_meta and not first.is_meta):
            raise ValueError(f"num_items must be one real number, got a tensor, {_shown(num_items)}")
    elif num_items is not None:
        num_items = float(check_alpha("num_items", num_items))
        if num_items <= 0:
            raise ValueError(f"num_items must be positive, got {num_items:g}")
    wide = torch.promote_types(first.dtype, torch.float32)
    if first.shape[-1] == 1:
        return first.new_zeros((), dtype=wide)
    if mask is not None:
        # What does not count may hold anything, infinities included, and is to get no gradient from it.
        first, second = (torch.where(mask.unsqueeze(-1), logits, 0.0) for logits in (first, second))
    log_p, log_q = F.log_softmax(first, -1, dtype=wide), F.log_softmax(second, -1, dtype=wide)
    target_p, target_q = (log_p.detach(), log_q.detach()) if detach else (log_p, log_q)
    divergence = 0.5 * (_divergence(target_q, log_p) + _divergence(target_p, log_q))
    if num_items is None:
        num_items = divergence.numel() if mask is None else mask.sum()
        num_items = max(num_items, 1) if isinstance(num_items, int) else num_items.clamp(min=1)
    return divergence.sum() / num_items


def _divergence(log_target: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(target || q), [...]. A class of probability 0 under the target adds nothing, whatever q has for it."""
    return (log_target.exp() * torch.where(log_target > -math.inf, log_target - log_q, 0.0)).sum(-1)


def _shown(value) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _predicts_next(model: nn.Module) -> bool:
    """Whether the model's loss compares the prediction at a token with the label of the next, as transformers' does."""
    model = unwrap_model(model, "config")
    if not hasattr(model, "loss_type") or getattr(model.config, "is_encoder_decoder", False):
        return False
    # None is a head whose name transformers does not know, such as GPT2LMHeadModel; it is taken for a causal one.
    return model.loss_type is None or model.loss_type.endswith(("ForCausalLM", "ForConditionalGeneration"))


def _prediction_mask(model: nn.Module, logits: torch.Tensor, labels: torch.Tensor | None):
    """(slice of the logits that have a target, which of those count) for token predictions; (all, None) otherwise."""
    if not predicts_tokens(logits, labels):
        return slice(None), None
    if _predicts_next(model):  # the last prediction has no target
        return slice(None, -1), labels[:, 1:] != -100
    return slice(None), labels != -100


def predicts_tokens(logits: torch.Tensor, labels: torch.Tensor | None) -> bool:
    """Whether there is a label for each token rather than for each sequence."""
    return labels is not None and not labels.is_floating_point() and 2 <= labels.dim() == logits.dim() - 1


def can_double(model: nn.Module, labels: torch.Tensor) -> bool:
    """Whether labels of -100 leave the second half of a doubled batch out of the model's loss."""
    config = getattr(unwrap_model(model, "config"), "config", None)
    regression = getattr(config, "num_labels", None) == 1 and labels.dim() <= 1
    return not labels.is_floating_point() and not regression


def pass_divergence(
    model: nn.Module, first: torch.Tensor, second: torch.Tensor, labels: torch.Tensor | None, *, detach: bool = True,
    num_items: float | torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`consistency_loss` of two passes' logits over the predictions that have a target, by the model's kind of labels.

    num_items: used for token predictions only.
    """
    kept, mask = _prediction_mask(model, first, labels)
    if mask is None:
        return consistency_loss(first, second, detach=detach)
    return consistency_loss(first[:, kept], second[:, kept], mask=mask, detach=detach, num_items=num_items)


def adamix_loss(
    model: nn.Module, inputs: dict[str, Any], *, weight: float = 1.0, detach: bool = True, doubled: bool = False
) -> tuple[torch.Tensor, Any]:
    """(loss, outputs of the first pass): the task loss of one pass, plus weight times its divergence from a second.

    inputs: what the model takes, with "labels". weight: of the consistency loss, 1 for classification; the authors
    take 100 for language models, where it is averaged over tokens. detach: see `consistency_loss`. doubled: both
    passes as one batch of twice the size, whose halves take different experts; outputs.logits then holds the first
    half. Activation checkpointing needs it. For a single logit it is the plain loss of one pass. The task loss is that
    of the first pass only, as the authors have it. Under gradient accumulation divide the sum by the number of
    micro-batches, as any mean loss. Raises TypeError or ValueError naming the argument.
    """
    check_module("model", model)
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs must be a mapping of the model's arguments, got {type(inputs).__name__}")
    weight = float(check_alpha("weight", weight))
    if weight < 0:
        raise ValueError(f"weight must be at least 0, got {weight:g}")
    check_flag("doubled", doubled)
    labels = inputs.get("labels")
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"inputs must have a tensor 'labels', got {_shown(labels)}")
    set_adamix_pass(model, 0)
    inputs = with_decoder_input(model, inputs)
    if doubled and can_double(model, labels):
        return _doubled(model, inputs, weight, detach)
    outputs = model(**inputs)
    loss = outputs["loss"]
    if weight == 0 or outputs["logits"].shape[-1] == 1:
        return loss, outputs
    second = second_pass(model, inputs)
    divergence = pass_divergence(model, outputs["logits"], second["logits"], labels, detach=detach)
    return loss + weight * divergence.to(loss.dtype), outputs


def second_pass(model: nn.Module, inputs: dict[str, Any]):
    """The model's outputs with the routes of pass 1, without labels and so without a loss of their own."""
    set_adamix_pass(model, 1)
    try:
        return model(**{name: value for name, value in inputs.items() if name != "labels"})
    finally:
        set_adamix_pass(model, 0)


def with_decoder_input(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, for an encoder-decoder with what it would make of the labels, for a pass that has none or others.

    ValueError if it has no way to say what that is.
    """
    model = unwrap_model(model, "config")
    given = not {"decoder_input_ids", "decoder_inputs_embeds"}.isdisjoint(inputs)
    if given or not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return inputs
    if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
        raise ValueError("inputs must have 'decoder_input_ids' for this encoder-decoder")
    return {**inputs, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])}


def double(inputs: dict[str, Any], batch: int) -> dict[str, Any]:
    """Inputs whose tensors of `batch` rows appear twice; the second copy's labels are left out of the loss (-100)."""
    twice = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == batch:
            copy = torch.full_like(value, -100) if name == "labels" else value
            value = torch.cat([value, copy])
        twice[name] = value
    return twice


def _doubled(model, inputs, weight, detach):
    labels = inputs["labels"]
    batch = labels.shape[0]
    set_adamix_pass(model, None, sequences=PASSES * batch)
    try:
        outputs = model(**double(inputs, batch))
    finally:
        set_adamix_pass(model, 0)
    first, second = outputs["logits"].split(batch)
    outputs["logits"] = first
    loss = outputs["loss"]
    if weight == 0 or first.shape[-1] == 1:
        return loss, outputs
    divergence = pass_divergence(model, first, second, labels, detach=detach)
    return loss + weight * divergence.to(loss.dtype), outputs
