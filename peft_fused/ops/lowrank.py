"""A low-rank adapter on a linear map, and the map itself in the same op.

    y = x W^T + bias + scale * v . (B[e] (u . keep_rank(A[e] drop(x))))

keep_rank zeroes all but the first `rank` components. One formula serves LoRA (Hu et al. 2021, eq. 3), DyLoRA (Valipour
et al. 2023, eq. 5: rank drawn per step, scale alpha / rank), AFLoRA (Liu et al. 2024: u, v), and AdaMix's LoRA form
(Wang et al. 2022: e drawn per forward). With t = dY^T (u . S) and S = keep_rank(A drop(x)):

    dSu = scale dY (v . B)      dB = scale v . t          dv = scale rowsum(B . t)
    dS  = u . dSu               dA = dS^T drop(x)         du = colsum(dSu . S)        dx = dY W + drop^T(dS A)

Saved for backward: x itself, S and a seed; neither when nothing that needs them is trained. S may be given in place of
A: layers that share their x then take it from `shared_shrink`, to which dS goes back. Implementations:
`lowrank_torch.py` here, `triton_kernels/lowrank.py`, `csrc/autograd/lowrank.cpp` with `csrc/kernels/lowrank.cu`.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..triton_kernels.launching import gpu_of, name_of
from ..triton_kernels.lowrank_plan import LowRankPlan, LowRankProblem
from ..triton_kernels.tiles import MAX_RANK, padded_rank
from . import lowrank_torch
from .arguments import (
    check_control,
    check_dropout,
    check_flag,
    check_scale,
    check_shape,
    pair_of,
    resolved,
    seed_tensor,
)
from .common import rows, unflatten
from .dropout import dropout_threshold, keep_mask, keep_scale
from .operation import Control, Input, Operation, is_huge, on_host, taken_types


def lowrank_linear_reference(
    x, weight, bias, A, B, *, scale=1.0, rank=None, expert=None, u=None, v=None, dropout_p=0.0, seed=None, frozen=False,
    S=None,
):  # fmt: skip
    """`lowrank_linear` written down in plain PyTorch, differentiated by autograd. Same arguments, same result."""
    return lowrank_adapter_reference(
        x, A, B, add=F.linear(x, weight, bias), scale=scale, rank=rank, expert=expert, u=u, v=v, dropout_p=dropout_p,
        seed=seed, frozen=frozen, S=S,
    )  # fmt: skip


def lowrank_adapter_reference(
    x, A, B, *, add=None, scale=1.0, rank=None, expert=None, u=None, v=None, dropout_p=0.0, seed=None, frozen=False,
    S=None,
):  # fmt: skip
    """`lowrank_adapter` written down in plain PyTorch, differentiated by autograd. Same arguments, same result."""
    expert_a, expert_b = expert if isinstance(expert, tuple | list) else (expert, expert)
    expert_a, expert_b = (0 if e is None else resolved(e) for e in (expert_a, expert_b))  # torch indexes by the memory
    B = B if B.dim() == 2 else B[expert_b]
    if S is not None:
        return _expanded(x, S[:, : B.shape[1]].reshape(*x.shape[:-1], -1), B, add, u, v, scale)
    A = A if A.dim() == 2 else A[expert_a]
    r = A.shape[0]
    rank = r if rank is None else rank
    ranks = torch.arange(r, device=x.device)
    if frozen:
        last = ranks == rank - 1
        A = torch.where(last.unsqueeze(1), A, A.detach())
        B = torch.where(last, B, B.detach())
    xd = x.to(A.dtype)
    if dropout_p > 0:
        seed = seed_tensor(seed, x.device)
        threshold = dropout_threshold(dropout_p)
        keep = keep_mask(seed, math.prod(x.shape[:-1]), x.shape[-1], threshold).reshape(x.shape)
        xd = xd * keep * keep_scale(threshold)
    return _expanded(x, F.linear(xd, A) * (ranks < rank), B, add, u, v, scale)


def _expanded(x, S, B, add, u, v, scale):
    """add + scale * v . (B (u . S)) in x's type, of S [..., r]."""
    if u is not None:
        S = S * u
    delta = F.linear(S, B)
    if v is not None:
        delta = delta * v
    delta = delta * scale
    return (delta if add is None else add + delta).to(x.dtype)


def lowrank_linear(
    x, weight, bias, A, B, *, scale=1.0, rank=None, expert=None, u=None, v=None, dropout_p=0.0, seed=None, frozen=False,
    S=None,
):  # fmt: skip
    """x W^T + bias + scale * v . (B[e] (u . keep_rank(A[e] drop(x)))), differentiable in every tensor but the controls.

    x: [..., K], any strides; fp32, fp16, bf16, or fp64 on the torch and reference backends.
    weight: [N, K] in x's dtype, any strides. bias: [N] or None.
    A: [r, K] or a stack [E, r, K]; B: [N, r] or [E, N, r]; 1 <= r <= 256; in x's dtype or fp32.
    u: [r], v: [N] or None, in A's dtype.
    scale: number or 0-d tensor, finite in fp32 (fp64 beside an fp64 x). It is multiplied into B, v and u, or into a
    product of two operands: where that leaves the range of their type, so does the result, though later factors might
    have brought it back. rank: 1..r, number or 0-d integer tensor; None keeps all.
    expert: index in 0..E-1 (number or 0-d tensor), or a pair of them for A and B; only for stacked factors, default 0.
    dropout_p: in [0, 1). It acts whenever it is not 0; pass 0 in evaluation.
    seed: None draws one from torch's generator of x's device; an int or a 0-d int64 tensor fixes the mask.
    frozen: DyLoRA's frozen mode, only row `rank - 1` of A and that column of B receive a gradient.
    S: [M, r] in B's dtype for the M rows of x, or None. It stands for A drop(x), in place of A, rank, dropout and
    frozen, and receives a gradient; x then gets that of x W^T alone. It may have the columns of zeros beyond r that
    `shared_shrink` leaves.

    0-d tensors belong on x's device; changing their value neither synchronises nor recompiles.
    Returns [..., N] in x's dtype. Under autocast x, weight and bias are cast as by torch.nn.functional.linear.
    A dispatch mode sees one operation: a policy of selective checkpointing names torch.ops.peft_fused.lowrank_fwd.
    Raises ValueError or TypeError naming the argument, RuntimeError when a forced backend cannot run.
    """
    if weight is None:
        raise TypeError("weight must be a torch.Tensor, got None: lowrank is the op without a base product")
    return _call(x, weight, None, bias, A, B, u, v, S, scale, rank, expert, dropout_p, seed, frozen)


def lowrank_adapter(
    x, A, B, *, add=None, scale=1.0, rank=None, expert=None, u=None, v=None, dropout_p=0.0, seed=None, frozen=False,
    S=None,
):  # fmt: skip
    """add + scale * v . (B[e] (u . keep_rank(A[e] drop(x)))): the adapter beside a base layer that runs as a module.

    add: [..., N] in x's dtype, the output of that layer, or None. It is not written to. The rest: see `lowrank_linear`.
    """
    return _call(x, None, add, None, A, B, u, v, S, scale, rank, expert, dropout_p, seed, frozen)


def lowrank_problem(
    x, A, B, *, has_weight: bool, dropout: bool = False, uv: bool = False, scale: float | torch.Tensor = 1.0
) -> LowRankProblem:
    """Description of `lowrank_linear` (has_weight) or `lowrank_adapter`, called now on these tensors. A: None where S
    is given. uv: whether it has u or v."""
    of_A, types = None if A is None else A.shape, taken_types(x, B)
    return _problem(x.shape, types, of_A, B.shape, x.device, scale, has_weight=has_weight, dropout=dropout, uv=uv)


def _problem(x, types, A, B, device, scale, *, has_weight, dropout, uv) -> LowRankProblem:
    """The same of the shapes x, A and B."""
    m = math.prod(x[:-1]) if x[-1] else 0
    return LowRankProblem(
        m, B[-2], x[-1], *map(name_of, types), device.type, gpu_of(device), B[-1], dropout, has_weight, uv,
        stacked=3 in (len(A or ()), len(B)), given=A is None, huge_scale=is_huge(scale, types[1]),
    )  # fmt: skip


@dataclass(slots=True, eq=False)
class LowRankCall:
    """A call of the op. dropout_p and seed as given; threshold and seed are what runs once it is settled."""

    x: torch.Tensor | None
    weight: torch.Tensor | None
    add: torch.Tensor | None
    bias: torch.Tensor | None
    A: torch.Tensor | None
    B: torch.Tensor | None
    u: torch.Tensor | None = None
    v: torch.Tensor | None = None
    scale: float | torch.Tensor = 1.0
    rank: int | torch.Tensor | None = None
    expert_a: int | torch.Tensor | None = None
    expert_b: int | torch.Tensor | None = None
    threshold: int = 0
    seed: int | torch.Tensor | None = None
    frozen: bool = False
    dropout_p: float = 0.0
    S: torch.Tensor | None = None

    def on_host(self) -> "LowRankCall":
        """With controls that lie on the CPU as numbers."""
        return replace(
            self, scale=on_host(self.scale), rank=on_host(self.rank), expert_a=on_host(self.expert_a),
            expert_b=on_host(self.expert_b),
        )  # fmt: skip


class LowRank(Operation):
    name = "lowrank"
    Call = LowRankCall
    inputs = (
        Input("x"), Input("weight", optional=True), Input("add", optional=True, passes=True),
        Input("bias", optional=True), Input("A", optional=True, parameter=True), Input("B", parameter=True),
        Input("u", optional=True, parameter=True), Input("v", optional=True, parameter=True),
        Input("S", optional=True, parameter=True),
    )  # fmt: skip
    controls = (
        Control("scale", "float", tensor=True), Control("rank", "int", tensor=True),
        Control("expert_a", "int", tensor=True), Control("expert_b", "int", tensor=True),
        Control("threshold", "int"), Control("seed", "Tensor?"), Control("frozen", "bool"),
    )  # fmt: skip

    def read(self, x, weight, add, bias, A, B, u, v, S, scale, rank, expert, dropout_p, seed, frozen) -> LowRankCall:
        expert_a, expert_b = pair_of("expert", expert)
        return LowRankCall(
            x, weight, add, bias, A, B, u, v, scale, rank, expert_a, expert_b, 0, seed, frozen, dropout_p, S
        )

    def check(self, call) -> None:
        if call.A is None and call.S is None:
            raise TypeError("A must be a torch.Tensor, got None: it may be left out where S is given")
        if call.S is not None:
            self._check_given(call)
        self.check_inputs(call, lambda: self._check_shapes(call))
        x, r = call.x, call.B.shape[-1]
        check_scale(call.scale, x)
        if call.rank is not None:
            check_control("rank", call.rank, x.device, 1, r)
        for name, factor, index in (("A", call.A, call.expert_a), ("B", call.B, call.expert_b)):
            if index is not None and factor is not None:  # that of a factor which is no stack is not used
                most = factor.shape[0] - 1 if factor.dim() == 3 else None
                check_control(f"expert (of {name})", index, x.device, 0, most)
        stacked = [factor for factor in (call.A, call.B) if factor is not None and factor.dim() == 3]
        if not stacked and (call.expert_a, call.expert_b) != (None, None):
            raise ValueError("expert needs a stacked A [E, r, K] or B [E, N, r], got 2-D factors")
        check_dropout(call.dropout_p, call.seed, x.device)
        check_flag("frozen", call.frozen)

    def _check_given(self, call) -> None:
        for name, absent in (("A", None), ("rank", None), ("dropout_p", 0), ("seed", None), ("frozen", False)):
            value = getattr(call, name)
            if value is not absent and value != absent:
                what = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
                raise ValueError(f"{name} must be {absent!r} where S is given, which stands for it; got {what}")

    def _check_shapes(self, call) -> None:
        x, A, B, S = call.x, call.A, call.B, call.S
        if x.dim() < 1:
            raise ValueError("x must have shape [..., K], got a 0-d tensor")
        if A is not None and A.dim() not in (2, 3):
            raise ValueError(f"A must have shape [r, K] or [E, r, K], got {list(A.shape)}")
        if B.dim() not in (2, 3):
            raise ValueError(f"B must have shape [N, r] or [E, N, r], got {list(B.shape)}")
        for name, factor in (("A", A), ("B", B)):
            if factor is not None and factor.dim() == 3 and factor.shape[0] == 0:
                raise ValueError(f"{name} must stack at least one expert, got shape {list(factor.shape)}")
        k, (n, r) = x.shape[-1], B.shape[-2:]
        if A is None:
            m = math.prod(x.shape[:-1])
            if not 1 <= r <= MAX_RANK:
                raise ValueError(f"B must have 1 to {MAX_RANK} columns (the rank r), got shape {list(B.shape)}")
            if S.dim() != 2 or S.shape[0] != m or S.shape[1] not in (r, padded_rank(r)):
                raise ValueError(
                    f"S must have shape [M, r] = {[m, r]}, or {padded_rank(r)} columns, got {list(S.shape)}"
                )
        else:
            if not 1 <= A.shape[-2] <= MAX_RANK:
                raise ValueError(f"A must have 1 to {MAX_RANK} rows (the rank r), got shape {list(A.shape)}")
            check_shape("A", A, (*A.shape[:-2], A.shape[-2], k), "[r, K] with K = x.shape[-1]")
            if r != A.shape[-2]:
                raise ValueError(f"B must have {A.shape[-2]} columns (the rank of A), got shape {list(B.shape)}")
        for name, shape, text in (
            ("weight", (n, k), "[N, K]"),
            ("bias", (n,), "[N]"),
            ("u", (r,), "[r]"),
            ("v", (n,), "[N]"),
            ("add", (*x.shape[:-1], n), "[..., N]"),
        ):
            if getattr(call, name) is not None:
                check_shape(name, getattr(call, name), shape, text)

    def settle(self, call) -> LowRankCall:
        call = super().settle(call)
        call.rank = call.B.shape[-1] if call.rank is None else call.rank
        call.expert_a, call.expert_b = (0 if e is None else e for e in (call.expert_a, call.expert_b))
        return call

    def problem(self, like, call, device) -> LowRankProblem:
        (x, dtype), (B, adapter_dtype) = (like[name] for name in ("x", "B"))
        A = like["A"] and like["A"][0]
        dropout = (call.threshold or dropout_threshold(call.dropout_p)) > 0
        has_weight, uv = like["weight"] is not None, (like["u"], like["v"]) != (None, None)
        return _problem(
            x, (dtype, adapter_dtype), A, B, device, call.scale, has_weight=has_weight, dropout=dropout, uv=uv
        )  # fmt: skip

    def output(self, like, call):
        B, adapter_dtype = like["B"]
        return B[-2], (0 if like["S"] else padded_rank(B[-1]), adapter_dtype)

    def reached(self, call, needs) -> set[str]:
        return needs - {"x"} if call.S is not None and call.weight is None else needs

    def reads(self, call, needs) -> set[str]:
        factor = needs & {"B", "u", "v"}
        given = call.S is not None
        to_ranks = needs & ({"S"} if given else {"x", "A"})
        reads = {"A", "B", "u", "v"} if to_ranks else {"B", "u", "v"} if factor else set()
        return (
            {n for n in reads if getattr(call, n) is not None}
            | ({"x"} if needs & {"A", "weight"} else set())
            | ({"weight"} if "x" in needs and call.weight is not None else set())
            | ({"S" if given else "hidden"} if factor else set())
        )

    def flops(self, shapes, call, needs) -> int:
        x, weight, A, B = (shapes[name] for name in ("x", "weight", "A", "B"))
        m, n, k, r = math.prod(x[:-1]), B[-2], x[-1], B[-1]
        if needs is None:
            return 2 * m * ((n * k if weight is not None else 0) + r * (n + (k if A is not None else 0)))
        base = ("x" in needs and weight is not None) + ("weight" in needs)
        shrinks = needs & {"x", "A"} if A is not None else set()
        to_ranks = bool(shrinks | (needs & {"u", "S"})) + bool(needs & {"B", "v"})
        return 2 * m * (base * n * k + r * (n * to_ranks + k * len(shrinks)))

    def reference(self, call) -> torch.Tensor:
        options = dict(
            scale=call.scale, rank=call.rank, expert=(call.expert_a, call.expert_b), u=call.u, v=call.v,
            dropout_p=call.dropout_p, seed=call.seed, frozen=call.frozen, S=call.S,
        )  # fmt: skip
        if call.weight is not None:
            return lowrank_linear_reference(call.x, call.weight, call.bias, call.A, call.B, **options)
        return lowrank_adapter_reference(call.x, call.A, call.B, add=call.add, **options)

    def forward(self, call, decision):
        y, S = self._forward(call, decision)
        return y, S if call.S is None else S.new_empty(S.shape[0], 0)  # an input is not hidden

    def _forward(self, call, decision):
        if decision.backend == "torch":
            return lowrank_torch.forward(call)
        from ..triton_kernels import lowrank as triton_lowrank

        add = None if call.add is None else rows(call.add)
        by_rows = replace(call, x=rows(call.x), add=add)
        if isinstance(decision.plan, LowRankPlan):
            y, S = triton_lowrank.lowrank_fwd(by_rows, plan=decision.plan)
        else:
            y, S = decision.plan.forward(by_rows)
        return unflatten(y, call.x), S

    def backward(self, dy, call, hidden, like, needs, decision):
        hidden = hidden if call.S is None else call.S
        if decision.backend == "torch" or call.B is None:  # without the adapter nothing is left that a kernel would do
            return lowrank_torch.backward(dy, call, hidden, like, needs)
        from ..triton_kernels import lowrank as triton_lowrank

        by_rows = replace(call, x=None if call.x is None else rows(call.x))
        if isinstance(decision.plan, LowRankPlan):
            grads = triton_lowrank.lowrank_bwd(rows(dy), by_rows, hidden, needs=needs, plan=decision.plan)
        else:
            grads = decision.plan.backward(rows(dy), by_rows, hidden, needs)
        if "x" in grads:
            grads["x"] = grads["x"].view(like["x"][0])
        if "S" in grads:
            grads["S"] = grads["S"][:, : like["S"][0][1]]
        return grads


LOWRANK = LowRank()
_call = LOWRANK.__call__
