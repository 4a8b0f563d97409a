"""The bottleneck op on the CPU: reference, PyTorch path and C++ node. Triton's kernels: tests/triton_kernels."""

import importlib

import pytest
import torch
import torch._dynamo.testing
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

import peft_fused
from peft_fused.ops import bottleneck_adapter, bottleneck_adapter_reference, common, dispatch, native
from peft_fused.ops.accuracy import wrong
from peft_fused.ops.bottleneck import BOTTLENECK, BOTTLENECK_ACTIVATIONS, BottleneckCall, bottleneck_problem
from peft_fused.ops.cases import bottleneck_cases, make_bottleneck

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
TYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]
TYPE_IDS = ["fp32", "bf16", "fp16", "bf16+fp32", "fp16+fp32"]
NODES = [
    pytest.param(True, id="cpp", marks=pytest.mark.skipif(native.module is None, reason=native.why_missing or "-")),
    pytest.param(False, id="python"),
]
both_nodes = pytest.mark.parametrize("cpp", NODES)
# (stacks of down and up, expert): every form of an index, with an expert that nothing takes wherever there are three.
FORMS = {
    "plain": ((None, None), None),
    "default": ((3, 3), None),
    "number": ((3, 3), 2),
    "0-d": ((3, 3), torch.tensor(1)),
    "pair": ((3, 2), (torch.tensor(2, dtype=torch.int32), 1)),
    "down alone": ((3, None), torch.tensor([2, 0])),
    "up alone": ((None, 3), (0, torch.tensor([1, 1, 0]))),
    "groups": ((3, 3), torch.tensor([2, 0, 0, 2, 2, 0])),
    "two numbers of groups": ((3, 3), (torch.tensor([2, 0]), torch.tensor([1, 0, 1]))),
    "groups and one": ((3, 3), (torch.tensor([2, 0]), torch.tensor(1))),
}
every_form = pytest.mark.parametrize("form", FORMS)
every_activation = pytest.mark.parametrize("activation", BOTTLENECK_ACTIVATIONS)


def leaves(case):
    return [case.tensors[name] for name in case.wrt]


def call_of(function, case):
    """function of the case's leaves alone."""
    return lambda *tensors: function(**{**case.tensors, **dict(zip(case.wrt, tensors, strict=True))}, **case.options)


def form_case(form, m=12, k=5, n=5, r=3, **more):
    experts, expert = FORMS[form]
    return make_bottleneck(m, k, n, r, experts=experts, expert=expert, **more)


# ---------------------------------------------------------------------------------------------------------- reference


def by_rows(h, down, down_bias, up, up_bias, act, residual, scale, experts_d, experts_u):
    """The formula, one row after the other; experts: the index of every row."""
    out = []
    for t, (i, j) in enumerate(zip(experts_d, experts_u, strict=True)):
        D, b = (p if p.dim() == dims else p[i] for p, dims in ((down, 2), (down_bias, 1)))
        U, c = (p if p.dim() == dims else p[j] for p, dims in ((up, 2), (up_bias, 1)))
        out.append(residual[t] + scale * (U @ act(D @ h[t] + b) + c))
    return torch.stack(out)


def expanded(index, rows):
    """The index of every row."""
    if index is None or isinstance(index, int):
        return [index or 0] * rows
    flat = index.reshape(-1)
    return [int(flat[t * len(flat) // rows]) for t in range(rows)]


@every_form
@pytest.mark.parametrize("residual", ["h", "other"])
def test_reference_is_the_formula_row_by_row(form, residual):
    case = form_case(form, dtype=F64, residual=residual, activation="gelu")
    t, expert = case.tensors, case.options["expert"]
    pair = expert if isinstance(expert, tuple) else (expert, expert)
    act = lambda z: z * 0.5 * (1 + torch.erf(z / 2**0.5))  # noqa: E731
    start = t["h"] if residual == "h" else t["residual"]
    parameters = (t["down"], t["down_bias"], t["up"], t["up_bias"])
    want = by_rows(t["h"], *parameters, act, start, 2.0, *(expanded(e, 12) for e in pair))
    torch.testing.assert_close(case.call(bottleneck_adapter_reference), want)


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        ("gelu_tanh", lambda z: 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))),
        ("relu", lambda z: z.clamp(min=0)),
        ("silu", lambda z: z / (1 + torch.exp(-z))),
        ("swish", lambda z: z / (1 + torch.exp(-z))),
        ("tanh", lambda z: (1 - torch.exp(-2 * z)) / (1 + torch.exp(-2 * z))),
        ("identity", lambda z: z),
    ],
)
def test_activations_are_their_formulas(activation, formula):
    case = make_bottleneck(9, 5, 4, 3, dtype=F64, activation=activation)
    t = case.tensors
    a = formula(t["h"] @ t["down"].mT + t["down_bias"])
    torch.testing.assert_close(case.call(bottleneck_adapter_reference), 2.0 * (a @ t["up"].mT + t["up_bias"]))


@pytest.mark.parametrize(
    "function", [bottleneck_adapter_reference, "cpp", "python"], ids=["reference", "cpp", "python"]
)
@every_form
@every_activation
def test_gradcheck(activation, form, function):
    case = form_case(form, dtype=F64, residual="h" if form == "groups" else "other", activation=activation)
    if isinstance(function, str):
        if function == "cpp" and native.module is None:
            pytest.skip(native.why_missing)
        with peft_fused.use_backend("torch", native=function == "cpp"):
            assert torch.autograd.gradcheck(call_of(bottleneck_adapter, case), leaves(case), fast_mode=True)
    else:
        assert torch.autograd.gradcheck(call_of(function, case), leaves(case), fast_mode=True)


@both_nodes
def test_relu_has_no_slope_at_zero(cpp):
    h = torch.zeros(2, 3, requires_grad=True)
    with peft_fused.use_backend("torch", native=cpp):
        y = bottleneck_adapter(h, torch.ones(1, 3), None, torch.ones(3, 1), None, "relu")
    y.sum().backward()
    assert torch.equal(h.grad, torch.ones(2, 3))


# --------------------------------------------------------------------------------------------- right in every dtype


@pytest.mark.skipif(native.module is None, reason=native.why_missing or "-")
@pytest.mark.parametrize("types", [*TYPES, (F64, F64)], ids=[*TYPE_IDS, "fp64"])
def test_the_cpp_node_takes_every_case(types):
    """Otherwise what is called its test would be Python's."""
    for case in bottleneck_cases("bottleneck", *types):
        t, o = case.tensors, {"activation": "gelu", "expert": None, **case.options}
        parameters = (t["down"], t["down_bias"], t["up"], t["up_bias"])
        arguments = (t["h"], *parameters, t["residual"], o["activation"], o["scale"], o["expert"])
        BOTTLENECK(*arguments)
        assert native.module.bottleneck(BOTTLENECK.decisions, *arguments).grad_fn is not None, case.name


@both_nodes
@pytest.mark.parametrize("types", [(F32, F32), (BF16, F32)], ids=["fp32", "bf16+fp32"])
@pytest.mark.parametrize("expert", [None, torch.tensor([1, 0, 0, 2, 1])], ids=["one", "groups"])
def test_large_enough_for_onednn_and_row_blocks(types, expert, cpp, poisoned):
    experts = (None, None) if expert is None else (3, 3)
    case = make_bottleneck(
        2100, 640, 512, 24, dtype=types[0], adapter_dtype=types[1], experts=experts, expert=expert, residual="other"
    )
    with peft_fused.use_backend("torch", native=cpp):
        assert not wrong(case)


@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
@every_form
@pytest.mark.parametrize("block", [None, 40])
def test_indices_that_stay_on_a_device(types, form, block, monkeypatch, poisoned):
    """What the composition does where indices and scale may not be read, without the device."""
    monkeypatch.setattr(BottleneckCall, "on_host", lambda self: self)
    if block is not None:
        monkeypatch.setitem(common.BLOCK_ELEMENTS, "cpu", block)
    scale = torch.tensor(2.0)
    for residual in ("h", "zeros"):
        case = form_case(form, 48, 20, 20, 6, dtype=types[0], adapter_dtype=types[1], residual=residual, scale=scale)
        with peft_fused.use_backend("torch", native=False):
            assert not wrong(case)


@both_nodes
@pytest.mark.parametrize("form", ["groups", "two numbers of groups"])
def test_a_route_is_the_same_as_one_call_per_group(form, cpp):
    case = form_case(form, dtype=F64, residual="h")
    expert = case.options["expert"]
    pair = expert if isinstance(expert, tuple) else (expert, expert)
    of_rows = [expanded(e, 12) for e in pair]
    with peft_fused.use_backend("torch", native=cpp):
        y = case.call(bottleneck_adapter)
        for i in range(12):
            one = {**case.tensors, "h": case.tensors["h"][i : i + 1]}
            alone = bottleneck_adapter(**one, scale=2.0, expert=(of_rows[0][i], of_rows[1][i]))
            torch.testing.assert_close(y[i : i + 1], alone)


# ------------------------------------------------------------------------------------- what backward keeps and repeats


@both_nodes
def test_frozen_parameters_save_nothing(cpp, kept_for_backward):
    def kept(wrt, **options):
        with peft_fused.use_backend("torch", native=cpp):
            return kept_for_backward(make_bottleneck(50, 40, 30, 4, wrt=wrt, **options))

    z = str((50, 4))
    assert kept(BOTTLENECK.own) == sorted(["h", "down", "up", z])
    assert kept(BOTTLENECK.own[1:]) == sorted(["h", "up", z]), "an h without gradient keeps no down"
    assert kept(("h", "up")) == sorted(["down", "up", z]), "a frozen down keeps no h"
    assert kept(("down",)) == kept(("down", "down_bias")) == sorted(["h", "up", z])
    assert kept(("down_bias",)) == sorted(["up", z])
    assert kept(("up",)) == kept(("up", "up_bias")) == [z], "dU needs z alone"
    assert kept(("up_bias",)) == kept(("residual",)) == kept(()) == []
    assert kept(("h", "down"), activation="identity") == sorted(["h", "down", "up"]), "a line's slope needs no z"
    assert kept(("up",), activation="identity") == [z]


@both_nodes
def test_a_scale_beyond_the_range_of_fp16_overflows_as_in_the_reference(cpp):
    case = make_bottleneck(7, 12, 10, 4, dtype=torch.float16, scale=1e30)
    with peft_fused.use_backend("torch", native=cpp):
        got, want = case.call(bottleneck_adapter), case.call(bottleneck_adapter_reference)
    assert torch.isinf(want).any() and torch.equal(got.isinf(), want.isinf())


@both_nodes
@pytest.mark.parametrize(
    "wrt", [BOTTLENECK.own, BOTTLENECK.own[1:], ("h", "up"), ("down_bias",), ("up",), ("up_bias",)]
)
def test_operations_are_counted_as_those_of_the_formula(wrt, cpp):
    importlib.import_module("peft_fused.ops.flops")
    case = make_bottleneck(40, 30, 20, 4, wrt=wrt)

    def count(function):
        with FlopCounterMode(display=False) as counter:
            case.call(function).sum().backward()
        return counter.get_total_flops()

    with peft_fused.use_backend("torch", native=cpp):
        assert count(bottleneck_adapter) == count(bottleneck_adapter_reference) > 0


@both_nodes
@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)], ids=["K = 0", "N = 0", "both"])
def test_layers_without_inputs_or_outputs(sizes, cpp):
    k, n = sizes
    shapes = dict(h=(3, 2, k), down=(4, k), down_bias=(4,), up=(n, 4), up_bias=(n,), residual=(3, 2, n))
    tensors = {name: torch.ones(shape, requires_grad=True) for name, shape in shapes.items()}
    with peft_fused.use_backend("torch", native=cpp):
        y = bottleneck_adapter(**tensors, activation="relu")
        assert torch.equal(y, torch.full((3, 2, n), 6.0))
        y.sum().backward()
    assert all(tensor.grad.shape == shapes[name] for name, tensor in tensors.items())


# ------------------------------------------------------------------------------------------------- compile and opcheck


def test_inductor():
    case = form_case("groups", residual="h")
    torch._dynamo.reset()
    compiled = torch.compile(lambda **k: bottleneck_adapter(**k) * 2, fullgraph=True)
    got = torch.autograd.grad(compiled(**case.tensors, **case.options).sum(), leaves(case))
    want = torch.autograd.grad(case.call(bottleneck_adapter_reference).sum() * 2, leaves(case))
    torch.testing.assert_close(got, want)


# -------------------------------------------------------------------------------------------------- autocast and modes


@both_nodes
@pytest.mark.parametrize("scale", [1e-3, 300.0])
def test_the_scale_does_not_leave_the_range_of_half_units(scale, cpp):
    """Units that are scaled in fp16 lose their digits below 6e-5 and overflow above 65504."""
    case = make_bottleneck(40, 30, 20, 4, dtype=F16, scale=scale, activation="relu", bias=False)
    case.tensors["down"] = case.tensors["down"].detach() * (500.0 if scale > 1 else 0.01)
    case.tensors["up"] = case.tensors["up"].detach() * (1e-3 if scale > 1 else 500.0)
    part = case.tensors | {"h": case.tensors["h"].detach()}
    with peft_fused.use_backend("torch", native=cpp):
        y = bottleneck_adapter(**part, **case.options)
    truth = bottleneck_adapter_reference(
        **{n: None if t is None else t.double() for n, t in part.items()}, **case.options
    )
    assert (y.double() - truth).norm() / truth.norm() < 2e-3


# ------------------------------------------------------------------------------------------------------------ dispatch


def test_the_problem_of_a_call():
    case = form_case("two numbers of groups")
    t = case.tensors
    problem = bottleneck_problem(t["h"], t["down"], t["up"], "relu", case.options["expert"])
    assert (problem.m, problem.n, problem.k, problem.r, problem.groups) == (12, 5, 5, 3, 6)
    assert bottleneck_problem(t["h"], t["down"][0], t["up"][0], "relu", case.options["expert"]).groups == 1
    assert "torch: " in str(peft_fused.explain(problem))


# ----------------------------------------------------------------------------------------------------------- bad input

STACKS = dict(down=torch.ones(2, 3, 6), down_bias=torch.ones(2, 3))
BAD = [
    (dict(h=[1.0]), TypeError, "h must be a torch.Tensor, got list"),
    (dict(h=torch.ones(4, 6, dtype=torch.int64)), TypeError, r"h must be floating point .*, got int64"),
    (dict(h=torch.tensor(1.0)), ValueError, r"h must have shape \[..., K\]"),
    (dict(h=torch.ones(4, 7)), ValueError, r"down must have shape \[r, K\].* = \[3, 7\], got \[3, 6\]"),
    (dict(h=torch.ones(4, 6).to_sparse()), ValueError, "h must be a dense"),
    (dict(down=None), TypeError, "down must be a torch.Tensor, got NoneType"),
    (dict(down=torch.ones(6)), ValueError, r"down must have shape \[r, K\] or \[E, r, K\], got \[6\]"),
    (dict(down=torch.ones(0, 3, 6)), ValueError, r"down must stack at least one expert, got shape \[0, 3, 6\]"),
    (dict(down=torch.ones(257, 6)), ValueError, r"down must have 1 to 256 rows .* got shape \[257, 6\]"),
    (
        dict(down=torch.ones(3, 6, dtype=BF16)),
        TypeError,
        r"down must have h's dtype or float32 \(float32\), got bfloat",
    ),
    (dict(down=TwoTensor(torch.ones(3, 6), torch.ones(3, 6))), TypeError, "down must be a plain tensor .* TwoTensor"),
    (dict(up=torch.ones(5, 4)), ValueError, r"up must have 3 columns \(the units of down\), got shape \[5, 4\]"),
    (dict(up=torch.ones(5)), ValueError, r"up must have shape \[N, r\] or \[E, N, r\], got \[5\]"),
    (dict(up=torch.ones(5, 3, device="meta")), ValueError, r"up must be on h's device \(cpu\), got meta"),
    (dict(down_bias=torch.ones(4)), ValueError, r"down_bias must have shape .* = \[3\], got \[4\]"),
    (dict(down_bias=0.0), TypeError, "down_bias must be a torch.Tensor or None, got float"),
    (dict(down=STACKS["down"]), ValueError, r"down_bias must have shape .* = \[2, 3\], got \[3\]"),
    (dict(up_bias=torch.ones(1, 5)), ValueError, r"up_bias must have shape .* = \[5\], got \[1, 5\]"),
    (dict(up_bias=torch.ones(5, dtype=F16)), TypeError, r"up_bias must have down's dtype \(float32\), got float16"),
    (dict(residual=torch.ones(5)), ValueError, r"residual must have shape \[..., N\] = \[4, 5\], got \[5\]"),
    (dict(residual=torch.ones(4, 5, dtype=F16)), TypeError, r"residual must have h's dtype \(float32\), got float16"),
    (
        dict(residual=None),
        ValueError,
        r"residual must be given where up has other rows \(5\) than h has features \(6\)",
    ),
    (dict(activation="gelu_new"), ValueError, "activation must be one of gelu, .* identity, got 'gelu_new'"),
    (dict(activation=torch.relu), TypeError, "activation must be a name, got builtin_function_or_method"),
    (dict(scale="2"), TypeError, "scale must be a number or a 0-d tensor, got str"),
    (dict(scale=float("nan")), ValueError, "scale must be finite, got nan"),
    (dict(scale=torch.tensor(1.0, requires_grad=True)), ValueError, "scale must not require a gradient"),
    (dict(scale=torch.ones(2)), ValueError, "scale must be a number or a 0-d floating-point tensor"),
    (dict(scale=torch.tensor(1.0, device="meta")), ValueError, r"scale must be on h's device \(cpu\), got meta"),
    (dict(**STACKS, expert=2), ValueError, r"expert \(of down\) must be in 0..1, got 2"),
    (dict(**STACKS, expert=-1), ValueError, r"expert \(of down\) must be in 0..1, got -1"),
    (dict(**STACKS, expert=True), TypeError, r"expert \(of down\) must be an int .* got bool"),
    (dict(**STACKS, expert=(0,)), ValueError, "expert must be an index or a pair of them, got 1 values"),
    (dict(**STACKS, expert=torch.tensor(2)), ValueError, r"expert \(of down\) must be in 0..1, got 2"),
    (dict(**STACKS, expert=torch.tensor([0, 2])), ValueError, r"expert \(of down\) must be in 0..1, got 2"),
    (dict(**STACKS, expert=torch.tensor([-1, 0])), ValueError, r"expert \(of down\) must be in 0..1, got -1"),
    (dict(**STACKS, expert=torch.tensor([0.0, 1.0])), ValueError, r"expert \(of down\) must hold integers"),
    (dict(**STACKS, expert=torch.tensor([True, False])), ValueError, r"expert \(of down\) must hold integers"),
    (dict(**STACKS, expert=torch.tensor([0, 1, 0])), ValueError, "groups that divides h's 4 rows, got 3"),
    (dict(**STACKS, expert=torch.zeros(0, dtype=torch.int64)), ValueError, "groups that divides h's 4 rows, got 0"),
    (dict(**STACKS, expert=torch.tensor([[0, 1]])), ValueError, r"must be a number, a 0-d tensor or one \[G\]"),
    (dict(**STACKS, expert=torch.tensor(0, device="meta")), ValueError, r"expert \(of down\) must be on h's device"),
    (dict(**STACKS, expert=(0, "1")), TypeError, r"expert \(of up\) must be an int .* got str"),
]


@both_nodes
@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[m[2][:40] for m in BAD])
def test_bad_arguments_are_named(change, kind, message, cpp):
    good = dict(
        h=torch.ones(4, 6), down=torch.ones(3, 6), down_bias=torch.ones(3), up=torch.ones(5, 3), up_bias=torch.ones(5),
        residual=torch.ones(4, 5),
    )  # fmt: skip
    with peft_fused.use_backend(None, native=cpp):
        bottleneck_adapter(**good)
        with pytest.raises(kind, match=message):
            bottleneck_adapter(**{**good, **change})


def test_an_index_of_a_parameter_that_is_no_stack_is_not_used():
    tensors = (torch.ones(4, 6), torch.ones(3, 6), None, torch.ones(6, 3), None)
    assert torch.equal(bottleneck_adapter(*tensors, expert=7), bottleneck_adapter(*tensors))


def test_both_nodes_agree():
    if native.module is None:
        pytest.skip(native.why_missing)
    assert dispatch.state.keys
    case = form_case("groups", dtype=F64, residual="h")
    results = []
    for cpp in (True, False):
        with peft_fused.use_backend("torch", native=cpp):
            y = case.call(bottleneck_adapter)
            results.append((type(y.grad_fn).__name__, [y, *torch.autograd.grad(y.sum(), leaves(case))]))
    assert results[0][0] != results[1][0], "two nodes"
    torch.testing.assert_close(results[0][1], results[1][1])
