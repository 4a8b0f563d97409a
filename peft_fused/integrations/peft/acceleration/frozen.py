"""Linear layers that are not trained, and their products in fp32 on a CPU (ops/frozen_linear.py).

An adapted layer has its base product in the library that is the faster one on this CPU. Layers without an adapter, such
as the head, or all but the projections to queries and values, get the same. So do base layers, for the calls in which
they run alone: while adapters are disabled or merged, or left to PEFT. As everywhere here the class of a layer is
exchanged, and nothing else of it; what a call may do is decided when it is made.
"""

from typing import ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ....ops.dispatch import is_routed
from ....ops.frozen_linear import against_layer, against_now, frozen_linear
from ..base import LINEAR, linear_operands


class FrozenLayer(nn.Module):
    """Stands before a linear layer's class among the bases."""

    plain_class: ClassVar[type[nn.Module]]

    def forward(self, *args, **kwargs):
        """As the class's own."""
        y = frozen_linear(args[0], *_operands(self)) if len(args) == 1 and not kwargs else None
        return super().forward(*args, **kwargs) if y is None else y


class FrozenLinear(FrozenLayer, nn.Linear):
    """torch.nn.Linear; see `FrozenLayer`. Made by `accelerate`, unmade by `restore`."""

    plain_class = nn.Linear


class FrozenConv1D(FrozenLayer, Conv1D):
    """transformers' Conv1D; see `FrozenLayer`. Made by `accelerate`, unmade by `restore`."""

    plain_class = Conv1D


# A layer that gains nothing with so many, tokens times batch size, keeps its class.
_ROWS = 256
_CLASSES = {each.plain_class: each for each in (FrozenLinear, FrozenConv1D)}
LINEAR.update({made: LINEAR[plain] for plain, made in _CLASSES.items()})


def _operands(layer: FrozenLayer) -> tuple[torch.Tensor, torch.Tensor | None]:
    return linear_operands(layer, LINEAR[layer.plain_class])  # its own class may be one derived by another library


def exchange(model: nn.Module) -> None:
    """Gives linear layers that are not trained their class here, where oneDNN is the faster library for such."""
    of_adapters = _parts_of_adapters(model)
    for module in model.modules():
        if type(module) in _CLASSES and id(module) not in of_adapters and _may_gain(module):
            module.__class__ = _CLASSES[type(module)]


def exchange_back(model: nn.Module) -> None:
    """Gives layers that have one of the classes here their own back."""
    for module in model.modules():
        if is_exchanged(module):
            module.__class__ = module.plain_class


def exchanged(model: nn.Module) -> list[str]:
    """The names of layers that have one of the classes here."""
    return [name for name, module in model.named_modules() if is_exchanged(module)]


def _parts_of_adapters(model: nn.Module) -> set[int]:
    """The ids of modules below adapted layers, but for those of base layers: an adapter is read, not called."""
    parts = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) or is_routed(module):
            for name, child in module.named_children():
                if name != "base_layer":
                    parts.update(map(id, child.modules()))
    return parts


def _may_gain(module: nn.Module) -> bool:
    if "forward" in module.__dict__ or module._parameters.get("weight") is None:
        return False  # a new class would not be used, or the weight is elsewhere
    weight, bias = linear_operands(module, LINEAR[type(module)])
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    return not trained and against_layer(weight, bias, _ROWS) is None


def is_exchanged(module: nn.Module) -> bool:
    """Whether the module's class is one of those here, and none that another library has since derived from it."""
    return type(module) in _CLASSES.values()


def explain_frozen(module: nn.Module, rows: int) -> tuple[str, list[str]] | None:
    """What `peft_fused.explain` says of such a layer, None for other modules."""
    if not is_exchanged(module):
        return None
    weight, bias = _operands(module)
    reason = against_layer(weight, bias, rows) or against_now(weight, bias)
    if reason is None:
        return "frozen_linear: oneDNN base GEMM", []
    return f"{module.plain_class.__name__}'s own forward", [f"frozen_linear: {reason}"]
