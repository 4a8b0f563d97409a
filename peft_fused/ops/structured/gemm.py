"""The Kronecker map by PyTorch's matrix products, forward and backward.

With X [b2, a2] a row of x and Y [b1, a1] one of dy: y = B X A^T and, summed over rows,

    E = Y A      dX = B^T E      dB = E X^T      dA = Y^T (B X)
"""

import torch

from ..common import cast_and_drop, scaled, split_k_product, unview

# Of the sum in a factor's gradient, that are added up in one chain.
TERMS = 64


def _apply(x2: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """[m, a2 b2] -> [m, a1 b1], all of one type; the product that leaves less to the other one comes first."""
    (a1, a2), (b1, b2), m = A.shape, B.shape, x2.shape[0]
    if b2 * a1 * (a2 + b1) <= b1 * a2 * (b2 + a1):
        right = (x2.reshape(m * b2, a2) @ A.t()).view(m, b2, a1)
        return unview(torch.matmul(B, right), m, b1 * a1)
    left = torch.matmul(B, x2.reshape(m, b2, a2)).view(m * b1, a2)
    return unview(left @ A.t(), m, b1 * a1)


def forward(x2, A, B, add2, *, scale, threshold, seed, transposed) -> torch.Tensor:
    """y [m, n] in x2's type."""
    # Detached, because torch.matmul takes another order of operations for what requires a gradient.
    A, B = A.detach(), B.detach()
    A, B = (A.t(), B.t()) if transposed else (A, B)
    # In half precision a scaled factor may leave the range that the result stays in.
    half = A.dtype.itemsize == 2
    delta = _apply(cast_and_drop(x2, A.dtype, seed, threshold), A if half else A * scale, B)
    if half:
        delta.mul_(scale)
    if add2 is not None:
        delta.add_(add2)
    return delta.to(x2.dtype)


def backward(dy2, x2, A, B, *, scale, threshold, seed, needs):
    """Gradients (dx, dA, dB) of the map that is not transposed, None where not needed; x2 as for the parameters."""
    need_x, need_A, need_B = needs
    A, B = A.detach(), B.detach()
    (a1, a2), (b1, b2), m = A.shape, B.shape, dy2.shape[0]
    Y = scaled(dy2.to(A.dtype), scale).reshape(m * b1, a1)
    dx = dA = dB = None
    E = (Y @ A).view(m, b1, a2) if need_x or need_B else None
    if need_x:
        dx = cast_and_drop(torch.matmul(B.t(), E).view(m, b2 * a2), A.dtype, seed, threshold).to(dy2.dtype)
    x3 = cast_and_drop(x2, A.dtype, seed, threshold).view(m, b2, a2) if need_A or need_B else None
    if need_B:
        left, right = (t.transpose(0, 1).reshape(-1, m * a2) for t in (E, x3))
        dB = split_k_product(left, right.t(), TERMS)
    if need_A:
        dA = split_k_product(Y.t(), torch.matmul(B, x3).view(m * b1, a2), TERMS)
    return dx, dA, dB
