"""The low-rank products of several factors with an input that they share, by one pass over it.

    S_i = A_i drop_i(x)        dA_i = dS_i^T drop_i(x)        dx = dx' + sum_i drop_i^T(dS_i A_i)

It is the first half of `lowrank_linear` for layers that are called on the same x, such as the query, key and value
projections of attention; each layer then runs the second half, given S_i. Every factor has a dropout mask of its own.
One of the layers takes x from here as well: what it gives as its gradient, dx', is then added to in place, where this
would otherwise be one more tensor of x's size to be added up. Saved for backward: x, once for all layers, and seeds.

It is no op in graphs: whatever traces, or comes with tensors of subclasses, is refused here, and the layers run whole.
"""

from functools import partial

import torch
import torch.nn.functional as F

from ..triton_kernels.launching import gpu_of, name_of
from ..triton_kernels.lowrank_plan import LowRankPlan, LowRankProblem, plan_lowrank
from . import dispatch, native
from .arguments import autocasts, check_derivative, is_watched, lazy, resolved, saved_tensors
from .common import blocks, product, rows
from .dropout import draw_seed, drop, dropout_threshold, keep_mask, keep_scale
from .operation import MOST_KEYS, taken_dtype, taken_types

# By the keys of the extension, as ops keep theirs: see operation.py.
_decisions: dict[bytes, dispatch.Decision] = {}
dispatch.forgetful.append(_decisions)


def shared_shrink_reference(x, factors, *, dropout_p=0.0, seeds=None):
    """[S_i] written down in plain PyTorch, differentiated by autograd. seeds: [G] int64, one of each factor."""
    threshold = dropout_threshold(dropout_p)
    found = []
    for i, A in enumerate(factors):
        xd = x.to(A.dtype).reshape(-1, x.shape[-1])
        if threshold:
            xd = xd * keep_mask(seeds[i], *xd.shape, threshold) * keep_scale(threshold)
        found.append(F.linear(xd, A))
    return found


def shared_shrink(x, factors, *, dropout_p=0.0, out_features=0) -> list[torch.Tensor] | None:
    """[x, S_1, ..., S_G] for layers that share x; None where that is not to be had, or not worth having.

    x: [..., K]. factors: A_i [r_i, K] of one dtype, x's or fp32. dropout_p: of every factor, whose seeds are drawn from
    torch's generator of x's device; on a CPU they are those of as many calls of `lowrank_linear`. out_features: of one
    of the layers.
    S_i: [M, r_i], or with columns of zeros up to what the kernels read, in the factors' dtype, as `lowrank_linear`
    takes it in place of A_i. x: the same, in the dtype that autocast makes of it, for one layer.
    """
    if dispatch.state.keys:
        found = native.module.shared_shrink(_decisions, x, factors, dropout_p, out_features)
        if type(found) is list:
            return found
        if type(found) is bytes:
            if len(_decisions) >= MOST_KEYS:
                _decisions.clear()
            _decisions[found] = _decision(_problem(x, factors, dropout_p, out_features), len(factors))
            return shared_shrink(x, factors, dropout_p=dropout_p, out_features=out_features)
        if found is not None:
            return _run(x, factors, dropout_p, found)
    device = x.device.type
    if autocasts(device):
        factors = [A.to(taken_dtype(A, x.device, parameter=True)) for A in factors]
        x = x.to(taken_dtype(x, x.device))
        with torch.autocast(device, enabled=False):
            return shared_shrink(x, factors, dropout_p=dropout_p, out_features=out_features)
    if is_watched(x, *factors) or lazy(x, *factors):
        return None
    return _run(x, factors, dropout_p, _decision(_problem(x, factors, dropout_p, out_features), len(factors)))


def is_spent(S: torch.Tensor) -> bool:
    """Whether backward has run through the node that made S: it may have freed what it kept for another S."""
    if S.grad_fn is None:
        return False
    ran = getattr(S.grad_fn, "ran", None)
    return native.module.shared_shrink_ran(S) if ran is None else ran


def why_alone(problem: LowRankProblem) -> str | None:
    """Why a layer of this problem is better off with a pass over x of its own; None if it is not."""
    decision = dispatch.decide(problem)
    if decision.backend == "reference":
        return "the reference is to be differentiated by torch"
    if decision.backend == "triton" and plan_lowrank(problem).forward == "single_kernel":
        return "its single kernel reads x no more than once for the base product as well"
    if problem.device == "cuda" and decision.backend != "triton":
        return f"on {decision.backend} every layer reads x by itself"
    return None


def _problem(x, factors, dropout_p, out_features) -> LowRankProblem:
    """That of one of the layers."""
    types = map(name_of, taken_types(x, factors[0]))
    m, k = (x.shape[:-1].numel(), x.shape[-1]) if x.shape[-1] else (0, 0)
    r = max(A.shape[0] for A in factors)
    return LowRankProblem(
        m, out_features, k, *types, x.device.type, gpu_of(x.device), r, dropout_threshold(dropout_p) > 0, True
    )


def _decision(problem: LowRankProblem, members: int) -> dispatch.Decision:
    shared = problem.shared_by(members)
    alone = dispatch.Decision("reference", False, problem, None)
    if why_alone(problem) is not None:
        return alone
    if dispatch.decide(problem).backend == "triton" and shared.limits("triton"):
        return alone
    return dispatch.decide(shared)


def _run(x, factors, dropout_p, decision) -> list[torch.Tensor] | None:
    """By Python's node; None where each layer is better off alone."""
    if decision.backend == "reference":
        return None
    threshold = dropout_threshold(dropout_p)
    seeds = draw_seed(x.device, (len(factors),)) if threshold else None
    passes_x = torch.is_grad_enabled() and x.requires_grad
    found = _Node.apply(x, threshold, seeds, decision, passes_x, *factors)
    return list(found) if passes_x else [x, *found]


class _Node(torch.autograd.Function):
    """csrc/autograd/shared_shrink.cpp in Python."""

    @staticmethod
    def forward(ctx, x, threshold, seeds, decision, passes_x, *factors):
        ctx.set_materialize_grads(False)
        ctx.threshold, ctx.decision, ctx.x, ctx.ran = threshold, decision, (x.shape, x.dtype), False
        ctx.passes_x, ctx.needs = passes_x, ctx.needs_input_grad[5:]
        if passes_x or any(ctx.needs):
            ctx.save_for_backward(x if any(ctx.needs) else None, seeds, *factors)
        found = _forward(rows(x), factors, threshold, seeds, decision)
        return (x, *found) if passes_x else tuple(found)

    @staticmethod
    def backward(ctx, *grads):
        ctx.ran = True
        needs_x = ctx.needs_input_grad[0]
        onto, of_S = (grads[0], grads[1:]) if ctx.passes_x else (None, grads)
        needs = [need and dS is not None for need, dS in zip(ctx.needs, of_S, strict=True)]
        if not any(needs) and (not needs_x or all(dS is None for dS in of_S)):
            return onto, *(None,) * (4 + len(of_S))
        check_derivative("shared_shrink")
        x, seeds, *factors = saved_tensors(ctx, ("x", "seed", *("A" for _ in of_S)))
        x2 = rows(x) if any(needs) else None
        shape, dtype = ctx.x
        if onto is not None:
            onto = rows(resolved(onto)).clone(memory_format=torch.contiguous_format)
        of_S = [resolved(dS) for dS in of_S]
        dx, found = _backward(of_S, onto, x2, factors, ctx.threshold, seeds, needs_x, needs, dtype, ctx.decision)
        return None if dx is None else dx.to(dtype).view(shape), None, None, None, None, *found


# Ranks that a product of all factors adds up at most: more would be less exact than the sum of their products.
MOST_BESIDE = 64


def _products(factors, threshold) -> list[tuple]:
    """(factor [ranks, K], its columns of all S) of each product: one for all members, or where each has its own mask,
    or ranks are many, one for each."""
    ends, end = [], 0
    for A in factors:
        ends.append(slice(end, end := end + A.shape[0]))
    together = not threshold and end <= MOST_BESIDE
    return [(torch.cat(factors), slice(0, end))] if together else list(zip(factors, ends, strict=True))


def _launchers(decision):
    """Forward and backward on Triton: launched from C++, or from Python."""
    if not isinstance(decision.plan, LowRankPlan):
        return decision.plan.shared_forward, decision.plan.shared_backward
    from ..triton_kernels.lowrank import shared_shrink_bwd, shared_shrink_fwd

    return partial(shared_shrink_fwd, plan=decision.plan), partial(shared_shrink_bwd, plan=decision.plan)


def _forward(x2, factors, threshold, seeds, decision) -> list[torch.Tensor]:
    """[S_i] on rows x [M, K]."""
    if decision.backend == "triton":
        return _launchers(decision)[0](x2, factors, threshold=threshold, seeds=seeds)
    dtype, products = factors[0].dtype, _products(factors, threshold)
    S = x2.new_empty(x2.shape[0], sum(A.shape[0] for A in factors), dtype=dtype)
    for i, j in _blocks(x2, x2.shape[1], dtype != x2.dtype or threshold):
        block = x2[i:j].to(dtype)
        for index, (A, columns) in enumerate(products):
            S[i:j, columns] = product(drop(block, seeds[index], threshold, i) if threshold else block, A.t())
    return S.split([A.shape[0] for A in factors], 1)


def _backward(of_S, onto, x2, factors, threshold, seeds, needs_x, needs, dtype, decision):
    """(dx [M, K] or None, [dA_i or None]) of gradients that may be None; dx in the memory of `onto` where there is one.
    x2: rows [M, K] or None."""
    if decision.backend == "triton":
        return _launchers(decision)[1](
            of_S, x2, factors, onto=onto, threshold=threshold, seeds=seeds, need_x=needs_x, needs=needs
        )
    live = [i for i, dS in enumerate(of_S) if dS is not None]
    products = _products([factors[i] for i in live], threshold)
    dS = torch.cat([of_S[i] for i in live], 1)
    M, K = dS.shape[0], factors[0].shape[1]
    dx = None
    if needs_x:
        dx = dS.new_zeros(M, K, dtype=dtype) if onto is None else onto
    sums = dS.new_zeros(dS.shape[1], K)
    for i, j in _blocks(dS, K, dtype != dS.dtype or threshold):
        block = None if x2 is None else x2[i:j].to(dS.dtype)
        back = 0
        for index, (A, columns) in zip(live, products, strict=False):
            part, seed = dS[i:j, columns], seeds[index] if threshold else None
            if block is not None:
                sums[columns] += product(part.t(), drop(block, seed, threshold, i) if threshold else block)
            if dx is not None:
                one = product(part, A)
                back = back + (drop(one, seed, threshold, i) if threshold else one)
        if dx is not None:
            dx[i:j] += back
    found = [None] * len(of_S)
    for i, dA in zip(live, sums.split([factors[i].shape[0] for i in live]), strict=True):
        if needs[i]:
            found[i] = dA.clone()  # a tensor of its own, because a gradient may outlive the others
    return dx, found


def _blocks(rows, columns, blocked):
    return blocks(len(rows), columns, rows.device) if blocked else [(0, len(rows))]
