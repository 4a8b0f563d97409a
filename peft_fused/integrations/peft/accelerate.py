"""Runs the LoRA linear layers of a PEFT model on fused operations, in place and reversibly.

`accelerate` changes the class of a layer and nothing else: parameters, buffers, state-dict keys, hooks and references
to the layer stay. The new class subclasses PEFT's, overrides `forward` only, and there leaves to PEFT whatever is not
the plain sum base(x) + scale * B(A(dropout(x))).
"""

import importlib
import logging
import warnings
from dataclasses import dataclass, field

import torch
from peft.tuners.lora.layer import Linear, LoraLayer, MultiheadAttention
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from transformers.pytorch_utils import Conv1D

from ...layers.checks import check_module
from ...ops import lowrank_adapter, lowrank_linear, native
from ...ops.dispatch import explainers, first_of
from ...ops.lowrank import MAX_RANK, LowRankProblem, lowrank_problem
from .quantised import unpack
from .tuner import is_hooked

__all__ = ["AccelerationReport", "FusedLoraLinear", "accelerate", "restore"]

logger = logging.getLogger("peft_fused")

# Anything else (DTensor, quantised or fake tensors) has a dispatch of its own, which operations on raw storage bypass.
_PLAIN_TENSORS = (torch.Tensor, nn.Parameter)
_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, *_HALF, torch.float64)


# What autograd.Function asks before it refuses to run below torch.func; there is no public name for it.
_functorch_active = torch._C._are_functorch_transforms_active


def _mixes(x: torch.Tensor, other: torch.dtype) -> bool:
    """Whether autocast is on and brings x and a parameter of another dtype together: all but float64 are cast."""
    return torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, other)


def _base_operands(base: nn.Module, x: torch.Tensor):
    """(weight [N, K], bias) of a base layer that is exactly x W^T + bias, or a str: why it has to be called."""
    kind = type(base)
    if kind is not nn.Linear and kind is not Conv1D:
        return f"the base layer is a {kind.__name__}, not a torch.nn.Linear"
    if is_hooked(base):
        return "the base layer carries hooks or a replaced forward"
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if type(weight) not in _PLAIN_TENSORS:
        return f"the base weight is a {type(weight).__name__}, not a plain parameter"
    if weight.dtype != x.dtype and not _mixes(x, weight.dtype):
        return f"the base weight is {weight.dtype} and x {x.dtype}"
    if bias is not None and (bias.dtype != weight.dtype or type(bias) not in _PLAIN_TENSORS):
        return f"the base bias is a {type(bias).__name__} of {bias.dtype} beside a weight of {weight.dtype}"
    return (weight if kind is nn.Linear else weight.t()), bias


_said = set()


def _say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        logger.warning("peft_fused: an accelerated layer takes PEFT's own forward: %s", reason)


class _FusedForward:
    """`forward` for PEFT's LoRA linear classes; stands before the PEFT class among the bases of a fused class.

    Everything is looked up again on every call: parameters get replaced (FSDP, hotswap), so do classes
    (parametrizations), and adapters come and go, none of which a cache would notice. `_modules` and `_parameters` are
    read directly because attribute access through nn.Module costs about ten times as much.
    """

    peft_class: type[LoraLayer]

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """As PEFT's. Raises what the fused operations and the base layer raise on inputs that do not fit."""
        # Arguments mean a mixed batch, activated LoRA or a base layer that takes more than x: PEFT's rules apply.
        if args or kwargs or self._disable_adapters or self.merged_adapters:
            return super().forward(x, *args, **kwargs)
        adapters = self._active_operands(x)
        if type(adapters) is str:
            if not torch.compiler.is_compiling():
                _say_once(adapters)
            return super().forward(x)
        if not adapters:
            return super().forward(x)

        base = self._modules["base_layer"]
        operands = _base_operands(base, x)
        if type(operands) is str:
            y = base(x)
            for A, B, extra, scale, p in adapters:
                y = _add_adapter(y, x, A, B, extra, scale, p)
            return y

        weight, bias = operands
        for _, _, extra, scale, _ in adapters:
            if extra is not None:
                bias = (scale * extra if bias is None else bias + scale * extra).to(weight.dtype)
        A, B, _, scale, p = adapters[0]
        y = lowrank_linear(x, weight, bias, A, B, scale=scale, dropout_p=p)
        for A, B, _, scale, p in adapters[1:]:
            y = lowrank_adapter(x, A, B, add=y, scale=scale, dropout_p=p)
        return y

    def _active_operands(self, x: torch.Tensor):
        """[(A, B, bias of B, scale, dropout probability)] of the active adapters, in order.

        Or a str: the reason why x and these adapters need PEFT's forward.
        """
        if type(x) not in _PLAIN_TENSORS:
            return f"x is a {type(x).__name__}, not a plain tensor"
        if not (x.is_cuda or x.is_cpu):
            return f"x is on {x.device.type}; the fused operations run on cpu and cuda"
        if x.dtype not in _DTYPES:
            return f"x is {x.dtype}; the fused operations take floating-point inputs"
        if x.layout is not torch.strided or x.is_nested:
            return f"x is {'nested' if x.is_nested else x.layout}; the fused operations take dense inputs"
        if _functorch_active():
            return "a torch.func transform is active"
        if torch.jit.is_tracing():
            return "torch.jit is tracing, which would fix the input's shape"
        if _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks:
            return "global module hooks are registered, which have to see every module called"
        modules, active = self._modules, self._active_adapter
        downs, ups, dropouts = modules["lora_A"]._modules, modules["lora_B"]._modules, modules["lora_dropout"]._modules
        operands = []
        for name in (active,) if isinstance(active, str) else active:
            if name in downs:
                found = self._adapter_operands(name, downs[name], ups[name], dropouts[name], x)
                if type(found) is str:
                    return f"adapter {name!r}: {found}"
                operands.append(found)
        return operands

    def _adapter_operands(self, name: str, down: nn.Module, up: nn.Module, dropout: nn.Module, x: torch.Tensor):
        """One element of `_active_operands`, or the reason against it."""
        if name in self.lora_variant:
            return f"it is a variant ({type(self.lora_variant[name]).__name__})"
        if type(down) is not nn.Linear or type(up) is not nn.Linear:
            return f"lora_A and lora_B are {type(down).__name__} and {type(up).__name__}, not torch.nn.Linear"
        if type(dropout) is nn.Identity:
            p = 0.0
        elif type(dropout) is nn.Dropout and not dropout.inplace and dropout.p < 1.0:
            p = dropout.p if dropout.training else 0.0
        else:
            return f"lora_dropout is {dropout}; fused are Identity() and Dropout(p < 1, inplace=False)"
        if is_hooked(down) or is_hooked(up) or is_hooked(dropout):
            return "lora_A, lora_B or lora_dropout carries hooks or a replaced forward"
        of_down, of_up = down._parameters, up._parameters
        A, B = of_down.get("weight"), of_up.get("weight")
        if type(A) not in _PLAIN_TENSORS or type(B) not in _PLAIN_TENSORS:
            return f"its weights are {type(A).__name__} and {type(B).__name__}, not plain parameters"
        if of_down["bias"] is not None:
            return "lora_A has a bias"
        dtype = A.dtype
        if B.dtype != dtype:
            return f"lora_A is {dtype}, lora_B {B.dtype}"
        if dtype != x.dtype and not self._casts(x, dtype):
            return f"it is {dtype}, x {x.dtype}" + ("" if self.cast_input_dtype_enabled else ", casting is disabled")
        if A.size(0) > MAX_RANK:
            return f"its rank is {A.size(0)}; the fused operations take ranks up to {MAX_RANK}"
        scale = self.scaling[name]
        if type(scale) is not float and not _is_scale(scale, x.device):
            return f"its scaling is {scale!r}: neither a number nor a constant 0-d tensor on x's device"
        return A, B, of_up["bias"], scale, p

    def _casts(self, x: torch.Tensor, dtype: torch.dtype) -> bool:
        """Whether adapters of another dtype than x's are defined for PEFT and for the fused operations."""
        to_fp32 = self.cast_input_dtype_enabled and dtype == torch.float32 and x.dtype in _HALF
        return to_fp32 or _mixes(x, dtype)

    def explain_path(self, x: torch.Tensor | None = None) -> tuple[str, list[str]]:
        """(what forward does with x, reasons against each faster way), for the layer as it is now.

        Without x: for an input in the dtype of the base layer, under the autocast state of this call. Parameters that
        are gathered for the forward only (FSDP2) are outside of it what they are there, and reported as such.
        """
        return self._explained(self._typical_input() if x is None else x)[:2]

    def op_problem(self, rows: int) -> LowRankProblem | None:
        """What the first fused op of a forward pass on x [rows, K] is given; None if there is none."""
        return self._explained(self._typical_input().expand(rows, -1))[2]

    def _explained(self, x: torch.Tensor) -> tuple[str, list[str], LowRankProblem | None]:
        if self._disable_adapters:
            return "base layer alone: the adapters are disabled", [], None
        if self.merged_adapters:
            return f"base layer alone: {', '.join(self.merged_adapters)} merged into it", [], None
        adapters = self._active_operands(x)
        if type(adapters) is str:
            return "PEFT's own forward", [f"lowrank, lowrank_linear: {adapters}"], None
        if not adapters:
            return "base layer alone: no active adapter has weights here", [], None
        operands = _base_operands(self._modules["base_layer"], x)
        fused = type(operands) is not str
        A, B, _, _, p = adapters[0]
        problem = lowrank_problem(x, A, B, has_weight=fused, dropout=p > 0)
        if fused:
            return " + ".join(["lowrank_linear"] + ["lowrank"] * (len(adapters) - 1)), [], problem
        path = "base layer called as a module, then " + " + ".join(["lowrank"] * len(adapters))
        return path, [f"lowrank_linear: {operands}"], problem

    def _typical_input(self) -> torch.Tensor:
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if dtype is None or not dtype.is_floating_point:
            # A quantised weight does not tell; half-precision activations go with it.
            dtype = torch.bfloat16
        return torch.empty(1, self.in_features, device=device, dtype=dtype)


def _is_scale(scale, device: torch.device) -> bool:
    if isinstance(scale, torch.Tensor):  # PEFT's hotswap preparation makes them tensors
        return (
            type(scale) is torch.Tensor
            and scale.dim() == 0
            and scale.is_floating_point()
            and not scale.requires_grad
            and scale.device == device
        )
    return isinstance(scale, int | float) and not isinstance(scale, bool)


def _add_adapter(y, x, A, B, extra, scale, p) -> torch.Tensor:
    """y + scale * (B(A(dropout(x))) + extra) in y's dtype, for y from any base layer."""
    dtype, device = x.dtype, x.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    if y.dtype == dtype and type(y) in _PLAIN_TENSORS:
        out = lowrank_adapter(x, A, B, add=y, scale=scale, dropout_p=p)
    else:
        # A base layer that answers in a type of its own decides the type of the sum, as it does in PEFT.
        out = y + lowrank_adapter(x, A, B, scale=scale, dropout_p=p)
    if extra is not None:
        out = out + scale * extra
    return out.to(y.dtype)


class _QuantisedForward(_FusedForward):
    """The same beside a quantised base, which bitsandbytes may have packed for inference on a CPU."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if x.requires_grad:
            unpack(self.get_base_layer())
        return super().forward(x, *args, **kwargs)

    def merge(self, *args, **kwargs) -> None:
        """As PEFT's, of the weight as it was before it was packed."""
        unpack(self.get_base_layer())
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        """As PEFT's; see `merge`."""
        unpack(self.get_base_layer())
        super().unmerge()


class FusedLoraLinear(_FusedForward, Linear):
    """PEFT's `lora.Linear` with a fused forward. Made by `accelerate`, unmade by `restore`, never constructed."""

    peft_class = Linear


# PEFT's classes for quantised bases. Their forwards differ from lora.Linear's in how the base layer is called and in
# casts that `_add_adapter` makes as well; merging, which does differ, is inherited. Most exist only where their library
# is installed, so the fused classes are built when first asked for, by `accelerate` or by unpickling.
_QUANTISED = {
    "FusedLoraLinear8bitLt": ("peft.tuners.lora.bnb", "Linear8bitLt"),
    "FusedLoraLinear4bit": ("peft.tuners.lora.bnb", "Linear4bit"),
    "FusedTorchaoLoraLinear": ("peft.tuners.lora.torchao", "TorchaoLoraLinear"),
    "FusedHqqLoraLinear": ("peft.tuners.lora.hqq", "HqqLoraLinear"),
    "FusedGPTQLoraLinear": ("peft.tuners.lora.gptq", "GPTQLoraLinear"),
    "FusedAwqLoraLinear": ("peft.tuners.lora.awq", "AwqLoraLinear"),
    "FusedAqlmLoraLinear": ("peft.tuners.lora.aqlm", "AqlmLoraLinear"),
    "FusedEetqLoraLinear": ("peft.tuners.lora.eetq", "EetqLoraLinear"),
}
_FUSED_NAMES = {path: name for name, path in _QUANTISED.items()}


def __getattr__(name: str) -> type[_FusedForward]:
    if name not in _QUANTISED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, class_name = _QUANTISED[name]
    peft_class = getattr(importlib.import_module(module), class_name)
    doc = f"PEFT's `{class_name}` with a fused adapter; its base layer is called as a module."
    fused = type(
        name, (_QuantisedForward, peft_class), {"__module__": __name__, "__doc__": doc, "peft_class": peft_class}
    )
    globals()[name] = fused
    return fused


def _fused_class(kind: type) -> type[_FusedForward] | None:
    """The fused class of exactly this PEFT class, None if there is none."""
    if kind is Linear:
        return FusedLoraLinear
    name = _FUSED_NAMES.get((kind.__module__, kind.__qualname__))
    if name is None:
        return None
    fused = globals().get(name) or __getattr__(name)
    return fused if fused.peft_class is kind else None


def _is_accelerated(module: nn.Module) -> bool:
    return isinstance(module, _FusedForward) and _fused_class(module.peft_class) is type(module)


def _why_not(module: LoraLayer, unused: set[int]) -> str | None:
    """Reason to leave a LoRA layer alone, None if its class can be swapped."""
    kind = type(module)
    if _fused_class(kind) is None:
        if isinstance(module, _FusedForward) or hasattr(module, "set_reshard_after_forward"):
            return f"{kind.__name__}: another library replaced the class (FSDP2 does); accelerate before sharding"
        return f"{kind.__module__}.{kind.__qualname__} has no fused form"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance, so that a new class would not be used"
    if id(module) in unused:
        return "the output projection of a lora.MultiheadAttention, which merges it instead of calling it"
    if getattr(module.get_base_layer(), "_hf_tp_plan", None) is not None:
        return "tensor parallel: its inputs and outputs are redistributed by hooks on lora_A and lora_B"
    variants = module.lora_variant
    if variants and all(name in variants for name in module.lora_A):
        return f"LoRA variant: {', '.join(sorted({type(variant).__name__ for variant in variants.values()}))}"
    return None


def _counted(names_by_reason: dict[str, list[str]]) -> list[str]:
    lines = []
    for reason, names in names_by_reason.items():
        shown = first_of([name or "(the model itself)" for name in names])
        lines.append(f"    {len(names)}: {reason} [{shown}]")
    return lines


def _group(reasons: dict[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    return groups


@dataclass
class AccelerationReport:
    """What `accelerate` did, by module name.

    swapped: layers that it changed. already: layers that an earlier call had changed. skipped: every other LoRA layer,
    with the reason. slower: those of `swapped` and `already` that cannot use the fastest path as they are now, with the
    reason; `explain_path` of a layer gives the same answer at any later time. own: layers of peft_fused's own methods,
    which have nothing to swap.
    """

    swapped: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    slower: dict[str, str] = field(default_factory=dict)
    own: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        total = len(self.swapped) + len(self.already) + len(self.skipped)
        own = f"{len(self.own)} layers of peft_fused's own methods [{first_of(self.own)}] are already fused"
        if not total:
            reason = f"{own}, there is" if self.own else "the model has no LoRA layers,"
            return f"peft_fused.accelerate: {reason} nothing to swap"
        lines = [f"peft_fused.accelerate: {len(self.swapped)} of {total} LoRA layers swapped"]
        if self.own:
            lines.append(f"  {own}")
        if self.already:
            lines.append(f"  accelerated before: {len(self.already)}")
        if self.slower:
            lines.append(f"  accelerated, but not on the fastest path: {len(self.slower)}")
            lines.extend(_counted(_group(self.slower)))
        if self.skipped:
            lines.append(f"  left to PEFT: {len(self.skipped)}")
            lines.extend(_counted(_group(self.skipped)))
        if native.module is None and (self.swapped or self.already):
            lines.append(f"  without the C++ extension ({native.why_missing}), which means {native.COST}")
            if native.not_built:
                lines.append(f"    {native.REMEDY}")
        return "\n".join(lines)


def accelerate(model: nn.Module) -> AccelerationReport:
    """Make the LoRA linear layers of a PEFT model run on peft_fused's operations, in place.

    Works on any module tree, before or after training steps, optimizer construction or `load_adapter`; layers that are
    added later need another call, which leaves the swapped ones alone. Second derivatives and forward-mode
    differentiation raise; they need `restore` first. Warns where no layer of the model is accelerated, layers of our
    own methods included. Raises TypeError if model is not a torch.nn.Module.
    """
    check_module("accelerate: model", model)
    report = AccelerationReport()
    for name, module in model.named_modules():
        if hasattr(type(module), "explain_path") and not isinstance(module, _FusedForward):
            report.own.append(name or "(the model itself)")
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    unused = {id(m.get_base_layer().out_proj) for _, m in layers if isinstance(m, MultiheadAttention)}
    for name, module in layers:
        if _is_accelerated(module):
            report.already.append(name)
        elif reason := _why_not(module, unused):
            report.skipped[name] = reason
            continue
        else:
            module.__class__ = _fused_class(type(module))
            report.swapped.append(name)
        reasons = module.explain_path()[1]
        if reasons:
            report.slower[name] = "; ".join(reasons)
    if not report.swapped and not report.already:
        warnings.warn(str(report), stacklevel=2)
    return report


def restore(model: nn.Module) -> list[str]:
    """Undo `accelerate`: give every layer PEFT's class back. Returns the names of the layers changed.

    Raises TypeError if model is not a torch.nn.Module, and RuntimeError, before changing anything, if another library
    has since replaced the class or the forward of an accelerated layer.
    """
    check_module("restore: model", model)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, _FusedForward)]
    for name, module in layers:
        if not _is_accelerated(module):
            raise RuntimeError(f"restore: {name!r} is now a {type(module).__qualname__}; undo that change first")
        if "forward" in module.__dict__:
            raise RuntimeError(f"restore: the forward of {name!r} was replaced on the instance; undo that first")
    for _, module in layers:
        module.__class__ = module.peft_class
    return [name for name, _ in layers]


def _explain_left(module: nn.Module) -> tuple[str, list[str]] | None:
    """What `peft_fused.explain` says of a LoRA layer that is not accelerated."""
    if not isinstance(module, LoraLayer):
        return None
    reason = _why_not(module, set()) or "peft_fused.accelerate has not been called on it"
    return "PEFT's own forward", [f"lowrank, lowrank_linear: {reason}"]


explainers.append(_explain_left)
