"""A low-rank adapter on a linear map, and the map itself in the same op.

    y = x W^T + bias + scale * v . (B[e] (u . keep_rank(A[e] drop(x))))

keep_rank zeroes all but the first `rank` components. One formula serves LoRA (Hu et al. 2021, eq. 3), DyLoRA (Valipour
et al. 2023, eq. 5: rank drawn per step, scale alpha / rank), AFLoRA (Liu et al. 2024: u, v), and AdaMix's LoRA form
(Wang et al. 2022: e drawn per forward). With t = dY^T (u . S) and S = keep_rank(A drop(x)):

    dSu = scale dY (v . B)      dB = scale v . t          dv = scale rowsum(B . t)
    dS  = u . dSu               dA = dS^T drop(x)         du = colsum(dSu . S)        dx = dY W + drop^T(dS A)

Saved for backward: x itself, S and a seed; neither when nothing that needs them is trained. Implementations:
`lowrank_torch.py` here, `triton_kernels/lowrank.py`, `csrc/autograd/lowrank.cpp` with `csrc/kernels/lowrank.cu`.
"""

import math

import torch
import torch.nn.functional as F

from ..triton_kernels.plan import MAX_RANK
from . import dispatch, lowrank_torch, native
from .arguments import (
    FLOATING,
    autocasts,
    check_beside,
    check_control,
    check_dense,
    check_dropout,
    check_flag,
    check_kept,
    check_memory,
    check_scale,
    check_shape,
    dtype_names,
    is_recorded,
    is_subclass,
    lazy,
    resolved,
    saved_tensors,
    seed_tensor,
    split,
)
from .dropout import dropout_threshold, keep_mask, keep_scale
from .lowrank_torch import Controls


def lowrank_linear_reference(
    x, weight, bias, A, B, *, scale=1.0, rank=None, expert=None, u=None, v=None, dropout_p=0.0, seed=None, frozen=False
):
    """`lowrank_linear` written down in plain PyTorch, differentiated by autograd. Same arguments, same result."""
    return lowrank_adapter_reference(
        x, A, B, add=F.linear(x, weight, bias), scale=scale, rank=rank, expert=expert, u=u, v=v, dropout_p=dropout_p,
        seed=seed, frozen=frozen,
    )  # fmt: skip


def lowrank_adapter_reference(
    x, A, B, *, add=None, scale=1.0, rank=None, expert=None, u=None, v=None, dropout_p=0.0, seed=None, frozen=False
):
    """`lowrank_adapter` written down in plain PyTorch, differentiated by autograd. Same arguments, same result."""
    expert_a, expert_b = expert if isinstance(expert, tuple | list) else (expert, expert)
    expert_a, expert_b = (0 if e is None else resolved(e) for e in (expert_a, expert_b))  # torch indexes by the memory
    A = A if A.dim() == 2 else A[expert_a]
    B = B if B.dim() == 2 else B[expert_b]
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
    S = F.linear(xd, A) * (ranks < rank)
    if u is not None:
        S = S * u
    delta = F.linear(S, B)
    if v is not None:
        delta = delta * v
    delta = delta * scale
    return (delta if add is None else add + delta).to(x.dtype)


def lowrank_linear(
    x, weight, bias, A, B, *, scale=1.0, rank=None, expert=None, u=None, v=None, dropout_p=0.0, seed=None, frozen=False
):
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

    0-d tensors belong on x's device; changing their value neither synchronises nor recompiles.
    Returns [..., N] in x's dtype. Under autocast x, weight and bias are cast as by torch.nn.functional.linear.
    A dispatch mode sees one operation: a policy of selective checkpointing names torch.ops.peft_fused.lowrank_fwd.
    Raises ValueError or TypeError naming the argument, RuntimeError when a forced backend cannot run.
    """
    if weight is None:
        raise TypeError("weight must be a torch.Tensor, got None: lowrank is the op without a base product")
    return _run(x, weight, None, bias, A, B, scale, rank, expert, u, v, dropout_p, seed, frozen)


def lowrank_adapter(
    x, A, B, *, add=None, scale=1.0, rank=None, expert=None, u=None, v=None, dropout_p=0.0, seed=None, frozen=False
):
    """add + scale * v . (B[e] (u . keep_rank(A[e] drop(x)))): the adapter beside a base layer that runs as a module.

    add: [..., N] in x's dtype, the output of that layer, or None. It is not written to. The rest: see `lowrank_linear`.
    """
    return _run(x, None, add, None, A, B, scale, rank, expert, u, v, dropout_p, seed, frozen)


def _run(x, weight, add, bias, A, B, scale, rank, expert, u, v, dropout_p, seed, frozen):
    state = dispatch.state
    if state.native_serves and not is_recorded():
        # None says that something is unusual: bad arguments, autocast, a tensor subclass, a dispatch mode, another
        # backend. The checks and the choice are made below, once, in Python.
        y = native.module.lowrank(
            x, weight, add, bias, A, B, scale, rank, expert, u, v, dropout_p, seed, frozen, state.backend
        )
        if y is not None:
            return y
    if isinstance(x, torch.Tensor) and autocasts(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, add, bias, A, B, u, v = (
            _autocast(t, dtype, i) for i, t in enumerate((x, weight, add, bias, A, B, u, v))
        )
        with torch.autocast(x.device.type, enabled=False):
            return _run(x, weight, add, bias, A, B, scale, rank, expert, u, v, dropout_p, seed, frozen)
    pair = tuple(expert) if isinstance(expert, tuple | list) else (expert, expert)
    _check(x, weight, add, bias, A, B, scale, rank, pair, u, v, dropout_p, seed, frozen)
    if lazy(x, weight, add, bias, A, B, scale, rank, *pair, u, v, seed):
        x, weight, add, bias, A, B, scale, rank, u, v, seed = map(
            resolved, (x, weight, add, bias, A, B, scale, rank, u, v, seed)
        )
        pair = tuple(map(resolved, pair))
        return _run(x, weight, add, bias, A, B, scale, rank, pair, u, v, dropout_p, seed, frozen)

    threshold = dropout_threshold(dropout_p)
    seed = seed_tensor(seed, x.device) if threshold else None
    # Whatever traces, or records for a second run as selective checkpointing does, has to see one operation.
    traced = is_recorded() or is_subclass(x) or torch._C._len_torch_dispatch_stack() > 0
    # A traced call chooses inside the op, where sizes are numbers: a choice in the graph would be a guard on them.
    backend = dispatch.in_graph() if traced else dispatch.choose(_problem(x, weight, A, B, u, v, threshold))
    if backend == "reference":
        options = dict(scale=scale, rank=rank, expert=pair, u=u, v=v, dropout_p=dropout_p, seed=seed, frozen=frozen)
        if weight is not None:
            return lowrank_linear_reference(x, weight, bias, A, B, **options)
        return lowrank_adapter_reference(x, A, B, add=add, **options)
    if backend == "cuda" and dispatch.forced() is None:
        # The node was asked first and left this call to Python: a tensor of a subclass that only it minds, for one.
        backend = dispatch.preferred(_problem(x, weight, A, B, u, v, threshold), traced=True)
    if backend == "cuda":
        raise RuntimeError(
            "backend 'cuda' runs in the C++ node, which takes no tensor subclasses, dispatch modes or torch.compile"
        )
    expert_a, expert_b = (0 if e is None else e for e in pair)
    flat = (
        *split(scale, float), *split(A.shape[-2] if rank is None else rank, int), *split(expert_a, int),
        *split(expert_b, int), threshold, seed, bool(frozen), backend,
    )  # fmt: skip
    if traced:
        return torch.ops.peft_fused.lowrank_fwd(x, weight, add, bias, A, B, u, v, *flat)[0]
    if torch.is_grad_enabled():
        inputs = dict(x=x, weight=weight, bias=bias, A=A, B=B, u=u, v=v)
        check_kept(**_kept({name: t is not None and t.requires_grad for name, t in inputs.items()}, inputs))
    return _LowRank.apply(x, weight, add, bias, A, B, u, v, *flat)[0]


def _problem(x, weight, A, B, u, v, threshold):
    uv = u is not None or v is not None
    return dispatch.problem_of(x, A, B, has_weight=weight is not None, dropout=threshold > 0, uv=uv)


def _autocast(tensor, dtype, position):
    # Adapters (positions 4..7) in fp32 stay there: mixing is what the op does well, and it is the more accurate choice.
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor if position >= 4 and tensor.dtype == torch.float32 else tensor.to(dtype)


# ------------------------------------------------------------------------------------------------------------- checks


def _check(x, weight, add, bias, A, B, scale, rank, pair, u, v, dropout_p, seed, frozen):
    """Raises ValueError or TypeError naming the first bad argument, what it is and what is allowed."""
    for name, tensor in (("x", x), ("A", A), ("B", B)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        check_dense(name, tensor)
    for name, tensor in (("weight", weight), ("add", add), ("bias", bias), ("u", u), ("v", v)):
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor or None, got {type(tensor).__name__}")
        if tensor is not None:
            check_dense(name, tensor)
    if x.dtype not in FLOATING:
        raise TypeError(f"x must be floating point ({dtype_names(FLOATING)}), got {dtype_names((x.dtype,))}")
    check_memory("x", x)
    if x.dim() < 1:
        raise ValueError("x must have shape [..., K], got a 0-d tensor")
    if A.dim() not in (2, 3):
        raise ValueError(f"A must have shape [r, K] or [E, r, K], got {list(A.shape)}")
    if B.dim() not in (2, 3):
        raise ValueError(f"B must have shape [N, r] or [E, N, r], got {list(B.shape)}")
    for name, factor in (("A", A), ("B", B)):
        if factor.dim() == 3 and factor.shape[0] == 0:
            raise ValueError(f"{name} must stack at least one expert, got shape {list(factor.shape)}")
    k, (n, r) = x.shape[-1], B.shape[-2:]
    if not 1 <= A.shape[-2] <= MAX_RANK:
        raise ValueError(f"A must have 1 to {MAX_RANK} rows (the rank r), got shape {list(A.shape)}")
    check_shape("A", A, (*A.shape[:-2], A.shape[-2], k), "[r, K] with K = x.shape[-1]")
    if r != A.shape[-2]:
        raise ValueError(f"B must have {A.shape[-2]} columns (the rank of A), got shape {list(B.shape)}")
    for name, tensor, shape, text in (
        ("weight", weight, (n, k), "[N, K]"),
        ("bias", bias, (n,), "[N]"),
        ("u", u, (r,), "[r]"),
        ("v", v, (n,), "[N]"),
        ("add", add, (*x.shape[:-1], n), "[..., N]"),
    ):
        if tensor is not None:
            check_shape(name, tensor, shape, text)
    adapter = {x.dtype, torch.float32} if x.dtype != torch.float64 else {torch.float64}
    for name, tensor, allowed in (
        ("weight", weight, {x.dtype}),
        ("bias", bias, {x.dtype}),
        ("add", add, {x.dtype}),
        ("A", A, adapter),
        ("B", B, {A.dtype}),
        ("u", u, {A.dtype}),
        ("v", v, {A.dtype}),
    ):
        if tensor is not None and tensor.dtype not in allowed:
            why = "x's dtype or float32" if name == "A" else "A's dtype" if name in "Buv" else "x's dtype"
            raise TypeError(f"{name} must have {why} ({dtype_names(allowed)}), got {dtype_names((tensor.dtype,))}")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device ({x.device}), got {tensor.device}")
        if tensor is not None:
            check_memory(name, tensor)
            check_beside(name, tensor, x)
    check_scale(scale, x)
    if rank is not None:
        check_control("rank", rank, x.device, 1, r)
    if len(pair) != 2:
        raise ValueError(f"expert must be an index or a pair of them, got {len(pair)} values")
    for name, factor, index in (("A", A, pair[0]), ("B", B, pair[1])):
        if index is not None:  # that of a factor which is no stack is not used
            most = factor.shape[0] - 1 if factor.dim() == 3 else None
            check_control(f"expert (of {name})", index, x.device, 0, most)
    if A.dim() == 2 and B.dim() == 2 and pair != (None, None):
        raise ValueError("expert needs a stacked A [E, r, K] or B [E, N, r], got 2-D factors")
    check_dropout(dropout_p, seed, x.device)
    check_flag("frozen", frozen)


# ------------------------------------------------------------------------------------- registered ops and the autograd

_CONTROLS = (
    "float scale, Tensor? scale_t, int rank, Tensor? rank_t, int expert_a, Tensor? expert_a_t, int expert_b, "
    "Tensor? expert_b_t, int threshold, Tensor? seed, bool frozen, str backend"
)
_LIBRARY = torch.library.Library("peft_fused", "DEF")
_LIBRARY.define(
    "lowrank_fwd(Tensor x, Tensor? weight, Tensor? add, Tensor? bias, Tensor A, Tensor B, Tensor? u, Tensor? v, "
    f"{_CONTROLS}) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "lowrank_bwd(Tensor dy, Tensor? x, Tensor? weight, Tensor? A, Tensor? B, Tensor? u, Tensor? v, Tensor? S, "
    f"{_CONTROLS}, bool[] needs) -> Tensor[]"
)
# Positions of the tensors in lowrank_fwd that have a gradient, in the order of `needs`; add's gradient is dy itself.
_X, _WEIGHT, _ADD, _BIAS, _A, _B, _U, _V = range(8)
_NEEDS = (_X, _WEIGHT, _BIAS, _A, _B, _U, _V)
NAMES = ("x", "weight", "bias", "A", "B", "u", "v")


def _controls(scale, scale_t, rank, rank_t, expert_a, expert_a_t, expert_b, expert_b_t, threshold, seed, frozen):
    pick = lambda number, tensor: number if tensor is None else tensor  # noqa: E731
    return Controls(
        pick(scale, scale_t), pick(rank, rank_t), pick(expert_a, expert_a_t), pick(expert_b, expert_b_t),
        threshold, seed, frozen,
    )  # fmt: skip


def _launch_controls(c: Controls) -> dict:
    """The controls as the Triton launchers name them."""
    return dict(
        scale=c.scale, rank=c.rank, expert_a=c.expert_a, expert_b=c.expert_b, threshold=c.threshold, seed=c.seed
    )  # fmt: skip


def _forward(x, weight, add, bias, A, B, u, v, *flat):
    c, backend = _controls(*flat[:-1]), flat[-1]
    if backend == "torch" or x.numel() == 0 or B.numel() == 0:  # there is nothing to launch a kernel on
        return lowrank_torch.forward(x, weight, add, bias, A, B, u, v, c)
    from ..triton_kernels import lowrank as triton_lowrank

    add2 = None if add is None else lowrank_torch.rows(add)
    y, S = triton_lowrank.lowrank_fwd(lowrank_torch.rows(x), weight, add2, bias, A, B, u, v, **_launch_controls(c))
    return lowrank_torch.unflatten(y, x), S


def _backward(dy, x, weight, A, B, u, v, S, *flat):
    """The needed gradients, as a list in the order of `NAMES`."""
    if autocasts(dy.device.type):  # backward() called inside autocast; forward settled the types
        with torch.autocast(dy.device.type, enabled=False):
            return _backward(dy, x, weight, A, B, u, v, S, *flat)
    c, backend, needs = _controls(*flat[:-2]), flat[-2], flat[-1]
    empty = dy.numel() == 0 or (A is not None and A.numel() == 0)
    if backend == "torch" or empty or B is None:  # without the adapter nothing is left that a kernel would do
        grads = lowrank_torch.backward(dy, x, weight, A, B, u, v, S, c, needs)
        return [grad.contiguous() for grad in grads if grad is not None]
    from ..triton_kernels import lowrank as triton_lowrank

    grads = triton_lowrank.lowrank_bwd(
        lowrank_torch.rows(dy), None if x is None else lowrank_torch.rows(x), weight, A, B, u, v, S,
        **_launch_controls(c), frozen=c.frozen, needs={name for name, need in zip(NAMES, needs, strict=True) if need},
    )  # fmt: skip
    if "x" in grads:
        grads["x"] = grads["x"].view(*dy.shape[:-1], A.shape[-1])
    return [grads[name].contiguous() for name in NAMES if name in grads]


def _resolve(backend, problem) -> str:
    """The backend of a traced call: what use_backend named while it was traced, or the choice for this problem.

    It is made without the `cuda` backend, so that it depends on types and device and is the same in the backward.
    """
    return dispatch.preferred(problem, traced=True) if backend == "auto" else dispatch.require(backend, problem)


def _forward_op(x, weight, add, bias, A, B, u, v, *flat):
    *controls, backend = flat
    backend = _resolve(backend, _problem(x, weight, A, B, u, v, _controls(*controls).threshold))
    return _forward(x, weight, add, bias, A, B, u, v, *controls, backend)


def _backward_op(dy, x, weight, A, B, u, v, S, *flat):
    *controls, backend, needs = flat
    if B is not None:
        backend = _resolve(backend, _problem(dy, weight, B.mT, B, u, v, _controls(*controls).threshold))
    return _backward(dy, x, weight, A, B, u, v, S, *controls, backend, needs)


def _forward_fake(x, weight, add, bias, A, B, u, v, *flat):
    # math.prod, because Size.numel() would fix a symbolic number of rows.
    S = x.new_empty(math.prod(x.shape[:-1]), A.shape[-2], dtype=A.dtype)
    return x.new_empty(*x.shape[:-1], B.shape[-2]), S


def _backward_fake(dy, x, weight, A, B, u, v, S, *flat):
    needs, grads = flat[-1], []
    if needs[0]:
        grads.append(dy.new_empty(*dy.shape[:-1], A.shape[-1]))
    if needs[1]:
        grads.append(dy.new_empty(dy.shape[-1], x.shape[-1]))
    if needs[2]:
        grads.append(dy.new_empty(dy.shape[-1]))
    return grads + [t.new_empty(t.shape) for t, need in zip((A, B, u, v), needs[3:], strict=True) if need]


def _setup(ctx, inputs, output):
    x, weight, _, _, A, B, u, v, *flat = inputs
    ctx.set_materialize_grads(False)
    needs = [ctx.needs_input_grad[i] for i in _NEEDS]
    need = dict(zip(NAMES, needs, strict=True))
    inputs = dict(x=x, weight=weight, A=A, B=B, u=u, v=v)
    tensors = [t for t in flat if isinstance(t, torch.Tensor)]
    ctx.flat = [None if isinstance(t, torch.Tensor) else t for t in flat]
    ctx.tensor_slots = [i for i, t in enumerate(flat) if isinstance(t, torch.Tensor)]
    ctx.needs = needs
    ctx.save_for_backward(
        *_kept(need, inputs).values(), output[1] if need["B"] or need["u"] or need["v"] else None, *tensors
    )


_SAVED = ("x", "weight", "A", "B", "u", "v")


def _kept(need, inputs):
    """What backward reads of the inputs, by name, None for what it does not."""
    keep_A = need["x"] or need["A"]
    keep_adapter = keep_A or need["B"] or need["u"] or need["v"]
    keeps = need["A"] or need["weight"], need["x"], keep_A, keep_adapter, keep_adapter, keep_adapter
    return {name: inputs[name] if keep else None for name, keep in zip(_SAVED, keeps, strict=True)}


def _grads(ctx, dy, dS, backward=None):
    """Gradients for every input of lowrank_fwd. Traced, they come from the registered op; eager skips its dispatch."""
    if dy is None:
        return (None,) * (8 + len(ctx.flat))
    if torch.is_grad_enabled():  # it would be differentiated without what S contributes
        raise RuntimeError("peft_fused: the low-rank op has no second derivative; use_backend('reference') has one")
    x, weight, A, B, u, v, S, *tensors = saved_tensors(ctx, _SAVED)
    dy = resolved(dy)
    flat = list(ctx.flat)
    for slot, tensor in zip(ctx.tensor_slots, tensors, strict=True):
        flat[slot] = tensor
    out = [None] * (8 + len(flat))
    if any(ctx.needs):
        backward = backward or torch.ops.peft_fused.lowrank_bwd
        found = iter(backward(dy, x, weight, A, B, u, v, S, *flat, ctx.needs))
        for position, need in zip(_NEEDS, ctx.needs, strict=True):
            if need:
                out[position] = next(found)
    if ctx.needs_input_grad[_ADD]:
        out[_ADD] = dy
    return tuple(out)


class _LowRank(torch.autograd.Function):
    """The op without the C++ node: what eager mode runs when the extension is missing or the kernels are Triton's."""

    @staticmethod
    def forward(x, weight, add, bias, A, B, u, v, *flat):
        return _forward(x, weight, add, bias, A, B, u, v, *flat)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        _setup(ctx, inputs, output)

    @staticmethod
    def backward(ctx, dy, dS):
        return _grads(ctx, dy, dS, _backward)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("lowrank_fwd", _forward_op, _key)
    _LIBRARY.impl("lowrank_bwd", _backward_op, _key)
torch.library.register_fake("peft_fused::lowrank_fwd", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("peft_fused::lowrank_bwd", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("peft_fused::lowrank_fwd", _grads, setup_context=_setup, lib=_LIBRARY)
