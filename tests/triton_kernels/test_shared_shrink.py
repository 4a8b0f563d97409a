"""Projections that share x: their low-rank products from one pass over it, and the op that is given one of them.

Against float64, as test_lowrank.py has it. Runs on a GPU, or interpreted with TRITON_INTERPRET=1 (see conftest.py).
"""

import os
from dataclasses import dataclass, replace

import pytest
import torch
from peft_fused.triton_kernels import lowrank
from peft_fused.triton_kernels.dropout import dropout_threshold, keep_scale
from peft_fused.triton_kernels.lowrank import lowrank_bwd, lowrank_fwd, shared_shrink_bwd, shared_shrink_fwd
from peft_fused.triton_kernels.tiles import padded_rank
from rule import TYPES, check_draws, violations

from peft_fused.ops.dropout import keep_mask
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


# -------------------------------------------------------------------------------------------------------------- members


@dataclass(frozen=True)
class Shared:
    T: int = 37
    K: int = 72
    r: tuple[int, ...] = (8, 8, 8)
    types: str = "fp32"
    p: float = 0.0
    onto: bool = True
    strided: bool = False
    undefined: tuple[int, ...] = ()  # members whose gradient is undefined
    splits: int = 1  # of columns and of rows
    draws: int = 1

    __str__ = described

    @property
    def seeds(self):
        return torch.tensor([0x1234_5678_9ABC_DEF1 * (i + 1) % 2**63 for i in range(len(self.r))])


def make_shared(case, device, draw=0):
    g = torch.Generator().manual_seed(hash((case.T, case.K, *case.r, draw)) % 2**31)
    dtype, adapter = TYPES[case.types]
    x, onto = normal(g, case.T, case.K, dtype=dtype), normal(g, case.T, case.K, dtype=dtype)
    if case.strided:
        wide = torch.full((case.T, 2 * case.K + 3), float("nan"), dtype=dtype)
        wide[:, 1 : 1 + case.K] = x
        x, onto = wide[:, 1 : 1 + case.K], onto.t().contiguous().t()
    t = {"x": x, "onto": onto} if case.onto else {"x": x}
    for i, r in enumerate(case.r):
        t[f"A{i}"] = normal(g, r, case.K, dtype=adapter, std=case.K**-0.5)
        t[f"dS{i}"] = normal(g, case.T, r, dtype=adapter)
    return {name: value.to(device) for name, value in t.items()}


def reference_shared(case, t, dtypes, seeds=None, shifted=False):
    """By plain PyTorch in `dtypes`. seeds, shifted: other masks, and a member whose ranks are one further."""
    dtype, adapter = dtypes
    members, threshold = range(len(case.r)), dropout_threshold(case.p)
    x = t["x"].to(dtype).detach().requires_grad_()
    A = [t[f"A{i}"].to(adapter).detach().requires_grad_() for i in members]
    rows = A[1].roll(1, 0) if shifted else None
    S = []
    for i in members:
        dropped = x
        if threshold:
            keep = keep_mask((case.seeds if seeds is None else seeds)[i], *x.shape, threshold).to(x.device)
            dropped = x * keep * keep_scale(threshold)
        S.append(dropped.to(adapter) @ (rows if shifted and i == 1 else A[i]).t())
    defined = [i for i in members if i not in case.undefined]
    dS = [t[f"dS{i}"].to(adapter) for i in defined]
    dx, *dA = torch.autograd.grad([S[i] for i in defined], [x, *(A[i] for i in defined)], dS)
    if case.onto:
        dx = t["onto"].to(dtype) + dx
    found = {"dx": dx} | {f"S{i}": S[i].detach() for i in members}
    return found | {f"dA{i}": of_a for i, of_a in zip(defined, dA, strict=True)}


def run_shared(case, t, need_x=True, needs=None):
    members, threshold = range(len(case.r)), dropout_threshold(case.p)
    factors, R = [t[f"A{i}"] for i in members], padded_rank(max(case.r))
    plan = lowrank._plan_members(t["x"], factors, threshold)
    if case.splits > 1:
        plan = replace(plan, **{n: replace(getattr(plan, n), splits=case.splits) for n in ("shrink", "grad_a")})
    dropout = dict(threshold=threshold, seeds=case.seeds.to(t["x"].device) if threshold else None)
    S = shared_shrink_fwd(t["x"], factors, **dropout, plan=plan)
    for one, r in zip(S, case.r, strict=True):
        assert one.is_contiguous() and one.shape == (case.T, R) and not one[:, r:].any()
    dS = [
        None if i in case.undefined else torch.nn.functional.pad(t[f"dS{i}"], (0, R - case.r[i])).contiguous()
        for i in members
    ]
    needs = [True] * len(case.r) if needs is None else needs
    onto = t["onto"].clone(memory_format=torch.preserve_format) if case.onto else None
    x = t["x"] if any(needs) or not case.onto else None
    dx, dA = shared_shrink_bwd(dS, x, factors, onto=onto, **dropout, need_x=need_x, needs=needs, plan=plan)
    assert [one is None for one in dA] == [not needs[i] or i in case.undefined for i in members]
    assert (dx is None) == (not need_x) and (dx is None or dx.is_contiguous())
    found = {f"S{i}": S[i][:, : case.r[i]] for i in members} | ({"dx": dx} if need_x else {})
    return found | {f"dA{i}": of_a for i, of_a in enumerate(dA) if of_a is not None}


# Without onto the delta is alone: an error of it cannot hide behind the base products.
SHARED = [
    *(Shared(types=types, r=r, onto=False) for types in TYPES for r in ((8, 8), (16, 16, 16), (8, 16, 5, 16))),
    *(Shared(types=types, r=(40, 8, 40), onto=False, T=23) for types in TYPES),
    *(Shared(types=types, r=(16, 16), p=0.3, onto=False) for types in TYPES),
    *(Shared(types=types, r=(8, 3, 8), p=0.1, T=23, onto=False) for types in TYPES),
    *(Shared(types=types, r=(40, 33), p=0.2, T=19, onto=False) for types in TYPES),
    *(Shared(types=types, T=131, K=330, splits=3, onto=False) for types in TYPES),
    *(Shared(types=types, T=70, K=264, p=0.2, splits=2, onto=False) for types in ("fp32", "bf16-fp32")),
    *(Shared(types=types, K=51, strided=True, p=p) for types in ("fp32", "bf16") for p in (0.0, 0.1)),
    *(
        Shared(types="bf16-fp32", undefined=u, p=p, onto=o)
        for u, o in (((1,), True), ((0, 2), False))
        for p in (0, 0.2)
    ),
    *(Shared(types="fp16", r=(70, 16, 70), p=p, onto=False, T=19) for p in (0.0, 0.2)),
    Shared(types="bf16", r=(200, 130, 8, 8), onto=False, T=11),
    *(Shared(T=T, p=p, draws=1 + 7 * T) for T in (0, 1) for p in (0.0, 0.5)),
]


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_members_share_a_pass(case, device, poisoned):
    check_draws(case, make_shared, run_shared, reference_shared, device)


@pytest.mark.parametrize("case", [Shared(types=t, p=p) for t in ("fp32", "bf16-fp32") for p in (0.0, 0.3)], ids=str)
def test_subsets_of_needs(case, device, poisoned):
    t = make_shared(case, device)
    truth, plain = (reference_shared(case, t, types) for types in (FLOAT64, TYPES[case.types]))
    for needs in ([False] * 3, [True, False, False], [False, True, True]):
        for need_x in (False, True):
            assert not violations(run_shared(case, t, need_x, needs), truth, plain), (need_x, needs)


@pytest.mark.parametrize("types", ["fp32", "fp16", "bf16", "bf16-fp32"])
def test_the_rule_rejects_planted_errors(types, device):
    """Masks of two members exchanged, or the ranks of one shifted, must fail in every output that they reach."""
    case = Shared(types=types, p=0.1, onto=False)
    t = make_shared(case, device)
    truth, plain = (reference_shared(case, t, kinds) for kinds in (FLOAT64, TYPES[types]))
    assert not violations(run_shared(case, t), truth, plain)
    exchanged = reference_shared(case, t, TYPES[types], seeds=case.seeds[[1, 0, 2]])
    assert {"S0", "S1", "dx", "dA0", "dA1"} == {name for name, *_ in violations(exchanged, truth, plain)}
    shifted = reference_shared(case, t, TYPES[types], shifted=True)
    assert {"S1", "dx", "dA1"} == {name for name, *_ in violations(shifted, truth, plain)}


@pytest.mark.parametrize("types", ["fp32", "bf16", "bf16-fp32"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("r", [8, 40])
def test_one_member_is_a_layer_by_itself(r, p, types, device):
    """S and dX are the bits of the op's own; of several members alike each has the same, to the order of sums."""
    case = Shared(types=types, r=(r,), p=p, onto=False)
    t = make_shared(case, device)
    x, A, seed = t["x"], t["A0"], case.seeds.to(device) if p else None
    B = torch.eye(r, device=device, dtype=A.dtype)
    dy = t["dS0"].to(x.dtype)
    dS = torch.nn.functional.pad(dy.to(A.dtype), (0, padded_rank(r) - r))
    threshold = dropout_threshold(p)
    call = LowRankCall(x, None, None, None, A, B, threshold=threshold, seed=seed[0] if p else None)
    _, S = lowrank_fwd(call)
    expected = lowrank_bwd(dy, call, S, needs={"x", "A"})
    (found,) = shared_shrink_fwd(x, [A], threshold=threshold, seeds=seed)
    dx, (dA,) = shared_shrink_bwd([dS], x, [A], threshold=threshold, seeds=seed, need_x=True, needs=[True])
    assert torch.equal(found, S) and torch.equal(dx, expected["x"])
    torch.testing.assert_close(dA, expected["A"])  # whose rows may be summed in another order
    seeds = case.seeds.expand(3).contiguous().to(device) if p else None
    for one in shared_shrink_fwd(x, [A] * 3, threshold=threshold, seeds=seeds):
        torch.testing.assert_close(one, S)


def test_onto_is_written_where_it_is_dense(device):
    t = make_shared(Shared(), device)
    dS = [torch.nn.functional.pad(t[f"dS{i}"], (0, 8)) for i in range(3)]
    factors, onto = [t[f"A{i}"] for i in range(3)], t["onto"].clone()
    dx, _ = shared_shrink_bwd(dS, None, factors, onto=onto, need_x=True, needs=[False] * 3)
    assert dx.data_ptr() == onto.data_ptr() and not torch.equal(dx, t["onto"])
    nothing, of_factors = shared_shrink_bwd([None] * 3, None, factors, onto=onto, need_x=True, needs=[True] * 3)
    assert nothing is onto and of_factors == [None] * 3


@pytest.mark.parametrize("types", ["fp32", "bf16-fp32"])
def test_what_is_not_finite_stays_in_its_row(types, device):
    """Padded ranks are zero whatever x is, and so is what a member without some of them has of the others."""
    case = Shared(T=21, K=16, r=(5, 3, 5), types=types)
    t = make_shared(case, device)
    t["x"][3, 2] = float("inf")
    S = shared_shrink_fwd(t["x"], [t[f"A{i}"] for i in range(3)])
    others = torch.arange(case.T, device=device) != 3
    for one in S:
        assert one[others].isfinite().all() and not one[3, :3].isfinite().any() and not one[:, 5:].any()
