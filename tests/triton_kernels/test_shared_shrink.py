"""Projections that share x: their low-rank products from one pass over it, and the op that is given one of them.

Against float64, as test_lowrank.py has it. Runs on a GPU, or interpreted with TRITON_INTERPRET=1 (see conftest.py).
"""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from peft_fused.triton_kernels import lowrank
from peft_fused.triton_kernels.lowrank import lowrank_bwd, lowrank_fwd
from peft_fused.triton_kernels.tiles import padded_rank
from rule import TYPES, check_draws, violations

from peft_fused.ops.lowrank import LowRankCall

pytestmark = [] if os.environ.get("TRITON_INTERPRET") == "1" else pytest.mark.gpu

FLOAT64 = (torch.float64, torch.float64)


def described(case):
    default = type(case).__dataclass_fields__
    changed = {k: v for k, v in vars(case).items() if v != default[k].default}
    return "-".join(f"{k}{v}" for k, v in changed.items()).replace(" ", "") or "default"


def normal(generator, *shape, dtype, std=1.0):
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype)


# ----------------------------------------------------------------------------------------------------------- S is given


@dataclass(frozen=True)
class Given:
    T: int = 37
    N: int = 80
    K: int = 72
    r: int = 5
    types: str = "fp32"
    weight: bool = False
    vectors: bool = False
    bias: bool = False
    padded: bool = True  # whether S has the columns that the kernels read
    splits: int = 1
    draws: int = 1

    __str__ = described


def make_given(case, device, draw=0):
    g = torch.Generator().manual_seed(hash((case.T, case.N, case.r, draw)) % 2**31)
    dtype, adapter = TYPES[case.types]
    t = {
        "x": normal(g, case.T, case.K, dtype=dtype),
        "dy": normal(g, case.T, case.N, dtype=dtype),
        "S": normal(g, case.T, case.r, dtype=adapter),
        "B": normal(g, case.N, case.r, dtype=adapter, std=0.3),
        "weight": normal(g, case.N, case.K, dtype=dtype, std=case.K**-0.5) if case.weight else None,
        "bias": normal(g, case.N, dtype=dtype) if case.bias else None,
        "u": 1 + normal(g, case.r, dtype=adapter, std=0.2) if case.vectors else None,
        "v": 1 + normal(g, case.N, dtype=adapter, std=0.2) if case.vectors else None,
    }
    return {name: None if value is None else value.to(device) for name, value in t.items()}


def needs_given(t):
    return {name for name in ("weight", "bias", "B", "u", "v", "S") if t[name] is not None} | (
        {"x"} if t["weight"] is not None else set()
    )


def reference_given(case, t, dtypes, scale=1.75):
    dtype, adapter = dtypes
    leaves = {
        name: value.to(adapter if name in ("S", "B", "u", "v") else dtype).requires_grad_(name in needs_given(t))
        for name, value in ((name, value.detach().clone()) for name, value in t.items() if value is not None)
    }
    S = leaves["S"] * leaves["u"] if case.vectors else leaves["S"]
    delta = S @ leaves["B"].t() * scale
    y = (delta * leaves["v"] if case.vectors else delta).to(dtype)
    if case.weight:
        y = leaves["x"] @ leaves["weight"].t() + y
    if case.bias:
        y = y + leaves["bias"]
    names = sorted(needs_given(t))
    grads = torch.autograd.grad(y, [leaves[name] for name in names], leaves["dy"])
    return {"y": y.detach()} | {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}


def run_given(case, t, needs=None):
    R = padded_rank(case.r)
    S = torch.nn.functional.pad(t["S"], (0, R - case.r)) if case.padded else t["S"]
    call = LowRankCall(t["x"], t["weight"], None, t["bias"], None, t["B"], t["u"], t["v"], scale=1.75, S=S)
    plan = None
    if case.splits > 1:
        plan = lowrank._plan(t["x"], S.dtype, case.N, case.r, 0, has_weight=case.weight, given=True)
        shared = {name: replace(getattr(plan, name), splits=case.splits) for name in ("dsu", "db")}
        plan = replace(plan, **shared, grad_b=plan.grad_b and replace(plan.grad_b, splits=case.splits))
    y, read = lowrank_fwd(call, plan=plan)
    assert torch.equal(read, torch.nn.functional.pad(t["S"], (0, R - case.r)))
    needs = needs_given(t) if needs is None else needs
    x, kept = t["x"] if "weight" in needs else None, read if needs & {"B", "u", "v"} else None
    grads = lowrank_bwd(t["dy"], replace(call, x=x), kept, needs=needs, plan=plan)
    assert grads.keys() == needs
    if "S" in needs:
        assert grads["S"].shape == S.shape and grads["S"].is_contiguous() and not grads["S"][:, case.r :].any()
        grads["S"] = grads["S"][:, : case.r]
    return {"y": y} | {f"d{name}": grad for name, grad in grads.items()}


GIVEN = [
    *(Given(types=types, r=r, padded=r != 16, vectors=r == 5) for types in TYPES for r in (5, 16, 40)),
    *(Given(types=types, r=8, weight=True, bias=True, padded=False, vectors=True) for types in TYPES),
    *(Given(types=types, T=70, N=270, r=8, splits=2, vectors=True) for types in TYPES),
    Given(T=0, weight=True, bias=True, vectors=True),
    Given(T=1, weight=True, bias=True, draws=8),
]


@pytest.mark.parametrize("case", GIVEN, ids=str)
def test_s_is_given(case, device, poisoned):
    check_draws(case, make_given, run_given, reference_given, device)


def test_s_is_given_and_little_is_needed(device, poisoned):
    case = Given(types="bf16-fp32", weight=True, vectors=True)
    t = make_given(case, device)
    truth, plain = reference_given(case, t, FLOAT64), reference_given(case, t, TYPES[case.types])
    for needs in ({"S"}, {"x"}, {"x", "S"}, {"B"}, {"u"}, {"S", "u"}, {"x", "v"}, {"weight"}, set()):
        assert not violations(run_given(case, t, needs), truth, plain), needs
    mutant = reference_given(case, t, TYPES[case.types], scale=1.75 * 1.02)
    assert {"dS", "dB", "du", "dv"} <= {name for name, *_ in violations(mutant, truth, plain)}


def test_the_single_kernel_makes_s_itself(device):
    t = make_given(Given(weight=True), device)
    call = LowRankCall(t["x"], t["weight"], None, None, None, t["B"], S=t["S"])
    with pytest.raises(ValueError, match="makes S itself"):
        lowrank_fwd(call, plan=lowrank._plan(t["x"], t["B"].dtype, 80, 5, 0))
