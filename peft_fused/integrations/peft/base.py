"""What may be read of a module in place of calling it, a base layer above all, and where accelerate keeps it.

Everything is looked up again on every call: parameters get replaced (FSDP, hotswap), so do classes (parametrizations),
and adapters come and go, none of which a cache would notice. `__dict__`, `_modules` and `_parameters` are read directly
because attribute access through nn.Module costs up to ten times as much.
"""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

# Anything else (DTensor, quantised or fake tensors) has a dispatch of its own, which operations on raw storage bypass.
PLAIN_TENSORS = (torch.Tensor, nn.Parameter)


def is_hooked(module: nn.Module):
    """Truthy if calling the module may do something that its class's forward does not."""
    # Read from the dictionary because asking a module for an attribute that it lacks costs a microsecond per call.
    state = module.__dict__
    return (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def has_accelerate_hook(module: nn.Module) -> bool:
    """Whether accelerate may hold the module's parameters elsewhere until the module is called."""
    return "_hf_hook" in module.__dict__


def execution_device(module: nn.Module) -> torch.device | None:
    """Where accelerate's hook puts a module's parameters when it is called; None if it does not say."""
    hook = module._hf_hook
    for each in getattr(hook, "hooks", [hook]):
        if (device := getattr(each, "execution_device", None)) is not None:
            return torch.device(device)
    return None


# Classes that are exactly x W^T + bias, and whether they keep W transposed. acceleration/frozen.py has more.
LINEAR: dict[type[nn.Module], bool] = {nn.Linear: False, Conv1D: True}


def base_operands(base: nn.Module) -> tuple[torch.Tensor, torch.Tensor | None] | str:
    """(weight [N, K], bias) of a base layer that is exactly x W^T + bias, or a str: why it has to be called."""
    transposed = LINEAR.get(type(base))
    if transposed is None:
        return f"the base layer is a {type(base).__name__}, not exactly torch.nn.Linear or Conv1D"
    if is_hooked(base):
        return "the base layer carries hooks or a replaced forward, as offloading gives it"
    weight, bias = linear_operands(base, transposed)
    if type(weight) not in PLAIN_TENSORS:
        return f"the base weight is a {type(weight).__name__}, not a plain parameter"
    if bias is not None and type(bias) not in PLAIN_TENSORS:
        return f"the base bias is a {type(bias).__name__}, not a plain parameter"
    return weight, bias


def linear_operands(linear: nn.Module, transposed: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight [N, K], bias) of a linear layer, which keeps W transposed or not."""
    # Something may have put them elsewhere, as DataParallel does. A default of `get` would be looked up always.
    own = linear._parameters
    weight = own["weight"] if "weight" in own else linear.weight  # noqa: SIM401
    bias = own["bias"] if "bias" in own else linear.bias  # noqa: SIM401
    return (weight.t() if transposed else weight), bias
