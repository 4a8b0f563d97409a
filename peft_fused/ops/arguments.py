"""What the ops share in reading their arguments: checks that name the argument, what was given and what is allowed."""

import sys

import torch

from .dropout import draw_seed

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


# Asked here, once: torch.compile of torch 2.11 does not trace the question.
_AUTOCAST_DEVICES = frozenset(
    kind
    for kind in ("cpu", "cuda", "xpu", "hpu", "mps", "mtia", "maia", "xla")
    if torch.amp.is_autocast_available(kind)
)


def autocasts(device_type: str) -> bool:
    return device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)


def is_recorded() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace makes a graph of what runs."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def is_subclass(x) -> bool:
    return type(x) not in (torch.Tensor, torch.nn.Parameter)


def seed_tensor(seed, device):
    if seed is None:
        return draw_seed(device)
    # Filled there rather than copied to the device, for which the host would wait.
    return seed if isinstance(seed, torch.Tensor) else torch.full((), seed, dtype=torch.int64, device=device)


def split(value, kind):
    """(number, tensor or None): the two columns that a control has in the op's schema."""
    return (kind(1), value) if isinstance(value, torch.Tensor) else (kind(value), None)


def check_dense(name, tensor):
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise ValueError(f"{name} must be a dense (strided) tensor, got layout {layout}")


def dtype_names(dtypes):
    return " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def describe(tensor):
    return f"{dtype_names((tensor.dtype,))} {list(tensor.shape)} on {tensor.device}"


def check_shape(name, tensor, shape, text):
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {text} = {list(shape)}, got {list(tensor.shape)}")


def check_control(name, value, device, least=0, most=None, *, integer=True):
    """A number, in least..most for an integer, or a 0-d tensor; a tensor's value is read only where that is free."""
    if isinstance(value, torch.Tensor):
        kind = "integer" if integer else "floating-point"
        fits = value.dtype in _INTEGERS if integer else value.is_floating_point()
        if value.dim() != 0 or not fits:
            raise ValueError(f"{name} must be a number or a 0-d {kind} tensor, got {describe(value)}")
        if value.device != device:
            raise ValueError(f"{name} must be on x's device ({device}), got {value.device}")
        if value.requires_grad:
            raise ValueError(f"{name} must not require a gradient: the op has none for it")
        if device.type != "cpu" or is_subclass(value) or torch.compiler.is_compiling():
            return
        value = value.item()
    elif isinstance(value, bool) or not isinstance(value, int if integer else int | float):
        raise TypeError(
            f"{name} must be {'an int' if integer else 'a number'} or a 0-d tensor, got {type(value).__name__}"
        )
    if integer and most is not None and not least <= value <= most:
        raise ValueError(f"{name} must be in {least}..{most}, got {value}")
    if not integer and not abs(value) <= sys.float_info.max:  # false for nan, and for ints that no float can hold
        raise ValueError(f"{name} must be finite, got {value}")


def check_dropout(dropout_p, seed, device):
    """A probability in [0, 1), and a seed that is None, an int or a 0-d int64 tensor on the device."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, int | float):
        raise TypeError(f"dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if isinstance(seed, torch.Tensor):
        if seed.dim() != 0 or seed.dtype != torch.int64 or seed.device != device:
            raise ValueError(f"seed must be a 0-d int64 tensor on {device}, got {describe(seed)}")
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed must be an int, a 0-d int64 tensor or None, got {type(seed).__name__}")
    elif seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
