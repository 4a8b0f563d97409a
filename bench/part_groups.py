"""What `bench/parts.py` measures: groups of calls that are timed together, by part."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from peft_fused.triton_kernels import fft_plan
from peft_fused.triton_kernels import lowrank_plan as plans
from peft_fused.triton_kernels.tiles import padded_rank

from peft_fused.ops import bottleneck_adapter, bottleneck_torch, cases, dispatch, lowrank_adapter, lowrank_linear
from peft_fused.ops import structured as maps
from peft_fused.ops.bottleneck import BOTTLENECK, BottleneckCall, bottleneck_problem
from peft_fused.ops.common import cast_and_drop
from peft_fused.ops.dropout import drop, dropout_threshold
from peft_fused.ops.lowrank import LowRankCall, lowrank_problem
from peft_fused.ops.shared_shrink import shared_shrink, why_alone

from . import structured
from .shapes import BF16, Shape, StructuredShape
from .timing import MODES, Variant
from .variants import ALPHA_OVER_R, Layer

FP32, FP16 = torch.float32, torch.float16


# ---------------------------------------------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Work:
    """What a call cannot do without: bytes to and from memory, and arithmetic that a GEMM of `rate` could do."""

    bytes: float
    flops: float
    rate: torch.dtype


class Call:
    """A kernel alone: a timing.Variant without a backward."""

    def __init__(self, run: Callable[[], object]):
        self.run = run

    def forward(self):
        return self.run()

    def backward(self, y) -> None:
        """There is none."""

    def clear(self) -> None:
        """It has no gradients."""


@dataclass
class Entry:
    """A variant and the work of each mode that gets a row, None where no prediction is made of it.

    against: the entry of the group that its ratio is to. equals: the one whose results its own must be; one without
    modes serves for that alone. settings: what is set while it runs, outside the time of a call.
    """

    variant: Variant
    work: dict[str, Work | None]
    against: str | None = None
    equals: str | None = None
    settings: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    note: str | None = None

    # A timing.Variant itself, for `interleave`.
    def forward(self):
        return self.variant.forward()

    def backward(self, y) -> None:
        self.variant.backward(y)

    def clear(self) -> None:
        self.variant.clear()

    def results(self) -> list[torch.Tensor]:
        with self.settings():
            if isinstance(self.variant, Layer):
                return [self.variant.forward().detach(), *self.variant.gradients()]
            found = self.variant.forward()
        found = found if isinstance(found, tuple | list) else [found]
        return [t for t in found if isinstance(t, torch.Tensor)]


@dataclass
class Group:
    """Entries that are timed together. build() makes them, with the reason in place of one that cannot run here."""

    what: str
    shape: str
    dtype: str
    build: Callable[[], dict[str, Entry | str]]
    host: bool = False  # wall time of the host, not time of the device


@dataclass(frozen=True)
class Grid:
    """The problems of each part, the most valuable first, and how long a group is timed: seconds, but at least so many
    rounds. calls: of a sample of the host's time, enough for the clock and too few to fill the device's queue."""

    shapes: dict[str, tuple[Shape | StructuredShape, ...]]
    seconds: float
    least: int
    calls: int


def _bf16(*sizes: int, adapter: torch.dtype = BF16) -> Shape:
    return Shape(*sizes, BF16, adapter)


_WIDE, _NARROW = _bf16(4096, 4096, 4096, 16), _bf16(4096, 768, 768, 8)
_MIXED = replace(_WIDE, adapter_dtype=FP32), replace(_NARROW, adapter_dtype=FP32)
CUDA = Grid(
    {
        "ceilings": tuple(
            _bf16(*sizes, 0)
            for sizes in (
                (4096, 4096, 4096), (4096, 768, 768), (4096, 768, 3072), (512, 4096, 4096), (16384, 4096, 4096),
                (4096, 4096, 14336), (16384, 8192, 8192), (64, 4096, 4096), (1, 4096, 4096),
            )
        ),
        "linear": (
            _NARROW, _bf16(4096, 768, 3072, 8), _bf16(64, 4096, 4096, 16), _bf16(1, 4096, 4096, 16), _WIDE,
            _bf16(512, 4096, 4096, 16), _MIXED[1],
        ),
        "kernels": (
            _WIDE, _NARROW, _bf16(16384, 4096, 4096, 16), _MIXED[0], _bf16(4096, 4096, 4096, 128),
            _bf16(16384, 8192, 8192, 64),
        ),
        "bottleneck": (_bf16(4096, 768, 768, 16), _bf16(4096, 4096, 4096, 64), _bf16(4096, 768, 768, 16, adapter=FP32)),
        "dropout": (_WIDE, _NARROW, _MIXED[0]),
        "host": (_bf16(16, 64, 64, 8),),
        "structured": tuple(
            StructuredShape(op, 4096, sizes, dtype)
            for op, sizes, dtype in (
                *(("circulant", (n,), BF16) for n in (4096, 768, 3072, 1536, 8192)), ("toeplitz", (3072, 768), BF16),
                ("circulant", (4096,), FP32), ("kronecker", (24, 32, 32, 24), BF16), ("kronecker", (64,) * 4, BF16),
            )
        ),
        "methods": _MIXED,
        "graphs": (_bf16(16, 64, 64, 8),),
    },
    seconds=0.4,
    least=5,
    calls=20,
)  # fmt: skip
_SMALL = (Shape(40, 48, 48, 4), Shape(40, 48, 48, 4, FP16, FP16))
TINY = Grid(
    {
        "ceilings": (Shape(40, 48, 48, 0),),
        "linear": _SMALL,
        "kernels": (*_SMALL, Shape(40, 48, 48, 4, FP16)),
        "bottleneck": _SMALL[:1],
        "dropout": _SMALL[1:],
        "host": (Shape(16, 64, 64, 8),),
        "structured": (
            StructuredShape("circulant", 6, (48,)), StructuredShape("toeplitz", 6, (96, 40), FP16),
            StructuredShape("kronecker", 6, (6, 8, 8, 6)),
        ),
        "methods": _SMALL[:1],
        "graphs": (Shape(16, 64, 64, 8),),
    },
    seconds=0.0,
    least=2,
    calls=2,
)  # fmt: skip


def _bytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


def _inputs(shape: Shape, device: torch.device) -> SimpleNamespace:
    """Random tensors of a layer, its adapter and what flows back; `problem` is the op on them."""
    m, n, k, r = shape.m, shape.n, shape.k, shape.r

    def normal(*sizes: int, std: float = 1.0, dtype: torch.dtype = shape.adapter_dtype) -> torch.Tensor:
        return torch.randn(sizes, device=device, dtype=dtype).mul_(std)

    t = SimpleNamespace(
        x=normal(m, k, dtype=shape.dtype), dy=normal(m, n, dtype=shape.dtype),
        weight=normal(n, k, std=k**-0.5, dtype=shape.dtype), A=normal(r, k, std=k**-0.5), B=normal(n, r, std=r**-0.5),
        S=normal(m, r), dS=normal(m, r), normal=normal,
    )  # fmt: skip
    # As the kernels have them: with zeros for ranks that are not there.
    t.padded_S, t.padded_dS = (F.pad(rows, (0, padded_rank(r) - r)) if r else rows for rows in (t.S, t.dS))
    t.call = LowRankCall(t.x, None, None, None, t.A, t.B, rank=r, expert_a=0, expert_b=0)
    t.problem = lowrank_problem(t.x, t.A, t.B, has_weight=True, dropout=False)
    return t


def _why_not(backend: str, problem) -> str:
    return "; ".join(dispatch.why_not(backend, problem))


def _kernel(run: Callable[[], object], work: Work | None, **more) -> Entry:
    return Entry(Call(run), {"forward": work}, **more)


def _triton(problem, call: Callable, work: Work | None, **more) -> Entry | str:
    """What call(launchers of the low-rank kernels) gives; the reason where they cannot be launched."""
    if why := _why_not("triton", problem):
        return why
    from peft_fused.triton_kernels import lowrank as launchers

    return _kernel(call(launchers), work, **more)


def _on(backend: str | None, native: bool = True) -> Callable:
    return partial(dispatch.use_backend, backend, native=native)


def _tile(launch: plans.LowRankLaunch) -> str:
    return ", ".join(f"{name} {value}" for name, value in vars(launch).items())


# ---------------------------------------------------------------------------------------------------- GEMM and layer


def _gemm(shape: Shape, device: torch.device) -> dict:
    """The base product alone, and as the ops call it, onto the adapter in place."""
    x, W, z = (
        torch.randn(sizes, device=device, dtype=shape.dtype)
        for sizes in ((shape.m, shape.k), (shape.n, shape.k), (shape.m, shape.n))
    )
    W, y = W.t(), torch.empty_like(z)
    moved, flops = _bytes(x, W, y), 2 * shape.m * shape.n * shape.k
    onto = Work(moved + _bytes(z), flops, shape.dtype)
    return {
        "beta 0": _kernel(lambda: torch.mm(x, W, out=y), Work(moved, flops, shape.dtype)),
        "beta 1": _kernel(lambda: z.addmm_(x, W), onto, against="beta 0"),
    }


def _linear(shape: Shape, device: torch.device) -> dict:
    """A whole forward pass: by one kernel, even where the plan has none, and by the adapter and then cuBLAS."""
    t = _inputs(shape, device)
    x, W, A, B, base = t.x, t.weight, t.A, t.B, "base alone"

    def baseline():
        y = x @ W.t()
        return y.addmm_(x @ A.to(x.dtype).t(), B.to(x.dtype).t(), alpha=ALPHA_OVER_R)

    work = Work(_bytes(x, W, A, B, t.S, t.dy), shape.flops("forward"), shape.dtype)
    entries = {
        base: _kernel(lambda: x @ W.t(), Work(_bytes(x, W, t.dy), 2 * shape.m * shape.n * shape.k, shape.dtype)),
        "addmm_ baseline": _kernel(baseline, work, against=base),
    }
    plan, call = plans.plan_lowrank(t.problem), LowRankCall(x, W, None, None, A, B, scale=ALPHA_OVER_R)
    launch = plan.linear or plans.plan_lowrank(replace(t.problem, n=plans.NARROW, k=plans.NARROW)).linear
    for name, chosen, note in (
        ("single kernel", replace(plan, forward="single_kernel", linear=launch), launch and _tile(launch)),
        ("adapter first", replace(plan, forward="shrink_expand_gemm", linear=None), None),
    ):
        entries[name] = "the plan has none for these types" if name == "single kernel" and not launch else _triton(
            t.problem, lambda op, plan=chosen: lambda: op.lowrank_fwd(call, plan=plan)[0],
            work, against=base, equals="addmm_ baseline", note=note,
        )  # fmt: skip
    return entries


# ------------------------------------------------------------------------------------------------------ single kernels


def _shrink(shape: Shape, device: torch.device) -> dict:
    """The product with A. The CUDA C++ kernel is reached through the op alone, so there is the op with next to no
    product with B too."""
    t = _inputs(shape, device)
    x, A, narrow = t.x, t.A, t.normal(8, shape.r)
    work = Work(_bytes(x, A, t.S), 2 * shape.m * shape.k * shape.r, shape.dtype)
    launch = replace(plans.plan_lowrank(t.problem).shrink, splits=1)
    same = dict(against="torch", equals="torch", note=_tile(launch))

    def shrink(op):
        return lambda: op.shrink(t.call, torch.empty_like(t.padded_S), launch)[:, : shape.r]

    entries = {
        "torch": _kernel(lambda: x.to(A.dtype) @ A.t(), work),
        "triton": _triton(t.problem, shrink, work, **same),
    }
    for backend in ("torch", "triton", "cuda"):
        against = None if backend == "torch" else "thin op, torch"
        entries[f"thin op, {backend}"] = _why_not(backend, t.problem) or _kernel(
            partial(lowrank_adapter, x, A, narrow), work, against=against, equals=against, settings=_on(backend)
        )
    return entries


def _expand(shape: Shape, device: torch.device) -> dict:
    t = _inputs(shape, device)
    S, B, dtype = t.S, t.B, t.x.dtype
    work = Work(_bytes(S, B, t.dy), 2 * shape.m * shape.n * shape.r, shape.dtype)
    launch = plans.plan_lowrank(t.problem).expand

    def expand(op):
        def run():
            y = torch.empty_like(t.dy)
            op.expand(t.call, t.padded_S, y, t.padded_S, launch)
            return y

        return run

    return {
        "torch": _kernel(lambda: (S @ B.t()).to(dtype), work),
        "triton": _triton(t.problem, expand, work, against="torch", equals="torch", note=_tile(launch)),
    }


_NO_SUCH_PASS = "the plan has none for this rank and these types"


def _grad_b(shape: Shape, device: torch.device) -> dict:
    """dSu and dB from dY, in one pass over it or in two."""
    t = _inputs(shape, device)
    dy, B, S, plan = t.dy, t.B, t.S, plans.plan_lowrank(t.problem)
    work = Work(_bytes(dy, B, S, S, B), 4 * shape.m * shape.n * shape.r, shape.dtype)

    def baseline():
        wide = dy.to(B.dtype)
        wide @ B  # dSu, which the kernels may leave in planes: dB is compared
        return wide.t() @ S

    def passes(chosen: plans.LowRankPlan, against: str, note: str) -> Entry | str:
        def call(op):
            def run():
                found = {"B": torch.empty_like(B)}
                _, sums = op.grad_b(dy, t.call, t.padded_S, {"A", "B"}, chosen, None)
                op.reduce(t.call, shape.n, shape.k, sums, (None, None), found, chosen.reduce)
                return found["B"]

            return run

        return _triton(t.problem, call, work, against=against, equals="torch", note=note)

    two = passes(replace(plan, grad_b=None), "torch", f"{_tile(plan.dsu)}; {_tile(plan.db)}")
    one = passes(plan, "two passes", _tile(plan.grad_b)) if plan.grad_b else _NO_SUCH_PASS
    return {"torch": _kernel(baseline, work), "two passes": two, "one pass": one}


def _grads_of_a(op, t: SimpleNamespace, call: LowRankCall, plan: plans.LowRankPlan) -> tuple:
    """(dA, dx) by the kernels, from dSu."""
    found = {"A": torch.empty_like(t.A), "x": torch.empty_like(t.x)}
    sums = op.grad_a(t.padded_dS, t.x.shape[1], call, None, {"A", "x"}, plan, found["x"])
    op.reduce(call, t.B.shape[0], t.x.shape[1], (None, None), sums, found, plan.reduce)
    return found["A"], found["x"]


def _grad_a(shape: Shape, device: torch.device) -> dict:
    """dx and dA from dSu, in one kernel or apart."""
    t = _inputs(shape, device)
    x, A, dS, plan = t.x, t.A, t.dS, plans.plan_lowrank(t.problem)
    work = Work(_bytes(x, dS, A, A, x), 4 * shape.m * shape.k * shape.r, shape.dtype)

    def kernels(chosen: plans.LowRankPlan, against: str) -> Entry | str:
        call = lambda op: partial(_grads_of_a, op, t, t.call, chosen)  # noqa: E731
        return _triton(t.problem, call, work, against=against, equals="torch", note=_tile(chosen.grad_a))

    return {
        "torch": _kernel(lambda: (dS.t() @ x.to(A.dtype), (dS @ A).to(x.dtype)), work),
        # In a square layer dB's launch is what dA's would be without dx.
        "apart": kernels(replace(plan, fused_a=False, grad_a=plan.db), "torch"),
        "fused": kernels(plan, "apart") if plan.fused_a else _NO_SUCH_PASS,
    }


def _bottleneck(shape: Shape, device: torch.device) -> dict:
    """With biases and its input as its residual."""
    t = _inputs(shape, device)
    call = BottleneckCall(t.x, t.A, t.normal(shape.r), t.B, t.normal(shape.n), expert_d=0, expert_u=0)
    work = Work(_bytes(t.x, t.dy, t.S, t.A, t.B), 4 * shape.m * shape.n * shape.r, shape.dtype)
    entries = {"torch": _kernel(partial(bottleneck_torch.forward, call), work)}
    if why := _why_not("triton", bottleneck_problem(t.x, t.A, t.B, "gelu")):
        return entries | {"triton": why}
    from peft_fused.triton_kernels.bottleneck import bottleneck_fwd

    return entries | {"triton": _kernel(partial(bottleneck_fwd, call), work, against="torch", equals="torch")}


def _bottleneck_bwd(shape: Shape, device: torch.device) -> dict:
    """All its gradients, from units as the forward saves them."""
    t = _inputs(shape, device)
    given = t.dy, t.x, t.A, t.B, t.S
    call = BottleneckCall(t.x, t.A, t.normal(shape.r), t.B, t.normal(shape.n), expert_d=0, expert_u=0)
    like, needs = BOTTLENECK.likeness(call), set(BOTTLENECK.own)
    call.down_bias = call.up_bias = None

    def run(backward):
        grads = backward(t.dy, call, t.S, like=like, needs=needs)
        return [grads[name] for name in BOTTLENECK.own]

    work = Work(_bytes(*given, t.x, t.A, t.B), 8 * shape.m * shape.n * shape.r, shape.dtype)
    entries = {"torch": _kernel(partial(run, bottleneck_torch.backward), work)}
    if why := _why_not("triton", bottleneck_problem(t.x, t.A, t.B, "gelu")):
        return entries | {"triton": why}
    from peft_fused.triton_kernels.bottleneck import bottleneck_bwd

    return entries | {"triton": _kernel(partial(run, bottleneck_bwd), work, against="torch", equals="torch")}


def _dropout(shape: Shape, device: torch.device) -> dict:
    """What drawing the mask adds to kernels that wait for memory: each with p = 0.1 against itself without."""
    t = _inputs(shape, device)
    x, A, dS, narrow = t.x, t.A, t.dS, t.normal(8, shape.r)
    threshold, seed = dropout_threshold(0.1), torch.tensor(0x1234_5678_9ABC_DEF1, device=device)
    wide, dropped = A.float(), cast_and_drop(x, FP32, seed, threshold)
    plan, dropped_call = plans.plan_lowrank(t.problem), replace(t.call, threshold=threshold, seed=seed)
    hidden, launch = torch.empty_like(t.padded_S), replace(plan.shrink, splits=1)
    one = Work(_bytes(x, A, t.S), 2 * shape.m * shape.k * shape.r, shape.dtype)
    two = Work(_bytes(x, dS, A, A, x), 2 * one.flops, shape.dtype)
    entries = {
        "S": Entry(Call(lambda: dropped @ wide.t()), {}),
        "y": Entry(Call(lambda: dropped @ wide.t() @ narrow.float().t()), {}),
        "dA, dx": Entry(Call(lambda: (dS.float().t() @ dropped, drop(dS.float() @ wide, seed, threshold))), {}),
    }
    for name, work, equals, step in (
        ("shrink", one, "S", lambda op, call: lambda: op.shrink(call, hidden, launch)[:, : shape.r]),
        ("grad_a", two, "dA, dx", lambda op, call: partial(_grads_of_a, op, t, call, plan)),
    ):
        entries[name] = _triton(t.problem, partial(step, call=t.call), work)
        entries[f"{name}, dropout"] = _triton(
            t.problem, partial(step, call=dropped_call), work, against=name, equals=equals
        )  # fmt: skip
    why, plain = _why_not("cuda", t.problem), "thin op, cuda"
    for name, more, other in (
        (plain, {}, {}),
        (f"{plain}, dropout", dict(dropout_p=0.1, seed=seed), dict(against=plain, equals="y")),
    ):
        call = partial(lowrank_adapter, x, A, narrow, **more)
        entries[name] = why or _kernel(call, one, settings=_on("cuda"), **other)
    return entries


# ---------------------------------------------------------------------------------------------------------------- host


def _layer_op(shape: Shape, device: torch.device) -> tuple[SimpleNamespace, Callable, list[torch.Tensor]]:
    """(its tensors, the op on x, what it trains) of an adapted layer of which x, A and B have gradients."""
    t = _inputs(shape, device)
    for leaf in (t.x, t.A, t.B):
        leaf.requires_grad_()
    return t, lambda x: lowrank_linear(x, t.weight, None, t.A, t.B, scale=ALPHA_OVER_R), [t.A, t.B]


def _host(shape: Shape, device: torch.device) -> dict:
    """A problem that takes the device no time: one call of PyTorch's, one of a launcher, the op by backend and node."""
    t, op, parameters = _layer_op(shape, device)
    x, W, launch = t.x.detach(), t.weight.t(), plans.plan_lowrank(t.problem).shrink
    entries = {
        "at::addmm": _kernel(lambda: torch.addmm(t.dy, x, W), None),
        "Triton launcher": _triton(t.problem, lambda op: partial(op.shrink, t.call, t.padded_S, launch), None),
    }
    plain = "torch, Python node"
    entries[plain] = Entry(Layer(op, t.x, t.dy, parameters), {}, settings=_on("torch", native=False))
    for name, backend in (("torch, C++ node", "torch"), ("triton", "triton"), ("cuda", "cuda"), ("automatic", None)):
        why = _why_not(backend, t.problem) if backend else ""
        if backend == "torch" and (device.type == "cuda" or not dispatch.native_allowed()):
            why = "the C++ node does not host the torch backend here"
        entries[name] = why or Entry(Layer(op, t.x, t.dy, parameters), {}, equals=plain, settings=_on(backend))
    for name, entry in entries.items():
        if isinstance(entry, Entry) and isinstance(entry.variant, Layer):
            entry.work, entry.against = {"forward": None, "both": None}, None if name == plain else plain
    entries["automatic"].note = dispatch.path_of(t.problem)
    return entries


def _graph(backend: str, shape: Shape, device: torch.device) -> dict:
    """What the device alone takes for the op of the `host` part."""
    t, op, parameters = _layer_op(shape, device)
    if why := _why_not(backend, t.problem) or ("" if device.type == "cuda" else "CUDA graphs need a CUDA device"):
        return {backend: why}

    def step():
        return torch.autograd.grad(op(t.x), [t.x, *parameters], t.dy)

    entries = {}
    with dispatch.use_backend(backend):
        for name, run in (("forward", lambda: op(t.x)), ("forward and backward", step)):
            entries[f"eager {name}"] = Entry(Call(run), {}, settings=_on(backend))
            entries[name] = _kernel(_captured(run), None, equals=f"eager {name}")
    return entries


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # workspaces and compiled kernels are made outside of the capture
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    return lambda: graph.replay() or kept  # what it wrote lives as long as it is replayed


# ----------------------------------------------------------------------------------------------------- structured maps


def _modes(forward: Work, backward: Work) -> dict[str, Work]:
    both = Work(forward.bytes + backward.bytes, forward.flops + backward.flops, forward.rate)
    return dict(zip(MODES, (forward, backward, both), strict=True))


def _structured(shape: StructuredShape, device: torch.device) -> dict:
    """A map alone, with parameters in fp32: by backend, in plain PyTorch, and by its dense matrix."""
    op, m, n, k = shape.op, shape.m, shape.n, shape.k
    x, dy = (torch.randn(m, size, device=device, dtype=shape.dtype) for size in (k, n))
    x.requires_grad_()
    std = k**-0.25 if op == "kronecker" else k**-0.5
    shapes = cases.parameter_shapes(op, shape.sizes).values()
    values = [torch.randn(size, device=device, dtype=shape.adapter_dtype).mul_(std) for size in shapes]
    tail = values[1][1:] if op == "toeplitz" else values[1] if len(values) > 1 else None
    problem = maps.structured_problem(op, x, values[0], tail, n, False)

    def entry(function: Callable, flops: tuple[float, float], rate: torch.dtype, **more) -> Entry:
        parameters = [value.clone().requires_grad_() for value in values]
        moved = _bytes(x, dy, *values), _bytes(dy, x, x, *values, *values)
        work = _modes(*(Work(size, count, rate) for size, count in zip(moved, flops, strict=True)))
        return Entry(Layer(lambda x: function(x, *parameters), x, dy, parameters), work, **more)

    plain = "baseline"
    found = {plain: entry(structured.BASELINES[op], (0, 0), shape.dtype)}
    ours, same = getattr(maps, f"{op}_matmul"), dict(against=plain, equals=plain)
    for backend, flops, rate in (("triton", _triton_flops, FP16), ("cuda", _cuda_flops, FP32)):
        rate = shape.dtype if op == "kronecker" else rate  # its products are of x's type
        found[backend] = _why_not(backend, problem) or entry(ours, flops(problem), rate, settings=_on(backend), **same)
    gemms = 2 * m * n * k
    if op == "kronecker":
        # Its matrix has a gradient of its own, of which those of the factors are sums.
        product = structured.plain_dense(op, n, k, device)
        found["dense"] = entry(product, (gemms, 2 * gemms), shape.dtype, **same)
    else:
        # The gradient of the vectors comes from transforms.
        found["dense"] = entry(
            ours, (gemms, gemms), shape.dtype, settings=partial(structured.planned, "dense"), **same
        )  # fmt: skip
    return found


def _kronecker_flops(problem: maps.StructuredProblem) -> tuple[int, int]:
    """In the cheaper order; backward is the transposed map and two products for each factor's gradient."""
    a1, a2, b1, b2 = problem.sizes
    forward = 2 * problem.m * min(b2 * a1 * (a2 + b1), b1 * a2 * (b2 + a1))
    return forward, 3 * forward


def _triton_flops(problem: maps.StructuredProblem) -> tuple[int, int]:
    """(forward, backward) of the matrix products that the kernels make of their transforms, padding included."""
    if problem.kind == "kronecker":
        return _kronecker_flops(problem)
    p, length = problem, problem.lengths.triton
    forward = _convolution_flops(p, p.k, p.n, length, "half" if p.dtype == "bfloat16" else "split")
    # Gradients of fp32 vectors keep their digits.
    plan = fft_plan.plan_convolution(p.m, p.k, p.n, length, "split", backward=True, gpu=p.gpu)
    backward = _dft_flops(plan, p.m, [plan.rows_in, plan.rows_out, *([plan.rows_in] if plan.fused else [])])
    return forward, backward + (0 if plan.fused else _convolution_flops(p, p.n, p.k, length, "split"))


def _convolution_flops(problem, n_in: int, n_out: int, length: int, precision: str) -> int:
    plan = fft_plan.plan_convolution(problem.m, n_in, n_out, length, precision, gpu=problem.gpu)
    return _dft_flops(plan, problem.m, [plan.rows_in, plan.rows_out] * plan.blocks_out)


def _dft_flops(plan: fft_plan.ConvolutionPlan, m: int, leading: list[int]) -> int:
    """Of one transform of m rows, in pairs, for each entry of `leading`: how many rows of a tile its leading product
    reads or makes; the others take the whole tile. A complex multiply-add is 8, and split operands take 3. A small
    leading factor has a sum of rows in place of a product."""
    p1, p2, p3 = plan.padded
    inner = plan.points * (p3 + (p2 if p2 > 1 else 0))
    outer = p1 * p2 * p3 if p1 >= 16 else 0
    return 8 * plans.cdiv(m, 2) * sum(rows * outer + inner for rows in leading) * (3 if plan.split else 1)


def _cuda_flops(problem: maps.StructuredProblem) -> tuple[float, float]:
    """Of 5 L log2 L for each transform of two rows, and the products of their spectra."""
    if problem.kind == "kronecker":
        return _kronecker_flops(problem)
    length = problem.lengths.cuda
    transform = 2.5 * problem.m * length * math.log2(max(2, length))
    return 2 * transform + 3 * problem.m * length, 3 * transform + 7 * problem.m * length


# ------------------------------------------------------------------------------------------------------------- methods


def _layer_work(shape: Shape) -> dict[str, Work]:
    item = shape.dtype.itemsize
    works = (Work(shape.moved(mode) * item, shape.flops(mode), shape.dtype) for mode in MODES[:2])
    return _modes(*works)


def _ranks(shape: Shape, device: torch.device) -> dict:
    """DyLoRA with its rank and scale on the device, as its layers have them, against LoRA of full rank."""
    t, op, parameters = _layer_op(shape, device)
    note = dispatch.path_of(t.problem)
    entries = {"LoRA": Entry(Layer(op, t.x, t.dy, parameters), _layer_work(shape), note=note)}
    for b in dict.fromkeys((1, max(1, shape.r // 2), shape.r)):
        rank, scale = torch.tensor(b, device=device), torch.tensor(ALPHA_OVER_R * shape.r / b, device=device)
        call = partial(_at_rank, t, rank, scale)
        work = _layer_work(replace(shape, r=b))
        entries[f"rank {b}"] = Entry(Layer(call, t.x, t.dy, parameters), work, against="LoRA", note=note)
    return entries


def _at_rank(t: SimpleNamespace, rank: torch.Tensor, scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return lowrank_linear(x, t.weight, None, t.A, t.B, scale=scale, rank=rank)


EXPERTS = 16


def _stack(tensor: torch.Tensor, experts: int) -> torch.Tensor:
    return torch.stack([tensor.detach() for _ in range(experts)]).requires_grad_()


def _experts(shape: Shape, device: torch.device) -> dict:
    """AdaMix's LoRA form: a stack, of which the device knows which expert works."""
    t = _inputs(shape, device)
    t.x.requires_grad_()
    index, note = torch.tensor(0, device=device), dispatch.path_of(t.problem)
    entries = {}
    for name, experts in (("1 expert", 1), (f"{EXPERTS} experts", EXPERTS)):
        A, B = _stack(t.A, experts), _stack(t.B, experts)
        call = lambda x, A=A, B=B: lowrank_linear(x, t.weight, None, A, B, scale=ALPHA_OVER_R, expert=index)  # noqa: E731
        against = None if experts == 1 else "1 expert"
        entries[name] = Entry(Layer(call, t.x, t.dy, (A, B)), _layer_work(shape), against=against, note=note)
    return entries


def _adapters(shape: Shape, device: torch.device) -> dict:
    """AdaMix's adapters: one expert for all rows, or one for each of eight groups of them."""
    t = _inputs(shape, device)
    t.x.requires_grad_()
    index = torch.tensor(0, device=device)
    groups = torch.arange(8, device=device)
    m, n, r = shape.m, shape.n, shape.r
    moved = _bytes(t.x, t.dy), _bytes(t.dy, t.x, t.x)
    work = _modes(Work(moved[0], 4 * m * n * r, shape.dtype), Work(moved[1], 8 * m * n * r, shape.dtype))
    entries = {}
    for name, experts, expert in (
        ("1 expert", 1, index), (f"{EXPERTS} experts", EXPERTS, index), ("8 groups of rows", EXPERTS, groups),
    ):  # fmt: skip
        down, up = _stack(t.A, experts), _stack(t.B, experts)
        call = lambda x, down=down, up=up, e=expert: bottleneck_adapter(x, down, None, up, None, expert=e)  # noqa: E731
        note = dispatch.path_of(bottleneck_problem(t.x, down, up, "gelu", expert))
        against = None if experts == 1 else "1 expert"
        entries[name] = Entry(Layer(call, t.x, t.dy, (down, up)), work, against=against, note=note)
    return entries


SHARING = 3  # queries, keys and values


def _shared(shape: Shape, device: torch.device) -> dict:
    """Three layers of LoRA on one x, as q/k/v are: each with a pass over x of its own, or all with one."""
    t = _inputs(shape, device)
    t.x.requires_grad_()
    A, B = ([factor.clone().requires_grad_() for _ in range(SHARING)] for factor in (t.A, t.B))
    dy = torch.cat([t.dy] * SHARING, 1)

    def layers(operands) -> torch.Tensor:
        ys = (
            lowrank_linear(x, t.weight, None, factor, outer, scale=ALPHA_OVER_R, S=S)
            for (x, factor, S), outer in zip(operands, B, strict=True)
        )
        return torch.cat(tuple(ys), 1)

    def alone(x: torch.Tensor) -> torch.Tensor:
        return layers([(x, factor, None) for factor in A])

    def together(x: torch.Tensor) -> torch.Tensor:
        first, *products = shared_shrink(x, A, out_features=shape.n)
        return layers([(x if i else first, None, S) for i, S in enumerate(products)])

    forward, backward = (
        Work(SHARING * work.bytes, SHARING * work.flops, work.rate)
        for work in (_layer_work(shape)[mode] for mode in MODES[:2])
    )
    work, parameters = _modes(forward, backward), (*A, *B)
    entries = {"alone": Entry(Layer(alone, t.x, dy, parameters), work, note=dispatch.path_of(t.problem))}
    why = why_alone(t.problem)
    shared = why or Entry(Layer(together, t.x, dy, parameters), work, against="alone", equals="alone")
    return entries | {"one pass": shared}


# ---------------------------------------------------------------------------------------------------------- the parts


# By part, what each shape of it is put through; a structured map is called by its own name.
PARTS: dict[str, dict[str, Callable]] = {
    "ceilings": {"gemm": _gemm},
    "linear": {"linear": _linear},
    "kernels": {"shrink": _shrink, "expand": _expand, "grad_b": _grad_b, "grad_a": _grad_a},
    "bottleneck": {"bottleneck": _bottleneck, "bottleneck_bwd": _bottleneck_bwd},
    "dropout": {"dropout": _dropout},
    "host": {"host": _host},
    "structured": {"": _structured},
    "methods": {
        "dylora": _ranks,
        "lora experts": _experts,
        "bottleneck experts": _adapters,
        "q/k/v of lora": _shared,
    },
    "graphs": {f"graph {backend}": partial(_graph, backend) for backend in ("torch", "triton", "cuda")},
}


def groups(part: str, grid: Grid, device: torch.device) -> list[Group]:
    """The groups of a part, the most valuable first."""
    return [
        Group(what or shape.op, _label(shape), shape.dtype_name, partial(build, shape, device), host=part == "host")
        for shape in grid.shapes[part]
        for what, build in PARTS[part].items()
    ]


def _label(shape: Shape | StructuredShape) -> str:
    return f"{shape.name} r{shape.r}" if getattr(shape, "r", 0) else shape.name
