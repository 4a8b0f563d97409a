"""What of an input, a base layer and an adapter the fused operations take, and why they do not take the rest.

Everything is looked up again on every call: parameters get replaced (FSDP, hotswap), so do classes (parametrizations),
and adapters come and go, none of which a cache would notice. `_modules` and `_parameters` are read directly because
attribute access through nn.Module costs about ten times as much.
"""

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from transformers.pytorch_utils import Conv1D

from ..tuner import is_hooked

# Anything else (DTensor, quantised or fake tensors) has a dispatch of its own, which operations on raw storage bypass.
PLAIN_TENSORS = (torch.Tensor, nn.Parameter)
_HALF = (torch.bfloat16, torch.float16)
_DTYPES = (torch.float32, *_HALF, torch.float64)

# What autograd.Function asks before it refuses to run below torch.func; there is no public name for it.
_functorch_active = torch._C._are_functorch_transforms_active


def against_input(x: torch.Tensor) -> str | None:
    """Why no fused operation can take x as things are, None if one can."""
    if type(x) not in PLAIN_TENSORS:
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
    return None


def base_operands(base: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None] | str:
    """(weight [N, K], bias) of a base layer that is exactly x W^T + bias, or a str: why it has to be called."""
    kind = type(base)
    if kind is not nn.Linear and kind is not Conv1D:
        return f"the base layer is a {kind.__name__}, not a torch.nn.Linear"
    if is_hooked(base):
        return "the base layer carries hooks or a replaced forward"
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if type(weight) not in PLAIN_TENSORS:
        return f"the base weight is a {type(weight).__name__}, not a plain parameter"
    if weight.dtype != x.dtype and not _mixes(x, weight.dtype):
        return f"the base weight is {weight.dtype} and x {x.dtype}"
    if bias is not None and (bias.dtype != weight.dtype or type(bias) not in PLAIN_TENSORS):
        return f"the base bias is a {type(bias).__name__} of {bias.dtype} beside a weight of {weight.dtype}"
    return (weight if kind is nn.Linear else weight.t()), bias


def _mixes(x: torch.Tensor, other: torch.dtype) -> bool:
    """Whether autocast is on and brings x and a parameter of another dtype together: all but float64 are cast."""
    return torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, other)


def casts(to_adapter: bool, x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether an adapter of another dtype than x's is defined for PEFT and for the fused operations.

    to_adapter: the layer's `cast_input_dtype_enabled`.
    """
    return (to_adapter and dtype == torch.float32 and x.dtype in _HALF) or _mixes(x, dtype)


def drop_probability(dropout: nn.Module) -> float | None:
    """The probability with which it drops at present, None if it is not what the fused operations do."""
    if type(dropout) is nn.Identity:
        return 0.0
    if type(dropout) is nn.Dropout and not dropout.inplace and dropout.p < 1.0:
        return dropout.p if dropout.training else 0.0
    return None


def is_scale(scale, device: torch.device) -> bool:
    """Whether the fused operations take it for a constant factor on a device."""
    if isinstance(scale, torch.Tensor):  # PEFT's hotswap preparation makes them tensors
        return (
            type(scale) is torch.Tensor
            and scale.dim() == 0
            and scale.is_floating_point()
            and not scale.requires_grad
            and scale.device == device
        )
    return isinstance(scale, int | float) and not isinstance(scale, bool)
