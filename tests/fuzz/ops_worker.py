"""Random calls of the ops, and of the C++ extension itself, one after the other: what test_ops.py runs in a process of
its own, which a crash may end. Each line of its output is a call that begins, or how it ended.

    python tests/fuzz/ops_worker.py SEED FIRST LAST

A call is a function of the seed and its number. Part of them are sound, in odd dtypes, sizes and layouts, which have to
be right; the others have one argument that is not, which has to be named, or to be right after all.
"""

import inspect
import json
import math
import random
import re
import sys
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_fused
from peft_fused.ops import accuracy, native
from peft_fused.ops.cases import OPS, make_bottleneck, make_lowrank, make_structured
from peft_fused.ops.structured.engine import STRUCTURES

# How far beyond the rule of ops/accuracy.py a single random call may be: that judges several draws of chosen sizes, and
# sums of few terms may cancel. What is wrong by more than rounding is so by 1 / eps.
ROUNDING = {torch.float16: 8.0, torch.bfloat16: 8.0, torch.float32: 64.0, torch.float64: 64.0}
TYPES = [
    (torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
]  # fmt: skip
SCALES = [0.0, 1.0, 2, -0.5, 1e-30, 300.0, 1e30, 3e38, -3e38]


class Wrong(Exception):
    """An outcome that is neither right nor a refusal by name."""


# ---------------------------------------------------------------------------------------------------- sound calls


def sound(rng):
    """A case that every op has to take."""
    op = rng.choice(list(OPS))
    dtype, adapter = rng.choice(TYPES)
    if op not in (*STRUCTURES, "lowrank", "lowrank_linear", "bottleneck"):
        return rng.choice([case for case in OPS[op].cases(op, dtype, adapter, "cpu") if case.input.numel() < 8000])
    size = lambda: rng.choice([1, 2, 3, 5, 8, 13, 24])  # noqa: E731
    m = rng.choice([0, 1, 2, 7, 20, 33])
    common = dict(dtype=dtype, adapter_dtype=adapter, data_seed=rng.randrange(1 << 30), strided=rng.random() < 0.2)
    scale = rng.choice(SCALES[:6])
    options = {"scale": torch.tensor(float(scale)) if rng.random() < 0.2 else scale}
    number = lambda n: torch.tensor(n) if rng.random() < 0.3 else n  # noqa: E731
    if op != "bottleneck" and rng.random() < 0.4:
        options |= dict(dropout_p=rng.choice([0.1, 0.5, 0.999]), seed=number(rng.randrange(-(1 << 63), 1 << 63)))
    if op in ("lowrank", "lowrank_linear"):
        k, n, r = size(), size(), rng.choice([1, 2, 5, 8, 17])
        experts = tuple(rng.choice([None, None, 3]) for _ in range(2))
        if rng.random() < 0.4:
            options["rank"] = number(rng.randint(1, r))
        if experts != (None, None):
            options["expert"] = tuple(number(rng.randrange(3)) for _ in range(2))
        options["frozen"] = rng.random() < 0.2
        common |= dict(experts=experts, uv=rng.random() < 0.4, bias=rng.random() < 0.5)
        return make_lowrank(op, m, k, n, r, **common, **options)
    if op == "bottleneck":
        k, n, r = size(), size(), rng.choice([1, 2, 5, 8])
        experts = tuple(rng.choice([None, 3]) for _ in range(2))
        residual = rng.choice(["h", "other"]) if k == n else "other"
        groups = rng.choice([g for g in (1, 2, 4) if m % g == 0])
        several = lambda: torch.tensor([rng.randrange(3) for _ in range(groups)])  # noqa: E731
        index = lambda: several() if rng.random() < 0.5 else rng.randrange(3)  # noqa: E731
        activation = rng.choice(["gelu", "gelu_tanh", "relu", "silu", "swish", "tanh", "identity"])
        return make_bottleneck(
            m, k, n, r, experts=experts, bias=rng.random() < 0.5, residual=residual, activation=activation,
            expert=(index(), index()), **common, **options,
        )  # fmt: skip
    more = dict(add=rng.random() < 0.4, transposed=rng.random() < 0.3)
    n = rng.choice([1, 2, 3, 7, 16, 40, 97])
    four = tuple(size() for _ in range(4))
    sizes = {"toeplitz": (n, four[0]), "kronecker": four, "ldr": (rng.randint(1, 3), n)}.get(op, (n,))
    if op == "circulant":
        more["factor"] = rng.random() < 0.3
        if rng.random() < 0.2:
            sizes = (rng.randint(1, 3), rng.randint(1, 3), n)
    return make_structured(op, m, *sizes, **common, **more, **options)


def negated(rng, t):
    return torch._neg_view(-t)


def in_other_order(rng, t):
    return t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t


def within(rng, t):
    """A part of a larger storage, every second element."""
    padded = torch.zeros(*t.shape[:-1], 2 * t.shape[-1] + 1, dtype=t.dtype) if t.dim() else None
    if padded is None:
        return t
    padded[..., 1::2] = t
    return padded[..., 1::2]


def imaginary(rng, t):
    return torch.complex(t, -t).conj().imag if t.dtype in (torch.float32, torch.float64) else t


def as_parameter(rng, t):
    return torch.nn.Parameter(t) if t.is_floating_point() else t


LAYOUTS = [negated, in_other_order, within, imaginary, as_parameter]


def laid_out(rng, case):
    """The same call with some of its tensors in memory in other ways. The seed and the controls are among them."""
    parts = []
    for part in (case.tensors, case.options):
        changed = dict(part)
        for name, value in part.items():
            values = value if isinstance(value, tuple) else (value,)
            moves = [isinstance(v, torch.Tensor) and rng.random() < 0.4 for v in values]
            moved = tuple(_laid_out(rng, v) if move else v for v, move in zip(values, moves, strict=True))
            changed[name] = moved if isinstance(value, tuple) else moved[0]
        parts.append(changed)
    return _case(case, *parts)


def _laid_out(rng, t):
    moved = rng.choice(LAYOUTS if t.is_floating_point() and t.dim() else [negated])(rng, t.detach())
    return moved.detach().requires_grad_(t.requires_grad)


def _case(case, tensors, options):
    return type(case)(case.op, case.name, case.outputs, tensors, options, case.wrt)


# ------------------------------------------------------------------------------------------------ unsound values


def freed(t):
    t = t.detach().clone()
    t.untyped_storage().resize_(0)
    return t


def nan_somewhere(t):
    t = t.detach().clone()
    if t.numel() and t.is_floating_point():
        t.view(-1)[t.numel() // 2] = math.nan
    return t


def inf_somewhere(t):
    t = t.detach().clone()
    if t.numel() and t.is_floating_point():
        t.view(-1)[0] = math.inf
    return t


def inference(t):
    with torch.inference_mode():
        return t.clone()


BAD_TENSORS = {
    "freed": freed,
    "meta": lambda t: t.detach().to("meta"),
    "sparse": lambda t: t.detach().to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor([t.detach()] * 2),
    "uninitialised": lambda t: torch.nn.UninitializedParameter(),
    "fake": lambda t: FakeTensorMode().from_tensor(t.detach()),
    "inference": inference,
    "double": lambda t: t.detach().double(),
    "half": lambda t: t.detach().half(),
    "long": lambda t: t.detach().long(),
    "bool": lambda t: t.detach().bool(),
    "complex": lambda t: torch.complex(t.detach().float(), t.detach().float()),
    "float8": lambda t: t.detach().to(torch.float8_e4m3fn),
    "quantized": lambda t: torch.quantize_per_tensor(t.detach().float(), 0.1, 0, torch.qint8),
    "one dimension more": lambda t: t.detach().unsqueeze(0),
    "one dimension less": lambda t: t.detach().flatten(),
    "a number": lambda t: t.detach().sum(),
    "cut": lambda t: t.detach()[..., :-1] if t.dim() else t,
    "empty": lambda t: t.detach()[..., :0] if t.dim() else t,
    "no rows": lambda t: t.detach()[:0] if t.dim() else t,
    "expanded": lambda t: t.detach()[:1].expand_as(t) if t.dim() else t,
    "nan": nan_somewhere,
    "inf": inf_somewhere,
    "zeros": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
}
OBJECTS = [
    None, 0, -1, 3, 2**70, 10**400, 1.5, 1e39, math.nan, math.inf, True, False, 1j, "x", "", b"x", [], [1.0],
    {}, (), (0, 0, 0), (None, "x"), object(), torch.float32, torch.tensor(2), torch.tensor(-1), torch.tensor(math.nan),
    torch.tensor(1e39, dtype=torch.float64), torch.tensor([0, 1]), torch.tensor(True), torch.empty(0),
    torch.tensor(1.0, requires_grad=True), torch.tensor(2, device="meta"),
]  # fmt: skip


def broken(rng, case):
    """The call with one argument changed: (what was done, the call)."""
    tensors, options = dict(case.tensors), dict(case.options)
    known = list(tensors) + [name for name in parameters_of(case.op) if name not in tensors]
    name = rng.choice(known)
    if isinstance(tensors.get(name), torch.Tensor) and rng.random() < 0.8:
        kind = rng.choice(list(BAD_TENSORS))
        value = BAD_TENSORS[kind](tensors[name])
        if kind in ("nan", "inf", "zeros", "expanded"):
            value.requires_grad_(tensors[name].requires_grad)
    else:
        value = rng.choice(SCALES if name == "scale" and rng.random() < 0.5 else OBJECTS)
        kind = str(value)[:40] if isinstance(value, int | float | str | None) else type(value).__name__
    if name == "scale" and isinstance(value, int):
        value = float(value) if abs(value) < 1e300 else value  # torch multiplies by no int beyond 64 bits
    (tensors if name in tensors else options)[name] = value
    wrt = tuple(n for n in case.wrt if isinstance(tensors[n], torch.Tensor) and tensors[n].requires_grad)
    return f"{name}: {kind}", type(case)(case.op, case.name, case.outputs, tensors, options, wrt)


def parameters_of(op):
    return list(inspect.signature(OPS[op].fn).parameters)


# ---------------------------------------------------------------------------------------------------------- judgement


def finite(case):
    """Whether the inputs are finite, and their products far from overflowing."""
    values = [v for part in (case.tensors, case.options) for v in part.values()]
    tensors = [v for v in values if isinstance(v, torch.Tensor) and not v.is_meta]
    return abs(float(case.options.get("scale", 1.0))) < 1e20 and all(bool(t.isfinite().all()) for t in tensors)


def overflows(case):
    """Whether the scale times what an op may fold it into, sums of an operand, leaves the range of the sums' type."""
    largest = torch.finfo(torch.promote_types(case.input.dtype, torch.float32)).max
    sums = [t.detach().double().abs().sum().item() for t in case.tensors.values() if t is not None]
    return abs(float(case.options.get("scale", 1.0))) * max(1.0, *filter(math.isfinite, sums)) > largest / 64


def judge(case):
    """Wrong, unless the call agrees with the reference in float64; where numbers overflow, on what is no number."""
    check, x = OPS[case.op], case.input
    if overflows(case):
        return "beyond the range of the sums"
    outputs = case.call(check.fn).shape[-1]  # others than the case's where an argument was changed
    generator = torch.Generator().manual_seed(99)
    dys = [torch.randn(*x.shape[:-1], outputs, generator=generator).to(x.dtype) for _ in range(2)]
    got, plain = (accuracy.outputs(fn, case, *dys) for fn in (check.fn, check.reference))
    if not finite(case) or not all(bool(v.isfinite().all()) for draw in plain for v in draw.values()):
        for draw, like in zip(got, plain, strict=True):
            for name, value in draw.items():
                if value.shape != like[name].shape:
                    raise Wrong(f"{name} has shape {list(value.shape)}, the reference's {list(like[name].shape)}")
                if bool((value.isnan() & like[name].isfinite()).any()):
                    raise Wrong(f"{name} has NaNs where the reference is finite")
        return "right where numbers overflow"
    exact = case.to(torch.float64)
    truth = accuracy.outputs(check.reference, exact, *(dy.double() for dy in dys))
    dtypes = {name: x.dtype if name == "y" else case.tensors[name].dtype for name in truth[0]}
    # The parameters of a map are parts of one kernel, over all of which an FFT spreads its rounding.
    parts = [name for name in truth[0] if name not in ("x", "y")] if case.op in STRUCTURES else []
    gradients = [draw[name] for draw in truth for name in parts]
    kernel = max((gradient.abs().max().item() for gradient in gradients if gradient.numel()), default=0.0)
    for verdict in accuracy.judge(got, plain, truth, dtypes):
        dtype = dtypes[verdict.name]
        spread = verdict.name in parts and verdict.error <= ROUNDING[dtype] * torch.finfo(dtype).eps * kernel
        if verdict.ratio > ROUNDING[dtype] and not spread:
            raise Wrong(f"{verdict.name} is {verdict.ratio:.3g} times as far off as allowed: {verdict.error:.3g}")
    return "right"


def called(case):
    """The outcome of a call that may be refused."""
    check = OPS[case.op]
    try:
        y = case.call(check.fn)
    except (ValueError, TypeError, RuntimeError) as error:
        said = str(error)
        if not re.search(rf"\b({'|'.join(parameters_of(case.op))})\b", said):
            raise Wrong(f"the message names no argument: {type(error).__name__}: {said[:200]}") from error
        return f"refused: {type(error).__name__}"
    try:
        case.call(check.reference)
    except Exception as error:
        raise Wrong(f"accepted, which the reference refuses: {type(error).__name__}: {str(error)[:150]}") from error
    if y.is_meta or type(y) is not torch.Tensor:
        return "right without numbers"
    return judge(case)


# --------------------------------------------------------------------------------------------- the extension itself


def direct(rng):
    """(function, arguments, plan) of a call into `_C`, one or none of them unsound. plan: that of the decision that a
    node is told to follow, None where there is none."""
    x, seed = torch.randn(rng.choice([0, 1, 5]), rng.choice([1, 6, 40])), torch.tensor(rng.randrange(1 << 60))
    k = x.shape[1]
    name = rng.choice(["drop", "structured", "lowrank", "bottleneck"])
    plan = []
    if name == "drop":
        call = [x, seed, rng.choice([0, 1, 20000, 65535]), rng.choice([0, 7])]
    elif name == "structured":
        kind = rng.choice(["circulant", "toeplitz", "kronecker"])
        method = "gemm" if kind == "kronecker" else rng.choice(["fft", "dense"])
        n = {"circulant": k, "toeplitz": 4, "kronecker": 6}[kind]
        p, q = {
            "circulant": (torch.randn(k), None), "toeplitz": (torch.randn(4), torch.randn(k - 1)),
            "kronecker": (torch.randn(2, k), torch.randn(3, 1)),
        }[kind]  # fmt: skip
        length = {"circulant": k, "toeplitz": k + 3, "kronecker": 0}[kind]
        add = rng.choice([None, torch.randn(x.shape[0], n)])
        call = [x, p.requires_grad_(), q, add, kind, None, 1.5, rng.choice([0.0, 0.25]), seed, False, ("p", "q")]
        plan = [method, length, n, torch.randn(n, k) if method == "dense" else None]
    elif name == "lowrank":
        A, B = torch.randn(2, k, requires_grad=True), torch.randn(3, 2, requires_grad=True)
        call = [x, torch.randn(3, k), None, None, A, B, None, None, 2.0, None, None, 0.25, seed, False]
    else:
        D, U = torch.randn(2, k, requires_grad=True), torch.randn(k, 2, requires_grad=True)
        call = [x, D, None, U, None, x, "gelu", 1.0, None]
    at = rng.randrange(len(call) + len(plan) + 1)
    of, at = (call, at) if at < len(call) else (plan, at - len(call))
    if at < len(of):
        value = of[at]
        if isinstance(value, torch.Tensor) and rng.random() < 0.8:
            of[at] = BAD_TENSORS[rng.choice(list(BAD_TENSORS))](value)
        else:
            of[at] = rng.choice(OBJECTS)
    return name, call, plan


def straight(rng):
    """A node is given its call as if it were decided to run there, unchecked."""
    name, call, plan = direct(rng)
    run = getattr(native.module, name)
    try:
        if name == "drop":
            y = run(*call)
        else:
            y = run({}, *call)
            if y is not None:
                if plan and plan[3] is not None:
                    matrix = plan[3]
                    plan[3] = lambda *parameters: matrix
                y = run({y: SimpleNamespace(native=True, plan=tuple(plan))}, *call)
        if isinstance(y, torch.Tensor) and y.requires_grad:
            y.sum().backward()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"_C refused: {type(error).__name__}", f"_C.{name}"
    return "_C declined" if y is None else "_C returned", f"_C.{name}"


# ---------------------------------------------------------------------------------------------------------------- run


def call(seed, number):
    """(outcome, what was called) of one call."""
    rng = random.Random(f"{seed} {number}")
    torch.manual_seed(number)
    kind = rng.choices(["sound", "broken", "straight"], [4, 5, 2])[0]
    if kind == "straight":
        return ("not built", "_C") if native.module is None else straight(rng)
    case = sound(rng)
    what = f"{case.op}({case.name}; {case.input.dtype})"
    try:
        with peft_fused.use_backend(None, native=rng.random() < 0.6):
            if kind == "sound":
                return judge(laid_out(rng, case) if rng.random() < 0.6 else case), what
            done, case = broken(rng, case)
            what += f", {done}"
            return called(case), what
    except Exception as error:
        told = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {str(error)[:300]}"
        return f"WRONG {told}", what


if __name__ == "__main__":
    start, first, last = map(int, sys.argv[1:])
    torch.set_num_threads(1)
    for i in range(first, last):
        print(json.dumps({"begins": i}), flush=True)
        result, name = call(start, i)
        print(json.dumps({"ended": i, "outcome": result, "call": name}), flush=True)
