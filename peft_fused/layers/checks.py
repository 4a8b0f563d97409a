"""Checks of the arguments that adapter layers and their configurations share."""

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..ops.arguments import FLOATING
from ..ops.arguments import check_flag as check_flag
from ..triton_kernels.tiles import MAX_RANK

# What a number that an adapter computes with may be at most: factors and scales are kept in fp32.
LARGEST = torch.finfo(torch.float32).max
LARGEST_SIZE = torch.iinfo(torch.int32).max


def check_tensor(x) -> None:
    """TypeError for an input of a layer that is no tensor, before anything asks it for what only a tensor has."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")


def check_own_weight(subject: str, module: nn.Module, error: type[Exception] = TypeError, but: str = "") -> None:
    """`error`, beginning with the subject, if a module's weight is computed from other parameters, so that writing to
    it would be undone. but: why that matters.
    """
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        raise error(
            f"{subject} the weight of this {type(module).__name__} is no parameter but computed from others "
            f"(parametrized, as by weight_norm or spectral_norm, or pruned){but}. Make it permanent first: "
            "parametrize.remove_parametrizations, prune.remove"
        )


def check_module(name: str, value) -> nn.Module:
    """The value, if it is a module. TypeError naming it otherwise."""
    if not isinstance(value, nn.Module):
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")
    return value


def check_rank(name: str, value, most: int = MAX_RANK) -> int:
    """The value, if it is an int in 1..most. TypeError or ValueError naming it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not 1 <= value <= most:
        raise ValueError(f"{name} must be in 1..{most}, got {value}")
    return value


def check_alpha(name: str, value) -> float:
    """The value, if it is a number that is finite in fp32. TypeError or ValueError naming it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not abs(value) <= LARGEST:  # false for nan, and for ints that no float can hold
        raise ValueError(f"{name} must be finite in fp32, got {value}")
    return value


def check_dropout(name: str, value) -> float:
    """The value, if it is a number in [0, 1). TypeError or ValueError naming it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return value


def check_size(name: str, value, least: int = 1) -> int:
    """The value, if a size or a number of steps can be it. TypeError or ValueError naming it otherwise."""
    if check_int(name, value, least) > LARGEST_SIZE:
        raise ValueError(f"{name} must be in {least}..{LARGEST_SIZE}, got {value}")
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


def check_choice(name: str, value, allowed: tuple[str, ...]) -> str:
    """The value, if it is one of the allowed strings. ValueError naming it otherwise."""
    if not isinstance(value, str) or value not in allowed:
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
    """The module, if it is a torch.nn.Linear or a transformers Conv1D with a dense weight in fp32, fp16, bf16 or fp64.

    TypeError naming what it is otherwise. Reads only: whoever freezes the module does so after all other checks.
    """
    allowed = "torch.nn.Linear or transformers' Conv1D"
    if not isinstance(module, nn.Module) or not (isinstance(module, nn.Linear) or is_conv1d(module)):
        raise TypeError(f"{name} must be a {allowed}, got {type(module).__name__}")
    weight, bias = module._parameters.get("weight"), module.bias
    check_own_weight(f"{name}:", module)
    shape = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else tuple(weight.shape)
    if not _is_dense(weight, shape):
        raise TypeError(
            f"{name} must be a {allowed} with a dense floating-point weight of its sizes, got {type(module).__name__} "
            f"with a weight that is {_describe(weight)}; quantised layers are supported through the PEFT integration"
        )
    if bias is not None and not _is_dense(bias, shape[:1] if isinstance(module, nn.Linear) else shape[1:]):
        raise TypeError(
            f"{name} must have a dense floating-point bias of its output's size, or none, got {type(module).__name__} "
            f"with a bias that is {_describe(bias)}"
        )
    if weight.is_inference():
        raise TypeError(
            f"{name}: the weight of this {type(module).__name__} was made under torch.inference_mode(), so that "
            "nothing can be trained with it or merged into it; make the layer outside of it"
        )
    return module


def features(module: nn.Module) -> tuple[int, int]:
    """(input, output) features of a module that `check_linear` let pass."""
    n, k = reversed(module.weight.shape) if is_conv1d(module) else module.weight.shape
    return k, n


def span(tensor: torch.Tensor) -> int:
    """How many elements its first and last are apart in memory, both counted."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _is_dense(tensor, shape: tuple[int, ...]) -> bool:
    return (
        isinstance(tensor, torch.Tensor)
        and not is_lazy(tensor)
        and not tensor.is_nested
        and tensor.layout == torch.strided
        and tensor.dtype in FLOATING
        and tuple(tensor.shape) == shape
    )


def _describe(tensor) -> str:
    if not isinstance(tensor, torch.Tensor):
        return f"a {type(tensor).__name__}"
    if is_lazy(tensor):
        return "not initialised yet (run the layer once)"
    if tensor.is_nested:
        return "nested"
    return f"{str(tensor.layout).removeprefix('torch.')} {tensor.dtype} {list(tensor.shape)}"
