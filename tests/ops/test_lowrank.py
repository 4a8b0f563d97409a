"""The low-rank op on the CPU: reference, PyTorch path and C++ node. Triton's kernels: tests/triton_kernels."""

import importlib

import pytest
import torch
import torch._dynamo.testing
from peft_fused.triton_kernels.lowrank_plan import LowRankProblem
from peft_fused.triton_kernels.problem import Gpu
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.flop_counter import FlopCounterMode

import peft_fused
from peft_fused.ops import (
    dispatch,
    lowrank_adapter,
    lowrank_adapter_reference,
    lowrank_linear,
    lowrank_linear_reference,
    native,
)
from peft_fused.ops.accuracy import wrong
from peft_fused.ops.cases import lowrank_cases, make_lowrank

OPS = {
    "lowrank_linear": (lowrank_linear, lowrank_linear_reference),
    "lowrank": (lowrank_adapter, lowrank_adapter_reference),
}
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
TYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]
TYPE_IDS = ["fp32", "bf16", "fp16", "bf16+fp32", "fp16+fp32"]
NODES = [
    pytest.param(True, id="cpp", marks=pytest.mark.skipif(native.module is None, reason=native.why_missing or "-")),
    pytest.param(False, id="python"),
]
both_ops = pytest.mark.parametrize("op", OPS)
both_nodes = pytest.mark.parametrize("cpp", NODES)


# ---------------------------------------------------------------------------------------------------------- reference


def test_reference_is_the_formula():
    case = make_lowrank("lowrank_linear", 5, 7, 6, 4, dtype=F64, uv=True, rank=3)
    t = case.tensors
    keep = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=F64))
    dense = t["weight"] + 2.0 * t["v"].diag() @ t["B"] @ keep @ t["u"].diag() @ t["A"]
    torch.testing.assert_close(case.call(lowrank_linear_reference), t["x"] @ dense.t() + t["bias"])


def test_frozen_trains_only_the_last_kept_rank():
    case = make_lowrank("lowrank", 9, 7, 6, 4, dtype=F64, rank=3, frozen=True)
    free = make_lowrank("lowrank", 9, 7, 6, 4, dtype=F64, rank=3)
    got = torch.autograd.grad(case.call(lowrank_adapter_reference).sum(), [case.tensors[n] for n in ("A", "B", "x")])
    want = torch.autograd.grad(free.call(lowrank_adapter_reference).sum(), [free.tensors[n] for n in ("A", "B", "x")])
    live = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=F64)
    torch.testing.assert_close(got[0], want[0] * live.unsqueeze(1))
    torch.testing.assert_close(got[1], want[1] * live)
    torch.testing.assert_close(got[2], want[2])


# --------------------------------------------------------------------------------------------- right in every dtype


@both_nodes
@both_ops
@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
def test_error_beside_the_base_product(op, types, cpp, poisoned):
    for case in lowrank_cases(op, *types, base=True):
        with peft_fused.use_backend("torch", native=cpp):
            assert not wrong(case)


@both_nodes
@pytest.mark.parametrize("types", [(F32, F32), (BF16, F32)], ids=["fp32", "bf16+fp32"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_large_enough_for_onednn_and_row_blocks(types, dropout_p, cpp, poisoned):
    """Sizes past the thresholds at which another GEMM library and the blocks of rows come in."""
    case = make_lowrank(
        "lowrank_linear", 1031, 512, 384, 16, dtype=types[0], adapter_dtype=types[1], dropout_p=dropout_p, seed=3
    )
    with peft_fused.use_backend("torch", native=cpp):
        assert not wrong(case)


@both_nodes
def test_onednn_gets_dense_weights_only(cpp):
    """Any other layout runs its reference code, thousands of times slower."""
    if not dispatch._onednn_beats_blas():
        pytest.skip("BLAS is the faster library on this CPU")
    case = make_lowrank("lowrank_linear", 128, 256, 192, 4)
    wide = torch.cat([case.tensors["weight"]] * 2, 1)
    dense, transposed, slices = case.tensors["weight"], case.tensors["weight"].t().contiguous().t(), wide[:, :256]
    results = []
    for weight, used in ((dense, True), (transposed, True), (slices, False)):
        case.tensors["weight"] = weight
        with peft_fused.use_backend("torch", native=cpp), torch.profiler.profile() as profile:
            y = case.call(lowrank_linear)
            results.append([y, *torch.autograd.grad(y.sum(), [case.tensors[n] for n in case.wrt])])
        assert (torch.ops.mkldnn._linear_pointwise.default.name() in {e.key for e in profile.key_averages()}) == used
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


# ------------------------------------------------------------------------------------- what backward keeps and repeats


@both_nodes
def test_frozen_factors_save_nothing(cpp, kept_for_backward):
    def kept(wrt, **options):
        with peft_fused.use_backend("torch", native=cpp):
            return set(kept_for_backward(make_lowrank("lowrank_linear", 50, 40, 30, 4, wrt=wrt, **options)))

    parameters, S = {"A", "B"}, "(50, 4)"
    assert kept(("x", "A", "B")) == parameters | {"x", "weight", S}
    assert kept(("x", "B")) == parameters | {"weight", S}, "a frozen A keeps no x"
    assert kept(("x", "A")) == parameters | {"weight", "x"}, "a frozen B keeps no S"
    assert kept(("A", "B")) == parameters | {"x", S}, "an x without gradient keeps no weight"
    assert kept(("B",)) == {"B", S}, "dB needs S alone"
    assert kept(("bias",)) == set() and kept(("weight",)) == {"x"}, "the base's gradients do not pass the adapter"
    with_dropout = kept(("x", "A", "B"), dropout_p=0.5)
    assert with_dropout == parameters | {"x", "weight", S, "()"}, "dropout keeps a seed, neither a mask nor a copy"


@both_nodes
@both_ops
@pytest.mark.parametrize("wrt", [("x", "A", "B"), ("A", "B"), ("B",), ("x", "weight")])
def test_operations_are_counted_as_those_of_the_formula(op, wrt, cpp):
    importlib.import_module("peft_fused.ops.flops")
    case = make_lowrank(op, 40, 30, 20, 4, wrt=[name for name in wrt if op == "lowrank_linear" or name != "weight"])

    def count(function):
        with FlopCounterMode(display=False) as counter:
            case.call(function).sum().backward()
        return counter.get_total_flops()

    with peft_fused.use_backend("torch", native=cpp):
        assert count(OPS[op][0]) == count(OPS[op][1]) > 0


@both_nodes
@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)], ids=["K = 0", "N = 0", "both"])
def test_layers_without_inputs_or_outputs(sizes, cpp):
    k, n = sizes
    shapes = dict(x=(3, 2, k), weight=(n, k), bias=(n,), A=(4, k), B=(n, 4))
    tensors = {name: torch.ones(shape, requires_grad=True) for name, shape in shapes.items()}
    with peft_fused.use_backend("torch", native=cpp):
        y = lowrank_linear(**tensors, dropout_p=0.2)
        assert torch.equal(y, torch.ones(3, 2, n))
        y.sum().backward()
    assert all(tensor.grad.shape == shapes[name] for name, tensor in tensors.items())
    assert lowrank_linear_reference(**tensors, dropout_p=0.2).shape == (3, 2, n)


# ------------------------------------------------------------------------------------------------- compile and opcheck


@pytest.mark.parametrize("uv", [False, True])
def test_inductor(uv):
    case = make_lowrank("lowrank", 24, 16, 12, 4, uv=uv)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **k: lowrank_adapter(**k) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(**case.tensors, **case.options), case.call(lowrank_adapter_reference) * 2)


# -------------------------------------------------------------------------------------------------- autocast and modes


def test_cpp_and_python_draw_the_same_dropout():
    if native.module is None:
        pytest.skip(native.why_missing)
    case = make_lowrank("lowrank", 40, 30, 20, 4, dropout_p=0.5)
    results = []
    for cpp in (True, False):
        torch.manual_seed(5)
        with peft_fused.use_backend("torch", native=cpp):
            results.append(case.call(lowrank_adapter))
    torch.testing.assert_close(*results)


# ------------------------------------------------------------------------------------------------------------ dispatch


def test_use_backend_acts_when_called():
    forced = peft_fused.use_backend("reference")
    try:
        assert dispatch.forced() == "reference"
    finally:
        forced.__exit__()
    assert dispatch.forced() is None
    with pytest.raises(ValueError, match="unknown backend 'nonsense'"):
        peft_fused.use_backend("nonsense")
    assert dispatch.forced() is None


def test_use_backend_is_undone():
    with pytest.raises(ZeroDivisionError), peft_fused.use_backend("reference"):
        assert dispatch.forced() == "reference"
        _ = 1 / 0
    assert dispatch.forced() is None


def test_explain_names_path_and_reasons():
    problem = LowRankProblem(64, 32, 32, "float32", "float32", "cpu", Gpu(), 8, False, True)
    text = str(peft_fused.explain(problem))
    assert "torch: " in text and "not triton: x is on cpu" in text and "not reference: torch comes first" in text
    with peft_fused.use_backend("reference"):
        assert "not torch: reference is forced" in str(peft_fused.explain(problem))
    with pytest.raises(TypeError, match=r"problem or a torch\.nn\.Module, got int"):
        peft_fused.explain(3)


def test_a_gpu_without_kernels_is_reported_once(caplog, monkeypatch):
    monkeypatch.setattr(dispatch, "_why_not", lambda name, *_: () if name in ("torch", "reference") else ("not here",))
    monkeypatch.setattr(dispatch, "_said", set())
    dispatch._decide.cache_clear()
    problem = LowRankProblem(64, 32, 32, "float32", "float32", "cuda", "any", 1, 8, False, True)
    assert [dispatch.decide(problem).backend for _ in range(2)] == ["torch", "torch"]
    assert [r.message for r in caplog.records if "runs on plain torch" in r.message and "not here" in r.message] == [
        caplog.records[0].message
    ]


# ----------------------------------------------------------------------------------------------------------- bad input

BAD = [
    (dict(x=torch.ones(4, 6, dtype=torch.int64)), TypeError, r"x must be floating point .*, got int64"),
    (dict(x=torch.ones(4, 7)), ValueError, r"A must have shape \[r, K\].* = \[3, 7\], got \[3, 6\]"),
    (dict(x=[1.0]), TypeError, "x must be a torch.Tensor, got list"),
    (dict(x=torch.tensor(1.0)), ValueError, r"x must have shape \[..., K\]"),
    (dict(weight=torch.ones(5, 5)), ValueError, r"weight must have shape \[N, K\] = \[5, 6\], got \[5, 5\]"),
    (dict(weight=torch.ones(5, 6, dtype=F16)), TypeError, r"weight must have x's dtype \(float32\), got float16"),
    (dict(bias=torch.ones(4)), ValueError, r"bias must have shape \[N\] = \[5\], got \[4\]"),
    (dict(A=torch.ones(6)), ValueError, r"A must have shape \[r, K\] or \[E, r, K\], got \[6\]"),
    (dict(A=torch.ones(3, 6, dtype=BF16)), TypeError, r"A must have x's dtype or float32 \(float32\), got bfloat16"),
    (
        dict(A=torch.ones(257, 6), B=torch.ones(5, 257)),
        ValueError,
        r"A must have 1 to 256 rows .* got shape \[257, 6\]",
    ),
    (dict(B=torch.ones(5, 4)), ValueError, r"B must have 3 columns \(the rank of A\), got shape \[5, 4\]"),
    (dict(u=torch.ones(2)), ValueError, r"u must have shape \[r\] = \[3\], got \[2\]"),
    (dict(v=torch.ones(5, device="meta")), ValueError, r"v must be on x's device \(cpu\), got meta"),
    (dict(A=torch.ones(3, 6).to_sparse()), ValueError, "A must be a dense"),
    (dict(x=torch.ones(4, 6).to_sparse()), ValueError, "x must be a dense"),
    (
        dict(x=torch.nested.nested_tensor([torch.ones(4, 6)] * 2)),
        ValueError,
        "x must be a dense .* got layout nested",
    ),
    (dict(A=TwoTensor(torch.ones(3, 6), torch.ones(3, 6))), TypeError, "A must be a plain tensor .* got a TwoTensor"),
    (dict(A=torch.ones(0, 3, 6)), ValueError, r"A must stack at least one expert, got shape \[0, 3, 6\]"),
    (dict(A=torch.ones(2, 3, 6), expert=(0,)), ValueError, "expert must be an index or a pair of them, got 1 values"),
    (dict(A=torch.ones(2, 3, 6), expert=(0, "1")), TypeError, r"expert \(of B\) must be an int .* got str"),
    (dict(scale=10**400), ValueError, "scale must be finite"),
    (dict(scale=torch.tensor(1j)), ValueError, "scale must be a number or a 0-d floating-point tensor"),
    (dict(dropout_p=10**400), ValueError, r"dropout_p must be in \[0, 1\)"),
    (dict(frozen="no"), TypeError, "frozen must be True or False, got str"),
    (dict(rank=0), ValueError, r"rank must be in 1..3, got 0"),
    (dict(rank=4), ValueError, r"rank must be in 1..3, got 4"),
    (dict(rank=torch.tensor(9)), ValueError, r"rank must be in 1..3, got 9"),
    (dict(rank=1.0), TypeError, r"rank must be an int or a 0-d tensor, got float"),
    (dict(rank=True), TypeError, r"rank must be an int or a 0-d tensor, got bool"),
    (dict(rank=torch.tensor([1])), ValueError, r"rank must be a number or a 0-d integer tensor, got int64 \[1\]"),
    (dict(rank=torch.tensor(1.0)), ValueError, r"rank must be a number or a 0-d integer tensor"),
    (dict(scale=float("nan")), ValueError, "scale must be finite, got nan"),
    (dict(scale="2"), TypeError, "scale must be a number or a 0-d tensor, got str"),
    (dict(scale=torch.tensor(1.0, requires_grad=True)), ValueError, "scale must not require a gradient"),
    (dict(expert=0), ValueError, "expert needs a stacked A"),
    (dict(A=torch.ones(2, 3, 6), expert=2), ValueError, r"expert \(of A\) must be in 0..1, got 2"),
    (dict(A=torch.ones(2, 3, 6), expert=(0, 0, 0)), ValueError, "expert must be an index or a pair of them, got 3"),
    (dict(dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    (dict(dropout_p=-0.1), ValueError, r"dropout_p must be in \[0, 1\), got -0.1"),
    (dict(dropout_p=None), TypeError, "dropout_p must be a number, got NoneType"),
    (dict(dropout_p=0.5, seed=1.5), TypeError, "seed must be an int, a 0-d int64 tensor or None, got float"),
    (dict(dropout_p=0.5, seed=2**63), ValueError, "seed must fit in 64 bits"),
    (
        dict(dropout_p=0.5, seed=torch.tensor(1, dtype=torch.int32)),
        ValueError,
        "seed must be a 0-d int64 tensor on cpu",
    ),
]


@both_nodes
@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[m[2][:40] for m in BAD])
def test_bad_arguments_are_named(change, kind, message, cpp):
    good = dict(x=torch.ones(4, 6), weight=torch.ones(5, 6), bias=None, A=torch.ones(3, 6), B=torch.ones(5, 3))
    with peft_fused.use_backend(None, native=cpp), pytest.raises(kind, match=message):
        lowrank_linear(**{**good, **change})


@both_nodes
def test_bad_add_is_named(cpp):
    with (
        peft_fused.use_backend(None, native=cpp),
        pytest.raises(ValueError, match=r"add must have shape .* = \[4, 5\]"),
    ):
        lowrank_adapter(torch.ones(4, 6), torch.ones(3, 6), torch.ones(5, 3), add=torch.ones(1, 5))


@pytest.mark.parametrize("native", [True, False])
def test_small_vectors_beside_fp16_factors_lose_no_digits(native):
    """v . B . u of AFLoRA's start lies below fp16's normal numbers."""
    torch.manual_seed(0)
    values = dict(
        x=torch.randn(64, 48), A=torch.randn(4, 48) / 7, B=torch.randn(40, 4) / 2, u=torch.full((4,), 0.1),
        v=torch.full((40,), 1e-4) * torch.randn(40),
    )  # fmt: skip
    dy = torch.randn(64, 40)
    found = {}
    for name, dtype, op in (
        ("truth", torch.float64, lowrank_adapter_reference), ("plain", torch.float16, lowrank_adapter_reference),
        ("ours", torch.float16, lowrank_adapter),
    ):  # fmt: skip
        leaves = {key: value.half().to(dtype).requires_grad_() for key, value in values.items()}
        with peft_fused.use_backend("torch" if name == "ours" else None, native=native):
            y = op(**leaves)
            grads = torch.autograd.grad(y, list(leaves.values()), dy.half().to(dtype))
        found[name] = {"y": y.detach(), **dict(zip(leaves, grads, strict=True))}
    for key, truth in found["truth"].items():
        plain, ours = ((found[name][key].double() - truth).norm() for name in ("plain", "ours"))
        assert ours <= 2 * plain + 1e-3 * truth.norm(), key


@both_nodes
@pytest.mark.parametrize("rank", [3, torch.tensor(3)], ids=["number", "tensor"])
def test_what_is_frozen_has_no_gradient_where_others_have_nans(rank, cpp):
    torch.manual_seed(0)
    x, A, B = torch.randn(6, 5), torch.randn(4, 5, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    x[1, 2] = float("nan")
    grads = {}
    for op, node in ((lowrank_adapter, cpp), (lowrank_adapter_reference, True)):
        with peft_fused.use_backend(None, native=node):
            grads[op] = torch.autograd.grad(op(x, A, B, rank=rank, frozen=True).sum(), (A, B))
    for ours, theirs in zip(*grads.values(), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert grads[lowrank_adapter][0].isnan().any() and not grads[lowrank_adapter][0][:2].any()
