"""What every op is made of in PyTorch: rows and blocks of them, products, cast and dropout."""

import math

import torch

from ..triton_kernels.tiles import MAX_RANK
from .dispatch import uses_onednn
from .dropout import drop

# Elements of a block of rows that are converted or dropped out at a time: few enough to bound the temporary memory and
# for a CPU's caches, enough to split over its cores or fill a GPU.
BLOCK_ELEMENTS = {"cpu": 1 << 19}
BLOCK_ELEMENTS_GPU = 1 << 24


def rows(t):
    """[..., K] -> [M, K]; said in full because -1 is undefined where K is 0."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def unview(t, *shape):
    """t in another shape, and not as a view: what a custom function returns may be changed in place later."""
    return torch.ops.aten._unsafe_view(t, shape)


def unflatten(y, x):
    """y [M, N] in x's leading dimensions."""
    return y if x.dim() == 2 else unview(y, *x.shape[:-1], y.shape[1])


def block_rows(columns: int, device: torch.device) -> int:
    """Rows of a block of so many columns."""
    return max(1, BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS_GPU) // max(1, columns))


def blocks(count: int, columns: int, device: torch.device) -> list[tuple[int, int]]:
    """(first, last) of each block of `count` rows."""
    step = block_rows(columns, device)
    return [(i, min(count, i + step)) for i in range(0, count, step)]


def cast_and_drop(x, dtype: torch.dtype, seed: torch.Tensor | None, threshold: int, first_row: int = 0):
    """x [rows, columns] in a dtype and, with a threshold, dropped out."""
    x = x.to(dtype)
    return drop(x, seed, threshold, first_row) if threshold else x


def scaled(x, scale):
    """x * scale, for a number that may be 1 or a tensor."""
    return x if isinstance(scale, float) and scale == 1.0 else x * scale


def base_product(x2, weight, bias):
    """x W^T + bias by oneDNN; None where BLAS is the better library, and accumulates onto the adapter in place.

    A weight that is not dense would run oneDNN's reference code, thousands of times slower.
    """
    if x2.device.type != "cpu" or not (weight.is_contiguous() or weight.t().is_contiguous()):
        return None
    return onednn_product(x2, weight, bias) if uses_onednn(x2.dtype, x2.numel() * weight.shape[0]) else None


def onednn_product(x2, weight, bias):
    """x W^T + bias by oneDNN, of a dense weight. Of a bias it reads the memory, whatever its stride."""
    bias = bias if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x2, weight, bias, "none", [], "")


def product(a, b):
    """a b. oneDNN adds up in one chain where BLAS, on the CPUs that it serves, takes partial sums: for a product of the
    adapter it serves short sums only, which keeps the error BLAS has. The base product is worth more than that."""
    out = base_product(a, b.t(), None) if a.shape[1] <= MAX_RANK else None
    return a @ b if out is None else out


# Splits of K at most: they are longer where there are more terms.
MOST_SPLITS = 32


def split_k_product(a, b, terms):
    """a b. In fp32 on a CPU K is split evenly, into splits of `terms` at most while MOST_SPLITS suffice; elsewhere not.

    MKL on Intel's CPUs adds up 384 terms in one chain, with more error than an FFT, or a sum of short products, has.
    """
    if a.dtype != torch.float32 or a.device.type != "cpu":
        return a @ b
    splits = min(MOST_SPLITS, max(1, math.ceil(a.shape[1] / terms)))
    step = max(1, math.ceil(a.shape[1] / splits))
    out = product(a[:, :step], b[:step])
    for i in range(step, a.shape[1], step):
        out.addmm_(a[:, i : i + step], b[i : i + step])
    return out
