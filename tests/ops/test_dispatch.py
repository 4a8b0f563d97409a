"""Which backend a problem gets on a GPU, told without one: the choice looks at descriptions of problems alone."""

from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from peft_fused.triton_kernels.lowrank_plan import LowRankProblem
from peft_fused.triton_kernels.problem import Gpu

import peft_fused
from peft_fused.layers import AfLoraLinear, LoraLinear
from peft_fused.ops import (
    bottleneck,
    bottleneck_torch,
    dispatch,
    lowrank,
    lowrank_adapter,
    lowrank_adapter_reference,
    lowrank_linear,
    lowrank_torch,
    native,
)
from peft_fused.ops.cases import OPS, make_lowrank
from peft_fused.ops.lowrank import LOWRANK, lowrank_problem
from peft_fused.ops.operation import Operation
from peft_fused.ops.structured import engine, fft, gemm, kernels, materialized
from peft_fused.ops.structured.plan import StructuredProblem


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as the choice of a backend goes, with everything built."""
    dispatch.forget()
    monkeypatch.setattr(dispatch, "_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if native.module is None:
        launcher = SimpleNamespace(triton_kernels=[], configure_triton=lambda *_: None, LowRankOnTriton=lambda p, _: p)
        monkeypatch.setattr(native, "module", launcher)
    monkeypatch.setattr(native, "has_cuda", lambda: True)
    yield
    dispatch.forget()


def problems():
    types = [(t, a) for t in ("float32", "bfloat16", "float16") for a in dict.fromkeys((t, "float32"))]
    for m, n, r, (dtype, adapter), dropout, weight in product(
        (1, 4096), (64, 4096), (8, 128), types, (False, True), (False, True)
    ):
        for uv in (False, True):
            yield LowRankProblem(m, n, n, dtype, adapter, "cuda", Gpu("a GPU", 132), r, dropout, weight, uv)


def test_tritons_kernels_are_launched_by_the_cpp_node(gpu):
    assert {(d.backend, d.native) for d in map(dispatch.decide, problems())} == {("triton", True)}


def test_an_unknown_triton_launches_its_kernels_itself(gpu, monkeypatch, caplog):
    from peft_fused.triton_kernels import compiled

    monkeypatch.setattr(compiled.triton, "__version__", "9.9.0")
    assert {(d.backend, d.native) for d in map(dispatch.decide, problems())} == {("triton", False)}
    said = [record.message for record in caplog.records if "9.9.0" in record.message]
    assert len(said) == 1 and "launched from Python" in said[0]


def test_without_triton_what_the_cuda_backend_declines_runs_on_torch(gpu, monkeypatch):
    """That is mixed types, and halves with u or v."""
    monkeypatch.setattr(dispatch, "_triton_missing", lambda: "triton is not installed")
    for problem in problems():
        declined = problem.dtype != problem.adapter_dtype or (problem.uv and problem.adapter_dtype == "float16")
        want = "torch" if declined else "cuda"
        assert dispatch.decide(problem).backend == want
        assert dispatch.path_of(problem).startswith(f"{want}: {'C++' if want == 'cuda' else 'Python'} autograd node")
        with peft_fused.use_backend("cuda"):
            assert dispatch.path_of(problem).startswith("cuda: C++ autograd node")


def test_explain_tells_the_same_choice_and_the_node_that_hosts_it(gpu):
    for problem in problems():
        assert dispatch.path_of(problem).startswith("triton: C++ autograd node")
        with peft_fused.use_backend("triton", native=False):
            assert dispatch.path_of(problem).startswith("triton: Python autograd node")
        with peft_fused.use_backend("torch"):
            assert dispatch.path_of(problem).startswith("torch: Python autograd node")


def test_without_the_native_node_its_kernels_are_not_chosen(gpu):
    circulant = StructuredProblem(
        4096, 3072, 3072, "float32", "float32", "cuda", Gpu("a GPU", 132), "circulant", (3072,), False
    )
    assert dispatch.decide(circulant).backend == "cuda"
    with peft_fused.use_backend(None, native=False):
        assert dispatch.decide(circulant).backend == "triton"
        assert any("native=False" in reason for reason in dispatch.why_not("cuda", circulant))
    with pytest.raises(RuntimeError, match=r"nothing can run on 'cuda'.*native=False"):
        peft_fused.use_backend("cuda", native=False)


@pytest.mark.parametrize(
    ("change", "backend", "reason"),
    [
        (lambda m: m.setattr(torch.cuda, "is_available", lambda: False), "triton", "torch sees no CUDA device; Triton"),
        (lambda m: m.setattr(torch.cuda, "is_available", lambda: False), "cuda", "torch sees no CUDA device; CUDA"),
        (lambda m: m.setattr(dispatch, "_capability", lambda: (7, 5)), "triton", "capability 7.5"),
        (lambda m: m.setattr(dispatch, "_capability", lambda: (7, 5)), "cuda", "capability 7.5"),
        (lambda m: m.setattr(dispatch, "_triton_missing", lambda: "it is missing"), "triton", "it is missing"),
        (lambda m: m.setattr(native, "has_cuda", lambda: False), "cuda", "without CUDA kernels"),
        (lambda m: m.setattr(native, "module", None), "cuda", "C.. extension: "),
    ],
)  # fmt: skip
def test_a_backend_on_which_nothing_can_run_is_refused_at_once(gpu, monkeypatch, change, backend, reason):
    with peft_fused.use_backend(backend):
        assert dispatch.forced() == backend
    change(monkeypatch)
    for other in ("reference", "torch", None):
        with peft_fused.use_backend(other), pytest.raises(RuntimeError, match=f"on '{backend}'.*{reason}"):
            peft_fused.use_backend(backend)
        assert dispatch.forced() is None


def test_under_the_interpreter_triton_needs_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dispatch, "_triton_missing", lambda: "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with peft_fused.use_backend("triton"):
        assert dispatch.forced() == "triton"


def test_under_the_interpreter_bf16_is_made_right_before_a_kernel_runs(monkeypatch):
    interpreter = pytest.importorskip("peft_fused.triton_kernels.interpreter", exc_type=ImportError)
    installed = []
    monkeypatch.setattr(interpreter, "install", lambda: installed.append(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x, A, B = (torch.zeros(4, 4, dtype=torch.bfloat16) for _ in range(3))
    problem = lowrank_problem(x, A, B, has_weight=False)
    assert dispatch.why_not("triton", problem) == [] and dispatch.decide(problem).backend == "torch"
    assert not installed
    with peft_fused.use_backend("triton"):
        assert dispatch.decide(problem).backend == "triton" and installed


def test_what_the_node_cannot_hold_runs_elsewhere(gpu):
    """A call that is recorded, or has a tensor of a subclass; forced there, it is refused."""
    for problem in problems():
        assert dispatch.decide(problem, node=False).backend == "triton"
        with pytest.raises(RuntimeError, match="takes no tensor subclasses"):
            dispatch.decide(problem, node=False, backend="cuda")


@pytest.mark.skipif(native.module is None, reason=native.why_missing or "-")
@pytest.mark.parametrize("adapter", [torch.float16, torch.float32])
def test_a_scale_that_the_type_does_not_hold_is_for_the_python_node(adapter):
    """ATen takes no such number as a factor of a product."""
    x, A, B = torch.ones(2, 3, dtype=torch.float16), torch.full((1, 3), 1e-3, dtype=adapter), torch.ones(2, 1)
    x.requires_grad_()
    y = lowrank_adapter(x, A, B.to(adapter) / 1024, scale=1e5)
    assert ("Cpp" in type(y.grad_fn).__name__) == (adapter == torch.float32)
    exact = lowrank_adapter_reference(x.double(), A.double(), B.double() / 1024, scale=1e5)
    torch.testing.assert_close(y.double(), exact, rtol=1e-2, atol=0)


def test_a_call_is_checked_and_decided_once(monkeypatch):
    if native.module is None:
        pytest.skip(native.why_missing)
    checked = []
    monkeypatch.setattr(LOWRANK, "check", lambda call: checked.append(1))
    x, A, B = torch.randn(5, 6), torch.randn(2, 6), torch.randn(7, 2)
    dispatch.forget()
    for rank in (1, 2, 1, 2):
        lowrank_adapter(x, A, B, rank=rank)
        lowrank_adapter(torch.randn(5, 6), A, B, rank=torch.tensor(rank))
    assert len(checked) == 4  # numbers and tensors of 1 and 2
    with peft_fused.use_backend("torch"):
        lowrank_adapter(x, A, B, rank=1)
    lowrank_adapter(x, A, B, rank=1)
    assert len(checked) == 6


def test_a_scale_beyond_the_range_of_the_parameters_is_not_for_the_extension():
    x, A, B = (torch.zeros(4, 4, dtype=torch.float16) for _ in range(3))
    fitting, huge = (lowrank_problem(x, A, B, has_weight=False, scale=torch.tensor(s)) for s in (65504.0, 1e6))
    told = "the scale is beyond its types' range"
    assert told in dispatch.why_not("cuda", huge) and told not in dispatch.why_not("cuda", fitting)
    assert dispatch.decide(huge).native is False and dispatch.decide(fitting).native is (native.module is not None)
    with pytest.raises(RuntimeError, match=told):
        dispatch.decide(huge, backend="cuda")


def test_a_weight_left_on_another_device_is_named_so_under_autocast():
    x, A, B = (torch.zeros(4, 4) for _ in range(3))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="weight must be on x's device"):
        lowrank_linear(x, torch.zeros(4, 4, device="meta"), None, A, B)


def test_equal_layers_are_explained_in_one_line():
    layers = [LoraLinear.from_linear(torch.nn.Linear(8, 8)) for _ in range(40)]
    text = str(peft_fused.explain(torch.nn.Sequential(*layers, LoraLinear.from_linear(torch.nn.Linear(8, 4)))))
    assert text.startswith("41 equal [0, 1, 2, ...]: lowrank_linear -> ") and text.count("lowrank_linear ->") == 1


# ----------------------------------------------------------------------------------- what is told, and what really runs


class Recorder:
    """Notes which implementations are entered, by standing in front of each of them."""

    def __init__(self, stack: ExitStack):
        self.ran = []
        if native.module is not None:
            node = {name: getattr(native.module, name) for name in dir(native.module) if not name.startswith("_")}
            for name in ("lowrank", "bottleneck", "structured"):
                node[name] = self.noting_node(node[name])
            stack.enter_context(mock.patch.object(native, "module", SimpleNamespace(**node)))
        here = {
            "torch: Python autograd node": (
                (lowrank_torch, "forward"), (bottleneck_torch, "forward"), (gemm, "forward"),
            ),
            "torch: Python autograd node, dense matrix by": ((materialized, "forward"),),
            "torch: Python autograd node, torch.fft of": ((fft, "forward"),),
            "triton: Python autograd node": ((kernels, "forward"),),
            "reference": (
                (lowrank, "lowrank_adapter_reference"), (lowrank, "lowrank_linear_reference"),
                (bottleneck, "bottleneck_adapter_reference"), (engine, "reference"),
            ),
        }  # fmt: skip
        if torch.cuda.is_available():
            from peft_fused.triton_kernels import bottleneck as triton_bottleneck
            from peft_fused.triton_kernels import lowrank as triton_lowrank

            here["triton: Python autograd node"] += (
                (triton_lowrank, "lowrank_fwd"), (triton_bottleneck, "bottleneck_fwd"),
            )  # fmt: skip
        # Of an op that is not named here: its own forward and reference, which those above are entered from.
        for op in Operation.__subclasses__():
            noting = self.noting(op.forward, lambda _, call, decision: f"{decision.backend}: Python autograd node")
            stack.enter_context(mock.patch.object(op, "forward", noting))
            stack.enter_context(mock.patch.object(op, "reference", self.noting(op.reference, lambda *_: "reference")))
        for path, places in here.items():
            for module, name in places:
                noting = self.noting(getattr(module, name), lambda *_, path=path: path)
                stack.enter_context(mock.patch.object(module, name, noting))

    def noting_node(self, fn):
        """As `path_of` begins, and of a structured map its method as well."""

        def run(decisions, x, *arguments):
            y = fn(decisions, x, *arguments)
            if isinstance(y, torch.Tensor):
                (decision,) = decisions.values()
                method, length, *_ = decision.plan if decision.plan and not x.is_cuda else ("", 0)
                words = {"fft": f", torch.fft of {length}", "dense": ", dense matrix by", "gemm": ", two GEMMs"}
                self.ran.append(f"{'cuda' if x.is_cuda else 'torch'}: C++ autograd node{words.get(method, '')}")
            return y

        return run

    def noting(self, fn, path):
        def run(*arguments, **options):
            self.ran.append(path(*arguments))
            return fn(*arguments, **options)

        return run


TYPES = [
    (torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16), (torch.bfloat16, torch.float32), (torch.float16, torch.float32),
]  # fmt: skip


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("forced", [None, "torch", "cuda", "reference"])
@pytest.mark.parametrize(
    ("device", "triton"),
    [
        ("cpu", True),
        pytest.param("cuda", True, marks=pytest.mark.gpu),
        pytest.param("cuda", False, marks=pytest.mark.gpu),
    ],
)
def test_what_is_told_is_what_runs(op, forced, device, triton, monkeypatch, every_backend):
    """Of every case there is: the path by `dispatch.path_of`, and the implementation that the call enters first."""
    if not triton:
        dispatch.forget()
        monkeypatch.setattr(dispatch, "_triton_missing", lambda: "triton is not installed")
    check, count = OPS[op], 0
    try:
        for dtype, adapter in TYPES:
            for case in check.cases(op, dtype, adapter, device):
                # Of long maps, which take their time, the choice that nobody has touched.
                short = case.input.shape[-1] <= 1000
                for native_node in (True, False) if short else (True,) if forced is None else ():
                    with peft_fused.use_backend(forced, native=native_node), ExitStack() as stack:
                        told = dispatch.path_of(check.problem(case))
                        recorder = Recorder(stack)
                        if told.startswith("RuntimeError"):
                            with pytest.raises(RuntimeError, match="cannot run"):
                                case.call(check.fn)
                            continue
                        case.call(check.fn)
                    assert told.startswith(recorder.ran[-1]), (case.op, case.name, dtype, adapter, told, recorder.ran)
                    count += 1
    finally:
        dispatch.forget()
    assert count > 0 or (forced == "cuda" and device == "cpu")


def test_an_aflora_layer_in_half_precision_is_explained_by_the_node_that_runs_it():
    layer = AfLoraLinear.from_linear(torch.nn.Linear(8, 8, dtype=torch.float16), r=2, dtype=torch.float16)
    problem = layer.explain_route(4)[2]
    assert problem.uv and "Python autograd node" in dispatch.path_of(problem)
    assert "Python autograd node" not in dispatch.path_of(replace(problem, uv=False)) or native.module is None


@pytest.mark.parametrize(
    ("rows", "error", "told"), [("x", TypeError, "rows must be an int, got str"), (-1, ValueError, "rows .* got -1")]
)
def test_explain_refuses_rows(rows, error, told):
    with pytest.raises(error, match=told):
        peft_fused.explain(LoraLinear.from_linear(torch.nn.Linear(8, 8)), rows=rows)


def test_under_autocast_a_control_is_checked_as_without():
    """A call with a number has been decided; one with a tensor in its place is another call."""
    case = make_lowrank("lowrank_linear", 6, 16, 12, 4)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            case.with_options(rank=2).call(OPS["lowrank_linear"].fn)
        for rank in (torch.tensor(2.0), torch.tensor(True)):
            with pytest.raises((TypeError, ValueError), match="rank"):
                case.with_options(rank=rank).call(OPS["lowrank_linear"].fn)
        assert case.with_options(rank=torch.tensor(2)).call(OPS["lowrank_linear"].fn).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["lowrank_linear", "bottleneck"])
def test_autocast_is_the_cpp_nodes_own(name, monkeypatch):
    """Once a call is decided the node casts it, and Python has no part in it. The result is that of Python's casts."""
    if not dispatch.native_allowed():
        pytest.skip("needs the C++ extension")
    op = OPS[name]
    case = op.layer(name, torch.float32, torch.float32, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        first = case.call(op.fn)
        monkeypatch.setattr(Operation, "_unusual", lambda *_: pytest.fail("Python had to cast"))
        again = case.call(op.fn)
        first, again = (
            torch.autograd.grad(y.float().sum(), [case.tensors[n] for n in case.wrt]) for y in (first, again)
        )
    for one, other in zip(first, again, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)
