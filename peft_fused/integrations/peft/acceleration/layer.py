"""The forward that `accelerate` gives to a layer of PEFT's, of whatever kind its adapters are."""

import logging
from typing import ClassVar

import torch
from torch import nn

from ....layers.route import CallBase, Route, Routed, Step
from ....ops.shared_shrink import why_alone
from ..base import base_operands
from .kinds import Kind, kind_of
from .operands import against_base, against_input
from .sharing import SIBLING

logger = logging.getLogger("peft_fused")

_said = set()


def _say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        logger.warning("peft_fused: an accelerated layer takes PEFT's own forward: %s", reason)


class PeftForward(Step):
    """The forward of PEFT's class, whatever it then does. warning: a line about that, for the first time it runs."""

    __slots__ = ("args", "kwargs", "layer", "name", "warning")

    def __init__(self, layer: nn.Module, name: str, warning: str | None = None, args: tuple = (), kwargs=None):
        self.layer, self.name, self.warning, self.args, self.kwargs = layer, name, warning, args, kwargs or {}

    def run(self, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        if self.warning is not None and not torch.compiler.is_compiling():
            _say_once(self.warning)
        return self.layer.peft_class.forward(self.layer, x, *self.args, **self.kwargs)


class AdapterStep(Step):
    """An adapter's part in a forward pass: `run` adds it to y.

    Of a kind whose layers can share their input, it has the slots `A` [r, K], `B`, `p` and `shared`, and depends on x
    by A drop(x), with probability p, alone. `shared` is None at first; given (x, S) of `shared_shrink`, `run` takes
    these.

    Of a kind that has a `linear_op`, it has the slots `weight` and `bias`, the first None at first. The first adapter's
    are set to the base layer's, [N, K] and [N] or None, where `run` is to compute that product as well.
    """

    __slots__ = ()


class AcceleratedLayer(Routed):
    """Stands before PEFT's class among the bases of a fused class. Subclasses, one for each kind of adapter or for each
    sort of layer that it comes in, define `adapter_step`.
    """

    kind: ClassVar[Kind]
    peft_class: ClassVar[type[nn.Module]]

    def adapter_step(self, name: str, x: torch.Tensor) -> AdapterStep | str | None:
        """An active adapter's part on x, a str for the reason why PEFT has to compute it, None if it has no weights."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """As PEFT's. Raises what the fused operations and the base layer raise on inputs that do not fit."""
        steps = self._decided(x, args, kwargs)[0]
        sibling = None if torch.compiler.is_compiling() else self.__dict__.get(SIBLING)
        offered = sibling and sibling.share(self, x, steps)
        y = None
        for step in steps:
            y = step.run(x, y)
        if offered:
            sibling.hold(offered, y)
        return y

    def route(self, x: torch.Tensor, args: tuple = (), kwargs: dict | None = None) -> Route:
        """What `forward` runs on x and what else it is called with, in the layer's present state.

        Parameters that are gathered for the forward only (FSDP2) are outside of it what they are there.
        """
        return Route(*self._decided(x, args, kwargs or {}))

    def _decided(self, x: torch.Tensor, args: tuple, kwargs: dict) -> tuple[list[Step], list[tuple[str, str]]]:
        """The steps of a route and what speaks against faster ones. A small layer feels every object more."""
        if args or kwargs:  # a mixed batch, activated LoRA or a base layer that takes more than x: PEFT's rules apply
            step = PeftForward(self, "PEFT's own forward", args=args, kwargs=kwargs)
            return [step], [(self.kind.ops, "it is called with more than x")]
        if self._disable_adapters:
            return [PeftForward(self, "base layer alone: the adapters are disabled")], []
        own = self.__dict__
        if own["merged_adapters"]:
            return [PeftForward(self, f"base layer alone: {', '.join(self.merged_adapters)} merged into it")], []
        steps = self._adapter_steps(x)
        if type(steps) is str:
            return self._left_to_peft(steps)
        if not steps:
            return [PeftForward(self, "base layer alone: no active adapter has weights here")], []

        base, linear_op = own["_modules"]["base_layer"], self.kind.linear_op
        if linear_op is None:
            return [CallBase(base), *steps], []
        operands = base_operands(base)
        if type(operands) is str:
            return [CallBase(base), *steps], [(linear_op, operands)]
        weight, bias = operands
        if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
            reason = against_base(weight, bias, x)
            if reason is not None:
                return [CallBase(base), *steps], [(linear_op, reason)]
        first = steps[0]
        first.weight, first.bias = operands
        return steps, []

    def _adapter_steps(self, x: torch.Tensor) -> list[AdapterStep] | str:
        """Those of the active adapters, or the reason why PEFT has to compute them."""
        reason = against_input(x)
        if reason is not None:
            return reason
        active, steps = self.__dict__["_active_adapter"], []
        for name in (active,) if isinstance(active, str) else active:
            step = self.adapter_step(name, x)
            if type(step) is str:
                return f"adapter {name!r}: {step}"
            if step is not None:
                steps.append(step)
        return steps

    def steps_to_share(self, x: torch.Tensor) -> list[AdapterStep]:
        """The steps that the layer is going to run on x, if nothing changes until then; none where PEFT runs."""
        if self._disable_adapters or self.__dict__["merged_adapters"]:
            return []
        steps = self._adapter_steps(x)
        return [] if type(steps) is str else steps

    def explain_route(self, rows: int = 1):
        """As `Routed`'s, and with whom the layer shares a pass over its input."""
        path, reasons, problem = super().explain_route(rows)
        if problem is None or SIBLING not in self.__dict__:
            return path, reasons, problem
        sibling = self.__dict__[SIBLING]
        found = "accelerate was called with group=False" if sibling is None else sibling.outcome()
        found = why_alone(problem) or found
        if type(found) is tuple:
            return f"{path}, one pass over the input of {', '.join(found)}", reasons, problem
        return path, [*reasons, f"shared_shrink: {found}"], problem

    def _left_to_peft(self, reason: str) -> tuple[list[Step], list[tuple[str, str]]]:
        return [PeftForward(self, "PEFT's own forward", reason)], [(self.kind.ops, reason)]

    def typical_input(self, rows: int = 1) -> torch.Tensor:
        """An input [rows, K] in the dtype of the base layer."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if dtype is None or not dtype.is_floating_point:
            # A quantised weight does not tell; half-precision activations go with it.
            dtype = torch.bfloat16
        return torch.empty(1, self.in_features, device=device, dtype=dtype).expand(rows, -1)

    def __reduce_ex__(self, protocol):
        # pickle and copy: a fused class is made at run time, so it is found again by the class of PEFT's.
        reduced = super().__reduce_ex__(protocol)
        return (_without_init, (self.peft_class,), *reduced[2:]) if is_accelerated(self) else reduced


def _without_init(peft_class: type) -> nn.Module:
    made = kind_of(peft_class).fused_class(peft_class)
    return made.__new__(made)


def is_accelerated(module: nn.Module) -> bool:
    """Whether the module's class is a fused one, and none that another library has since derived from it."""
    return isinstance(module, AcceleratedLayer) and type(module) is module.kind.fused_class(module.peft_class)
