"""The vectors that structured maps are convolutions with, and back.

A circulant, skew-circulant or Toeplitz matrix is a window of the circulant matrix whose first column is `kernel`; the
gradient of that column, a correlation, `fold`s onto the parameters. Entry l of the kernel multiplies x[j] into
y[j + l], entry `length - l` into y[j - l].
"""

import torch


def kernel(kind: str, p: torch.Tensor, q: torch.Tensor | None, length: int) -> torch.Tensor:
    """First column [length] of the circulant matrix that contains the map.

    circulant: p [n], or blocks [O, I, n] with length n only; q a second factor of p, or None. skew_circulant: p [n].
    toeplitz: p the first column, q the first row without its first entry. length n is the ring of the structure itself
    (cyclic, or negacyclic for skew_circulant); a linear convolution needs at least 2 n - 1, or for toeplitz p + q.
    """
    if kind == "circulant":
        p = p if q is None else p * q
        before = p[..., 1:]
    elif kind == "skew_circulant":
        before = -p[1:]
    else:
        before = q.flip(0)
    if kind != "toeplitz" and length == p.shape[-1]:
        return p
    return torch.cat([p, p.new_zeros(length - p.shape[0] - before.shape[0]), before])


def fold(
    kind: str, dk: torch.Tensor, p: torch.Tensor, q: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of (p, q) from that of the kernel: the adjoint of `kernel`."""
    length = dk.shape[-1]
    if kind == "toeplitz":
        return dk[: p.shape[0]], dk[length - q.shape[0] :].flip(0)
    n = p.shape[-1]
    if length != n:
        before = dk[length - n + 1 :]
        dk = dk[:n].clone()
        dk[1:] += before if kind == "circulant" else -before
    if q is None:
        return dk, None
    return dk * q, dk * p


def fold_terms(kind: str, terms, p: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of (p, q) of a product from those of its kernels: one pair (first map, last map) per term."""
    if kind == "toeplitz_product":
        return tuple(_fold_symmetric(dk, t) for dk, t in zip(terms[0], (p, q), strict=True))
    dg = [fold("circulant", last, g, None)[0] for (_, last), g in zip(terms, p, strict=True)]
    dh = [fold("skew_circulant", first, h, None)[0] for (first, _), h in zip(terms, q, strict=True)]
    return torch.stack(dg), torch.stack(dh)


def _fold_symmetric(dk, t):
    col, tail = fold("toeplitz", dk, t, t[1:])
    col = col.clone()
    col[1:] += tail
    return col


def dense(kind: str, p: torch.Tensor, q: torch.Tensor | None, rows: int, columns: int) -> torch.Tensor:
    """The matrix [rows, columns] of the map, a strided view of a vector."""
    if kind == "toeplitz":
        diagonals = torch.cat([q.flip(0), p])
    else:
        p = p if q is None else p * q
        diagonals = torch.cat([p[1:] if kind == "circulant" else -p[1:], p])
    # diagonals[first + i - j] is entry (i, j). Strides cannot be negative, so the columns are laid out backwards.
    first = diagonals.shape[0] - p.shape[0]
    backwards = diagonals[first - columns + 1 :].as_strided((rows, columns), (1, 1))
    return backwards.flip(1)


def fold_dense(
    kind: str, gradient: torch.Tensor, p: torch.Tensor, q: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of (p, q) from that of the dense matrix, summed along its diagonals."""
    rows, columns = gradient.shape
    # In the flipped matrix lag i - j is column + row; rows read one entry short of their length put it in one column.
    slanted = torch.cat([gradient.flip(1), gradient.new_zeros(rows, rows)], 1).flatten()
    sums = slanted[: rows * (rows + columns - 1)].view(rows, rows + columns - 1).sum(0)
    length = rows + columns - 1 if kind == "toeplitz" else 2 * p.shape[-1] - 1
    dk = sums.new_zeros(length)
    dk[:rows] = sums[columns - 1 :]
    dk[length - columns + 1 :] = sums[: columns - 1]
    return fold(kind, dk, p, q)


def sizes_of(kind: str, p: torch.Size, q: torch.Size | None) -> tuple[int, ...]:
    """The sizes of a map of parameters of these shapes, as `plan.StructuredProblem` lists them."""
    if kind == "toeplitz":
        return p[0], q[0] + 1
    return (*p, *q) if kind == "kronecker" else tuple(p)
