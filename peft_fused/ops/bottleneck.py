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

import torch

from ..triton_kernels.bottleneck_plan import ACTIVATIONS, BottleneckProblem
from ..triton_kernels.plan import MAX_RANK
from . import bottleneck_torch, dispatch, native
from .arguments import (
    FLOATING,
    autocasts,
    check_beside,
    check_control,
    check_dense,
    check_kept,
    check_memory,
    check_scale,
    check_shape,
    describe,
    dtype_names,
    is_recorded,
    is_subclass,
    lazy,
    resolved,
    saved_tensors,
    split,
)
from .bottleneck_torch import Controls, Likeness
from .lowrank_torch import rows, unflatten


def bottleneck_adapter_reference(
    h, down, down_bias, up, up_bias, activation="gelu", *, residual=None, scale=1.0, expert=None
):  # fmt: skip
    """`bottleneck_adapter` written down in plain PyTorch, differentiated by autograd. Same arguments, same result."""
    expert_d, expert_u = expert if isinstance(expert, tuple | list) else (expert, expert)
    act = bottleneck_torch.ACTIVATIONS[activation]
    a = act(_linear_reference(h.to(down.dtype), down, down_bias, expert_d))
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
    state = dispatch.state
    if state.native_serves and not is_recorded():
        # None says that something is unusual, for the checks and the choice below: see lowrank._run.
        y = native.module.bottleneck(
            h, down, down_bias, up, up_bias, activation, residual, scale, expert, state.backend
        )  # fmt: skip
        if y is not None:
            return y
    if isinstance(h, torch.Tensor) and autocasts(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
        h, residual = (_autocast(t, dtype, keep_fp32=False) for t in (h, residual))
        down, down_bias, up, up_bias = (_autocast(t, dtype, keep_fp32=True) for t in (down, down_bias, up, up_bias))
        with torch.autocast(h.device.type, enabled=False):
            return bottleneck_adapter(
                h, down, down_bias, up, up_bias, activation, residual=residual, scale=scale, expert=expert
            )  # fmt: skip
    pair = tuple(expert) if isinstance(expert, tuple | list) else (expert, expert)
    _check(h, down, down_bias, up, up_bias, activation, residual, scale, pair)
    if lazy(h, down, down_bias, up, up_bias, residual, scale, *pair):
        h, down, down_bias, up, up_bias, residual, scale = map(
            resolved, (h, down, down_bias, up, up_bias, residual, scale)
        )
        return bottleneck_adapter(
            h, down, down_bias, up, up_bias, activation, residual=residual, scale=scale,
            expert=tuple(map(resolved, pair)),
        )  # fmt: skip

    expert_d, expert_u = (0 if e is None or t.dim() == 2 else e for e, t in zip(pair, (down, up), strict=True))
    # Whatever traces, or records for a second run as selective checkpointing does, has to see one operation.
    traced = is_recorded() or is_subclass(h) or torch._C._len_torch_dispatch_stack() > 0
    # A traced call chooses inside the op, where sizes are numbers: a choice in the graph would be a guard on them.
    if traced:
        backend = dispatch.in_graph()
    else:
        backend = dispatch.choose(problem_of(h, down, up, activation, (expert_d, expert_u)))
    if backend == "reference":
        return bottleneck_adapter_reference(
            h, down, down_bias, up, up_bias, activation, residual=residual, scale=scale, expert=(expert_d, expert_u)
        )  # fmt: skip
    flat = (activation, *split(scale, float), *split(expert_d, int), *split(expert_u, int), backend)
    if traced:
        return torch.ops.peft_fused.bottleneck_fwd(h, down, down_bias, up, up_bias, residual, *flat)[0]
    if torch.is_grad_enabled():
        inputs = dict(zip(NAMES, (h, down, down_bias, up, up_bias), strict=True))
        check_kept(**_kept({name: t is not None and t.requires_grad for name, t in inputs.items()}, h, down, up))
    return _Bottleneck.apply(h, down, down_bias, up, up_bias, residual, *flat)[0]


def problem_of(h, down, up, activation: str, expert=None) -> BottleneckProblem:
    """Description of `bottleneck_adapter` on these tensors."""
    gpu, sm_count = dispatch.gpu_of(h)
    pair = expert if isinstance(expert, tuple | list) else (expert, expert)
    groups = math.lcm(*(len(e) for e, t in zip(pair, (down, up), strict=True) if t.dim() == 3 and _per_group(e)))
    return _problem(math.prod(h.shape[:-1]), up.shape[-2], h, down, activation, groups, gpu, sm_count)


def _problem(m, n, h, down, activation, groups, gpu, sm_count):
    return BottleneckProblem(
        m, n, down.shape[-1], down.shape[-2], dispatch.name_of(h.dtype), dispatch.name_of(down.dtype), h.device.type,
        gpu, sm_count, groups, activation,
    )  # fmt: skip


def _per_group(index) -> bool:
    return isinstance(index, torch.Tensor) and index.dim() == 1


def _autocast(tensor, dtype, *, keep_fp32: bool):
    # Parameters in fp32 stay there: mixing is what the op does well, and it is the more accurate choice.
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor if keep_fp32 and tensor.dtype == torch.float32 else tensor.to(dtype)


# ------------------------------------------------------------------------------------------------------------- checks


def _check(h, down, down_bias, up, up_bias, activation, residual, scale, pair):
    """Raises ValueError or TypeError naming the first bad argument, what it is and what is allowed."""
    for name, tensor in (("h", h), ("down", down), ("up", up)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        check_dense(name, tensor)
    for name, tensor in (("down_bias", down_bias), ("up_bias", up_bias), ("residual", residual)):
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor or None, got {type(tensor).__name__}")
        if tensor is not None:
            check_dense(name, tensor)
    if h.dtype not in FLOATING:
        raise TypeError(f"h must be floating point ({dtype_names(FLOATING)}), got {dtype_names((h.dtype,))}")
    check_memory("h", h)
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
    for name, bias, weight in (("down_bias", down_bias, down), ("up_bias", up_bias, up)):
        if bias is not None:
            text = "the shape of its weight without the last size"
            check_shape(name, bias, weight.shape[:-1], text)
    if residual is not None:
        check_shape("residual", residual, (*h.shape[:-1], n), "[..., N]")
    elif n != k:
        raise ValueError(f"residual must be given where up has other rows ({n}) than h has features ({k}), got None")
    allowed = {h.dtype, torch.float32} if h.dtype != torch.float64 else {torch.float64}
    for name, tensor, dtypes, why in (
        ("down", down, allowed, "h's dtype or float32"),
        ("down_bias", down_bias, {down.dtype}, "down's dtype"),
        ("up", up, {down.dtype}, "down's dtype"),
        ("up_bias", up_bias, {down.dtype}, "down's dtype"),
        ("residual", residual, {h.dtype}, "h's dtype"),
    ):
        if tensor is None:
            continue
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} must have {why} ({dtype_names(dtypes)}), got {dtype_names((tensor.dtype,))}")
        if tensor.device != h.device:
            raise ValueError(f"{name} must be on h's device ({h.device}), got {tensor.device}")
        check_memory(name, tensor)
        check_beside(name, tensor, h, "h")
    if not isinstance(activation, str):
        raise TypeError(f"activation must be a name, got {type(activation).__name__}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    _check_device("scale", scale, h)
    check_scale(scale, h)
    if len(pair) != 2:
        raise ValueError(f"expert must be an index or a pair of them, got {len(pair)} values")
    for name, weight, index in (("down", down, pair[0]), ("up", up, pair[1])):
        if index is not None:
            # That of a parameter which is no stack is not used.
            _check_expert(f"expert (of {name})", index, h, weight.shape[0] - 1 if weight.dim() == 3 else None)


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


# ------------------------------------------------------------------------------------- registered ops and the autograd

_CONTROLS = (
    "str activation, float scale, Tensor? scale_t, int expert_d, Tensor? expert_d_t, int expert_u, "
    "Tensor? expert_u_t, str backend"
)
_LIBRARY = torch.library.Library("peft_fused", "FRAGMENT")
_LIBRARY.define(
    "bottleneck_fwd(Tensor h, Tensor down, Tensor? down_bias, Tensor up, Tensor? up_bias, Tensor? residual, "
    f"{_CONTROLS}) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "bottleneck_bwd(Tensor dy, Tensor? h, Tensor? down, Tensor? up, Tensor? z, SymInt experts_d, SymInt experts_u, "
    f"SymInt r, ScalarType dtype, bool residual_is_h, {_CONTROLS}, bool[] needs) -> Tensor[]"
)
# The tensors in bottleneck_fwd that bottleneck_bwd has gradients of; the residual's is dy itself.
NAMES = ("h", "down", "down_bias", "up", "up_bias")
_RESIDUAL = 5


def _controls(activation, scale, scale_t, expert_d, expert_d_t, expert_u, expert_u_t) -> Controls:
    pick = lambda number, tensor: number if tensor is None else tensor  # noqa: E731
    return Controls(activation, pick(scale, scale_t), pick(expert_d, expert_d_t), pick(expert_u, expert_u_t))


def _launch_controls(c: Controls) -> dict:
    """The controls as the Triton launchers name them, both sides with as many groups or with one."""
    indices = [c.expert_d, c.expert_u]
    groups = math.lcm(*(len(e) for e in indices if _per_group(e)))
    spread = lambda e: e.unsqueeze(1).expand(-1, groups // len(e)).flatten() if _per_group(e) else e  # noqa: E731
    indices = [spread(e) for e in indices]
    return dict(activation=c.activation, scale=c.scale, expert_d=indices[0], expert_u=indices[1])


def _forward(h, down, down_bias, up, up_bias, residual, *flat):
    c, backend = _controls(*flat[:-1]), flat[-1]
    if backend == "torch" or h.numel() == 0 or up.numel() == 0:  # there is nothing to launch a kernel on
        return bottleneck_torch.forward(h, down, down_bias, up, up_bias, residual, c)
    from ..triton_kernels import bottleneck as triton_bottleneck

    y, z = triton_bottleneck.bottleneck_fwd(
        rows(h), down, down_bias, up, up_bias, None if residual is None else rows(residual), **_launch_controls(c)
    )
    return unflatten(y, h), z


def _backward(dy, h, down, up, z, experts_d, experts_u, r, dtype, residual_is_h, *flat):
    """The needed gradients, as a list in the order of `NAMES`."""
    like = Likeness(experts_d, experts_u, r, dtype)
    if autocasts(dy.device.type):  # backward() called inside autocast; forward settled the types
        with torch.autocast(dy.device.type, enabled=False):
            return _backward(dy, h, down, up, z, experts_d, experts_u, r, dtype, residual_is_h, *flat)
    c, backend, needs = _controls(*flat[:-2]), flat[-2], flat[-1]
    empty = dy.numel() == 0 or any(t is not None and t.numel() == 0 for t in (h, down))
    if backend == "torch" or empty:
        grads = bottleneck_torch.backward(dy, h, down, up, z, c, like, residual_is_h, needs)
        return [grad.contiguous() for grad in grads if grad is not None]
    from ..triton_kernels import bottleneck as triton_bottleneck

    grads = triton_bottleneck.bottleneck_bwd(
        rows(dy), None if h is None else rows(h), down, up, z, **_launch_controls(c), residual_is_h=residual_is_h,
        needs={name for name, need in zip(NAMES, needs, strict=True) if need},
        shapes=_shapes(dy, h, down, experts_d, experts_u, r, needs), dtype=dtype,
    )  # fmt: skip
    if "h" in grads:
        grads["h"] = grads["h"].view(*dy.shape[:-1], down.shape[-1])
    return [grads[name].contiguous() for name in NAMES if name in grads]


def _shapes(dy, h, down, experts_d, experts_u, r, needs) -> dict:
    """Shapes of the needed gradients by name."""
    k = next((t.shape[-1] for t in (h, down) if t is not None), 0)
    stack = lambda experts, *shape: (experts, *shape) if experts else shape  # noqa: E731
    shapes = (
        (*dy.shape[:-1], k), stack(experts_d, r, k), stack(experts_d, r), stack(experts_u, dy.shape[-1], r),
        stack(experts_u, dy.shape[-1]),
    )  # fmt: skip
    return {name: shape for name, shape, need in zip(NAMES, shapes, needs, strict=True) if need}


def _resolve(backend, problem) -> str:
    """The backend of a traced call: see lowrank._resolve."""
    return dispatch.preferred(problem, traced=True) if backend == "auto" else dispatch.require(backend, problem)


def _forward_op(h, down, down_bias, up, up_bias, residual, *flat):
    *controls, backend = flat
    c = _controls(*controls)
    backend = _resolve(backend, problem_of(h, down, up, c.activation, (c.expert_d, c.expert_u)))
    return _forward(h, down, down_bias, up, up_bias, residual, *controls, backend)


def _backward_op(dy, h, down, up, z, experts_d, experts_u, r, dtype, residual_is_h, *flat):
    *controls, backend, needs = flat
    c = _controls(*controls)
    k = next((t.shape[-1] for t in (h, down) if t is not None), dy.shape[-1])
    # The forward's own problem, as far as the choice of a traced call depends on it.
    like_h, like_down = dy.new_empty(1).expand(*dy.shape[:-1], k), dy.new_empty(1, dtype=dtype).expand(r, k)
    like_up = dy.new_empty(1, dtype=dtype).expand(dy.shape[-1], r)
    backend = _resolve(backend, problem_of(like_h, like_down, like_up, c.activation))
    return _backward(
        dy, h, down, up, z, experts_d, experts_u, r, dtype, residual_is_h, *controls, backend, needs
    )  # fmt: skip


def _forward_fake(h, down, down_bias, up, up_bias, residual, *flat):
    # math.prod, because Size.numel() would fix a symbolic number of rows.
    z = h.new_empty(math.prod(h.shape[:-1]), down.shape[-2], dtype=down.dtype)
    return h.new_empty(*h.shape[:-1], up.shape[-2]), z


def _backward_fake(dy, h, down, up, z, experts_d, experts_u, r, dtype, residual_is_h, *flat):
    shapes = _shapes(dy, h, down, experts_d, experts_u, r, flat[-1])
    return [dy.new_empty(shape, dtype=dy.dtype if name == "h" else dtype) for name, shape in shapes.items()]


def _setup(ctx, inputs, output):
    h, down, _, up, _, residual, activation, scale, scale_t, expert_d, expert_d_t, expert_u, expert_u_t, backend = (
        inputs
    )
    ctx.set_materialize_grads(False)
    ctx.needs = [bool(need) for need in ctx.needs_input_grad[: len(NAMES)]]
    need = dict(zip(NAMES, ctx.needs, strict=True))
    need_dz = need["h"] or need["down"] or need["down_bias"]
    experts_d, experts_u = (t.shape[0] if t.dim() == 3 else 0 for t in (down, up))
    ctx.like = experts_d, experts_u, down.shape[-2], down.dtype, residual is None
    ctx.controls = activation, scale, expert_d, expert_u, backend
    keep = any(ctx.needs)
    ctx.save_for_backward(
        *_kept(need, h, down, up).values(),
        output[1] if need["up"] or (need_dz and activation != "identity") else None,
        *(t if keep else None for t in (scale_t, expert_d_t, expert_u_t)),
    )


def _kept(need, h, down, up):
    """What backward reads of the inputs, by name, None for what it does not."""
    need_dz = need["h"] or need["down"] or need["down_bias"]
    return dict(h=h if need["down"] else None, down=down if need["h"] else None, up=up if need_dz else None)


def _grads(ctx, dy, dz, backward=None):
    """Gradients for every input of bottleneck_fwd, traced by the registered op; eager mode skips its dispatch."""
    out = [None] * 14
    if dy is None:
        return tuple(out)
    if torch.is_grad_enabled():  # it would be differentiated without what z contributes
        raise RuntimeError("peft_fused: the bottleneck op has no second derivative; use_backend('reference') has one")
    if any(ctx.needs):
        h, down, up, z, scale_t, expert_d_t, expert_u_t = saved_tensors(ctx, ("h", "down", "up"))
        dy = resolved(dy)
        activation, scale, expert_d, expert_u, backend = ctx.controls
        backward = backward or torch.ops.peft_fused.bottleneck_bwd
        found = iter(
            backward(
                dy, h, down, up, z, *ctx.like, activation, scale, scale_t, expert_d, expert_d_t, expert_u, expert_u_t,
                backend, ctx.needs,
            )
        )  # fmt: skip
        for position, need in enumerate(ctx.needs):
            if need:
                out[position] = next(found)
    if ctx.needs_input_grad[_RESIDUAL]:
        out[_RESIDUAL] = dy
    return tuple(out)


class _Bottleneck(torch.autograd.Function):
    """The op without the C++ node: what eager mode runs when the extension is missing or the kernels are Triton's."""

    @staticmethod
    def forward(h, down, down_bias, up, up_bias, residual, *flat):
        return _forward(h, down, down_bias, up, up_bias, residual, *flat)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(output[1])
        _setup(ctx, inputs, output)

    @staticmethod
    def backward(ctx, dy, dz):
        return _grads(ctx, dy, dz, _backward)


for _key in ("CPU", "CUDA"):
    _LIBRARY.impl("bottleneck_fwd", _forward_op, _key)
    _LIBRARY.impl("bottleneck_bwd", _backward_op, _key)
torch.library.register_fake("peft_fused::bottleneck_fwd", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("peft_fused::bottleneck_bwd", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("peft_fused::bottleneck_fwd", _grads, setup_context=_setup, lib=_LIBRARY)
