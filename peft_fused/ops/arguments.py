"""What the ops share in reading their arguments: checks that name the argument, what was given and what is allowed."""

import sys

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

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


def is_watched(*tensors) -> bool:
    """Whether somebody has to see one operation: who traces, or records for a second run as selective checkpointing
    does, or a tensor of a subclass; and torch.func differentiates nothing else."""
    return (
        is_recorded()
        or any(map(is_subclass, tensors))
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )


def seed_tensor(seed, device):
    if seed is None:
        return draw_seed(device)
    # Filled there rather than copied to the device, for which the host would wait.
    return seed if isinstance(seed, torch.Tensor) else torch.full((), seed, dtype=torch.int64, device=device)


def lazy(*values) -> bool:
    """Whether the values of one of these tensors are others than those in its memory: negated by a bit, or zeros
    without memory.

    Kernels, and whoever else takes a data pointer, see the memory. A compiled call goes through torch's dispatcher,
    which writes such values out; no real number has the conjugate bit.
    """
    if torch.compiler.is_compiling():
        return False
    return any(isinstance(value, torch.Tensor) and (value.is_neg() or value._is_zerotensor()) for value in values)


def resolved(value):
    """The value, as a tensor whose memory holds it if it is a lazy one."""
    if not lazy(value):
        return value
    return value.clone() if value._is_zerotensor() else value.resolve_neg()


def pair_of(name, value) -> tuple:
    """(first, second) of a value for both or a pair of them. ValueError, naming it, for another number of values."""
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"{name} must be an index or a pair of them, got {len(pair)} values")
    return pair


def check_dense(name, tensor):
    """ValueError unless a tensor is dense and initialised; asked first, because a shape is more than others have."""
    if not torch.compiler.is_compiling() and is_lazy(tensor):
        raise ValueError(f"{name} must be initialised, got an {type(tensor).__name__}: run the module's forward first")
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else tensor.layout
        raise ValueError(f"{name} must be a dense (strided) tensor, got layout {layout}")


def check_memory(name, tensor):
    """ValueError where a tensor's storage was freed or is too short for it; nothing to say of what has none."""
    if torch.compiler.is_compiling() or is_subclass(tensor) or tensor.is_meta or lazy(tensor):
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or tensor.numel() == 0:
        return
    if tensor.is_contiguous():
        last = tensor.numel()
    else:
        last = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if (tensor.storage_offset() + last) * tensor.itemsize > tensor.untyped_storage().nbytes():
        raise ValueError(f"{name} must lie in memory, got {describe(tensor)}, whose storage was freed or is too small")


def check_derivative(op):
    """RuntimeError where the backward of an op is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"peft_fused: the {op} op has no second derivative; use_backend('reference') has one")


def saved_tensors(ctx, names):
    """What a forward saved, the first of it by these names. ValueError where the memory of one was freed since,
    RuntimeError where the values of one were changed."""
    if torch.compiler.is_compiling():  # no graph holds an exception's text, or memory
        return ctx.saved_tensors
    try:
        saved = ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            "peft_fused: a tensor that backward reads, an input or a parameter, was changed in place after the forward "
            "pass. Of an input write h = h + y in place of h += y; of a parameter, run backward before it is changed. "
            f"autograd says: {error}"
        ) from None
    for name, tensor in zip(names, saved, strict=False):
        if tensor is not None:
            check_memory(name, tensor)
    return saved


def check_beside(name, tensor, x, x_name="x"):
    """TypeError where a tensor subclass that is more than a name stands beside an x without it, or the reverse."""
    if torch.compiler.is_compiling():
        return
    if isinstance(x, FakeTensor) and not isinstance(tensor, FakeTensor) and not x.fake_mode.allow_non_fake_inputs:
        raise TypeError(f"{name} must be a fake tensor beside a fake {x_name}, got a {type(tensor).__name__}")
    more = isinstance(tensor, FakeTensor) or (is_subclass(tensor) and is_traceable_wrapper_subclass(tensor))
    if more and not is_subclass(x):
        raise TypeError(f"{name} must be a plain tensor beside a plain {x_name}, got a {type(tensor).__name__}")


def check_kept(**tensors):
    """ValueError, naming it, for an inference tensor among those that backward is to read (None: not read)."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.is_inference():
            raise ValueError(
                f"{name} must not be an inference tensor where backward reads it: pass {name}.clone(), made outside of "
                "inference mode"
            )


def dtype_names(dtypes):
    return " or ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def describe(tensor):
    return f"{dtype_names((tensor.dtype,))} {list(tensor.shape)} on {tensor.device}"


def check_shape(name, tensor, shape, text):
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {text} = {list(shape)}, got {list(tensor.shape)}")


def check_flag(name: str, value) -> bool:
    """The value, if it is a bool. TypeError naming it otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    return value


def check_scale(scale, x):
    """A number that is finite in the type of the op's sums, or a 0-d floating-point tensor."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    check_control("scale", scale, x.device, most=torch.finfo(wide).max, integer=False)


def check_control(name, value, device, least=0, most=None, *, integer=True):
    """An integer in least..most, or a number of a size of `most` at most, or a 0-d tensor of it, whose value is read
    only where that is free."""
    if isinstance(value, torch.Tensor):
        check_dense(name, value)
        check_memory(name, value)
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
    # false for nan, and for ints that no float can hold
    if not integer and not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} must be finite, got {value}")
    if not integer and most is not None and abs(value) > most:
        raise ValueError(f"{name} must be at most {most:.5g} in size, got {value}")


def check_dropout(dropout_p, seed, device):
    """A probability in [0, 1), and a seed that is None, an int or a 0-d int64 tensor on the device."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, int | float):
        raise TypeError(f"dropout_p must be a number, got {type(dropout_p).__name__}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if isinstance(seed, torch.Tensor):
        check_dense("seed", seed)
        check_memory("seed", seed)
        if seed.dim() != 0 or seed.dtype != torch.int64 or seed.device != device:
            raise ValueError(f"seed must be a 0-d int64 tensor on {device}, got {describe(seed)}")
    elif seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed must be an int, a 0-d int64 tensor or None, got {type(seed).__name__}")
    elif seed is not None and not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
