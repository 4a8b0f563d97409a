"""The structured ops on a CUDA device: every backend by the 2x rule, and the promises that only a GPU can break."""

import pytest
import torch

import peft_fused
from peft_fused.ops import dispatch, structured
from peft_fused.ops.accuracy import compare, compare_mutated
from peft_fused.ops.cases import make_structured, structured_cases
from peft_fused.ops.dropout import dropout_threshold, keep_mask
from peft_fused.ops.structured.engine import STRUCTURES

pytestmark = pytest.mark.gpu

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]
TYPE_IDS = ["fp32", "bf16", "fp16", "bf16+fp32", "fp16+fp32"]
BACKENDS = ("torch", "triton", "cuda")


def functions(kind):
    return getattr(structured, kind), getattr(structured, f"{kind}_reference")


def problem(case):
    tensors = case.tensors
    p, q = (tensors.get(name) for name in STRUCTURES[case.op].names)
    q = q[1:] if case.op == "toeplitz" else q
    dropout, transposed = "dropout_p" in case.options, case.options.get("transposed", False)
    return structured.problem_of(case.op, tensors["x"], p, q, case.outputs, dropout, transposed)


def runnable(backend, case):
    return not dispatch.why_not(backend, problem(case))


def skip_unless(backend, case):
    if reasons := dispatch.why_not(backend, problem(case)):
        pytest.skip("; ".join(reasons))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
@pytest.mark.parametrize("kind", STRUCTURES)
def test_error_is_at_most_twice_pytorchs(kind, types, backend, poisoned):
    op, reference = functions(kind)
    cases = [case for case in structured_cases(kind, *types, device="cuda") if runnable(backend, case)]
    if not cases:
        pytest.skip(f"{backend} has no kernel for it")
    with peft_fused.use_backend(backend):
        for case in cases:
            bad = [f"{v.name}: {v.ratio:.2f}" for v in compare(op, reference, case) if not v.ok]
            assert not bad, case.name
        case = next(case for case in cases if case.name.startswith("131"))
        for defect, verdicts in compare_mutated(op, reference, case).items():
            assert not verdicts[0].ok, f"{defect} passed on {case.name}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_rows_of_a_real_layer(backend):
    """Enough rows for several tiles or stripes per program, where a partial sum could be lost."""
    for kind, sizes in (("circulant", (3072,)), ("toeplitz", (768, 3072)), ("kronecker", (32, 24, 24, 32))):
        case = make_structured(kind, 4097, *sizes, dtype=BF16, adapter_dtype=BF16, device="cuda")
        if runnable(backend, case):
            with peft_fused.use_backend(backend):
                assert all(v.ok for v in compare(*functions(kind), case)), kind


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", STRUCTURES)
def test_two_runs_are_bitwise_equal(kind, backend):
    sizes = {"toeplitz": (640, 768), "kronecker": (24, 32, 32, 24), "ldr": (2, 768)}.get(kind, (768,))
    case = make_structured(kind, 1000, *sizes, dtype=BF16, device="cuda", dropout_p=0.1, seed=3)
    skip_unless(backend, case)

    def run():
        with peft_fused.use_backend(backend):
            y = case.call(functions(kind)[0])
        return [y, *torch.autograd.grad(y, [case.tensors[n] for n in case.wrt], torch.ones_like(y))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", STRUCTURES)
def test_no_host_sync_in_a_step(kind, backend):
    sizes = {"toeplitz": (192, 128), "kronecker": (8, 16, 24, 8), "ldr": (2, 128)}.get(kind, (128,))
    scale = torch.tensor(1.5, device="cuda")
    case = make_structured(kind, 256, *sizes, dtype=BF16, device="cuda", scale=scale, dropout_p=0.1)
    skip_unless(backend, case)

    def step():
        with peft_fused.use_backend(backend):
            case.call(functions(kind)[0]).float().square().sum().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        scale.fill_(3)
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["circulant", "toeplitz", "kronecker"])
def test_cuda_graph_replays_with_other_data_and_scale(kind, backend):
    sizes = {"toeplitz": (192, 128), "kronecker": (8, 16, 24, 8)}.get(kind, (2048,))
    scale = torch.tensor(1.0, device="cuda")
    case = make_structured(kind, 64, *sizes, device="cuda", scale=scale, wrt=())
    skip_unless(backend, case)
    op, reference = functions(kind)
    with peft_fused.use_backend(backend), torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                case.call(op)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = case.call(op)
        for value in (1.0, 0.5, 3.0):
            scale.fill_(value)
            case.tensors["x"].normal_()
            graph.replay()
            torch.testing.assert_close(y, case.call(reference), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_mask_is_exact(backend):
    """The circulant matrix of a unit vector is the identity, so the op returns its mask."""
    m, n, p = 300, 1536, 0.3
    unit, seed = torch.zeros(n, device="cuda"), torch.tensor(2**40 + 3, device="cuda")
    unit[0] = 1
    x = torch.ones(m, n, device="cuda", requires_grad=True)
    with peft_fused.use_backend(backend):
        y = structured.circulant(x, unit, dropout_p=p, seed=seed)
        (dx,) = torch.autograd.grad(y.sum(), [x])
    keep = keep_mask(seed, m, n, dropout_threshold(p))
    assert torch.equal(y.abs() > 0.5, keep) and torch.equal(dx.abs() > 0.5, keep)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_any_magnitude_share_a_tile(backend):
    x = torch.randn(4, 1536, device="cuda") * torch.tensor([1e30, 1e-30, 1.0, 1e4], device="cuda").unsqueeze(1)
    c = torch.randn(1536, device="cuda")
    with peft_fused.use_backend(backend):
        y = structured.circulant(x, c)
    exact = structured.circulant_reference(x.double(), c.double())
    assert ((y - exact).abs().amax(1) / exact.abs().amax(1) < 1e-5).all()


@pytest.mark.parametrize("kind", STRUCTURES)
def test_compile_is_one_graph(kind):
    sizes = {"toeplitz": (192, 128), "kronecker": (8, 16, 24, 8), "ldr": (2, 128)}.get(kind, (128,))
    case = make_structured(kind, 256, *sizes, device="cuda")
    op, reference = functions(kind)
    torch._dynamo.reset()
    y = torch.compile(lambda **k: op(**k), fullgraph=True)(**case.tensors, **case.options)
    torch.testing.assert_close(y, case.call(reference), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert all(case.tensors[name].grad is not None for name in case.wrt)
