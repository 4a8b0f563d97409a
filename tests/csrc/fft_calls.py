"""The kernels of csrc/kernels/fft.cu as functions of tensors, run by the CPU (cuda_on_host.py), and plain PyTorch's."""

import ctypes
from ctypes import c_bool, c_float, c_int, c_int64, c_uint32, c_void_p

import torch
from cuda_on_host import KERNELS, NUMBERS, ORDERS, THRESHOLD, FloatControl, Unit, in_orders, pointer

from peft_fused.ops.dropout import keep_mask, keep_scale

ENTRIES = """
PEFT_FUSED_ENTRY int run_convolve(const peft_fused::FftConvolveParams& p) {
  return peft_fused::fft_convolve(p, nullptr);
}
PEFT_FUSED_ENTRY int run_correlate(const peft_fused::FftCorrelateParams& p) {
  return peft_fused::fft_correlate(p, nullptr);
}
PEFT_FUSED_ENTRY int run_blocks(int64_t m, int length, int* blocks) {
  return peft_fused::fft_correlate_blocks(m, length, blocks);
}
PEFT_FUSED_ENTRY int run_radices(int length, int* radices, int* count) {
  return peft_fused::fft_radices(length, radices, count) ? cudaSuccess : cudaErrorInvalidValue;
}
PEFT_FUSED_ENTRY int run_twiddles(int length, float* table) {
  return peft_fused::fft_twiddles(length, table) ? cudaSuccess : cudaErrorInvalidValue;
}
"""


class FftConvolveParams(ctypes.Structure):
    _fields_ = (
        [(name, c_void_p) for name in ("x", "add", "y", "khat", "twiddles", "seed")]
        + [(name, c_int64) for name in ("m", "x_row", "add_row", "y_row")]
        + [(name, c_int) for name in ("n_in", "n_out", "length")]
        + [("threshold", c_uint32), ("keep_scale", c_float), ("conjugate", c_bool), ("mask_output", c_bool)]
        + [("scale", FloatControl), ("x_type", c_int), ("y_type", c_int)]
    )


class FftCorrelateParams(ctypes.Structure):
    _fields_ = (
        [(name, c_void_p) for name in ("x", "dy", "dx", "partial", "khat", "twiddles", "seed")]
        + [(name, c_int64) for name in ("m", "x_row", "dy_row", "dx_row")]
        + [(name, c_int) for name in ("n_in", "n_out", "length", "blocks")]
        + [("threshold", c_uint32), ("keep_scale", c_float), ("conjugate", c_bool)]
        + [("scale", FloatControl), ("x_type", c_int), ("dy_type", c_int)]
    )


UNIT = Unit(KERNELS / "fft.cu", ENTRIES, (FftConvolveParams, FftCorrelateParams))
INVALID_VALUE = "^1: "  # how an error of that code begins
ALIKE = ("seed", "scale", "on_device", "twiddles")  # options of both kernels that are no parameters as they are


def radices_of(library, length):
    """Radices of the passes."""
    radices, count = (c_int * 16)(), c_int(-1)
    library("run_radices", length, radices, ctypes.byref(count))
    return radices[: count.value]


def twiddles_of(library, length):
    twiddles = torch.full((max(length, 0),), torch.nan, dtype=torch.complex64)
    library("run_twiddles", length, twiddles)
    return twiddles


def shared_params(library, memory, x, k, seed=None, scale=1.0, on_device=False, twiddles=None):
    """What both kernels are given alike; scale as a number or in memory."""
    length = len(k)
    twiddles = twiddles_of(library, length) if twiddles is None else twiddles
    lent = memory.lend(torch.tensor(float(scale))) if on_device else None
    return {
        "x": pointer(memory.lend(x)),
        "khat": pointer(memory.lend(torch.fft.fft(k))),
        "twiddles": pointer(memory.lend(twiddles)),
        "seed": pointer(memory.lend(None if seed is None else torch.tensor(seed))),
        "m": len(x),
        "x_row": x.stride(0),
        "n_in": x.shape[1],
        "length": length,
        "threshold": THRESHOLD,
        "keep_scale": keep_scale(THRESHOLD),
        "scale": FloatControl(pointer(lent), 99.0 if on_device else scale),
        "x_type": NUMBERS[x.dtype],
    }


def convolve(library, x, k, n_out, *, add=None, dtype=None, layout=(0, 0), in_place=False, orders=ORDERS, **options):
    """y of the kernel; options: conjugate, mask_output, length and those of shared_params."""
    dtype = x.dtype if dtype is None else dtype
    alike = {name: options.pop(name) for name in ALIKE if name in options}

    def run(memory):
        base = memory.lend(add, writable=in_place)
        y = base if in_place else memory.result(len(x), n_out, dtype, n_out + layout[0], layout[1])
        given = {
            "add": pointer(base),
            "y": pointer(y),
            "add_row": 0 if add is None else add.stride(0),
            "y_row": y.stride(0),
            "n_out": n_out,
            "y_type": NUMBERS[dtype],
        }
        params = FftConvolveParams(**{**shared_params(library, memory, x, k, **alike), **given, **options})
        library("run_convolve", ctypes.byref(params))
        return (y,)

    return in_orders(library, run, orders)[0]


def correlate(library, x, dy, k, *, blocks=2, want_dx=True, layout=(0, 0), orders=ORDERS, **options):
    """dx, if wanted, and the partial sums; options: conjugate and those of shared_params."""
    alike = {name: options.pop(name) for name in ALIKE if name in options}

    def run(memory):
        n_in = x.shape[1]
        dx = memory.result(len(x), n_in, x.dtype, n_in + layout[0], layout[1]) if want_dx else None
        partial = memory.result(max(blocks, 1), len(k) // 2 + 1, torch.complex64)
        given = {
            "dy": pointer(memory.lend(dy)),
            "dx": pointer(dx),
            "partial": pointer(partial),
            "dy_row": dy.stride(0),
            "dx_row": dx.stride(0) if want_dx else 0,
            "n_out": dy.shape[1],
            "blocks": blocks,
            "dy_type": NUMBERS[dy.dtype],
        }
        params = FftCorrelateParams(**shared_params(library, memory, x, k, **alike), **given, **options)
        library("run_correlate", ctypes.byref(params))
        return (dx, partial) if want_dx else (partial,)

    return in_orders(library, run, orders)


def kept(t, seed):
    if seed is None:
        return t
    return torch.where(keep_mask(torch.tensor(seed), *t.shape, THRESHOLD), t * keep_scale(THRESHOLD), 0.0)


def plain_convolution(x, k, n_out, dtype=None, *, conjugate=False, mask_output=False, seed=None, add=None, scale=1.0):
    """Plain PyTorch in k's dtype, rounded once to `dtype` if that is another."""
    khat, x = torch.fft.rfft(k), x.to(k.dtype)
    xhat = torch.fft.rfft(x if mask_output else kept(x, seed), len(k))
    y = scale * torch.fft.irfft(xhat * (khat.conj() if conjugate else khat), len(k))[:, :n_out]
    y = kept(y, seed) if mask_output else y
    return (y if add is None else add.to(k.dtype) + y).to(k.dtype if dtype is None else dtype)


def plain_correlation(x, dy, k, dtype=None, *, conjugate=False, seed=None, scale=1.0):
    dx = plain_convolution(dy, k, x.shape[1], dtype, conjugate=not conjugate, mask_output=True, seed=seed, scale=scale)
    xhat, dyhat = (torch.fft.rfft(t, len(k)) for t in (kept(x.to(k.dtype), seed), dy.to(k.dtype)))
    dk = (xhat.conj() * dyhat).sum(0)
    return {"dx": dx, "dk": torch.fft.irfft(dk.conj() if conjugate else dk, len(k))}
