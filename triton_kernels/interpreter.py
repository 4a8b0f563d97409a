"""Triton's interpreter (TRITON_INTERPRET=1) with a bf16 that is right, or refused.

The interpreter keeps bf16 numbers as integers of 16 bits. Moving them about is right all the same. But a product
multiplies the integers, a sum adds them, and a conversion truncates, all without a word. After `install` a product
widens its operands, which is exact, a conversion rounds to nearest even, and any other arithmetic on bf16 raises.
"""

from functools import cache, wraps

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

CASTS = ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc", "int_cast")
MOVES = (
    "load", "store", "masked_load", "masked_store", "tensor_pointer_load", "tensor_pointer_store", "descriptor_load",
    "descriptor_store", "descriptor_gather", "descriptor_scatter", "bitcast", "select", "reshape", "trans", "gather",
    "expand_dims", "broadcast", "cat", "join", "split", "splat", "unsplat", "print",
)  # fmt: skip


def is_bf16(value) -> bool:
    """Of a handle, or of a type that the interpreter is given as an argument."""
    kind = value.dtype if isinstance(value, TensorHandle) else value
    return isinstance(kind, tl.dtype) and kind.scalar == tl.bfloat16


def widened(handle: TensorHandle) -> TensorHandle:
    if not is_bf16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def rounded(data: np.ndarray) -> TensorHandle:
    wide = np.asarray(data, dtype=np.float32)
    if data.dtype != np.float32 and not np.array_equal(wide, data, equal_nan=True):
        raise NotImplementedError(f"{data.dtype} to bfloat16 in the interpreter: it would be rounded twice")
    bits = wide.view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # a tie goes to the even one
    # Rounding would carry some NaNs over to a number; the highest bit of the fraction keeps any of them a NaN.
    return TensorHandle(np.where(np.isnan(wide), bits >> 16 | 0x40, nearest).astype(np.uint16), tl.bfloat16)


def _refusing(function, name: str):
    @wraps(function)
    def checked(self, *arguments, **options):
        if any(map(is_bf16, (*arguments, *options.values()))):
            raise NotImplementedError(f"{name} of bfloat16 in the interpreter: it would take the numbers for integers")
        return function(self, *arguments, **options)

    return checked


def _refusing_inputs(function):
    @wraps(function)
    def checked(self, inputs):
        if any(is_bf16(tensor.handle) for tensor in inputs):
            raise NotImplementedError("a sum or a scan of bfloat16 in the interpreter: it would add integers")
        return function(self, inputs)

    return checked


@cache
def install() -> None:
    """For all kernels of the process, and for good. A second call changes nothing."""
    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def dot(self, a, b, *more):
        return create_dot(self, widened(a), widened(b), *more)

    def cast(self, source, kind):
        if not is_bf16(kind):
            return cast_impl(self, widened(source), kind)
        return source if is_bf16(source) else rounded(source.data)

    # What Triton may add to the interpreter is refused, because it is not among what is known to be right.
    known = {f"create_{name}" for name in ("dot", *CASTS, *MOVES)}
    for name, function in list(vars(InterpreterBuilder).items()):
        if name.startswith("create_") and name not in known:
            setattr(InterpreterBuilder, name, _refusing(function, name.removeprefix("create_")))
    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = dot, cast
    for kind in (ReduceOps, ScanOps):
        kind.apply_impl = _refusing_inputs(kind.apply_impl)
