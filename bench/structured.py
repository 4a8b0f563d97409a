"""The structured maps alone, with no base layer beside them: ours, ours with each method forced, the obvious lines of
plain PyTorch, and PEFT's C3A. All of one case have the same parameters, input and incoming gradient.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from peft.tuners.c3a.utils import BlockCircularConvolution

import peft_fused
from peft_fused.ops import cases, dispatch, structured
from peft_fused.ops.accuracy import outputs
from peft_fused.ops.structured import plan as plan_module

from .baselines import Layer, cuda_peak_bytes, saved_bytes
from .shapes import StructuredShape
from .timing import MODES, clock_of, interleave, ratio, wall_ms
from .verify import TOLERANCE, WrongResult, relative_rms

# Dense products are timed below this many multiply-adds; from there on, a few rounds of them take a minute on a CPU.
DENSE_LIMIT = {"cpu": 1 << 35, "cuda": 1 << 40}
# What is not timed alone is measured of these.
MEASURED = ("ours", "chain", "c3a")


# ------------------------------------------------------------------------------------------------------- plain PyTorch


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """torch.fft takes no bf16."""
    return tensor.float()


def circulant_lines(x, c):
    y = torch.fft.irfft(torch.fft.rfft(_wide(x)) * torch.fft.rfft(_wide(c)), n=c.shape[-1])
    return y.to(x.dtype)


def skew_circulant_lines(x, h):
    """By turning the ring into a cyclic one, with complex transforms: what SURM's code does."""
    angle = torch.arange(h.shape[-1], device=h.device) * (torch.pi / h.shape[-1])
    turn = torch.polar(torch.ones_like(angle), angle)
    Y = torch.fft.fft(_wide(x) * turn) * torch.fft.fft(_wide(h) * turn)
    return (turn.conj() * torch.fft.ifft(Y)).real.to(x.dtype)


def toeplitz_lines(x, col, row):
    """In a circulant matrix of the next power of two, as SURM's code does."""
    n, k = col.shape[0], row.shape[0]
    length = 1 << (n + k - 2).bit_length()
    window = torch.cat([col, col.new_zeros(length - n - k + 1), row[1:].flip(0)])
    y = torch.fft.irfft(torch.fft.rfft(_wide(x), n=length) * torch.fft.rfft(_wide(window)), n=length)
    return y[..., :n].to(x.dtype)


def toeplitz_product_lines(x, a, b):
    return toeplitz_lines(toeplitz_lines(x, a, a), b, b)


def kronecker_lines(x, A, B):
    A, B = A.to(x.dtype), B.to(x.dtype)
    return (B @ x.unflatten(-1, (B.shape[1], A.shape[1])) @ A.mT).flatten(-2)


def ldr_lines(x, G, H):
    return sum(circulant_lines(skew_circulant_lines(x, h), g) for g, h in zip(G, H, strict=True))


CHAIN = {
    "circulant": circulant_lines, "skew_circulant": skew_circulant_lines, "toeplitz": toeplitz_lines,
    "toeplitz_product": toeplitz_product_lines, "kronecker": kronecker_lines, "ldr": ldr_lines,
}  # fmt: skip

# A dense matrix as someone would write it down: its entries gathered from the diagonals, whose gradient autograd adds
# up entry by entry, or torch.kron.
DIAGONALS = {
    "circulant": lambda c: torch.cat([c[1:], c]),
    "skew_circulant": lambda h: torch.cat([-h[1:], h]),
    "toeplitz": lambda col, row: torch.cat([row[1:].flip(0), col]),
}


def dense_lines(op: str, n: int, k: int, device: torch.device) -> Callable | None:
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
class Case:
    """All variants of one shape, the problem that ours solves, the true results, and the reasons for those left out."""

    shape: StructuredShape
    variants: dict[str, Layer]
    problem: structured.StructuredProblem
    truth: dict[str, torch.Tensor]
    skipped: dict[str, str]


def build(shape: StructuredShape, device: torch.device) -> Case:
    """Every variant that a shape has, on the inputs that tests and `peft-fused check` use too."""
    made = cases.make_structured(
        shape.op, shape.m, *shape.sizes, dtype=shape.dtype, adapter_dtype=shape.adapter_dtype, device=device, scale=1.0
    )
    x = made.tensors["x"]
    dy = torch.randn(shape.m, shape.n, generator=torch.Generator().manual_seed(1)).to(x)
    values = [made.tensors[name] for name in made.wrt[1:]]
    truth = outputs(getattr(structured, f"{shape.op}_matmul_reference"), made.to(torch.float64), dy.double())
    ours, skipped = getattr(structured, f"{shape.op}_matmul"), {}

    def layer(kind: Callable, function: Callable) -> Layer:
        parameters = [value.detach().clone().requires_grad_() for value in values]
        return kind(lambda x: function(x, *parameters), x, dy, parameters)

    variants = {"ours": layer(Layer, ours), "chain": layer(Layer, CHAIN[shape.op])}
    if shape.op == "circulant":
        variants["c3a"] = C3A(x, dy, values[0])
    small = shape.m * shape.n * shape.k < DENSE_LIMIT[device.type]
    if lines := dense_lines(shape.op, shape.n, shape.k, device):
        if small:
            variants["dense"] = layer(Layer, lines)
        else:
            skipped["dense"] = "its GEMMs would take too long"
    if shape.op in plan_module.CONVOLUTIONS:
        for method in ("fft", "dense"):
            if method == "fft" or small:
                variants[f"ours_{method}"] = layer(lambda *rest, method=method: Forced(method, *rest), ours)
    first, second = values[0], values[1] if len(values) > 1 else None
    second = second[1:] if shape.op == "toeplitz" else second
    problem = structured.structured_problem(shape.op, x, first, second, shape.n, False)
    variants["ours"].path = dispatch.path_of(problem)
    return Case(shape, variants, problem, truth, skipped)


def verify(case: Case) -> dict[str, dict[str, float]]:
    """Relative RMS errors of every variant against float64; WrongResult when one is beyond the tolerance."""
    found = {}
    limit = TOLERANCE[case.shape.dtype]
    for name, variant in case.variants.items():
        results = [variant.forward().detach(), *variant.gradients()]
        pairs = zip(case.truth.items(), results, strict=True)
        found[name] = {
            what: relative_rms(result, true) for (what, true), result in pairs if what not in variant.unchecked
        }
        if wrong := {what: error for what, error in found[name].items() if not error <= limit}:
            text = ", ".join(f"{what} {error:.2e}" for what, error in wrong.items())
            raise WrongResult(f"{name} of {case.shape.op} at {case.shape.name}: {text} beyond {limit:.0e}")
    return found


def run_case(shape: StructuredShape, device: torch.device, *, seconds: float) -> list[dict]:
    """One row per mode."""
    case = build(shape, device)
    errors = verify(case)
    case.truth.clear()  # as large as the rest of the case, in float64
    measured = {name: case.variants[name] for name in MEASURED if name in case.variants}
    saved = {name: saved_bytes(variant) for name, variant in measured.items()}
    times = interleave(case.variants, clock_of(device, shape.calls), seconds=seconds)
    extra = {"saved_bytes": saved, "skipped": case.skipped, "error_vs_reference": errors["ours"]}
    if device.type == "cuda":
        extra["peak_bytes"] = {name: cuda_peak_bytes(variant) for name, variant in measured.items()}
        extra["wall_ms"] = {name: wall_ms(variant) for name, variant in measured.items()}

    def row(mode: str) -> dict:
        def against(name: str, mine: str = "ours") -> float | None:
            return ratio(times[mine][mode], times[name][mode]) if name in times else None

        return {
            "op": shape.op,
            "shape": shape.name,
            "dtype": shape.dtype_name,
            "dropout": 0.0,
            "mode": mode,
            "ratio_to_chain": against("chain"),
            "ratio_to_c3a": against("c3a"),
            "ratio_to_dense": against("dense"),
            "plan": {"method": case.problem.plan.method, "length": case.problem.plan.length},
            "fft_over_dense": against("ours_dense", "ours_fft"),
            "ms_median": {name: times[name][mode].median for name in times},
            "ms_iqr": {name: times[name][mode].iqr for name in times},
            "rounds": len(times["ours"][mode].ms),
            "path": case.variants["ours"].path,
        }

    return [row(mode) | extra for mode in MODES]
