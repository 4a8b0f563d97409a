"""A bottleneck adapter, and mixtures of them of which each group of rows takes one.

    y = residual + scale * (act(h D[i]^T + b[i]) U[j]^T + c[j])

The residual is h itself where none is given. One formula serves Houlsby et al. 2019 and Pfeiffer et al. 2021 (one D and
U), AdaMix (Wang et al. 2022: i and j drawn per forward pass) and, without activation and on the output of a base layer,
low-rank adapters routed per sequence. With z = h D^T + b, a = act(z) and g = dY:

    dz = scale g U . act'(z)    dD = dz^T h            db = colsum(dz)          dh = dz D + (g where h is the residual)
                                dU = scale g^T a       dc = scale colsum(g)     dresidual = g

Saved for backward: h, where D is trained, and z. Implementations: `bottleneck_torch.py` here,
`triton_kernels/bottleneck.py`, `csrc/autograd/bottleneck.cpp`.
"""

import math
from dataclasses import dataclass, replace

import torch

from ..triton_kernels.bottleneck_plan import BOTTLENECK_ACTIVATIONS, BottleneckPlan, BottleneckProblem
from ..triton_kernels.launching import gpu_of, name_of
from ..triton_kernels.tiles import MAX_RANK
from . import bottleneck_torch
from .arguments import (
    check_control,
    check_dense,
    check_memory,
    check_scale,
    check_shape,
    describe,
    is_subclass,
    pair_of,
    resolved,
)
from .common import rows, unflatten
from .operation import Control, Input, Operation, is_huge, on_host, taken_types


def bottleneck_adapter_reference(
    h, down, down_bias, up, up_bias, activation="gelu", *, residual=None, scale=1.0, expert=None
):  # fmt: skip
    """`bottleneck_adapter` written down in plain PyTorch, differentiated by autograd. Same arguments, same result."""
    expert_d, expert_u = expert if isinstance(expert, tuple | list) else (expert, expert)
    a = bottleneck_torch.activate(activation, _linear_reference(h.to(down.dtype), down, down_bias, expert_d))
    delta = _linear_reference(a, up, up_bias, expert_u) * scale
    return ((h if residual is None else residual) + delta).to(h.dtype)


def _linear_reference(x, weight, bias, index):
    """x W[index]^T + b[index], where a 1-D index has one expert for each of its equal groups of rows."""
    if weight.dim() == 2:
        return torch.nn.functional.linear(x, weight, bias)
    index = resolved(torch.as_tensor(0 if index is None else index, device=x.device))  # torch indexes by the memory
    grouped = rows(x).reshape(max(1, index.numel()), -1 if x.numel() else 0, x.shape[-1])
    out = grouped @ weight[index.long().reshape(-1)].mT
    if bias is not None:
        out = out + bias[index.long().reshape(-1)].unsqueeze(1)
    return out.reshape(*x.shape[:-1], weight.shape[-2])


def bottleneck_adapter(h, down, down_bias, up, up_bias, activation="gelu", *, residual=None, scale=1.0, expert=None):
    """residual + scale * (act(h D[i]^T + b[i]) U[j]^T + c[j]), differentiable in every tensor but scale and expert.

    h: [..., K], any strides; fp32, fp16, bf16, or fp64 on the torch and reference backends.
    down: D [r, K] or a stack [E, r, K]; up: U [N, r] or [E, N, r]; 1 <= r <= 256; in h's dtype or fp32.
    down_bias: b [r] or None, up_bias: c [N] or None, [E, r] and [E, N] beside a stack; in down's dtype.
    activation: "gelu" (by the error function), "gelu_tanh", "relu", "silu" or "swish", "tanh", "identity".
    residual: [..., N] in h's dtype, not written to; None is h itself, for N = K.
    scale: number or 0-d tensor, finite in fp32 (fp64 beside an fp64 h).
    expert: index in 0..E-1, a number or an integer tensor, or a pair of them for down and up; default 0. A 0-d tensor
        is one for all rows; a tensor [G] has one for each of G equal groups of consecutive rows (G divides the product
        of h's leading sizes): [batch] routes sequences, [2] the halves of a batch. A side that is no stack ignores it.

    Tensors of scale and expert belong on h's device; changing their values neither synchronises nor recompiles.
    Returns [..., N] in h's dtype. Under autocast h, residual and parameters that are not fp32 are cast.
    The gradient of a stack is zero for experts that no row took, and has a fixed order of summation.
    A dispatch mode sees one operation, torch.ops.peft_fused.bottleneck_fwd.
    Raises ValueError or TypeError naming the argument, RuntimeError when a forced backend cannot run.
    """
    return _call(h, down, down_bias, up, up_bias, residual, activation, scale, expert)


def bottleneck_problem(h, down, up, activation: str, expert=None, scale=1.0) -> BottleneckProblem:
    """Description of `bottleneck_adapter`, called now on these tensors."""
    groups = _groups(pair_of("expert", expert), down.dim() == 3, up.dim() == 3)
    return _problem(h.shape, taken_types(h, down), down.shape, up.shape, h.device, activation, groups, scale)


def _problem(h, types, down, up, device, activation, groups, scale) -> BottleneckProblem:
    """The same of the shapes h, down and up."""
    return BottleneckProblem(
        math.prod(h[:-1]), up[-2], down[-1], *map(name_of, types), device.type, gpu_of(device), down[-2], groups,
        activation, huge_scale=is_huge(scale, types[1]),
    )  # fmt: skip


def _groups(experts, *stacked: bool) -> int:
    return math.lcm(*(len(e) for e, stack in zip(experts, stacked, strict=True) if stack and _per_group(e)))


def _per_group(index) -> bool:
    return isinstance(index, torch.Tensor) and index.dim() == 1


@dataclass(slots=True, eq=False)
class BottleneckCall:
    """A call of the op."""

    h: torch.Tensor | None
    down: torch.Tensor | None
    down_bias: torch.Tensor | None
    up: torch.Tensor | None
    up_bias: torch.Tensor | None
    residual: torch.Tensor | None = None
    activation: str = "gelu"
    scale: float | torch.Tensor = 1.0
    expert_d: int | torch.Tensor | None = None
    expert_u: int | torch.Tensor | None = None

    def on_host(self) -> "BottleneckCall":
        """With controls that lie on the CPU as numbers and lists."""
        return replace(
            self, scale=on_host(self.scale), expert_d=on_host(self.expert_d), expert_u=on_host(self.expert_u)
        )


class Bottleneck(Operation):
    name = "bottleneck"
    Call = BottleneckCall
    inputs = (
        Input("h"), Input("down", parameter=True), Input("down_bias", optional=True, parameter=True),
        Input("up", parameter=True), Input("up_bias", optional=True, parameter=True),
        Input("residual", optional=True, passes=True),
    )  # fmt: skip
    controls = (
        Control("activation", "str"), Control("scale", "float", tensor=True), Control("expert_d", "int", tensor=True),
        Control("expert_u", "int", tensor=True),
    )  # fmt: skip

    def read(self, h, down, down_bias, up, up_bias, residual, activation, scale, expert) -> BottleneckCall:
        expert_d, expert_u = pair_of("expert", expert)
        return BottleneckCall(h, down, down_bias, up, up_bias, residual, activation, scale, expert_d, expert_u)

    def check(self, call) -> None:
        self.check_inputs(call, lambda: self._check_shapes(call))
        h = call.h
        if not isinstance(call.activation, str):
            raise TypeError(f"activation must be a name, got {type(call.activation).__name__}")
        if call.activation not in BOTTLENECK_ACTIVATIONS:
            allowed = ", ".join(BOTTLENECK_ACTIVATIONS)
            raise ValueError(f"activation must be one of {allowed}, got {call.activation!r}")
        _check_device("scale", call.scale, h)
        check_scale(call.scale, h)
        for name, weight, index in (("down", call.down, call.expert_d), ("up", call.up, call.expert_u)):
            if index is not None:
                # That of a parameter which is no stack is not used.
                _check_expert(f"expert (of {name})", index, h, weight.shape[0] - 1 if weight.dim() == 3 else None)

    def _check_shapes(self, call) -> None:
        h, down, up = call.h, call.down, call.up
        if h.dim() < 1:
            raise ValueError("h must have shape [..., K], got a 0-d tensor")
        if down.dim() not in (2, 3):
            raise ValueError(f"down must have shape [r, K] or [E, r, K], got {list(down.shape)}")
        if up.dim() not in (2, 3):
            raise ValueError(f"up must have shape [N, r] or [E, N, r], got {list(up.shape)}")
        for name, weight in (("down", down), ("up", up)):
            if weight.dim() == 3 and weight.shape[0] == 0:
                raise ValueError(f"{name} must stack at least one expert, got shape {list(weight.shape)}")
        k, r, n = h.shape[-1], down.shape[-2], up.shape[-2]
        if not 1 <= r <= MAX_RANK:
            raise ValueError(f"down must have 1 to {MAX_RANK} rows (the units r), got shape {list(down.shape)}")
        check_shape("down", down, (*down.shape[:-1], k), "[r, K] with K = h.shape[-1]")
        if up.shape[-1] != r:
            raise ValueError(f"up must have {r} columns (the units of down), got shape {list(up.shape)}")
        for name, bias, weight in (("down_bias", call.down_bias, down), ("up_bias", call.up_bias, up)):
            if bias is not None:
                check_shape(name, bias, weight.shape[:-1], "the shape of its weight without the last size")
        if call.residual is not None:
            check_shape("residual", call.residual, (*h.shape[:-1], n), "[..., N]")
        elif n != k:
            raise ValueError(
                f"residual must be given where up has other rows ({n}) than h has features ({k}), got None"
            )

    def settle(self, call) -> BottleneckCall:
        for name, weight in (("expert_d", call.down), ("expert_u", call.up)):
            if weight.dim() == 2 or getattr(call, name) is None:
                setattr(call, name, 0)
        return call

    def problem(self, like, call, device) -> BottleneckProblem:
        (h, dtype), (down, parameter_dtype), (up, _) = (like[name] for name in ("h", "down", "up"))
        groups = _groups((call.expert_d, call.expert_u), len(down) == 3, len(up) == 3)
        return _problem(h, (dtype, parameter_dtype), down, up, device, call.activation, groups, call.scale)

    def output(self, like, call):
        down, parameter_dtype = like["down"]
        return like["up"][0][-2], (down[-2], parameter_dtype)

    def reads(self, call, needs) -> set[str]:
        need_dz = not needs.isdisjoint(("h", "down", "down_bias"))
        reads = {read for need, read in (("down", "h"), ("h", "down")) if need in needs}
        if need_dz:
            reads.add("up")
        if "up" in needs or (need_dz and call.activation != "identity"):
            reads.add("hidden")
        return reads

    def flops(self, shapes, call, needs) -> int:
        """Of its two products: additions and the activation count nothing."""
        h, n, r = shapes["h"], shapes["up"][-2], shapes["down"][-2]
        m, k = math.prod(h[:-1]), h[-1]
        if needs is None:
            return 2 * m * r * (k + n)
        passes = bool(needs & {"h", "down", "down_bias"}) + ("up" in needs)
        return 2 * m * r * (n * passes + k * len(needs & {"h", "down"}))

    def reference(self, call) -> torch.Tensor:
        return bottleneck_adapter_reference(
            call.h, call.down, call.down_bias, call.up, call.up_bias, call.activation, residual=call.residual,
            scale=call.scale, expert=(call.expert_d, call.expert_u),
        )  # fmt: skip

    def forward(self, call, decision):
        if decision.backend == "torch":
            return bottleneck_torch.forward(call)
        from ..triton_kernels import bottleneck as triton_bottleneck

        residual = None if call.residual is None else rows(call.residual)
        by_rows = replace(call, h=rows(call.h), residual=residual)
        if isinstance(decision.plan, BottleneckPlan):
            y, z = triton_bottleneck.bottleneck_fwd(_spread(by_rows), plan=decision.plan)
        else:
            y, z = decision.plan.forward(by_rows)
        return unflatten(y, call.h), z

    def backward(self, dy, call, hidden, like, needs, decision):
        if decision.backend == "torch":
            return bottleneck_torch.backward(dy, call, hidden, like, needs)
        from ..triton_kernels import bottleneck as triton_bottleneck

        by_rows = replace(call, h=None if call.h is None else rows(call.h))
        if isinstance(decision.plan, BottleneckPlan):
            grads = triton_bottleneck.bottleneck_bwd(
                rows(dy), _spread(by_rows), hidden, like=like, needs=needs, plan=decision.plan
            )  # fmt: skip
        else:
            (down, dtype), (up, _), residual = like["down"], like["up"], like["residual"]
            grads = decision.plan.backward(rows(dy), by_rows, hidden, down, up, dtype, residual is None, needs)
        if "h" in grads:
            grads["h"] = grads["h"].view(like["h"][0])
        return grads


def _spread(call) -> BottleneckCall:
    """The call as the kernels take it: both sides with an index for as many groups, or with one."""
    indices = call.expert_d, call.expert_u
    groups = math.lcm(*(len(e) for e in indices if _per_group(e)))
    spread = lambda e: e.unsqueeze(1).expand(-1, groups // len(e)).flatten() if _per_group(e) else e  # noqa: E731
    expert_d, expert_u = map(spread, indices)
    return replace(call, expert_d=expert_d, expert_u=expert_u)


def _check_device(name, value, h):
    if isinstance(value, torch.Tensor) and value.device != h.device:
        raise ValueError(f"{name} must be on h's device ({h.device}), got {value.device}")


def _check_expert(name, index, h, most):
    """An index in 0..most; values in tensors are read only where that is free."""
    _check_device(name, index, h)
    if not _per_group(index):
        if isinstance(index, torch.Tensor) and index.dim() > 1:
            raise ValueError(f"{name} must be a number, a 0-d tensor or one [G] of integers, got {describe(index)}")
        check_control(name, index, h.device, 0, most)
        return
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers, got {describe(index)}")
    check_dense(name, index)
    check_memory(name, index)
    groups, count = index.shape[0], math.prod(h.shape[:-1])
    if groups < 1 or count % groups:
        raise ValueError(f"{name} must have a number of groups that divides h's {count} rows, got {groups}")
    if h.device.type == "cpu" and most is not None and not (is_subclass(index) or torch.compiler.is_compiling()):
        check_control(name, int(index.min()), h.device, 0, most)
        check_control(name, int(index.max()), h.device, 0, most)


BOTTLENECK = Bottleneck()
_call = BOTTLENECK.__call__
