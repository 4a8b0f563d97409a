"""The Kronecker kernels against torch.kron in float64: values, gradients, dropout mask, controls.

Runs on a GPU, or interpreted with TRITON_INTERPRET=1 (see conftest.py).
"""

import itertools
import os
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from peft_fused.triton_kernels import kronecker as launchers
from peft_fused.triton_kernels.kronecker import kronecker_bwd, kronecker_fwd
from peft_fused.triton_kernels.kronecker_plan import limits
from peft_fused.triton_kernels.problem import Gpu
from rule import FP32, TYPES, check_draws, repeated, violations

from peft_fused.ops.dropout import dropout_threshold, keep_mask, keep_scale

pytestmark = [] if os.environ.get("TRITON_INTERPRET") == "1" else pytest.mark.gpu

NAMES = ("x", "A", "B")


@dataclass(frozen=True)
class Case:
    M: int = 9
    sizes: tuple[int, int, int, int] = (7, 11, 13, 5)  # A [a1, a2], B [b1, b2]
    types: str = "fp32"
    scale: float = 1.75
    p: float = 0.0
    add: bool = False
    strided: bool = False
    seed: int = 0x1234_5678_9ABC_DEF1
    draws: int = 1  # inputs drawn; their errors are pooled where an output is made of few sums

    def __str__(self):
        default = Case.__dataclass_fields__
        changed = {k: v for k, v in vars(self).items() if v != default[k].default}
        return "-".join(f"{k}{v}" for k, v in changed.items()) or "default"


def make(case, device, draw=0):
    """Inputs by name. Strided rows leave gaps that hold NaN; strided factors are transposed."""
    generator = torch.Generator().manual_seed(hash((case.M, case.sizes)) % 2**31 + draw)
    dtype, factor = TYPES[case.types]
    a1, a2, b1, b2 = case.sizes

    def normal(rows, columns, dtype, std=1.0):
        value = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * std
        return value.to(dtype).to(device)

    def rows(columns):
        value = normal(case.M, columns, dtype)
        if not case.strided:
            return value
        wide = torch.full((case.M, 2 * columns + 3), float("nan"), dtype=dtype, device=device)
        wide[:, 1 : 2 * columns : 2] = value
        return wide[:, 1 : 2 * columns : 2]

    t = {
        "x": rows(a2 * b2),
        "dy": rows(a1 * b1),
        "A": normal(a1, a2, factor, a2**-0.5),
        "B": normal(b1, b2, factor, b2**-0.5),
        "add": rows(a1 * b1) if case.add else None,
    }
    if case.strided:
        t |= {name: t[name].t().contiguous().t() for name in "AB"}
    return t


def options(case, device):
    threshold = dropout_threshold(case.p)
    return {
        "scale": case.scale,
        "threshold": threshold,
        "seed": torch.tensor(case.seed, device=device) if threshold else None,
    }


def reference(case, t, dtypes, scale=None, without=None):
    """Outputs and gradients by autograd in `dtypes` (activations, factors): with torch.kron in float64, as two products
    in the types of the case. The last two arguments plant an error."""
    dtype, factor = dtypes
    a1, a2, b1, b2 = case.sizes
    x, dy = t["x"].to(dtype).requires_grad_(), t["dy"].to(dtype)
    A, B = (t[name].detach().to(factor).requires_grad_() for name in "AB")
    threshold = dropout_threshold(case.p)
    mask = keep_mask(torch.tensor(case.seed), case.M, a2 * b2, threshold).to(x.device)
    dropped = x.to(factor) * mask * keep_scale(threshold)
    live = torch.ones(b2, 1, dtype=factor, device=x.device)
    if without is not None:
        live[without] = 0
    if dtype == torch.float64:
        delta = dropped @ torch.kron(B * live.T, A).T
    else:
        delta = (B @ ((dropped.view(-1, b2, a2) * live) @ A.T)).reshape(-1, b1 * a1)
    y = (delta * (case.scale if scale is None else scale)).to(dtype)
    if case.add:
        y = y + t["add"].to(dtype)
    grads = torch.autograd.grad(y, (x, A, B), dy)
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(NAMES, grads, strict=True)}


def run(case, t, needs=NAMES, **overrides):
    """The kernels, forward and backward; backward is given x only where it reads it."""
    o = options(case, t["x"].device) | overrides
    y = kronecker_fwd(t["x"], t["A"], t["B"], add=t["add"], **o)
    x = t["x"] if {"A", "B"} & set(needs) else None
    grads = kronecker_bwd(t["dy"], x, t["A"], t["B"], **o, needs=frozenset(needs))
    assert grads.keys() == set(needs)
    return {"y": y} | {f"d{name}": grad for name, grad in grads.items()}


CASES = [
    *(Case(types=types, add=add) for types in TYPES for add in (False, True)),
    *(Case(types=types, p=0.3) for types in TYPES),
    *(Case(M=M, types=types, p=0.2) for M in (0, 1, 5, 67) for types in ("fp16", "bf16-fp32")),
    *(Case(M=M, sizes=(16, 16, 15, 16)) for M in (0, 1, 5, 67)),
    *(Case(M=11, types=types, sizes=(24, 24, 32, 32), p=p) for types in TYPES for p in (0.0, 0.1)),
    *(Case(M=5, types=types, sizes=(40, 24, 17, 32), p=0.1, strided=True) for types in TYPES),
    *(Case(M=5, types=types, sizes=(1, 40, 50, 1), add=True, draws=16) for types in TYPES),
    *(Case(M=5, types=types, sizes=(33, 1, 1, 45), add=True) for types in TYPES),
    *(Case(M=3, types=types, sizes=(64, 48, 33, 64), p=0.1) for types in ("fp32", "fp16", "bf16-fp32")),
    *(Case(M=3, types=types, sizes=(72, 16, 8, 100), p=0.1) for types in ("fp16", "bf16")),
    Case(M=5, sizes=(1, 1, 1, 1)),
    Case(M=5, add=True, strided=True, p=0.5),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case, device, poisoned):
    check_draws(case, make, run, reference, device)


@pytest.mark.parametrize("types", ["fp32", "fp16", "bf16-fp32"])
def test_many_rows_for_each_program(types, device, monkeypatch):
    """Blocks of rows in sequence, the last program with fewer, and more than one program to sum over."""
    for programs in (1, 3):
        plans = {"forward": programs, "backward": programs}
        monkeypatch.setattr("peft_fused.triton_kernels.kronecker_plan.PROGRAMS_PER_SM", plans)
        monkeypatch.setattr(launchers, "gpu_of", lambda _: Gpu())
        case = Case(M=20 + programs, types=types, sizes=(16, 24, 7, 20), p=0.1)
        t = make(case, device)
        truth = reference(case, t, (torch.float64, torch.float64))
        got = repeated(partial(run, case, t))
        assert not violations(got, truth, reference(case, t, TYPES[types]))


@pytest.mark.parametrize("types", TYPES)
def test_subsets_of_needs(types, device, poisoned):
    for sizes in ((7, 11, 13, 5), (16, 24, 20, 16)):
        case = Case(M=3, types=types, sizes=sizes, p=0.1)
        t = make(case, device)
        truth = reference(case, t, (torch.float64, torch.float64))
        plain = reference(case, t, TYPES[types])
        for size in range(4):
            for needs in itertools.combinations(NAMES, size):
                assert not violations(run(case, t, needs=needs), truth, plain), needs


@pytest.mark.parametrize("types", TYPES)
def test_the_rule_rejects_planted_errors(types, device):
    """2 % in the scale or one row of every X missing must fail in each output, one element of A in those it reaches."""
    case = Case(types=types)
    t = make(case, device)
    truth = reference(case, t, (torch.float64, torch.float64))
    plain = reference(case, t, TYPES[types])
    everything = {"y", "dx", "dA", "dB"}
    assert not violations(run(case, t), truth, plain)
    assert {name for name, *_ in violations(run(case, t, scale=1.75 * 1.02), truth, plain)} == everything
    assert {name for name, *_ in violations(reference(case, t, TYPES[types], without=3), truth, plain)} == everything
    wrong = t["A"].clone()
    wrong[2, 3] *= -1
    assert {name for name, *_ in violations(run(case, t | {"A": wrong}), truth, plain)} == {"y", "dx", "dB"}


@pytest.mark.parametrize("seed", [1, -0x1234_5678_9ABC_DEF0])
@pytest.mark.parametrize("sizes", [(7, 11, 13, 5), (48, 24, 17, 7)])
def test_dropout_mask_is_exact(seed, sizes, device):
    """Ones and identities show the mask itself, on the input, on the output and on dx."""
    _, a, _, b = sizes
    x, eyes = torch.ones(9, a * b, device=device), (torch.eye(a, device=device), torch.eye(b, device=device))
    seed_tensor = torch.tensor(seed, device=device)
    for threshold in (1, dropout_threshold(0.3), dropout_threshold(1.0)):
        o = {"threshold": threshold, "seed": seed_tensor}
        expected = keep_mask(seed_tensor.cpu(), 9, a * b, threshold).to(device) * keep_scale(threshold)
        for got in (kronecker_fwd(x, *eyes, **o), kronecker_fwd(x, *eyes, mask_output=True, **o)):
            torch.testing.assert_close(got, expected)
        for needs in (frozenset("x"), frozenset("xAB")):
            torch.testing.assert_close(kronecker_bwd(x, x, *eyes, needs=needs, **o)["x"], expected)


def test_mask_on_the_output(device):
    case = Case(p=0.4, add=True)
    t = make(case, device)
    o = options(case, device)
    masked = kronecker_fwd(t["x"], t["A"], t["B"], add=t["add"], mask_output=True, **o)
    y = kronecker_fwd(t["x"], t["A"], t["B"], scale=case.scale)
    keep = keep_mask(o["seed"].cpu(), *y.shape, o["threshold"]).to(device)
    torch.testing.assert_close(masked, t["add"] + y * keep * keep_scale(o["threshold"]))


def test_output_type(device):
    case = Case(types="fp16", add=True)
    t = make(case, device)
    y = kronecker_fwd(t["x"], t["A"], t["B"], add=t["add"].float(), out_dtype=FP32)
    assert y.dtype == FP32
    torch.testing.assert_close(y.half(), kronecker_fwd(t["x"], t["A"], t["B"], add=t["add"]))


def test_scale_on_the_device_equals_a_number(device):
    case = Case(M=9)
    t = make(case, device)
    expected = run(case, t)
    for scale in (torch.tensor(1.75, device=device), torch.tensor([0.0, 1.75], dtype=torch.float64, device=device)[1]):
        got = run(case, t, scale=scale)
        assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_limits(device):
    assert limits(64, 64, 64, 64, "bfloat16", "float32") == []
    assert limits(128, 128, 128, 128, "bfloat16", "bfloat16") == []
    (reason,) = limits(64, 65, 64, 64, "float32", "float32")
    assert "A is [64, 65]" in reason and "up to 64" in reason
    assert limits(16, 11, 16, 16, "float16", "float16", dropout=True) == []
    assert "multiple of 8" in limits(24, 25, 16, 16, "float16", "float16", dropout=True)[0]
    assert "float16" in limits(4, 4, 4, 4, "bfloat16", "float16")[0]
    x, A, B = (torch.zeros(sizes, device=device) for sizes in ((3, 65), (2, 65), (65, 1)))
    with pytest.raises(ValueError, match="up to 64"):
        kronecker_fwd(x, A, B)
    with pytest.raises(ValueError, match="up to 64"):
        kronecker_bwd(x.new_zeros(3, 130), x, A, B)
