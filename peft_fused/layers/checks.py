"""Checks of the arguments that adapter layers and their configurations share."""

import math

import torch
from torch import nn

from ..triton_kernels.plan import MAX_RANK


def check_rank(name: str, value, most: int = MAX_RANK) -> int:
    """The value, if it is an int in 1..most. TypeError or ValueError naming it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not 1 <= value <= most:
        raise ValueError(f"{name} must be in 1..{most}, got {value}")
    return value


def check_alpha(name: str, value) -> float:
    """The value, if it is a finite number. TypeError or ValueError naming it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return value


def check_dropout(name: str, value) -> float:
    """The value, if it is a number in [0, 1). TypeError or ValueError naming it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return value


def check_int(name: str, value, least: int = 0) -> int:
    """The value, if it is an int of at least `least`. TypeError or ValueError naming it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def check_adapter_dtype(name: str, value, base: torch.dtype) -> torch.dtype:
    """The dtype of adapters on a base layer of dtype `base`: its own or float32, which is the default.

    TypeError or ValueError naming it otherwise.
    """
    wide = torch.promote_types(base, torch.float32)
    if value is None:
        return wide
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype or None, got {value!r}")
    if value not in (base, wide):
        allowed = " or ".join(dict.fromkeys((str(base), str(wide))))
        raise ValueError(f"{name} must be {allowed} on a base layer of {base}, got {value}")
    return value


def check_flag(name: str, value) -> bool:
    """The value, if it is a bool. TypeError naming it otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_choice(name: str, value, allowed: tuple[str, ...]) -> str:
    """The value, if it is one of the allowed strings. ValueError naming it otherwise."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def is_conv1d(module: nn.Module) -> bool:
    """Whether the module is transformers' Conv1D, a linear layer that stores its weight as [in, out]."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__ == "Conv1D"
        and hasattr(module, "nf")
        and isinstance(weight, torch.Tensor)
        and weight.dim() == 2
    )


def check_linear(name: str, module) -> nn.Module:
    """The module, if it is a torch.nn.Linear or a transformers Conv1D with a dense floating-point weight.

    TypeError naming what it is otherwise.
    """
    allowed = "torch.nn.Linear or transformers' Conv1D"
    if not isinstance(module, nn.Module) or not (isinstance(module, nn.Linear) or is_conv1d(module)):
        raise TypeError(f"{name} must be a {allowed}, got {type(module).__name__}")
    weight = module.weight
    plain = weight.is_floating_point() and weight.dim() == 2 and weight.layout == torch.strided
    if not plain or (isinstance(module, nn.Linear) and weight.shape != (module.out_features, module.in_features)):
        raise TypeError(
            f"{name} must be a {allowed} with a dense floating-point weight, got {type(module).__name__} with a weight "
            f"of {weight.dtype} {list(weight.shape)}; quantised layers are supported through the PEFT integration"
        )
    return module
