"""The low-rank op on the CPU: reference, PyTorch path and C++ node. Triton's kernels: tests/triton_kernels."""

import functools
import importlib
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from peft_fused.triton_kernels.lowrank_plan import LowRankProblem
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
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
from peft_fused.ops.accuracy import compare, compare_mutated
from peft_fused.ops.cases import lowrank_cases, make_case

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


def failures(verdicts):
    return [f"{v.name}: {v.ratio:.2f} of what is allowed" for v in verdicts if not v.ok]


# ---------------------------------------------------------------------------------------------------------- reference


@both_ops
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rank": 2},
        {"experts": (2, 3), "expert": (1, 0)},
        {"experts": (None, 3), "expert": 2},
        {"dropout_p": 0.4, "seed": 5},
    ],
    ids=str,
)
def test_reference_gradcheck(op, options):
    wrt = ("x", "A", "B", "u", "v", *(("weight", "bias") if op == "lowrank_linear" else ("add",)))
    case = make_case(op, 3, 5, 4, 3, dtype=F64, uv=True, wrt=wrt, **options)
    names = list(case.wrt)

    def function(*tensors):
        return OPS[op][1](**{**case.tensors, **dict(zip(names, tensors, strict=True))}, **case.options)

    assert torch.autograd.gradcheck(function, [case.tensors[name] for name in names])


def test_reference_is_the_formula():
    case = make_case("lowrank_linear", 5, 7, 6, 4, dtype=F64, uv=True, rank=3)
    t = case.tensors
    keep = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=F64))
    dense = t["weight"] + 2.0 * t["v"].diag() @ t["B"] @ keep @ t["u"].diag() @ t["A"]
    torch.testing.assert_close(case.call(lowrank_linear_reference), t["x"] @ dense.t() + t["bias"])


def test_frozen_trains_only_the_last_kept_rank():
    case = make_case("lowrank", 9, 7, 6, 4, dtype=F64, rank=3, frozen=True)
    free = make_case("lowrank", 9, 7, 6, 4, dtype=F64, rank=3)
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
def test_error_is_at_most_twice_pytorchs(op, types, cpp, poisoned):
    function, reference = OPS[op]
    for base in (False, True):
        for case in lowrank_cases(op, *types, base=base):
            with peft_fused.use_backend("torch", native=cpp):
                assert not failures(compare(function, reference, case)), case.name


@both_nodes
@both_ops
@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
def test_defects_do_not_pass(op, types, cpp):
    function, reference = OPS[op]
    seen = set()
    for case in lowrank_cases(op, *types):
        with peft_fused.use_backend("torch", native=cpp):
            for defect, verdicts in compare_mutated(function, reference, case).items():
                seen.add(defect)
                assert not verdicts[0].ok, f"{defect} passed on {case.name}"
    assert seen == {"scale x 1.02", "one rank dropped"}


@both_nodes
@pytest.mark.parametrize("types", [(F32, F32), (BF16, F32)], ids=["fp32", "bf16+fp32"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_large_enough_for_onednn_and_row_blocks(types, dropout_p, cpp, poisoned):
    """Sizes past the thresholds at which another GEMM library and the blocks of rows come in."""
    case = make_case(
        "lowrank_linear", 1031, 512, 384, 16, dtype=types[0], adapter_dtype=types[1], dropout_p=dropout_p, seed=3
    )
    with peft_fused.use_backend("torch", native=cpp):
        assert not failures(compare(lowrank_linear, lowrank_linear_reference, case))


@both_nodes
def test_onednn_gets_dense_weights_only(cpp):
    """Any other layout runs its reference code, thousands of times slower."""
    if not dispatch._onednn_beats_blas():
        pytest.skip("BLAS is the faster library on this CPU")
    case = make_case("lowrank_linear", 128, 256, 192, 4)
    wide = torch.cat([case.tensors["weight"]] * 2, 1)
    dense, transposed, slices = case.tensors["weight"], case.tensors["weight"].t().contiguous().t(), wide[:, :256]
    results = []
    for weight, used in ((dense, True), (transposed, True), (slices, False)):
        case.tensors["weight"] = weight
        with peft_fused.use_backend("torch", native=cpp), torch.profiler.profile() as profile:
            y = case.call(lowrank_linear)
            results.append([y, *torch.autograd.grad(y.sum(), [case.tensors[n] for n in case.wrt])])
        assert any("_linear_pointwise" in event.key for event in profile.key_averages()) == used
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@both_nodes
@pytest.mark.parametrize("wrt", [(n,) for n in ("x", "weight", "bias", "A", "B", "u", "v")] + [("x", "B"), ("A", "v")])
def test_any_subset_may_be_frozen(wrt, cpp, poisoned):
    every = ("x", "weight", "bias", "A", "B", "u", "v")
    full = make_case("lowrank_linear", 13, 11, 9, 4, dtype=F64, uv=True, wrt=every)
    part = make_case("lowrank_linear", 13, 11, 9, 4, dtype=F64, uv=True, wrt=wrt)
    dy = torch.randn(13, 9, dtype=F64)
    want = torch.autograd.grad(full.call(lowrank_linear_reference), [full.tensors[n] for n in wrt], dy)
    with peft_fused.use_backend("torch", native=cpp):
        part.call(lowrank_linear).backward(dy)
    for name, grad in zip(wrt, want, strict=True):
        torch.testing.assert_close(part.tensors[name].grad, grad)
    assert all(part.tensors[n].grad is None for n in every if n not in wrt)


@both_nodes
@pytest.mark.parametrize("shape", [(0,), (2, 0), (7,), (2, 3), (1, 2, 3)], ids=str)
def test_leading_dimensions_and_no_tokens(shape, cpp):
    case = make_case("lowrank_linear", 1, 6, 5, 2, dtype=F64)
    x = torch.randn(*shape, 6, dtype=F64, requires_grad=True)
    options = {**case.tensors, "x": x, **case.options}
    with peft_fused.use_backend("torch", native=cpp):
        y = lowrank_linear(**options)
    assert y.shape == (*shape, 5)
    y.sum().backward()
    want = torch.autograd.grad(lowrank_linear_reference(**options).sum(), [x, case.tensors["B"]])
    torch.testing.assert_close(x.grad, want[0])
    torch.testing.assert_close(case.tensors["B"].grad, want[1])


@both_nodes
@pytest.mark.parametrize("odd", ["A", "B", "u", "v"])
def test_no_tokens_give_no_gradient_whatever_the_factors_hold(odd, cpp):
    case = make_case("lowrank_linear", 0, 12, 10, 4, uv=True)
    with torch.no_grad():
        case.tensors[odd].fill_(float("inf"))
    for tensor in case.tensors.values():
        tensor.requires_grad_()
    with peft_fused.use_backend("torch", native=cpp):
        case.call(lowrank_linear).sum().backward()
    for name, tensor in case.tensors.items():
        assert torch.equal(tensor.grad, torch.zeros_like(tensor)), name


@both_nodes
def test_one_row_as_a_vector(cpp):
    case = make_case("lowrank_linear", 1, 6, 5, 2, dtype=F64)
    options = {**case.tensors, "x": torch.randn(6, dtype=F64), **case.options}
    with peft_fused.use_backend("torch", native=cpp):
        torch.testing.assert_close(lowrank_linear(**options), lowrank_linear_reference(**options))


@both_nodes
def test_strides_of_any_kind(cpp):
    """A transposed weight (GPT-2's Conv1D), a permuted x, a column-major A, an expanded gradient."""
    base = torch.randn(8, 6, dtype=F64)
    x = torch.randn(8, 3, 4, dtype=F64).permute(2, 1, 0).requires_grad_()
    A = torch.randn(8, 2, dtype=F64).t().requires_grad_()
    B = torch.randn(6, 2, dtype=F64, requires_grad=True)
    grads = []
    for function in (lowrank_linear, lowrank_linear_reference):
        with peft_fused.use_backend("torch", native=cpp):
            y = function(x, base.t(), None, A, B)
        grads.append(torch.autograd.grad(y.sum(), [x, A, B]))
    torch.testing.assert_close(grads[0], grads[1])


@both_nodes
def test_inputs_and_outputs_keep_to_themselves(cpp):
    """Neither inputs nor saved tensors are written to, and the output may be changed in place by the next layer."""
    case = make_case("lowrank", 8, 6, 5, 3)
    before = {name: t.detach().clone() for name, t in case.tensors.items() if t is not None}
    with peft_fused.use_backend("torch", native=cpp):
        y = case.call(lowrank_adapter)
    y.add_(1.0)
    y.sum().backward()
    for name, value in before.items():
        assert torch.equal(case.tensors[name], value), name


# ------------------------------------------------------------------------------------- what backward keeps and repeats


def saved_tensors(function):
    """Tensors that autograd keeps for the backward of function()."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        function()
    return kept


@both_nodes
def test_frozen_factors_save_nothing(cpp):
    def kept(wrt, **options):
        case = make_case("lowrank_linear", 50, 40, 30, 4, wrt=wrt, **options)
        with peft_fused.use_backend("torch", native=cpp):
            tensors = saved_tensors(lambda: case.call(lowrank_linear))
        known = {t.data_ptr(): name for name, t in case.tensors.items() if t is not None}
        return {known.get(t.data_ptr(), tuple(t.shape)) for t in tensors}

    parameters = {"A", "B"}
    assert kept(("x", "A", "B")) == parameters | {"x", "weight", (50, 4)}
    assert kept(("x", "B")) == parameters | {"weight", (50, 4)}, "a frozen A keeps no x"
    assert kept(("x", "A")) == parameters | {"weight", "x"}, "a frozen B keeps no S"
    assert kept(("A", "B")) == parameters | {"x", (50, 4)}, "an x without gradient keeps no weight"
    assert kept(("B",)) == {"B", (50, 4)}, "dB needs S alone"
    assert kept(("bias",)) == set() and kept(("weight",)) == {"x"}, "the base's gradients do not pass the adapter"
    with_dropout = kept(("x", "A", "B"), dropout_p=0.5)
    assert with_dropout == parameters | {"x", "weight", (50, 4), ()}, "dropout keeps a seed, neither a mask nor a copy"


@both_nodes
def test_two_runs_are_bitwise_equal(cpp):
    def run():
        torch.manual_seed(3)
        case = make_case("lowrank_linear", 700, 600, 500, 16, dropout_p=0.1)
        with peft_fused.use_backend("torch", native=cpp):
            y = case.call(lowrank_linear)
        return [y, *torch.autograd.grad(y, [case.tensors[n] for n in case.wrt], torch.ones_like(y))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@both_nodes
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_plain_gradients(use_reentrant, cpp):
    """Dropout draws its seed from torch's generator, which both kinds of checkpointing replay."""
    case = make_case("lowrank_linear", 40, 30, 20, 4, dropout_p=0.5, rank=torch.tensor(3))

    def run(wrapped):
        torch.manual_seed(11)
        with peft_fused.use_backend("torch", native=cpp):
            y = wrapped(lambda x: lowrank_linear(**{**case.tensors, "x": x}, **case.options), case.tensors["x"])
            y.square().sum().backward()
        grads = [case.tensors[n].grad for n in case.wrt]
        for name in case.wrt:
            case.tensors[name].grad = None
        return grads

    plain = run(lambda function, x: function(x))
    for got, want in zip(run(lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant)), plain, strict=True):
        assert torch.equal(got, want)


@both_nodes
def test_a_control_changed_before_backward_is_no_silent_error(cpp):
    """A rank tensor read again in backward must be the one of the forward, or autograd must object."""
    rank = torch.tensor(4)
    case = make_case("lowrank", 20, 12, 10, 4, rank=rank)
    with peft_fused.use_backend("torch", native=cpp):
        y = case.call(lowrank_adapter)
        want = torch.autograd.grad(y.sum(), [case.tensors["A"]], retain_graph=True)[0]
        rank.fill_(1)
        try:
            got = torch.autograd.grad(y.sum(), [case.tensors["A"]])[0]
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            assert torch.equal(got, want)


@both_nodes
def test_no_second_derivative_without_saying_so(cpp):
    case = make_case("lowrank", 4, 3, 2, 1)
    with peft_fused.use_backend("torch", native=cpp), pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(case.call(lowrank_adapter).sum(), [case.tensors["x"]], create_graph=True)


@both_nodes
@pytest.mark.parametrize("saved", ["mm", "lowrank_fwd", "nothing"])
@pytest.mark.parametrize("types", [(F32, F32), (BF16, F32)], ids=["fp32", "bf16+fp32"])
def test_selective_checkpointing_gives_the_plain_gradients(types, saved, cpp):
    """Whatever the policy keeps: it sees the op as one operation, none of whose intermediate results it could keep."""

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if saved in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    case = make_case("lowrank_linear", 40, 30, 20, 4, dtype=types[0], adapter_dtype=types[1], dropout_p=0.3, seed=1)
    leaves = [case.tensors[name] for name in case.wrt]
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    block = lambda x: lowrank_linear(**{**case.tensors, "x": x}, **case.options).sin()  # noqa: E731
    with peft_fused.use_backend("torch", native=cpp):
        plain = torch.autograd.grad(block(case.tensors["x"]).sum(), leaves)
        y = checkpoint(block, case.tensors["x"], use_reentrant=False, context_fn=contexts)
        for got, want in zip(torch.autograd.grad(y.sum(), leaves), plain, strict=True):
            assert (got - want).abs().max() <= 0.01 * want.abs().max()  # two nodes, two orders of rounding


@both_nodes
@both_ops
@pytest.mark.parametrize("wrt", [("x", "A", "B"), ("A", "B"), ("B",), ("x", "weight")])
def test_operations_are_counted_as_those_of_the_formula(op, wrt, cpp):
    importlib.import_module("peft_fused.ops.flops")
    case = make_case(op, 40, 30, 20, 4, wrt=[name for name in wrt if op == "lowrank_linear" or name != "weight"])

    def count(function):
        with FlopCounterMode(display=False) as counter:
            case.call(function).sum().backward()
        return counter.get_total_flops()

    with peft_fused.use_backend("torch", native=cpp):
        assert count(OPS[op][0]) == count(OPS[op][1]) > 0


def test_the_op_runs_without_importing_triton():
    """On the CPU, without PEFT, whose transformers import it."""
    code = (
        "import importlib.util, sys, torch; found = importlib.util.find_spec;"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'peft' else found(name, package);"
        "import peft_fused; peft_fused.ops.lowrank_adapter(torch.ones(2, 3), torch.ones(1, 3), torch.ones(4, 1));"
        "assert not {'peft', 'transformers', 'triton'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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


@both_nodes
def test_meta_tensors_have_the_shape_alone(cpp):
    case = make_case("lowrank_linear", 6, 5, 4, 3)
    tensors = {name: t.detach().to("meta") for name, t in case.tensors.items() if t is not None}
    with peft_fused.use_backend(None, native=cpp):
        y = lowrank_linear(**tensors)
    assert (y.shape, y.device.type) == ((6, 4), "meta")


# ------------------------------------------------------------------------------------------------- compile and opcheck


def test_compile_is_one_graph_and_ranks_do_not_recompile():
    rank, scale = torch.tensor(4), torch.tensor(2.0)
    case = make_case("lowrank_linear", 24, 16, 12, 4, rank=rank)
    case.options["scale"] = scale
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda **k: lowrank_linear(**k), backend=counter, fullgraph=True)
    for b in (4, 1, 3, 2):
        rank.fill_(b)
        scale.fill_(8.0 / b)
        leaves = [case.tensors[n] for n in case.wrt]
        got = torch.autograd.grad(compiled(**case.tensors, **case.options).square().sum(), leaves)
        want = torch.autograd.grad(case.call(lowrank_linear_reference).square().sum(), leaves)
        for a, c in zip(got, want, strict=True):
            torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_compile_takes_any_number_of_rows_and_any_scale():
    case = make_case("lowrank_linear", 24, 16, 12, 4)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda **k: lowrank_linear(**k), backend=counter, fullgraph=True)
    for rows in range(3, 20):
        tensors = {**case.tensors, "x": case.tensors["x"].detach()[:1].expand(rows, -1)}
        torch.testing.assert_close(compiled(**tensors), lowrank_linear(**tensors))
    assert counter.frame_count == 2, "one for the first number of rows, one for all others"
    torch._dynamo.reset()
    for dynamic in (None, True):
        compiled = torch.compile(lambda **k: lowrank_linear(**k), backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for scale in (0.5, 0.7, 0.9):
            got, want = compiled(**case.tensors, scale=scale), lowrank_linear(**case.tensors, scale=scale)
            torch.testing.assert_close(got, want)


def test_a_compiled_call_keeps_the_backend_it_was_traced_with():
    case = make_case("lowrank_linear", 24, 16, 12, 4)
    torch._dynamo.reset()
    y = torch.compile(lambda **k: lowrank_linear(**k), backend="aot_eager", fullgraph=True)(**case.tensors)
    with peft_fused.use_backend("reference"):
        y.sum().backward()
    assert case.tensors["A"].grad is not None


@pytest.mark.parametrize("uv", [False, True])
def test_inductor(uv):
    case = make_case("lowrank", 24, 16, 12, 4, uv=uv)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **k: lowrank_adapter(**k) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(**case.tensors, **case.options), case.call(lowrank_adapter_reference) * 2)


@pytest.mark.parametrize("options", [{}, {"uv": True, "rank": 2}, {"dropout_p": 0.3, "seed": torch.tensor(4)}], ids=str)
def test_opcheck(options):
    case = make_case("lowrank_linear", 6, 5, 4, 3, **options)
    t, o = case.tensors, case.options
    controls = (2.0, None, o.get("rank", 3), None, 0, None, 0, None, 0, None, False, "torch")
    if "dropout_p" in o:
        controls = (*controls[:8], 20000, o["seed"], False, "torch")
    tensors = (t["x"], t["weight"], None, t["bias"], t["A"], t["B"], t["u"], t["v"])
    torch.library.opcheck(torch.ops.peft_fused.lowrank_fwd, (*tensors, *controls))
    detached = [None if x is None else x.detach() for x in tensors]
    needs = [True, False, True, True, True, t["u"] is not None, t["v"] is not None]
    shapes = [[-1] if x is None else list(x.shape) for x in tensors]
    sizes = [size for shape in shapes for size in shape if size >= 0], [-1 if -1 in s else len(s) for s in shapes]
    torch.library.opcheck(
        torch.ops.peft_fused.lowrank_bwd,
        (torch.randn(6, 4), *detached, torch.randn(6, 3), *sizes, torch.float32, *controls, needs),
    )


# -------------------------------------------------------------------------------------------------- autocast and modes


@both_nodes
def test_autocast_is_that_of_linear(cpp):
    case = make_case("lowrank_linear", 32, 24, 16, 4)
    with peft_fused.use_backend("torch", native=cpp), torch.autocast("cpu", dtype=BF16):
        y = case.call(lowrank_linear)
        base = torch.nn.functional.linear(case.tensors["x"], case.tensors["weight"], case.tensors["bias"])
    assert y.dtype == base.dtype == BF16
    truth = case.to(F64).call(lowrank_linear_reference)
    assert (y.double() - truth).norm() / truth.norm() < 1e-2
    y.float().sum().backward()
    assert case.tensors["A"].grad.dtype == F32


@both_nodes
@pytest.mark.parametrize("size", [8, 300])
def test_backward_inside_autocast_keeps_its_types(size, cpp):
    case = make_case("lowrank_linear", size, 200, 160, 4)
    leaves = [case.tensors[n] for n in case.wrt]
    with peft_fused.use_backend("torch", native=cpp):
        y = case.call(lowrank_linear)
        want = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
        with torch.autocast("cpu", dtype=BF16):
            got = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_cpp_and_python_draw_the_same_dropout():
    if native.module is None:
        pytest.skip(native.why_missing)
    case = make_case("lowrank", 40, 30, 20, 4, dropout_p=0.5)
    results = []
    for cpp in (True, False):
        torch.manual_seed(5)
        with peft_fused.use_backend("torch", native=cpp):
            results.append(case.call(lowrank_adapter))
    torch.testing.assert_close(*results)


# ------------------------------------------------------------------------------------------------------------ dispatch


def test_a_forced_backend_that_cannot_run_says_why(every_backend):
    case = make_case("lowrank", 4, 3, 2, 1, dtype=F64)
    with peft_fused.use_backend("triton"), pytest.raises(RuntimeError) as error:
        case.call(lowrank_adapter)
    assert "float64" in str(error.value) and "CUDA device" in str(error.value)
    compiled = torch.compile(lambda **k: lowrank_adapter(**k), backend="aot_eager")
    with peft_fused.use_backend("triton"), pytest.raises(RuntimeError, match="x is float64"):
        compiled(**case.tensors, **case.options)
    with peft_fused.use_backend("cuda"), pytest.raises(RuntimeError, match="x is on cpu"):
        case.call(lowrank_adapter)
    with pytest.raises(ValueError, match="unknown backend 'cudnn', allowed: reference, torch, triton, cuda"):
        peft_fused.use_backend("cudnn").__enter__()


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
    problem = LowRankProblem(64, 32, 32, 8, "float32", "float32", "cpu", "", 1, False, True)
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
    problem = LowRankProblem(64, 32, 32, 8, "float32", "float32", "cuda", "any", 1, False, True)
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
