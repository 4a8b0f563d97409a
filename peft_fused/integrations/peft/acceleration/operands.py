"""What of an input and an adapter the fused operations take, and why they do not take the rest: see also base.py."""

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from ..base import PLAIN_TENSORS

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


def against_base(weight: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> str | None:
    """Why a base layer of these has to be called for x because of their types, None if it need not be."""
    if weight.dtype != x.dtype and not _autocast_joins(x, weight.dtype):
        return f"the base weight is {weight.dtype} and x {x.dtype}"
    if bias is not None and bias.dtype != weight.dtype:
        return f"the base bias is {bias.dtype} beside a weight of {weight.dtype}"
    return None


def _autocast_joins(x: torch.Tensor, other: torch.dtype) -> bool:
    """Whether autocast is on and brings x and a parameter of another type together: all floating types but float64."""
    return torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, other)


def casts(to_adapter: bool, x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether an adapter of another dtype than x's is defined for PEFT and for the fused operations.

    to_adapter: the layer's `cast_input_dtype_enabled`.
    """
    return (to_adapter and dtype == torch.float32 and x.dtype in _HALF) or _autocast_joins(x, dtype)


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
