"""The bottleneck kernels against float64: values, gradients, routing, runtime controls.

Runs on a GPU, or interpreted with TRITON_INTERPRET=1 (see conftest.py).
"""

import itertools
import os
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from peft_fused.triton_kernels import bottleneck as launchers
from peft_fused.triton_kernels.bottleneck import bottleneck_bwd, bottleneck_fwd
from peft_fused.triton_kernels.bottleneck_plan import BOTTLENECK_ACTIVATIONS
from peft_fused.triton_kernels.problem import Gpu
from rule import TYPES, check_draws, violations

from peft_fused.ops.bottleneck import BOTTLENECK, BottleneckCall

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [] if INTERPRETED else pytest.mark.gpu

NAMES = ("h", "down", "down_bias", "up", "up_bias")
ACT = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "identity": lambda z: z,
}
EXPERTS = 3


@dataclass(frozen=True)
class Case:
    rows: int = 7  # of a group
    groups: int = 2
    K: int = 72
    N: int = 80
    r: int = 5
    types: str = "fp32"
    activation: str = "gelu"
    residual: str = "zeros"  # or "h", or "other"
    stacked: str = "du"  # which sides are
    expert_d: object = (2, 0)  # a number, a list per group (repeated as needed) or None
    expert_u: object = (1, 1)
    biases: bool = True
    strided: bool = False
    sm_count: int = 1
    scale: float = 1.75
    draws: int = 1  # inputs drawn; their errors are pooled where an output has few elements

    def __str__(self):
        default = Case.__dataclass_fields__
        changed = {k: v for k, v in vars(self).items() if v != default[k].default}
        return "-".join(f"{k}{v}" for k, v in changed.items()).replace(" ", "") or "default"

    @property
    def M(self):
        return self.rows * self.groups

    def indices(self, side):
        """The expert of each group; all 0 for a side that is not stacked."""
        expert = self.expert_d if side == "d" else self.expert_u
        if side not in self.stacked or expert is None:
            return [0] * self.groups
        return (
            [expert] * self.groups
            if isinstance(expert, int)
            else list(itertools.islice(itertools.cycle(expert), self.groups))
        )


@pytest.fixture(autouse=True)
def multiprocessors(request, monkeypatch):
    """In the interpreter a case says how many there are, on which the size and number of blocks depends."""
    if INTERPRETED:
        case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
        monkeypatch.setattr(launchers, "gpu_of", lambda _: Gpu("", case.sm_count if case else 1))


def make(case, device, draw=0):
    """Inputs by name. Strided rows leave gaps that hold NaN; strided factors are transposed."""
    generator = torch.Generator().manual_seed(hash((case.M, case.N, case.K, case.r, draw)) % 2**31)
    dtype, adapter = TYPES[case.types]

    def normal(*shape, dtype=adapter, std=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype).to(device)

    def rows(columns):
        value = normal(case.M, columns, dtype=dtype)
        if not case.strided:
            return value
        wide = torch.full((case.M, 2 * columns + 3), float("nan"), dtype=dtype, device=device)
        wide[:, 1 : 2 * columns : 2] = value
        return wide[:, 1 : 2 * columns : 2]

    stack_d, stack_u = ((EXPERTS,) if side in case.stacked else () for side in "du")
    t = {
        "h": rows(case.K),
        "dy": rows(case.N),
        "down": normal(*stack_d, case.r, case.K, std=case.K**-0.5),
        "down_bias": normal(*stack_d, case.r, std=0.5) if case.biases else None,
        "up": normal(*stack_u, case.N, case.r, std=case.r**-0.5),
        "up_bias": normal(*stack_u, case.N) if case.biases else None,
        "residual": {"zeros": torch.zeros_like(rows(case.N)), "h": None, "other": rows(case.N)}[case.residual],
    }
    if case.strided:
        t |= {name: t[name].mT.contiguous().mT for name in ("down", "up")}
    return t


def controls(case, device, as_tensor=None):
    """Indices and scale for the launchers; numbers as tensors of a type where one is given."""
    found = {"scale": case.scale if as_tensor is None else torch.tensor(case.scale, device=device)}
    for side in "du":
        expert = case.expert_d if side == "d" else case.expert_u
        if expert is not None and not isinstance(expert, int):
            expert = torch.tensor(case.indices(side), dtype=as_tensor or torch.int64, device=device)
        elif as_tensor is not None:
            expert = torch.tensor([9, expert], dtype=as_tensor, device=device)[1]
        found[f"expert_{side}"] = expert
    return found


def reference(case, t, dtypes, scale=None, without=None, swap=False):
    """Outputs and gradients by autograd in `dtypes` (h, parameters), group by group. The last three arguments plant
    an error."""
    dtype, adapter = dtypes
    leaves = {
        name: value.detach()
        .to(dtype if name in ("h", "dy", "residual") else adapter)
        .clone()
        .requires_grad_(name in NAMES)
        for name, value in t.items()
        if value is not None
    }
    pick = lambda name, i: leaves[name][i] if t[name].dim() > 1 + (name in ("down", "up")) else leaves[name]  # noqa: E731
    live = torch.ones(case.r, dtype=adapter, device=t["h"].device)
    if without is not None:
        live[without] = 0
    zs, ys = [], []
    for g, (i, j) in enumerate(zip(case.indices("d"), case.indices("u"), strict=True)):
        i = (i + 1) % EXPERTS if swap else i
        part = slice(g * case.rows, (g + 1) * case.rows)
        h = leaves["h"][part]
        z = F.linear(h.to(adapter), pick("down", i), pick("down_bias", i) if case.biases else None)
        delta = F.linear(ACT[case.activation](z) * live, pick("up", j), pick("up_bias", j) if case.biases else None)
        start = h if case.residual == "h" else leaves["residual"][part]
        ys.append((start + delta * (case.scale if scale is None else scale)).to(dtype))
        zs.append(z)
    y = torch.cat(ys)
    names = [name for name in NAMES if name in leaves]
    grads = torch.autograd.grad(y, [leaves[name] for name in names], leaves["dy"], allow_unused=True)
    out = {"y": y.detach(), "z": torch.cat(zs).detach()}
    for name, grad in zip(names, grads, strict=True):
        out[f"d{name}"] = torch.zeros_like(leaves[name]) if grad is None else grad
    return out


def needs_of(t):
    return {name for name in NAMES if t[name] is not None}


def run(case, t, needs=None, **overrides):
    """The kernels, forward and backward; backward is given what it reads, None for the rest."""
    c = controls(case, t["h"].device) | {"activation": case.activation} | overrides
    call = BottleneckCall(**{name: t[name] for name in BOTTLENECK.names}, **c)
    y, z = bottleneck_fwd(call)
    needs = needs_of(t) if needs is None else needs
    need_dz = needs & {"h", "down", "down_bias"}
    reads_z = "up" in needs or (need_dz and case.activation != "identity")
    kept = replace(
        call,
        h=t["h"] if "down" in needs else None,
        down=t["down"] if "h" in needs else None,
        up=t["up"] if need_dz else None,
        down_bias=None,
        up_bias=None,
        residual=None,
    )
    grads = bottleneck_bwd(t["dy"], kept, z if reads_z else None, like=BOTTLENECK.likeness(call), needs=needs)
    assert grads.keys() == needs
    return {"y": y, "z": z} | {f"d{name}": grad for name, grad in grads.items()}


SMALL = Case(K=40, N=40)
CASES = [
    *(Case(r=r, types=types, draws=8 if r == 1 else 1) for types in TYPES for r in (1, 5, 16, 48)),
    *(
        replace(SMALL, activation=act, types=types, r=16)
        for types in ("fp32", "fp16")
        for act in BOTTLENECK_ACTIVATIONS
    ),
    *(replace(SMALL, types=types, residual="h", strided=True, K=50, N=50) for types in TYPES),
    *(Case(types=types, residual="other", strided=True, biases=False) for types in ("fp32", "fp16-fp32", "bf16")),
    *(Case(rows=1, groups=groups, sm_count=132, draws=8) for groups in (1, 2, 7)),
    *(Case(rows=1, types=types, sm_count=132, draws=8) for types in ("bf16", "bf16-fp32")),
    *(Case(rows=97, groups=groups, types=types) for groups in (1, 2) for types in ("fp32", "fp16", "bf16-fp32")),
    # Several splits of the rows, with parts of groups and with several groups, and of the columns.
    *(
        Case(rows=97, groups=7, expert_d=(2, 0, 2, 1), sm_count=132, K=72, N=520, types=types)
        for types in ("fp32", "fp16", "bf16-fp32")
    ),
    Case(rows=601, groups=1, expert_d=2, expert_u=None, sm_count=132, K=40),
    *(Case(groups=1, expert_d=2, expert_u=None, stacked=side, types=types) for side in ("d", "u") for types in TYPES),
    *(Case(groups=7, stacked=side, types="fp16") for side in ("d", "u", "du")),
    Case(groups=1, expert_d=None, expert_u=None, stacked=""),
    Case(expert_d=1, expert_u=(2, 0)),
    Case(expert_d=(2, 2), expert_u=0),
    # More units than one launch holds.
    *(Case(r=150, types=types, K=72, N=136, residual="other") for types in ("fp32", "fp16-fp32", "bf16-fp32")),
    *(Case(r=200, types=types, K=72, N=72, residual="h") for types in ("fp32", "fp16", "bf16")),
    Case(rows=0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case, device, poisoned):
    check_draws(case, make, run, reference, device)


@pytest.mark.parametrize("types", ["fp32", "fp16", "bf16-fp32"])
def test_subsets_of_needs(types, device, poisoned):
    """Each subset is right, whichever kernels the others would have called for, and reads nothing it need not."""
    for r, activation in ((5, "identity"), (150, "tanh")):
        case = Case(rows=3, K=24, N=24, r=r, types=types, activation=activation, residual="h")
        t = make(case, device)
        truth = reference(case, t, (torch.float64, torch.float64))
        plain = reference(case, t, TYPES[types])
        # Which kernels a subset calls for does not depend on the types.
        for size in range(6) if types == "fp16" else (1, 5):
            for needs in itertools.combinations(NAMES, size):
                assert not violations(run(case, t, needs=set(needs)), truth, plain), needs


@pytest.mark.parametrize("types", TYPES)
def test_the_rule_rejects_planted_errors(types, device):
    """2 % in the scale, one unit of sixteen missing or another expert must fail in every output that they reach."""
    case = Case(r=16, rows=37, types=types)
    t = make(case, device)
    truth = reference(case, t, (torch.float64, torch.float64))
    plain = reference(case, t, TYPES[types])
    assert not violations(run(case, t), truth, plain)
    wrong_scale = {name for name, *_ in violations(run(case, t, scale=1.75 * 1.02), truth, plain)}
    everything = {"y", "dh", "ddown", "ddown_bias", "dup", "dup_bias"}
    assert wrong_scale == everything
    other = torch.tensor([0, 1], device=device)
    assert {name for name, *_ in violations(run(case, t, expert_d=other), truth, plain)} == {"z"} | everything - {
        "dup_bias"
    }
    for planted in ({"without": 3}, {"swap": True}):
        found = {name for name, *_ in violations(reference(case, t, TYPES[types], **planted), truth, plain)}
        assert {"y", "dh", "ddown", "ddown_bias", "dup"} <= found


def test_controls_on_the_device_equal_numbers(device):
    """A tensor gives the same bits as the number, whatever the integer type, and whatever view of a table it is."""
    case = Case(groups=1, rows=19, expert_d=2, expert_u=1)
    t = make(case, device)
    expected = run(case, t)
    for integer in (torch.int32, torch.int64):
        zero_d = controls(case, device, integer)
        one_d = zero_d | {"expert_d": torch.tensor([2], dtype=integer, device=device)}
        for c in (zero_d, one_d):
            got = run(case, t, **c)
            assert all(torch.equal(expected[name], got[name]) for name in expected)
    strided = Case(rows=5, groups=4, expert_d=(2, 0, 0, 1))
    t = make(strided, device)
    table = torch.tensor([[2, 9], [0, 9], [0, 9], [1, 9]], device=device)
    expected, got = run(strided, t), run(strided, t, expert_d=table[:, 0])
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_experts_of_no_group_get_zeros(device, poisoned):
    case = Case(groups=4, expert_d=(2, 0), expert_u=(1,))
    got = run(case, make(case, device))
    for name, chosen in (("ddown", (0, 2)), ("ddown_bias", (0, 2)), ("dup", (1,)), ("dup_bias", (1,))):
        for expert in range(EXPERTS):
            assert bool(got[name][expert].any()) == (expert in chosen), (name, expert)


def test_rows_of_other_groups_are_not_read(device):
    """NaN in the rows and in the expert of one group stays there."""
    case = Case(rows=5, groups=2)
    t = make(case, device)
    expected = run(case, t)
    t["h"][5:] = t["dy"][5:] = t["down"][0] = float("nan")
    got = run(case, t)
    assert torch.equal(got["y"][:5], expected["y"][:5]) and torch.equal(got["dh"][:5], expected["dh"][:5])
    assert torch.equal(got["ddown"][2], expected["ddown"][2]) and got["y"][5:].isnan().all()


def test_activations_keep_the_digits_of_small_numbers(device):
    """Near 0, where a formula in exp alone cancels, y = act(z) has the error of fp32."""
    z = torch.cat([torch.logspace(-6, 1.2, 200), -torch.logspace(-6, 1.2, 200), torch.zeros(1)]).to(device)
    one = torch.ones(1, 1, device=device)
    for name in ("tanh", "gelu", "silu", "gelu_tanh"):
        call = BottleneckCall(z[:, None], one, None, one, None, torch.zeros_like(z)[:, None], activation=name)
        y, _ = bottleneck_fwd(call)
        exact = ACT[name](z.double())
        # x Phi(x) and x sigmoid(x) cancel far to the left in torch too.
        kept = z > -1 if name != "tanh" else torch.ones_like(z, dtype=torch.bool)
        error = ((y[:, 0] - exact).abs() / exact.abs().clamp_min(1e-30))[kept & (z != 0)]
        assert error.max() < 2e-6, name
        assert y[-1] == 0


@pytest.mark.parametrize("activation", BOTTLENECK_ACTIVATIONS)
def test_nan_and_the_kink(activation, device):
    """A NaN is not lost, and the slope at 0 is torch's."""
    one = torch.ones(1, 1, device=device)
    h = torch.tensor([[0.0], [float("nan")]], device=device, requires_grad=True)
    zeros = torch.zeros(2, 1, device=device)
    call = BottleneckCall(h.detach(), one, None, one, None, zeros, activation=activation)
    y, z = bottleneck_fwd(call)
    assert y[0] == 0 and y[1].isnan()
    dh = bottleneck_bwd(one.expand(2, 1), call, z, like=BOTTLENECK.likeness(call), needs={"h"})["h"]
    (expected,) = torch.autograd.grad(ACT[activation](h).sum(), [h])
    torch.testing.assert_close(dh, expected, equal_nan=True)
