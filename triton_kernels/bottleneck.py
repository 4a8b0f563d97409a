"""Bottleneck adapter with experts, forward and backward, by Triton kernels.

    y = residual + scale * (act(h D[i]^T + b[i]) U[j]^T + c[j])        residual None is h itself

h [M, K], D [r, K] or [E, r, K], b [r] or [E, r], U [N, r] or [E, N, r], c [N] or [E, N]; 1 <= r <= 256. h is fp16, bf16
or fp32, the parameters all of that type or all fp32; h, dY and the residual may have any strides. `scale` is a number
or a 0-d tensor on the device. An expert index is a number, a 0-d integer tensor or a 1-D one [G], for which the rows
are G equal consecutive groups; a side that is not stacked ignores its own. No value of theirs, nor M or G,
synchronises or recompiles. z = h D^T + b is what the forward saves.

Backward, with g = dY and a = act(z):   dz = scale * (g U) * act'(z)     dD = dz^T h      db = colsum dz
                                        dh = dz D + (g)                  dU = scale g^T a  dc = scale colsum g

These functions launch what `bottleneck_plan` says and check little: types, shapes and index ranges are the caller's.
"""

from dataclasses import dataclass

import torch

from . import bottleneck_kernels as kernels
from .bottleneck_plan import (
    BottleneckPlan,
    BottleneckProblem,
    grad_constexprs,
    plan_bottleneck,
    reduce_constexprs,
    rows_constexprs,
    shrink_only,
)
from .launching import control, dense, gpu_of, name_of, precision, stack_strides
from .tiles import cdiv


def bottleneck_fwd(call, *, plan=None):
    """(y [M, N] in h's type, z [M, r] in the parameters') of a call on rows h [M, K]."""
    h, down, up, activation = call.h, call.down, call.up, call.activation
    (M, K), (N, r) = h.shape, up.shape[-2:]
    y = h.new_empty(M, N)
    z = h.new_empty(M, r, dtype=down.dtype)
    if M == 0:
        return y, z
    route_d, route_u = _Route.of(down.dim() == 3, call.expert_d), _Route.of(up.dim() == 3, call.expert_u)
    groups = max(route_d.groups, route_u.groups)
    plan = plan or _plan(h, N, K, r, down.dtype, groups, activation)
    s = None if plan.fused else torch.empty_like(z)
    add = h if call.residual is None else call.residual
    with torch.cuda.device_of(h):
        for launch in plan.forward:
            _rows(
                launch, groups, activation, h, down, call.down_bias, up, call.up_bias, add, z, s, None, y, call.scale,
                route_d, route_u,
            )  # fmt: skip
    return y, z


def bottleneck_bwd(dy, call, z, *, like, needs, plan=None):
    """Gradients by name for the names in `needs`, out of h, down, down_bias, up, up_bias; each in its operand's type.

    like: (shape, dtype) of every input of the call by name, None for an absent one; where that is the residual, dY is a
    part of dh. h is read for down, down for h, up for these two and down_bias, z for all but up_bias, with the identity
    for up alone; what is not read may be None.
    """
    h, down, up, activation, scale = call.h, call.down, call.up, call.activation, call.scale
    (D_shape, dtype), U_shape = like["down"], like["up"][0]
    residual_is_h = like["residual"] is None
    M, N = dy.shape
    r, K = D_shape[-2:]
    grads = {name: dy.new_empty(like[name][0], dtype=dtype) for name in needs if name != "h"}
    if "h" in needs:
        grads["h"] = dy.new_empty(M, K)
    if M == 0:
        return {name: grad.zero_() for name, grad in grads.items()}

    route_d, route_u = _Route.of(len(D_shape) == 3, call.expert_d), _Route.of(len(U_shape) == 3, call.expert_u)
    groups = max(route_d.groups, route_u.groups)
    plan = plan or _plan(dy, N, K, r, dtype, groups, activation)
    need_units = not needs.isdisjoint(("down", "down_bias"))
    need_dz = need_units or "h" in needs
    launches = plan.backward if "h" in needs else shrink_only(plan.backward) if need_dz or "up" in needs else ()
    dz = dy.new_empty(M, r, dtype=dtype) if need_units or len(launches) > 1 else None
    a = dy.new_empty(M, r, dtype=dtype) if "up" in needs else None
    with torch.cuda.device_of(dy):
        for launch in launches:
            _rows(
                launch, groups, activation, dy if need_dz else None, None if up is None else up.mT, None,
                None if down is None else down.mT, None, dy if residual_is_h else None, z, dz, a, grads.get("h"),
                scale, route_u, route_d, backward=True,
            )  # fmt: skip
        sums_d = sums_u = _NO_SUMS
        if need_units:
            x = h if "down" in needs else None
            sums_d = _sums(plan.grad_down, x, dz, route_d, _mT(grads.get("down")), unit_bias=grads.get("down_bias"))
        if not needs.isdisjoint(("up", "up_bias")):
            sums_u = _sums(plan.grad_up, dy, a, route_u, grads.get("up"), bias=grads.get("up_bias"))
        if sums_d.experts + sums_u.experts:
            _reduce(sums_d, sums_u, r, scale, plan.reduce)
    return grads


@dataclass(frozen=True)
class _Route:
    """An expert index as the kernels take it: of each group with a stride, otherwise of all rows."""

    pointer: torch.Tensor | None
    value: int
    stride: int
    groups: int

    @staticmethod
    def of(stacked, expert) -> "_Route":
        if not stacked or expert is None:
            return _Route(None, 0, 0, 1)
        pointer, value = control(expert, 0)
        if pointer is None or pointer.numel() == 1:
            return _Route(pointer, value, 0, 1)
        return _Route(pointer, value, pointer.stride(0), pointer.shape[0])


def _plan(rows, n, k, r, adapter_dtype, groups, activation) -> BottleneckPlan:
    types = name_of(rows.dtype), name_of(adapter_dtype)
    return plan_bottleneck(
        BottleneckProblem(rows.shape[0], n, k, *types, rows.device.type, gpu_of(rows.device), r, groups, activation)
    )


def _mT(factor):
    return None if factor is None else factor.mT


def _strides(factor) -> tuple[int, int, int]:
    return (0, 0, 0) if factor is None else stack_strides(factor)


def _bias_stride(bias) -> int:
    return bias.stride(0) if bias is not None and bias.dim() == 2 else 0


def _rows(
    launch, groups, activation, x, w_in, b_in, w_out, b_out, add, z, s, a, y, scale, route_in, route_out, backward=False
):
    """rows_kernel; w_in is indexed [expert, unit, column of x], w_out [expert, column of y, unit]."""
    M, r = (x.shape[0], w_in.shape[-2]) if z is None else z.shape
    K, N = (0 if t is None else t.shape[1] for t in (x, y))
    b_in, b_out = dense(b_in), dense(b_out)
    group_rows = M // groups
    row_blocks = cdiv(group_rows, launch.block_m)
    n_blocks = cdiv(cdiv(N, launch.block_n), launch.splits)
    splits = cdiv(cdiv(N, launch.block_n), n_blocks) if launch.expand else 1
    scale_ptr, scale = control(scale, 1.0)
    kernels.rows_kernel[(groups * row_blocks, splits, 1 if launch.expand else cdiv(r, launch.block_r))](
        x, w_in, b_in, w_out, b_out, add, z, s, a, y, scale_ptr, route_in.pointer, route_out.pointer,
        group_rows, row_blocks, K, N, r, scale, route_in.value, route_out.value, n_blocks,
        route_in.stride, route_out.stride, *((0, 0) if x is None else x.stride()),
        *_strides(w_in), _bias_stride(b_in), *_strides(w_out), _bias_stride(b_out),
        *((0, 0) if add is None else add.stride()),
        **rows_constexprs(launch, activation, backward), PREC=precision(),
        num_warps=launch.num_warps, num_stages=launch.num_stages, maxnreg=launch.maxnreg,
    )  # fmt: skip


@dataclass(frozen=True)
class _Sums:
    """Partial sums of a factor's gradient [experts, width, r] and of its bias', and where their sums go."""

    partials: torch.Tensor | None
    vectors: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    route: _Route
    experts: int
    slots: int
    row_splits: int
    width: int

    # One index per group leaves nothing to choose: there is a slot for each expert, or one expert in all.
    def pointers(self):
        index = self.route.pointer if self.route.groups == 1 else None
        return self.partials, self.vectors, self.weight, self.bias, index

    def sizes(self):
        index = self.route.value if self.route.groups == 1 else 0
        return index, self.slots, self.row_splits, self.width, *_strides(self.weight)


_NO_SUMS = _Sums(None, None, None, None, _Route.of(False, None), 0, 1, 0, 1)


def _sums(launch, x, s, route, weight, bias=None, unit_bias=None) -> _Sums:
    """First stage of weight [E, X, r] = x^T s, bias [E, X] and unit_bias [E, r], the column sums of x and of s, each of
    the rows of one expert and without E where there is one; None for what is not needed. There is at most one bias."""
    rows = s if x is None else x
    M, X, r = rows.shape[0], 1 if x is None else x.shape[1], 1 if s is None else s.shape[1]
    outputs = [(weight, (X, r)), (bias, (X,)), (unit_bias, (r,))]
    experts = next(out.shape[0] if out.dim() > len(shape) else 1 for out, shape in outputs if out is not None)
    slots = experts if route.groups > 1 else 1
    groups = route.groups if slots > 1 else 1
    group_rows = M // groups
    row_blocks = cdiv(group_rows, launch.block_m)
    blocks = groups * row_blocks
    row_split_blocks = cdiv(blocks, launch.splits)
    row_splits = cdiv(blocks, row_split_blocks)
    partials, sums, unit_sums = (
        None if out is None else out.new_empty(slots, row_splits, *shape, dtype=torch.float32) for out, shape in outputs
    )
    kernels.grad_kernel[(cdiv(X, launch.block_x), row_splits, slots * cdiv(r, launch.block_r))](
        x, s, partials, sums, unit_sums, route.pointer if slots > 1 else None,
        group_rows, row_blocks, blocks, row_split_blocks, X, r, route.stride, *((0, 0) if x is None else x.stride()),
        **grad_constexprs(launch), PREC=precision(),
        num_warps=launch.num_warps, num_stages=launch.num_stages, maxnreg=launch.maxnreg,
    )  # fmt: skip
    vectors, bias = (sums, bias) if unit_sums is None else (unit_sums, unit_bias)
    return _Sums(partials, vectors, weight, bias, route, experts, slots, row_splits, X)


def _reduce(down: _Sums, up: _Sums, r, scale, launch):
    """Second stage: one launch for both factors."""
    scale_ptr, scale = control(scale, 1.0)
    down_programs, up_programs = (side.experts * cdiv(side.width, launch.block_x) for side in (down, up))
    kernels.reduce_kernel[(down_programs + up_programs,)](
        *down.pointers(), *up.pointers(), scale_ptr, down_programs, r, scale, *down.sizes(), *up.sizes(),
        **reduce_constexprs(launch), num_warps=launch.num_warps, num_stages=1, maxnreg=None,
    )  # fmt: skip
