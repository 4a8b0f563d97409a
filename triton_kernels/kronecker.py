"""Kronecker product on a linear map, forward and backward, by Triton kernels.

    y = add + scale * flatten(B X A^T)        W = B (x) A,  X [b2, a2] = x viewed row-major,  y viewed [b1, a1]

x [M, b2 a2] in fp16, bf16 or fp32, A [a1, a2] and B [b1, b2] of that type or fp32, all of any strides, as is `add`
[M, b1 a1]. `scale` is a Python number or a 0-d tensor on the device and the dropout seed a 0-d int64 tensor: neither
they nor M synchronise or recompile; the sizes of the factors do compile. Dropout is on x, or on the product with
`mask_output`, where it is the mask of element (row, output column).

Backward, per row with G = dY [b1, a1], H = drop(X) A^T and E = B^T G:   dX = drop^T(scale E A)
                                                                         dA = scale sum E^T drop(X)
                                                                         dB = scale sum G H^T

These functions launch what `kronecker_plan` says and check little; `kronecker_plan.limits` says what does not fit.
"""

import torch

from . import kronecker_kernels as kernels
from .kronecker_plan import REDUCE, REDUCE_WARPS, KroneckerProblem, backward_passes, constexprs, forward_launch
from .launching import control, gpu_of, name_of, precision
from .tiles import cdiv


def kronecker_fwd(x, A, B, *, add=None, scale=1.0, threshold=0, seed=None, mask_output=False, out_dtype=None):
    """y [M, b1 a1] = add + scale * flatten(B X A^T), in out_dtype or x's type. threshold: see dropout_threshold."""
    y = x.new_empty(x.shape[0], B.shape[0] * A.shape[0], dtype=out_dtype or x.dtype)
    if x.shape[0] == 0:
        return y
    problem = _problem(x, A, B)
    launch = forward_launch(problem)
    dropout = ("output" if mask_output else "input") if threshold else None
    scale_ptr, scale = control(scale, 1.0)
    with torch.cuda.device_of(x):
        kernels.forward_kernel[launch.grid](
            x, A, B, add, y, scale_ptr, seed, problem.m, scale, threshold, launch.m_blocks,
            *x.stride(), *A.stride(), *B.stride(), *((0, 0) if add is None else add.stride()),
            **constexprs(problem, launch), DROPOUT=dropout, PREC=precision(),
            num_warps=launch.num_warps, num_stages=launch.num_stages,
        )  # fmt: skip
    return y


def kronecker_bwd(dy, x, A, B, *, scale=1.0, threshold=0, seed=None, needs=frozenset({"x", "A", "B"})):
    """Gradients by name for the names in `needs`, out of x, A, B; each in its operand's type, dx in dy's.

    Of dropout it knows that of x alone. x may be None unless the gradient of A or B is needed.
    """
    problem = _problem(dy, A, B)
    grads, partials = {}, {}
    for group, launch in backward_passes(problem, frozenset(needs)):
        if launch is None:
            grads["x"] = kronecker_fwd(dy, A.t(), B.t(), scale=scale, threshold=threshold, seed=seed, mask_output=True)
        else:
            dx, sums = _backward_pass(dy, x, A, B, problem, launch, scale, threshold, seed, group)
            grads |= {} if dx is None else {"x": dx}
            partials |= sums
    if partials:
        grads |= _reduce(partials, A.dtype, scale)
    return {name: grads[name] for name in needs}


def _backward_pass(dy, x, A, B, problem, launch, scale, threshold, seed, group):
    """dx, or None, and the partial sums of the gradients of the factors by name."""
    row_splits, columns = launch.grid
    dx = dy.new_empty(x.shape) if "x" in group else None
    partials = {
        name: dy.new_empty(count, *factor.shape, dtype=torch.float32)
        for name, factor, count in (("A", A, row_splits), ("B", B, row_splits * columns))
        if name in group
    }
    scale_ptr, value = control(scale, 1.0)
    if problem.m:
        with torch.cuda.device_of(dy):
            kernels.backward_kernel[launch.grid](
                dy, x, A, B, dx, partials.get("A"), partials.get("B"), scale_ptr, seed, problem.m, value, threshold,
                launch.m_blocks, *dy.stride(), *x.stride(), *A.stride(), *B.stride(),
                **constexprs(problem, launch), NEED_DX="x" in group, NEED_DA="A" in group, NEED_DB="B" in group,
                DROPOUT=threshold > 0, PREC=precision(), num_warps=launch.num_warps, num_stages=launch.num_stages,
            )  # fmt: skip
    return dx, partials


def _reduce(partials, dtype, scale):
    """By name scale * the sum of partials over their first axis, in their order; of no partials, zeros."""
    sums = {name: given.new_empty(given.shape[1:], dtype=dtype) for name, given in partials.items()}
    pointers = [tensors.get(name) for name in ("A", "B") for tensors in (partials, sums)]
    counts = [(partials[name].shape[0], sums[name].numel()) if name in sums else (0, 0) for name in ("A", "B")]
    scale_ptr, scale = control(scale, 1.0)
    with torch.cuda.device_of(next(iter(sums.values()))):
        kernels.reduce_kernel[(sum(cdiv(size, REDUCE["BLOCK"]) for _, size in counts),)](
            *pointers, scale_ptr, scale, *counts[0], *counts[1], **REDUCE, num_warps=REDUCE_WARPS
        )
    return sums


def _problem(rows, A, B) -> KroneckerProblem:
    return KroneckerProblem(
        rows.shape[0], *A.shape, *B.shape, name_of(rows.dtype), name_of(A.dtype), gpu_of(rows.device)
    )
