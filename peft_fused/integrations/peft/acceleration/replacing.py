"""Exchanges the classes of a PEFT model's layers for fused ones, in place and reversibly.

`accelerate` changes the class of a layer and nothing else: parameters, buffers, state-dict keys, hooks and references
to the layer stay. The new class subclasses PEFT's and overrides `forward`, which leaves to PEFT whatever the fused
operations do not compute.
"""

import warnings

from torch import nn

from ....layers.checks import check_module
from ....ops.arguments import check_flag
from ....ops.dispatch import is_routed
from .frozen import FrozenLayer, exchange, exchange_back, exchanged, is_exchanged
from .kinds import Kind, kind_of
from .layer import AcceleratedLayer, is_accelerated
from .report import AccelerationReport
from .sharing import SIBLING, join_siblings


def _why_not(kind: Kind, module: nn.Module, unused: dict[int, str]) -> str | None:
    """Reason to leave a layer of PEFT's alone, None if its class can be exchanged."""
    of_module = type(module)
    if kind.fused_class(of_module) is None:
        if isinstance(module, AcceleratedLayer) or hasattr(module, "set_reshard_after_forward"):
            return f"{of_module.__name__}: another library replaced the class (FSDP2 does); accelerate before sharding"
        return f"{of_module.__module__}.{of_module.__qualname__} has no fused form"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance, so that a new class would not be used"
    return unused.get(id(module)) or kind.why_not(module)


def accelerate(model: nn.Module, *, group: bool = True, frozen: bool = True) -> AccelerationReport:
    """Make the LoRA linear layers of a PEFT model run on peft_fused's operations, in place.

    group: layers of one parent that receive the same tensor, such as the projections to queries, keys and values, share
    one pass over it, forward and backward; see sharing.py. False parts those that an earlier call grouped.
    frozen: linear layers that are not trained have their fp32 products in oneDNN on a CPU that MKL is slow on, as
    adapted layers have theirs; see frozen.py. False gives those of an earlier call torch's own back.

    Works on any module tree, before or after training steps, optimizer construction or `load_adapter`; layers that are
    added later need another call, which leaves the swapped ones alone. Second derivatives and forward-mode
    differentiation raise; they need `restore` first. Warns where no layer of the model is accelerated, layers of our
    own methods included. Raises TypeError if model is not a torch.nn.Module, or group or frozen not a bool.
    """
    check_module("accelerate: model", model)
    check_flag("accelerate: group", group)
    check_flag("accelerate: frozen", frozen)
    if not frozen:
        _changed(model, FrozenLayer, "accelerate: frozen=False")
    report, layers = AccelerationReport(), {}
    for name, module in model.named_modules():
        if (kind := kind_of(type(module))) is not None:
            layers.setdefault(kind, {})[name] = module
        elif is_routed(module):  # a layer of our methods, which is fused as it is
            report.own.append(name or "(the model itself)")
    for kind, of_kind in layers.items():
        report.kinds.append(kind.name)
        unused = kind.unused(list(of_kind.values()))
        for name, module in of_kind.items():
            if is_accelerated(module):
                report.already.append(name)
            elif reason := _why_not(kind, module, unused):
                report.skipped[name] = reason
                continue
            else:
                module.__class__ = kind.fused_class(type(module))
                report.swapped.append(name)
            if reasons := module.explain_route()[1]:
                report.slower[name] = "; ".join(reasons)
    report.groups = join_siblings(model, is_accelerated, group)
    if not frozen:
        exchange_back(model)
    elif layers or report.own:
        exchange(model)
    report.frozen = exchanged(model)
    if not report.swapped and not report.already and not (report.own and report.frozen):
        warnings.warn(str(report), stacklevel=2)
    return report


def _changed(model: nn.Module, ours: type | tuple[type, ...], caller: str) -> list[tuple[str, nn.Module]]:
    """The layers of a model of our classes, with their names. RuntimeError if one cannot have its own class back."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, ours)]
    for name, module in found:
        if not (is_accelerated(module) or is_exchanged(module)):
            raise RuntimeError(f"{caller}: {name!r} is now a {type(module).__qualname__}; undo that change first")
        if "forward" in module.__dict__:
            raise RuntimeError(f"{caller}: the forward of {name!r} was replaced on the instance; undo that first")
    return found


def restore(model: nn.Module) -> list[str]:
    """Undo `accelerate`: give every layer its own class back. Returns the names of the layers changed.

    Raises TypeError if model is not a torch.nn.Module, and RuntimeError, before changing anything, if another library
    has since replaced the class or the forward of such a layer.
    """
    check_module("restore: model", model)
    changed = _changed(model, (AcceleratedLayer, FrozenLayer), "restore")
    exchange_back(model)
    for _, module in changed:
        if isinstance(module, AcceleratedLayer):
            module.__class__ = module.peft_class
            module.__dict__.pop(SIBLING, None)
    return [name for name, _ in changed]


def explain_left(module: nn.Module, rows: int) -> tuple[str, list[str]] | None:
    """What `peft_fused.explain` says of a layer of PEFT's that is not accelerated, None for other modules."""
    kind = kind_of(type(module))
    if kind is None:
        return None
    reason = _why_not(kind, module, {}) or "peft_fused.accelerate has not been called on it"
    return "PEFT's own forward", [f"{kind.ops}: {reason}"]
