"""Sums as tensor cores make them, for the interpreter, whose own are numpy's: rounded, and in an order of its own.

A tensor core takes a few products at a time, which are exact, and the sum so far. It shifts all of them to the largest
exponent among them, cuts off what then lies below its last bit, adds, and cuts the sum to the 24 bits of fp32. This is
how Fasi et al. 2021 ("Numerical behavior of NVIDIA tensor cores") found an A100's to be; later ones take more products
at a time and keep more bits.
"""

import numpy as np
import triton.language as tl
from peft_fused.triton_kernels.interpreter import widened
from triton._C.libtriton import ir
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

BITS = 25  # of the terms: the 24 of fp32, and one more


def to_tf32(value):
    """Of fp32 numbers the 11 highest bits, rounded to nearest, ties away from zero."""
    return ((value.view(np.uint32).astype(np.uint64) + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32)


def cut(value, exponent):
    """value without what lies below 2 ** exponent."""
    return np.ldexp(np.trunc(np.ldexp(value, -exponent)), exponent)


def summed(a, b, start, at_a_time, bits=BITS):
    """start + a b in fp32, by so many products at a time."""
    a, b, total = (value.astype(np.float64) for value in (a, b, start))
    for k in range(0, a.shape[1], at_a_time):
        products = a[:, k : k + at_a_time, None] * b[None, k : k + at_a_time]
        largest = np.frexp(np.maximum(np.abs(products).max(1), np.abs(total)))[1]
        unit = np.ldexp(1.0, largest - bits)
        total = (np.trunc(products / unit[:, None]).sum(1) + np.trunc(total / unit)) * unit
        total = cut(total, np.frexp(total)[1] - 24)
    return total.astype(np.float32)


def install(patch, bits=BITS):
    """Until the patch is undone products in half precision, and those by three of tf32, are a tensor core's."""
    create_dot = InterpreterBuilder.create_dot

    def dot(self, a, b, start, precision, *more):
        if a.dtype.scalar in (tl.bfloat16, tl.float16):
            return TensorHandle(summed(widened(a).data, widened(b).data, start.data, 8, bits), tl.float32)
        if precision != ir.INPUT_PRECISION.TF32x3:
            return create_dot(self, a, b, start, precision, *more)
        # As Triton splits it: the small products first and from zero, `start` by an addition of its own, which rounds.
        high_a, high_b = to_tf32(a.data), to_tf32(b.data)
        low_a, low_b = to_tf32(a.data - high_a), to_tf32(b.data - high_b)
        found = summed(low_a, high_b, np.zeros_like(start.data), 4, bits)
        found = summed(high_a, low_b, found, 4, bits)
        found = np.where(np.isnan(found), np.float32(0), found)  # where an infinity has no low part
        return TensorHandle(summed(high_a, high_b, found, 4, bits) + start.data, tl.float32)

    patch.setattr(InterpreterBuilder, "create_dot", dot)
