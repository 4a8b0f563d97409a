"""The structured maps alone, with no base layer beside them: ours, ours with each method forced, plain PyTorch as
anyone would write it, and PEFT's C3A. All of one case have the same parameters, input and incoming gradient.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from peft.tuners.c3a.utils import BlockCircularConvolution

import peft_fused
from peft_fused.ops import dispatch, structured
from peft_fused.ops.accuracy import outputs
from peft_fused.ops.cases import make_structured
from peft_fused.ops.structured import plan as plan_module
from peft_fused.ops.structured.engine import STRUCTURES

from .benchmark import Benchmark, Table
from .rows import Case, Comparison
from .shapes import BF16, StructuredShape
from .variants import Layer
from .verify import refuse_wrong, relative_rms


def _shapes(m: int, op: str, *sizes: tuple[int, ...], dtype=torch.float32) -> tuple[StructuredShape, ...]:
    return tuple(StructuredShape(op, m, each, dtype) for each in sizes)


TINY = tuple(
    StructuredShape(op, 33, sizes)
    for op, sizes in (
        ("circulant", (48,)), ("skew_circulant", (48,)), ("toeplitz", (40, 48)), ("toeplitz_product", (48,)),
        ("kronecker", (6, 8, 8, 6)), ("ldr", (2, 48)),
    )
)  # fmt: skip

CPU = (
    *_shapes(2048, "circulant", (384,), (768,), (1024,), (1536,), (3072,), (4096,), (8192,)),
    *_shapes(2048, "circulant", (768,), (3072,), dtype=BF16),
    *_shapes(2048, "toeplitz", (768, 768), (3072, 768)),
    *_shapes(2048, "kronecker", (24, 32, 32, 24), (64, 64, 48, 48)),
    *_shapes(2048, "skew_circulant", (768,)),
    *_shapes(2048, "toeplitz_product", (768,)),
    *_shapes(2048, "ldr", (1, 768)),
)

CPU_ALL = (
    *CPU,
    *_shapes(2048, "circulant", (8192,), dtype=BF16),
    *_shapes(32, "circulant", (768,), (3072,)),
    *_shapes(2048, "toeplitz", (3072, 3072), (768, 3072)),
    *_shapes(2048, "toeplitz", (768, 768), dtype=BF16),
    *_shapes(2048, "kronecker", (24, 32, 32, 24), dtype=BF16),
    *_shapes(2048, "skew_circulant", (3072,)),
    *_shapes(2048, "toeplitz_product", (3072,)),
    *_shapes(2048, "ldr", (4, 768), (1, 3072)),
)

CUDA = (
    *_shapes(4096, "circulant", (4096,), (768,), (1024,), (3072,), (8192,), dtype=BF16),
    *_shapes(4096, "circulant", (4096,), (768,), (1024,), (3072,), (8192,)),
    *_shapes(4096, "toeplitz", (4096, 4096), (768, 768), (3072, 768), dtype=BF16),
    *_shapes(4096, "kronecker", (64, 64, 64, 64), (24, 32, 32, 24), dtype=BF16),
    *_shapes(4096, "toeplitz", (4096, 4096), (768, 768)),
    *_shapes(4096, "toeplitz_product", (768,), (4096,), dtype=BF16),
    *_shapes(4096, "ldr", (1, 4096), (4, 768), dtype=BF16),
    *_shapes(4096, "skew_circulant", (4096,), dtype=BF16),
    *_shapes(4096, "kronecker", (64, 64, 64, 64)),
)

# Dense products are timed below this many multiply-adds; from there on, a few rounds of them take a minute on a CPU.
DENSE_LIMIT = {"cpu": 1 << 35, "cuda": 1 << 40}


# ------------------------------------------------------------------------------------------------------- plain PyTorch


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """torch.fft takes no bf16."""
    return tensor.float()


def plain_circulant(x, c):
    y = torch.fft.irfft(torch.fft.rfft(_wide(x)) * torch.fft.rfft(_wide(c)), n=c.shape[-1])
    return y.to(x.dtype)


def plain_skew_circulant(x, h):
    """By turning the ring into a cyclic one, with complex transforms: what SURM's code does."""
    angle = torch.arange(h.shape[-1], device=h.device) * (torch.pi / h.shape[-1])
    turn = torch.polar(torch.ones_like(angle), angle)
    Y = torch.fft.fft(_wide(x) * turn) * torch.fft.fft(_wide(h) * turn)
    return (turn.conj() * torch.fft.ifft(Y)).real.to(x.dtype)


def plain_toeplitz(x, col, row):
    """In a circulant matrix of the next power of two, as SURM's code does."""
    n, k = col.shape[0], row.shape[0]
    length = 1 << (n + k - 2).bit_length()
    window = torch.cat([col, col.new_zeros(length - n - k + 1), row[1:].flip(0)])
    y = torch.fft.irfft(torch.fft.rfft(_wide(x), n=length) * torch.fft.rfft(_wide(window)), n=length)
    return y[..., :n].to(x.dtype)


def plain_toeplitz_product(x, a, b):
    return plain_toeplitz(plain_toeplitz(x, a, a), b, b)


def plain_kronecker(x, A, B):
    A, B = A.to(x.dtype), B.to(x.dtype)
    return (B @ x.unflatten(-1, (B.shape[1], A.shape[1])) @ A.mT).flatten(-2)


def plain_ldr(x, G, H):
    return sum(plain_circulant(plain_skew_circulant(x, h), g) for g, h in zip(G, H, strict=True))


BASELINES = {
    "circulant": plain_circulant, "skew_circulant": plain_skew_circulant, "toeplitz": plain_toeplitz,
    "toeplitz_product": plain_toeplitz_product, "kronecker": plain_kronecker, "ldr": plain_ldr,
}  # fmt: skip

# A dense matrix as someone would write it down: its entries gathered from the diagonals, whose gradient autograd adds
# up entry by entry, or torch.kron.
DIAGONALS = {
    "circulant": lambda c: torch.cat([c[1:], c]),
    "skew_circulant": lambda h: torch.cat([-h[1:], h]),
    "toeplitz": lambda col, row: torch.cat([row[1:].flip(0), col]),
}


def plain_dense(op: str, n: int, k: int, device: torch.device) -> Callable | None:
    """x times the dense matrix of a map, None where none is written down in a line."""
    if op == "kronecker":
        return lambda x, A, B: F.linear(x, torch.kron(B, A).to(x.dtype))
    if op not in DIAGONALS:
        return None
    index = torch.arange(n, device=device).unsqueeze(1) - torch.arange(k, device=device) + (k - 1)
    return lambda x, *parameters: F.linear(x, DIAGONALS[op](*parameters)[index].to(x.dtype))


# ------------------------------------------------------------------------------------------------------------ variants


class C3A(Layer):
    """PEFT's circulant adapter of one block, as its layer applies it, without the layer's base product. Its kernel is
    that of the transposed matrix and n times as large; its gradient is reported as that of ours.

    In PEFT 0.21 its gradient of x is not that of its forward (torch.autograd.gradcheck fails): it is timed as it is and
    compared in the rest.
    """

    unchecked = ("x",)

    def __init__(self, x, dy, c: torch.Tensor):
        kernel = (_wide(c).flip(0).roll(1) * c.shape[0]).detach().view(1, 1, -1).requires_grad_()

        def call(x):
            # The lines of C3ALinear.forward: fp32 in, divided by the features, back to x's type.
            return (BlockCircularConvolution.apply(x.to(torch.float32), kernel) / x.size(-1)).to(x.dtype)

        super().__init__(call, x, dy, (kernel,))

    def gradients(self) -> list[torch.Tensor]:
        dx, dkernel = super().gradients()
        return [dx, dkernel.flatten().flip(0).roll(1) * dkernel.numel()]


@contextlib.contextmanager
def planned(method: str) -> Iterator[None]:
    """The torch backend with this method, whatever the plan; in Python, where that can be changed."""

    def plan(problem):
        return structured.StructuredPlan(method, problem.lengths.torch)

    with mock.patch.object(plan_module, "plan_structured", plan), peft_fused.use_backend("torch", native=False):
        yield


class Forced(Layer):
    """Our op with its method forced in both directions."""

    def __init__(self, method: str, call: Callable, x, dy, parameters):
        super().__init__(call, x, dy, parameters)
        self.method = method

    def forward(self) -> torch.Tensor:
        with planned(self.method):
            return super().forward()

    def backward(self, y: torch.Tensor) -> None:
        with planned(self.method):
            super().backward(y)


@dataclass
class Variants:
    """All variants of one shape, the problem that ours solves, the true results, and the reasons for those left out."""

    shape: StructuredShape
    layers: dict[str, Layer]
    problem: structured.StructuredProblem
    truth: dict[str, torch.Tensor]
    skipped: dict[str, str]


def build(shape: StructuredShape, device: torch.device) -> Variants:
    """Every variant that a shape has, on the inputs that tests and `peft-fused check` use too."""
    made = make_structured(
        shape.op, shape.m, *shape.sizes, dtype=shape.dtype, adapter_dtype=shape.adapter_dtype, device=device, scale=1.0
    )
    x = made.tensors["x"]
    dy = torch.randn(shape.m, shape.n, generator=torch.Generator().manual_seed(1)).to(x)
    values = [made.tensors[name] for name in made.wrt[1:]]
    (truth,) = outputs(getattr(structured, f"{shape.op}_matmul_reference"), made.to(torch.float64), dy.double())
    ours, skipped = getattr(structured, f"{shape.op}_matmul"), {}

    def layer(kind: Callable, function: Callable) -> Layer:
        parameters = [value.detach().clone().requires_grad_() for value in values]
        return kind(lambda x: function(x, *parameters), x, dy, parameters)

    layers = {"ours": layer(Layer, ours), "baseline": layer(Layer, BASELINES[shape.op])}
    if shape.op == "circulant":
        layers["c3a"] = C3A(x, dy, values[0])
    small = shape.m * shape.n * shape.k < DENSE_LIMIT[device.type]
    if dense := plain_dense(shape.op, shape.n, shape.k, device):
        if small:
            layers["dense"] = layer(Layer, dense)
        else:
            skipped["dense"] = "its GEMMs would take too long"
    if shape.op in plan_module.CONVOLUTIONS:
        for method in ("fft", "dense"):
            if method == "fft" or small:
                layers[f"ours_{method}"] = layer(lambda *rest, method=method: Forced(method, *rest), ours)
    first, second = values[0], values[1] if len(values) > 1 else None
    second = second[1:] if shape.op == "toeplitz" else second
    problem = structured.structured_problem(shape.op, x, first, second, shape.n, False)
    return Variants(shape, layers, problem, truth, skipped)


def verify(found: Variants) -> dict[str, dict[str, float]]:
    """Relative RMS errors of every variant against float64; WrongResult when one is beyond the tolerance."""
    errors = {}
    for name, variant in found.layers.items():
        results = [variant.forward().detach(), *variant.gradients()]
        pairs = zip(found.truth.items(), results, strict=True)
        each = {what: relative_rms(result, true) for (what, true), result in pairs if what not in variant.unchecked}
        errors[name] = refuse_wrong(each, found.shape, f"{name} of {found.shape.op}")
    return errors


def cases(shape: StructuredShape, device: torch.device) -> Iterator[Case]:
    """One, of one comparison."""
    found = build(shape, device)
    errors = verify(found)
    found.truth.clear()  # as large as the rest of the case, in float64
    comparison = Comparison(
        shape.op, "ours", {"baseline": "baseline", "c3a": "c3a", "dense": "dense"}, dispatch.path_of(found.problem),
        errors["ours"], memory=("ours", "baseline", "c3a"),
        about={"plan": {"method": found.problem.plan.method, "length": found.problem.plan.length}},
        ratios={"fft_over_dense": ("ours_dense", "ours_fft")},
    )  # fmt: skip
    yield Case(shape, found.layers, [comparison], found.skipped)


def _plan(row: dict) -> str:
    plan = row["plan"]
    return f"fft {plan['length']}" if plan["method"] == "fft" else plan["method"]


BENCHMARK = Benchmark(
    ops=tuple(STRUCTURES),
    cases=cases,
    seconds={"tiny": 0.05, "default": 2.0, "all": 6.0},
    shapes={"tiny": TINY, "default": CPU, "all": CPU_ALL, "cuda": CUDA},
    table=Table(
        "structured maps, no base layer",
        first={"plan": _plan},
        ratios={
            "/ plain": "ratio_to_baseline",
            "/ C3A": "ratio_to_c3a",
            "/ dense": "ratio_to_dense",
            "fft/dense": "fft_over_dense",
        },
        saved={"saved": "ours", "plain saves": "baseline"},
        last={},
        about="plain: PyTorch as anyone would write it; C3A: PEFT's; dense: by the matrix, written down in PyTorch\n"
        "fft/dense: ours by FFT over ours by the dense matrix; saved: bytes for backward beside x",
    ),
)
