"""Products with Toeplitz matrices, constant along their diagonals.

    toeplitz:          T[i, j] = col[i - j] for i >= j, else row[j - i]; symmetric for toeplitz(x, t, t)
    toeplitz_product:  T(b) T(a) x with both symmetric, the form that SURM trains; itself no Toeplitz matrix

An N x K Toeplitz matrix is a window of a circulant one of any length from N + K - 1 on, so that T x is a circular
convolution of x padded with zeros. Source: SURM (Sehanobish et al. 2024), section 3. Gradients: dx is the product with
the transposed matrix, toeplitz(dy, row, col); the vectors' are sums along the diagonals of dy^T x.
"""

import torch

from . import engine
from .engine import check_input


def plain_toeplitz(x, col, tail, n):
    """tail: the first row without its first entry, which is col[0]."""
    length = col.shape[0] + tail.shape[0]
    window = torch.cat([col, tail.flip(0)])
    return torch.fft.irfft(torch.fft.rfft(x, n=length) * torch.fft.rfft(window), n=length)[..., :n]


def _plain_product(x, a, b, n):
    return plain_toeplitz(plain_toeplitz(x, a, a[1:], n), b, b[1:], n)


def toeplitz_matmul(x, col, row, *, add=None, scale=1.0, dropout_p=0.0, seed=None, transposed=False):
    """add + scale * T(col, row) drop(x), differentiable in x, col, row and add.

    x: [..., K]; col: [N], the first column; row: [K], the first row. Both hold the corner: col[0] wins, row[0] is not
    read and its gradient is zero. Pass the same tensor twice for a symmetric matrix. Rectangular maps are native.
    add: [..., N]. The rest: see `circulant_matmul`. transposed: x [..., N] gives [..., K].
    """
    return engine.run(
        "toeplitz", x, col, _tail_of(row), add=add, scale=scale, dropout_p=dropout_p, seed=seed, transposed=transposed
    )


def _tail_of(row):
    engine.check_parameter("row", row, (1,), "[K]")
    return row[1:]


def toeplitz_tail(x, col, tail, *, add=None, scale=1.0, dropout_p=0.0, seed=None, transposed=False):
    """`toeplitz_matmul` by exactly its N + K - 1 entries: tail [K - 1] is the first row without the corner.

    A tail that is a parameter, which `row[1:]` is not, lets a dense matrix made of it be kept.
    """
    return engine.run(
        "toeplitz", x, col, tail, add=add, scale=scale, dropout_p=dropout_p, seed=seed, transposed=transposed,
        names=("col", "tail"),
    )  # fmt: skip


def _toeplitz_outputs(x, col, tail, out_features, transposed, names) -> int:
    engine.check_parameter("col", col, (1,), "[N]")
    engine.check_tensor("tail", tail)
    if tail.dim() != 1:
        raise ValueError(f"tail must have shape [K - 1], got {list(tail.shape)}")
    n, k = col.shape[0], tail.shape[0] + 1
    columns = "1 + the length of tail" if names[1] == "tail" else "the length of row"
    check_input(x, n if transposed else k, "the length of col" if transposed else columns)
    return k if transposed else n


def toeplitz_matmul_reference(x, col, row, **options):
    """`toeplitz_matmul` written down in plain PyTorch, differentiated by autograd. Same arguments, same result."""
    return engine.reference("toeplitz", x, col, _tail_of(row), **options)


def toeplitz_product_matmul(x, a, b, *, add=None, scale=1.0, dropout_p=0.0, seed=None, transposed=False):
    """add + scale * T(b) T(a) drop(x), T(t) = toeplitz(., t, t), differentiable in x, a, b and add.

    x: [..., n]; a, b: [n]. T(a) comes first. On Triton both products are one kernel, whose intermediate never leaves
    the chip. The rest: see `circulant_matmul`.
    """
    return engine.run(
        "toeplitz_product", x, a, b, add=add, scale=scale, dropout_p=dropout_p, seed=seed, transposed=transposed
    )


def _product_outputs(x, a, b, out_features, transposed, names) -> int:
    engine.check_parameter("a", a, (1,), "[n]")
    engine.check_parameter("b", b, (1,), "[n]")
    if a.shape != b.shape:
        raise ValueError(f"b must have a's shape {list(a.shape)}, got {list(b.shape)}")
    check_input(x, a.shape[0], "the length of a and b")
    return a.shape[0]


def toeplitz_product_matmul_reference(x, a, b, **options):
    """`toeplitz_product` written down in plain PyTorch, differentiated by autograd. Same arguments, same result."""
    return engine.reference("toeplitz_product", x, a, b, **options)


engine.register("toeplitz", ("col", "row"), plain_toeplitz, _toeplitz_outputs)
engine.register("toeplitz_product", ("a", "b"), _plain_product, _product_outputs)
