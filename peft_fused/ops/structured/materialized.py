"""Structured maps as one GEMM with their dense matrix, where that is cheaper than transforms.

The matrix of trained vectors is made once per optimizer step: it is kept with the parameter that it was made of for as
long as the versions stay the same and no gradient of it has been computed. Whoever writes parameters past torch's
version counters (through `.data`, outside of training) has to call `forget`; on a CPU such a write is seen.
"""

import torch
from torch.utils.weak import WeakIdKeyDictionary

from ..common import cast_and_drop, scaled, split_k_product
from . import maps

# Of a sum, that are added up in one chain: few enough for the error of an FFT, enough to cost little beside it.
TERMS = 256

_made = WeakIdKeyDictionary()
# Parameters of CUDA graphs, whose replays change them without a word to torch's version counters.
_captured = WeakIdKeyDictionary()


def forget(p: torch.Tensor) -> None:
    """Drops the dense matrices made of a parameter."""
    _made.pop(p, None)


def _keeps(t: torch.Tensor) -> bool:
    """Whether a tensor may be recognised later. A view may be one of p, which would then never be freed."""
    return t.is_leaf and not (t.is_inference() or t.is_meta or t._is_view())


def matrix(kind, p, q, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """The dense matrix [rows, columns] of a convolution in a dtype, new or as it was made before."""
    parts = [p] if q is None else [p, q]
    # A CUDA graph has to make the matrix itself: it replays with other values, and outlives what is kept here.
    capturing = p.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing:
        forget(p)
        _captured[p] = True
    keeps = p not in _captured and all(map(_keeps, parts))
    state = keeps and [(t.data_ptr(), t._version) for t in parts]
    # What one stream has made another would read before it is there.
    stream = torch.cuda.current_stream(p.device).cuda_stream if p.is_cuda else 0
    key = (kind, rows, columns, dtype, stream)
    found = _made.get(p, {}).get(key) if keeps else None
    if found and found[0] is q and found[1] == state and (p.is_cuda or all(map(torch.equal, found[2], parts))):
        return found[3]
    with torch.inference_mode(False), torch.no_grad():
        wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in parts]
        made = maps.dense(kind, wide[0], wide[1] if q is not None else None, rows, columns).to(dtype)
        if keeps:
            # Equal values on a CPU are what makes a kept matrix right there; on a GPU comparing would synchronise.
            copies = [] if p.is_cuda else [t.detach().clone() for t in parts]
            # q itself, not its id or address, which a later tensor may have again.
            _made.setdefault(p, {})[key] = (q, state, copies, made)
    return made


def work_dtype(x, p):
    """On a CPU the dtype of the parameters, at least fp32; on a GPU x's own, whose GEMM runs on tensor cores."""
    return x.dtype if x.is_cuda else torch.promote_types(torch.promote_types(x.dtype, p.dtype), torch.float32)


def matrix_of(problem, x, p, q) -> torch.Tensor:
    """The dense matrix that a problem's rows x are multiplied by."""
    return matrix(problem.kind, p, q, problem.n, problem.k, work_dtype(x, p))


def _product(a, b, scale) -> torch.Tensor:
    """scale a b. On a GPU the product takes the factor, which would be a pass over memory by itself."""
    if a.device.type == "cpu" or not isinstance(scale, float):
        return scaled(split_k_product(a, b, TERMS), scale)
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def forward(x2, p, q, add2, *, kind, n, scale, threshold, seed, transposed) -> torch.Tensor:
    """y [m, n] in x2's type."""
    k, dtype = x2.shape[1], work_dtype(x2, p)
    M = matrix(kind, p, q, *((k, n) if transposed else (n, k)), dtype)
    xd = cast_and_drop(x2, dtype, seed, threshold)
    right = M if transposed else M.t()
    if add2 is not None and add2.dtype == dtype and isinstance(scale, float) and x2.is_cuda:
        return torch.addmm(add2, xd, right, alpha=scale)
    delta = _product(xd, right, scale)
    if add2 is not None:
        delta = delta.add_(add2)
    return delta.to(x2.dtype)


def backward(dy2, x2, p, q, *, kind, k, scale, threshold, seed, needs, correlate):
    """Gradients (dx, dp, dq).

    correlate(): the same by transforms, of the vectors alone, for a GPU's 16-bit types, whose GEMM would round the
    gradient of the matrix before it is summed along the diagonals.
    """
    need_x, need_p, need_q = needs
    n, dtype = dy2.shape[1], work_dtype(dy2, p)
    gd = dy2.to(dtype)
    dx = dp = dq = None
    if need_x:
        product = _product(gd, matrix(kind, p, q, n, k, dtype), scale)
        dx = cast_and_drop(product, dtype, seed, threshold).to(dy2.dtype)
    if need_p or need_q:
        forget(p)  # an optimizer that bypasses version counters is about to change it
        if dtype.itemsize < 4:
            return dx, *correlate()[1:]
        gradient = _product(gd.t(), cast_and_drop(x2, dtype, seed, threshold), scale)
        wide = [None if t is None else t.to(dtype) for t in (p, q)]
        dp, dq = maps.fold_dense(kind, gradient, *wide)
        dp, dq = dp.to(p.dtype) if need_p else None, dq.to(q.dtype) if need_q else None
    return dx, dp, dq
