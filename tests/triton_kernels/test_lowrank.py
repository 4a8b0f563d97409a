"""The low-rank kernels against float64: values, gradients, dropout mask, runtime controls.

Runs on a GPU, or interpreted with TRITON_INTERPRET=1 (see conftest.py).
"""

import itertools
import os
from dataclasses import dataclass, replace

import pytest
import torch
from peft_fused.triton_kernels import lowrank
from peft_fused.triton_kernels.dropout import dropout_threshold, keep_scale
from peft_fused.triton_kernels.lowrank import lowrank_bwd, lowrank_fwd
from peft_fused.triton_kernels.tiles import padded_rank
from rule import TYPES, check_draws, violations

from peft_fused.ops.lowrank import LowRankCall

pytestmark = [] if os.environ.get("TRITON_INTERPRET") == "1" else pytest.mark.gpu

NAMES = ("x", "weight", "bias", "A", "B", "u", "v")


@dataclass(frozen=True)
class Case:
    T: int = 37
    N: int = 80
    K: int = 72
    r: int = 5
    types: str = "fp32"
    base: str = "add"  # "add", "weight" or "none"
    bias: bool = False
    vectors: bool = False
    experts: int = 0  # slots of A and B; B uses the last, A the first but one
    share_b: bool = False  # B is not stacked
    rank: int | None = None
    frozen: bool = False
    p: float = 0.0
    strided: bool = False
    splits: int = 1  # of columns and of rows
    seed: int = 0x1234_5678_9ABC_DEF1
    draws: int = 1  # inputs drawn; their errors are pooled where an output has few elements

    def __str__(self):
        default = Case.__dataclass_fields__
        changed = {k: v for k, v in vars(self).items() if v != default[k].default}
        return "-".join(f"{k}{v}" for k, v in changed.items()) or "default"


def make(case, device, draw=0):
    """Inputs by name, B non-zero. Strided rows leave gaps that hold NaN."""
    generator = torch.Generator().manual_seed(hash((case.T, case.N, case.K, case.r, draw)) % 2**31)
    dtype, adapter = TYPES[case.types]

    def normal(*shape, dtype, std=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype).to(device)

    def factors(size):
        """Signs times 0.5..1.5: without the tail of a normal, no single element decides the largest error."""
        uniform = torch.rand(2, size, generator=generator, dtype=torch.float64)
        return ((0.5 + uniform[0]) * (uniform[1] - 0.5).sign()).to(adapter).to(device)

    def rows(*shape):
        value = normal(*shape, dtype=dtype)
        if not case.strided:
            return value
        wide = torch.full((shape[0], 2 * shape[1] + 3), float("nan"), dtype=dtype, device=device)
        wide[:, 1 : 1 + shape[1]] = value
        return wide[:, 1 : 1 + shape[1]]

    stack = (case.experts,) if case.experts else ()
    stack_b = () if case.share_b else stack
    t = {
        "x": rows(case.T, case.K),
        "dy": rows(case.T, case.N),
        "A": normal(*stack, case.r, case.K, dtype=adapter, std=case.K**-0.5),
        "B": normal(*stack_b, case.N, case.r, dtype=adapter, std=0.05 if case.base == "weight" else 0.3),
        "weight": normal(case.N, case.K, dtype=dtype, std=case.K**-0.5) if case.base == "weight" else None,
        "add": rows(case.T, case.N) if case.base == "add" else None,
        "bias": normal(case.N, dtype=dtype) if case.bias else None,
        "u": factors(case.r) if case.vectors else None,
        "v": factors(case.N) if case.vectors else None,
    }
    if case.strided and case.base == "weight":
        t["weight"] = t["weight"].t().contiguous().t()
    for name in ("bias", "u", "v") if case.strided else ():
        if t[name] is not None:
            t[name] = torch.stack([t[name], torch.full_like(t[name], float("nan"))], 1)[:, 0]
    return t


def controls(case):
    return {
        "scale": 1.75,
        "rank": case.rank,
        "expert_a": 1 if case.experts else None,
        "expert_b": case.experts - 1 if case.experts and not case.share_b else None,
        "threshold": dropout_threshold(case.p),
    }


def needs_of(t):
    return {name for name in NAMES if t[name] is not None}


def philox_mask(seed, rows, columns, threshold):
    """The dropout convention in plain PyTorch, from the Philox definition."""
    word = 0xFFFFFFFF
    groups = -(-columns // 8)
    c0 = torch.arange(groups).expand(rows, groups)
    c1 = torch.arange(rows)[:, None].expand(rows, groups)
    c2 = c3 = torch.zeros(rows, groups, dtype=torch.int64)
    k0, k1 = seed & word, (seed >> 32) & word
    for _ in range(7):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps to the right 64 bits
        c0, c1, c2, c3 = (
            (second >> 32) & word ^ c1 ^ k0,
            second & word,
            (first >> 32) & word ^ c3 ^ k1,
            first & word,
        )
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    words = torch.stack((c0, c1, c2, c3), -1)
    draws = torch.stack((words & 0xFFFF, words >> 16), -1)
    return draws.reshape(rows, groups * 8)[:, :columns] >= threshold


def reference(case, t, dtypes, scale=None, drop_rank=None):
    """Outputs and gradients by autograd in `dtypes` (activations, adapter). The last two arguments plant an error."""
    c = controls(case)
    dtype, adapter = dtypes
    leaves = {}
    for name, value in t.items():
        if value is not None:
            to = adapter if name in ("A", "B", "u", "v") else dtype
            leaves[name] = value.detach().to(to).clone().requires_grad_(name in NAMES)
    x = leaves["x"]
    A = leaves["A"] if t["A"].dim() == 2 else leaves["A"][c["expert_a"]]
    B = leaves["B"] if t["B"].dim() == 2 else leaves["B"][c["expert_b"]]
    live = torch.arange(case.r, device=x.device) < (case.r if case.rank is None else case.rank)
    if drop_rank is not None:
        live = live & (torch.arange(case.r, device=x.device) != drop_rank)
    mask = philox_mask(case.seed, case.T, case.K, c["threshold"]).to(x.device)
    S = ((x.to(adapter) * mask * keep_scale(c["threshold"])) @ A.t()) * live
    delta = (S * leaves["u"] if case.vectors else S) @ B.t() * (c["scale"] if scale is None else scale)
    delta = (delta * leaves["v"] if case.vectors else delta).to(dtype)
    y = delta
    if case.base == "weight":
        y = x @ leaves["weight"].t() + delta
    elif case.base == "add":
        y = leaves["add"] + delta
    if case.bias:
        y = y + leaves["bias"]
    names = sorted(needs_of(t))
    grads = torch.autograd.grad(y, [leaves[n] for n in names], leaves["dy"], allow_unused=True)
    out = {"y": y, "S": S}
    for name, grad in zip(names, grads, strict=True):
        grad = torch.zeros_like(leaves[name]) if grad is None else grad
        if case.frozen and name in ("A", "B"):
            only = torch.arange(case.r, device=x.device) == case.rank - 1
            grad = grad * (only[:, None] if name == "A" else only)
        out[f"d{name}"] = grad
    return {name: value.detach() for name, value in out.items()}


def run(case, t, needs=None, scale=None, plan=None, **overrides):
    """The kernels, forward and backward; backward is given what the autograd node keeps for it, None for the rest."""
    c = controls(case) | overrides
    if scale is not None:
        c["scale"] = scale
    seed = torch.tensor(case.seed, device=t["x"].device) if case.p else None
    if plan is None and t["x"].shape[0]:
        plan = lowrank._plan(t["x"], t["A"].dtype, case.N, case.r, c["threshold"], has_weight=case.base == "weight")
        splits = {
            name: replace(getattr(plan, name), splits=case.splits)
            for name in ("shrink", "grad_b", "dsu", "db", "grad_a")
            if getattr(plan, name) is not None
        }
        plan = replace(plan, **splits) if case.splits > 1 else plan
    tensors = {name: t[name] for name in ("x", "weight", "add", "bias", "A", "B", "u", "v")}
    call = LowRankCall(**tensors, **c, seed=seed, frozen=case.frozen)
    y, S = lowrank_fwd(call, plan=plan)
    assert S.shape[1] == padded_rank(case.r) and not S[:, case.r :].any()
    needs = needs_of(t) if needs is None else needs
    x, A, kept_S = (
        value if needs & wanted else None
        for value, wanted in ((t["x"], {"A", "weight"}), (t["A"], {"x", "A"}), (S, {"B", "u", "v"}))
    )
    grads = lowrank_bwd(t["dy"], replace(call, x=x, A=A), kept_S, needs=needs, plan=plan)
    assert grads.keys() == needs
    return {"y": y, "S": S[:, : case.r]} | {f"d{name}": grad for name, grad in grads.items()}


# The delta alone (base "none"), so that an error of the adapter cannot hide behind the base map.
DELTA = Case(base="none")
CASES = [
    *(replace(DELTA, types=types, r=r, vectors=r != 16) for types in TYPES for r in (16, 33)),
    *(replace(DELTA, types=types, r=1, vectors=True, T=17, draws=16) for types in TYPES),
    *(replace(DELTA, types=types, r=150, K=264, N=136, T=11) for types in ("fp32", "fp16", "bf16-fp32")),
    *(replace(DELTA, types=types, T=131, K=330, N=270, splits=3, vectors=True) for types in TYPES),
    *(replace(DELTA, types=types, T=70, N=256, K=128, splits=2, p=0.2, bias=True) for types in TYPES),
    *(replace(DELTA, types=types, T=131, r=70, splits=2, p=0.3, vectors=True) for types in ("fp32", "fp16", "bf16")),
    *(replace(DELTA, types=types, p=0.1, K=50, vectors=True, r=r) for types in TYPES for r in (3, 33)),
    *(replace(DELTA, types=types, r=16, rank=7, frozen=f) for types in ("fp32", "bf16-fp32") for f in (False, True)),
    *(replace(DELTA, types=types, experts=3, vectors=True, p=0.2) for types in ("fp32", "fp16", "bf16-fp32")),
    replace(DELTA, experts=3, share_b=True, rank=2, frozen=True),
    *(replace(DELTA, T=1, types=types, vectors=True, bias=True, draws=8) for types in ("fp32", "fp16", "bf16-fp32")),
    replace(DELTA, T=0, vectors=True, bias=True),
    *(Case(types=types, bias=True, strided=True, K=51, N=77, p=0.1) for types in ("fp32", "bf16")),
    *(Case(types=types, base="weight", bias=True, vectors=True, strided=s) for types in TYPES for s in (False, True)),
    Case(T=70, N=150, base="weight", bias=True, r=16, types="fp16"),
    Case(T=150, N=150, base="weight", experts=2, rank=4, types="bf16-fp32"),
    Case(T=70, base="weight", bias=True, r=20, types="fp16", splits=2),
    Case(T=70, base="weight", p=0.25, types="fp16", vectors=True),
    Case(T=0, base="weight", bias=True, vectors=True, experts=2, p=0.5),
    Case(T=1, base="weight", p=0.5, vectors=True, draws=8),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case, device, poisoned):
    check_draws(case, make, run, reference, device)


def test_single_kernel_delta(device, poisoned):
    """The single kernel on a zero base map, where only the delta is left to compare."""
    for types in TYPES:
        case = Case(base="weight", types=types, vectors=True, rank=4)
        t = make(case, device) | {"weight": torch.zeros(case.N, case.K, dtype=TYPES[types][0], device=device)}
        truth = reference(case, t, (torch.float64, torch.float64))
        plain = reference(case, t, TYPES[types])
        plan = lowrank._plan(t["x"], t["A"].dtype, case.N, case.r, 0)
        assert plan.forward == "single_kernel"
        got = run(case, t, needs=set(), plan=plan)
        assert not violations(got, truth, plain)


@pytest.mark.parametrize("types", ["fp32", "fp16", "bf16-fp32"])
def test_subsets_of_needs(types, device, poisoned):
    """Alone or in pairs, every gradient is right, whichever kernels the others would have called for."""
    for r in (5, 70):
        case = Case(T=19, N=40, K=24, r=r, types=types, base="weight", bias=True, vectors=True, p=0.1)
        t = make(case, device)
        truth = reference(case, t, (torch.float64, torch.float64))
        plain = reference(case, t, TYPES[types])
        for size in (0, 1, 2):
            for needs in itertools.combinations(NAMES, size):
                assert not violations(run(case, t, needs=set(needs)), truth, plain), needs


@pytest.mark.parametrize("types", ["fp32", "fp16", "bf16", "bf16-fp32"])
def test_the_rule_rejects_planted_errors(types, device):
    """2 % in the scale or one rank of sixteen missing must fail in every output that they reach."""
    case = replace(DELTA, types=types, r=16)
    t = make(case, device)
    truth = reference(case, t, (torch.float64, torch.float64))
    plain = reference(case, t, TYPES[types])
    assert not violations(run(case, t), truth, plain)
    wrong_scale = {name for name, *_ in violations(run(case, t, scale=1.75 * 1.02), truth, plain)}
    assert wrong_scale == {"y", "dx", "dA", "dB"}
    for planted in ({"scale": 1.75 * 1.02}, {"drop_rank": 3}):
        mutant = reference(case, t, TYPES[types], **planted)
        assert {"y", "dx", "dA", "dB"} <= {name for name, *_ in violations(mutant, truth, plain)}


@pytest.mark.parametrize("seed", [0, 1, -1, 0x7FFF_FFFF_FFFF_FFFF, -0x1234_5678_9ABC_DEF0])
def test_dropout_mask_is_exact(seed, device):
    """x = 1 and A = I show the mask itself; rows and columns that end inside a block and inside a group of eight."""
    M, K = 83, 91
    x, A = torch.ones(M, K, device=device), torch.eye(K, device=device)
    for threshold in (1, dropout_threshold(0.1), dropout_threshold(0.5), dropout_threshold(1.0)):
        keep = philox_mask(seed, M, K, threshold).to(device)
        seed_tensor = torch.tensor(seed, device=device)
        call = LowRankCall(x, None, None, None, A, torch.eye(K, device=device), threshold=threshold, seed=seed_tensor)
        _, S = lowrank_fwd(call)
        dx = lowrank_bwd(x, call, S, needs={"x"})["x"]
        assert torch.equal(S[:, :K] != 0, keep) and torch.equal(dx != 0, keep)
        torch.testing.assert_close(S[:, :K], keep * keep_scale(threshold))


def test_controls_on_the_device_equal_numbers(device):
    """A 0-d tensor gives the same bits as the number, for every control, whatever the integer or float type."""
    for base in ("none", "weight"):
        case = Case(experts=3, rank=3, frozen=True, vectors=True, base=base)
        t = make(case, device)
        expected = run(case, t)
        for integer, floating in ((torch.int32, torch.float32), (torch.int64, torch.float64)):
            tensors = {
                "scale": torch.tensor(1.75, dtype=floating, device=device),
                "rank": torch.tensor(3, dtype=integer, device=device),
                "expert_a": torch.tensor([0, 1], dtype=integer, device=device)[1],
                "expert_b": torch.tensor([0, 2], dtype=integer, device=device)[1],
            }
            got = run(case, t, **tensors)
            assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_other_experts_get_zero(device):
    case = Case(experts=3, vectors=True)
    t = make(case, device)
    got = run(case, t)
    assert got["dA"][1].abs().sum() > 0 and got["dB"][2].abs().sum() > 0
    assert not got["dA"][[0, 2]].any() and not got["dB"][[0, 1]].any()


@pytest.mark.parametrize("types", ["fp32", "bf16", "bf16-fp32"])
@pytest.mark.parametrize("base", ["none", "weight"])
def test_what_is_not_finite_stays_in_its_row(base, types, device):
    """Ranks that are not there, padded or beyond `rank`, are zero whatever x and dY are, and pass nothing on."""
    case = Case(base=base, types=types, T=21, N=24, K=16, r=5, rank=3)
    t = make(case, device)
    t["x"][3, 2] = t["dy"][7, 1] = float("inf")
    c = controls(case)
    call = LowRankCall(**{n: t[n] for n in ("x", "weight", "add", "bias", "A", "B", "u", "v")}, **c)
    y, S = lowrank_fwd(call)
    grads = lowrank_bwd(t["dy"], call, S, needs={"x", "A", "B"})
    others = torch.arange(case.T, device=device) != 3
    assert not S[:, 3:].any() and y[others].isfinite().all() and not S[3, :3].isfinite().any()
    assert grads["x"][torch.arange(case.T, device=device) != 7].isfinite().all()
    assert not grads["A"][3:, 3:].any() and not grads["B"][2:, 3:].any()


def test_single_kernel_refuses_dropout(device):
    t = make(Case(base="weight"), device)
    plan = lowrank._plan(t["x"], t["A"].dtype, 80, 5, 0)
    with pytest.raises(ValueError, match="no dropout"):
        run(Case(base="weight", p=0.5), t, plan=plan)
