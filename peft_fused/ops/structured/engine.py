"""What the structured ops share: checks, the choice of a backend, one registered operation and its autograd node.

Saved for backward: x itself and the parameters, each only where a gradient reads it; spectra and intermediates are
recomputed. Implementations: `fft.py`, `materialized.py` and `gemm.py` here, between which `plan.py` chooses, the Triton
kernels behind `kernels.py`, and `csrc/autograd/structured.cpp` with `csrc/kernels/fft.cu`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from .. import dispatch, native
from ..arguments import (
    FLOATING,
    autocasts,
    check_beside,
    check_dense,
    check_dropout,
    check_flag,
    check_kept,
    check_memory,
    check_scale,
    dtype_names,
    is_recorded,
    is_subclass,
    resolved,
    saved_tensors,
    seed_tensor,
    split,
)
from ..dropout import drop, dropout_threshold, keep_mask, keep_scale, load
from ..lowrank_torch import rows, unflatten
from . import fft, gemm, kernels, maps, materialized
from .plan import StructuredProblem


@dataclass(frozen=True)
class Structure:
    """One kind of map. names: of its parameters, q's None where it has none or it is optional. plain(x, p, q, n): the
    map [..., K] -> [..., n] in plain PyTorch, in the dtype that x and the parameters share."""

    kind: str
    names: tuple[str, str | None]
    plain: Callable


STRUCTURES: dict[str, Structure] = {}


def run(kind, x, p, q, n, *, add=None, scale=1.0, dropout_p=0.0, seed=None, transposed=False, names=None):
    """add + scale * M drop(x), or M^T, on parameters whose shapes fit: [..., K] -> [..., n] in x's dtype.

    names: of p and q where the caller has others than the structure.
    """
    names = names or STRUCTURES[kind].names
    _check(names, x, p, q, add, n, scale, dropout_p, seed, transposed)
    x, p, q, add, scale, seed = map(resolved, (x, p, q, add, scale, seed))
    if autocasts(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, add = (_autocast(t, dtype) for t in (x, add))
        p, q = (t if t is None or t.dtype == torch.float32 else _autocast(t, dtype) for t in (p, q))
        with torch.autocast(x.device.type, enabled=False):
            return run(
                kind, x, p, q, n, add=add, scale=scale, dropout_p=dropout_p, seed=seed, transposed=transposed,
                names=names,
            )  # fmt: skip
    _check_dtypes(names, x, p, q, add)

    threshold = dropout_threshold(dropout_p)
    seed = seed_tensor(seed, x.device) if threshold else None
    # Whatever traces, or records for a second run as selective checkpointing does, has to see one operation.
    traced = is_recorded() or is_subclass(x) or torch._C._len_torch_dispatch_stack() > 0
    if traced:
        backend = dispatch.in_graph()
    else:
        problem = problem_of(kind, x, p, q, n, threshold > 0, transposed)
        backend = dispatch.choose(problem)
        if dispatch.hosts(problem, backend):
            return _native(problem, backend, names, x, p, q, add, scale, threshold, seed)
    if backend == "reference":
        return reference(
            kind, x, p, q, n, add=add, scale=scale, dropout_p=dropout_p, seed=seed, transposed=transposed
        )  # fmt: skip
    if backend == "cuda":
        raise RuntimeError(
            "backend 'cuda' runs in the C++ node, which takes no tensor subclasses, dispatch modes or torch.compile"
        )
    flat = (kind, n, *split(scale, float), threshold, seed, transposed, backend)
    if traced:
        return torch.ops.peft_fused.structured_fwd(x, p, q, add, *flat)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, p, q)):
        reads_x = p.requires_grad or (q is not None and q.requires_grad)
        check_kept(x=x if reads_x else None, **{names[0]: p, names[1] or "q": q})
    return _Structured.apply(x, p, q, add, *flat)


def _native(problem, backend, names, x, p, q, add, scale, threshold, seed):
    """The op in the C++ node."""
    method, length = problem.plan.method, problem.plan.length
    if backend == "cuda" and method != "gemm":
        method, length = "fft", problem.lengths.cuda
    matrix = None
    if method == "dense":
        matrix = materialized.matrix(problem.kind, p, q, problem.n, problem.k, materialized.work_dtype(x, p))
    return native.module.structured(
        problem.kind, method, (names[0], names[1] or ""), x, p, q, add, problem.n, length, scale, threshold, seed,
        matrix,
    )  # fmt: skip


def reference(kind, x, p, q, n, *, add=None, scale=1.0, dropout_p=0.0, seed=None, transposed=False):
    """`run` in plain PyTorch, differentiated by autograd."""
    # No FFT library has bf16: convolutions are computed in fp32 at least and rounded once.
    dtype = p.dtype
    if kind != "kronecker":
        dtype = torch.promote_types(torch.promote_types(x.dtype, p.dtype), torch.float32)
    xd, pd, qd = (t if t is None else t.to(dtype) for t in (x, p, q))
    if dropout_p > 0:
        threshold = dropout_threshold(dropout_p)
        keep = keep_mask(seed_tensor(seed, x.device), math.prod(x.shape[:-1]), x.shape[-1], threshold)
        xd = xd * keep.reshape(x.shape) * keep_scale(threshold)
    plain = STRUCTURES[kind].plain
    if transposed:
        columns = plain(torch.eye(n, dtype=dtype, device=x.device), pd, qd, x.shape[-1])
        delta = xd @ columns.mT
    elif 0 in x.shape:  # which torch.fft refuses
        delta = xd @ plain(torch.eye(x.shape[-1], dtype=dtype, device=x.device), pd, qd, n)
    else:
        delta = plain(xd, pd, qd, n)
    delta = delta * scale
    return (delta if add is None else add + delta).to(x.dtype)


def problem_of(kind, x, p, q, n: int, dropout: bool, transposed: bool = False) -> StructuredProblem:
    """Description of a structured op on these tensors."""
    gpu, sm_count = dispatch.gpu_of(x)
    k = x.shape[-1]
    return StructuredProblem(
        kind, math.prod(x.shape[:-1]), n, k, maps.sizes_of(kind, p, q), dispatch.name_of(x.dtype),
        dispatch.name_of(p.dtype), x.device.type, gpu, sm_count, dropout, transposed,
    )  # fmt: skip


def _autocast(tensor, dtype):
    if tensor is None or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


# ------------------------------------------------------------------------------------------------------------- checks


def check_tensor(name: str, tensor) -> None:
    """TypeError or ValueError unless it is a dense tensor with memory behind it."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    check_dense(name, tensor)
    check_memory(name, tensor)


def check_parameter(name: str, tensor, dims: tuple[int, ...], text: str) -> None:
    """TypeError or ValueError unless a parameter is a tensor of one of these numbers of dimensions, none of size 0."""
    check_tensor(name, tensor)
    if tensor.dim() not in dims or 0 in tensor.shape:
        raise ValueError(f"{name} must have shape {text} with no size of 0, got {list(tensor.shape)}")


def check_input(x, size: int | None, why: str) -> None:
    """TypeError or ValueError unless x is a dense floating-point tensor [..., size]."""
    check_tensor("x", x)
    if x.dtype not in FLOATING:
        raise TypeError(f"x must be floating point ({dtype_names(FLOATING)}), got {dtype_names((x.dtype,))}")
    if x.dim() < 1:
        raise ValueError("x must have shape [..., K], got a 0-d tensor")
    if x.shape[-1] < 1:
        raise ValueError(f"x must have at least one feature, got shape {list(x.shape)}")
    if size is not None and x.shape[-1] != size:
        raise ValueError(f"x must have {size} features ({why}), got shape {list(x.shape)}")


def _check(names, x, p, q, add, n, scale, dropout_p, seed, transposed):
    if add is not None:
        check_tensor("add", add)
    tensors = [(name, t) for name, t in zip((*names, "add"), (p, q, add), strict=True) if t is not None]
    for name, tensor in tensors:
        if tensor.dtype not in FLOATING:
            allowed = dtype_names(FLOATING)
            raise TypeError(f"{name} must be floating point ({allowed}), got {dtype_names((tensor.dtype,))}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device ({x.device}), got {tensor.device}")
        check_beside(name, tensor, x)
    if add is not None and tuple(add.shape) != (*x.shape[:-1], n):
        raise ValueError(f"add must have shape [..., N] = {[*x.shape[:-1], n]}, got {list(add.shape)}")
    check_scale(scale, x)
    check_dropout(dropout_p, seed, x.device)
    check_flag("transposed", transposed)


def _check_dtypes(names, x, p, q, add):
    allowed = {x.dtype, torch.float32} if x.dtype != torch.float64 else {torch.float64}
    for name, tensor, kinds, why in (
        (names[0], p, allowed, "x's dtype or float32"),
        (names[1], q, {p.dtype}, f"{names[0]}'s dtype"),
        ("add", add, {x.dtype}, "x's dtype"),
    ):
        if tensor is not None and tensor.dtype not in kinds:
            raise TypeError(f"{name} must have {why} ({dtype_names(kinds)}), got {dtype_names((tensor.dtype,))}")


# ------------------------------------------------------------------------------------- registered ops and the autograd

_CONTROLS = "float scale, Tensor? scale_t, int threshold, Tensor? seed, bool transposed, str backend"
_LIBRARY = torch.library.Library("peft_fused", "FRAGMENT")
# What they keep from call to call, tables and dense matrices, must not lie in the memory of a graph of inductor's.
_KEEPS = (torch.Tag.cudagraph_unsafe,)
_LIBRARY.define(
    f"structured_fwd(Tensor x, Tensor p, Tensor? q, Tensor? add, str kind, int n, {_CONTROLS}) -> Tensor", tags=_KEEPS
)
_LIBRARY.define(
    f"structured_bwd(Tensor dy, Tensor? x, Tensor p, Tensor? q, str kind, int k, {_CONTROLS}, bool[] needs) "
    "-> Tensor[]",
    tags=_KEEPS,
)


def _resolve(backend, problem) -> str:
    """The backend of a traced call: see lowrank._resolve."""
    return dispatch.preferred(problem, traced=True) if backend == "auto" else dispatch.require(backend, problem)


def _forward(x, p, q, add, kind, n, scale, scale_t, threshold, seed, transposed, backend):
    scale = _scale(scale, scale_t)
    options = dict(kind=kind, n=n, scale=scale, threshold=threshold, seed=seed, transposed=transposed)
    x2, add2 = rows(x), None if add is None else rows(add)
    if x2.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], n)
    if backend == "triton":
        return unflatten(kernels.forward(x2, p, q, add2, **options), x)
    plan = problem_of(kind, x, p, q, n, threshold > 0, transposed).plan
    if plan.method == "gemm":
        del options["kind"], options["n"]
        y = gemm.forward(x2, p, q, add2, **options)
    elif plan.method == "dense":
        y = materialized.forward(x2, p, q, add2, **options)
    else:
        y = fft.forward(x2, p, q, add2, **options, length=plan.length)
    return unflatten(y, x)


def _backward(dy, x, p, q, kind, k, scale, scale_t, threshold, seed, transposed, backend, needs):
    """The needed gradients of (x, p, q), as a list."""
    if autocasts(dy.device.type):  # backward() called inside autocast; forward settled the types
        with torch.autocast(dy.device.type, enabled=False):
            return _backward(dy, x, p, q, kind, k, scale, scale_t, threshold, seed, transposed, backend, needs)
    number = _scale(scale, scale_t)
    dy2, x2 = rows(dy), None if x is None else rows(x)
    if transposed:
        # <dy, M^T x> = <M dy, x>: the gradient of x is the map itself, and of M that of y = M dy.
        dx = None
        if needs[0]:
            dx = _forward(dy2, p, q, None, kind, k, scale, scale_t, 0, None, False, backend)
            dx = drop(dx, seed, threshold) if threshold else dx
        parts = [None, None, None]
        if needs[1] or needs[2]:
            # A dropped-out x keeps its digits: the parameters' gradients may be fp32 beside half-precision rows.
            x2 = load(x2, p.dtype, seed, threshold) if threshold else x2
            parts = _gradients(x2, dy2, p, q, kind, dy2.shape[1], number, 0, None, backend, (False, *needs[1:]))
        grads = (dx, *parts[1:])
    else:
        grads = _gradients(dy2, x2, p, q, kind, k, number, threshold, seed, backend, needs)
    dx, dp, dq = grads
    if needs[0]:
        dx = dx.view(*dy.shape[:-1], k)
    return [grad.contiguous() for grad, need in zip((dx, dp, dq), needs, strict=True) if need]


def _gradients(dy2, x2, p, q, kind, k, scale, threshold, seed, backend, needs):
    options = dict(kind=kind, k=k, scale=scale, threshold=threshold, seed=seed, needs=needs)
    if dy2.shape[0] == 0:
        return [None if t is None else t.new_zeros(t.shape) for t in (dy2.new_empty(0, k), p, q)]
    if backend == "triton":
        return kernels.backward(dy2, x2, p, q, **options)
    like = dy2.new_empty(1, k).expand(dy2.shape[0], k)
    plan = problem_of(kind, like, p, q, dy2.shape[1], threshold > 0).plan
    if plan.method == "gemm":
        del options["kind"], options["k"]
        return gemm.backward(dy2, x2, p, q, **options)
    if plan.method == "dense":
        vectors = options | {"needs": (False, *needs[1:])}
        by_fft = partial(fft.backward, dy2, x2, p, q, **vectors, length=plan.length)
        return materialized.backward(dy2, x2, p, q, **options, correlate=by_fft)
    return fft.backward(dy2, x2, p, q, **options, length=plan.length)


def _scale(number, tensor):
    """The scale as a number where that is free to know."""
    if tensor is None:
        return number
    return tensor.item() if tensor.device.type == "cpu" else tensor


def _forward_op(x, p, q, add, kind, n, *flat):
    *controls, transposed, backend = flat
    backend = _resolve(backend, problem_of(kind, x, p, q, n, controls[2] > 0, transposed))
    return _forward(x, p, q, add, kind, n, *controls, transposed, backend)


def _backward_op(dy, x, p, q, kind, k, *flat):
    *controls, transposed, backend, needs = flat
    like = dy.new_empty(1).expand(*dy.shape[:-1], k)
    backend = _resolve(backend, problem_of(kind, like, p, q, dy.shape[-1], controls[2] > 0, transposed))
    return _backward(dy, x, p, q, kind, k, *controls, transposed, backend, needs)


def _forward_fake(x, p, q, add, kind, n, *flat):
    return x.new_empty(*x.shape[:-1], n)


def _backward_fake(dy, x, p, q, kind, k, *flat):
    likes = (dy.new_empty(*dy.shape[:-1], k), p, q)
    return [like.new_empty(like.shape) for like, need in zip(likes, flat[-1], strict=True) if need]


def _setup(ctx, inputs, output):
    x, p, q, _, kind, _, scale, scale_t, threshold, seed, transposed, backend = inputs
    needs = [bool(need) for need in ctx.needs_input_grad[:3]]
    ctx.call = kind, x.shape[-1], scale, threshold, transposed, backend
    ctx.needs = needs
    ctx.save_for_backward(x if needs[1] or needs[2] else None, p, q, scale_t, seed)


def _grads(ctx, dy, backward=None):
    """Gradients for every input of structured_fwd, traced by the registered op; eager mode skips its dispatch."""
    out = [None] * 12
    if dy is None:
        return tuple(out)
    if torch.is_grad_enabled():
        raise RuntimeError("peft_fused: the structured ops have no second derivative; use_backend('reference') has one")
    if any(ctx.needs):
        x, p, q, scale_t, seed = saved_tensors(ctx, ("x", "p", "q"))
        dy = resolved(dy)
        kind, k, scale, threshold, transposed, backend = ctx.call
        backward = backward or torch.ops.peft_fused.structured_bwd
        found = iter(backward(dy, x, p, q, kind, k, scale, scale_t, threshold, seed, transposed, backend, ctx.needs))
        for position, need in enumerate(ctx.needs):
            if need:
                out[position] = next(found)
    if ctx.needs_input_grad[3]:
        out[3] = dy
    return tuple(out)


class _Structured(torch.autograd.Function):
    """The op without the C++ node: what eager mode runs for other kinds, backends, or when the extension is missing."""

    @staticmethod
    def forward(x, p, q, add, *flat):
        return _forward(x, p, q, add, *flat)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        _setup(ctx, inputs, output)

    @staticmethod
    def backward(ctx, dy):
        return _grads(ctx, dy, _backward)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("structured_fwd", _forward_op, _key)
    _LIBRARY.impl("structured_bwd", _backward_op, _key)
torch.library.register_fake("peft_fused::structured_fwd", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("peft_fused::structured_bwd", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("peft_fused::structured_fwd", _grads, setup_context=_setup, lib=_LIBRARY)
