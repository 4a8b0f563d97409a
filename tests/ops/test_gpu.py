"""The low-rank op on a CUDA device: every backend by the 2x rule, and the promises that only a GPU can break."""

import pytest
import torch

import peft_fused
from peft_fused.ops import dispatch, lowrank, lowrank_linear, lowrank_linear_reference, lowrank_reference
from peft_fused.ops.accuracy import compare, compare_mutated
from peft_fused.ops.cases import lowrank_cases, make_case
from peft_fused.ops.dropout import dropout_threshold, keep_mask

pytestmark = pytest.mark.gpu

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]
TYPE_IDS = ["fp32", "bf16", "fp16", "bf16+fp32", "fp16+fp32"]
OPS = {"lowrank_linear": (lowrank_linear, lowrank_linear_reference), "lowrank": (lowrank, lowrank_reference)}
BACKENDS = ("torch", "triton", "cuda")


def runnable(backend, case):
    problem = dispatch.problem_of(
        case.tensors["x"], case.tensors["A"], case.tensors["B"], has_weight="weight" in case.tensors,
        dropout="dropout_p" in case.options,
    )  # fmt: skip
    reasons = dispatch.why_not(backend, problem)
    if reasons:
        pytest.skip("; ".join(reasons))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
def test_error_is_at_most_twice_pytorchs(op, types, backend, poisoned):
    function, reference = OPS[op]
    for base in (False, True):
        for case in lowrank_cases(op, *types, device="cuda", base=base):
            runnable(backend, case)
            with peft_fused.use_backend(backend):
                bad = [f"{v.name}: {v.ratio:.2f}" for v in compare(function, reference, case) if not v.ok]
                assert not bad, case.name
                for defect, verdicts in compare_mutated(function, reference, case).items() if not base else ():
                    assert not verdicts[0].ok, f"{defect} passed on {case.name}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(4097, 768, 768, 8), (1024, 4096, 4096, 16), (511, 1024, 3072, 64)], ids=str)
def test_sizes_of_real_layers(sizes, backend):
    case = make_case("lowrank_linear", *sizes, dtype=BF16, device="cuda", base=False)
    runnable(backend, case)
    with peft_fused.use_backend(backend):
        assert all(v.ok for v in compare(lowrank_linear, lowrank_linear_reference, case))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_mask_is_exact(backend):
    """With A = B = I and nothing else, the op returns its mask."""
    m, k, p = 300, 64, 0.3
    eye, seed = torch.eye(k, device="cuda"), torch.tensor(2**40 + 3, device="cuda")
    x = torch.ones(m, k, device="cuda", requires_grad=True)
    with peft_fused.use_backend(backend):
        y = lowrank(x, eye, eye, dropout_p=p, seed=seed)
        (dx,) = torch.autograd.grad(y.sum(), [x])
    keep = keep_mask(seed, m, k, dropout_threshold(p))
    assert torch.equal(y != 0, keep) and torch.equal(dx != 0, keep)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_are_bitwise_equal(backend):
    case = make_case("lowrank_linear", 1000, 768, 640, 16, dtype=BF16, device="cuda", dropout_p=0.1, seed=3, uv=True)

    def run():
        with peft_fused.use_backend(backend):
            y = case.call(lowrank_linear)
        return [y, *torch.autograd.grad(y, [case.tensors[n] for n in case.wrt], torch.ones_like(y))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_host_sync_in_a_step(backend):
    rank, scale = torch.tensor(5, device="cuda"), torch.tensor(1.5, device="cuda")
    case = make_case(
        "lowrank_linear", 256, 128, 192, 8, dtype=BF16, device="cuda", rank=rank, scale=scale, dropout_p=0.1
    )

    def step():
        with peft_fused.use_backend(backend):
            case.call(lowrank_linear).float().square().sum().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rank.fill_(3)
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_graph_replays_with_other_data_and_rank(backend):
    rank = torch.tensor(8, device="cuda")
    case = make_case("lowrank_linear", 256, 128, 192, 8, device="cuda", rank=rank, wrt=())
    with peft_fused.use_backend(backend), torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                case.call(lowrank_linear)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = case.call(lowrank_linear)
        for b in (8, 2, 5):
            rank.fill_(b)
            case.tensors["x"].normal_()
            graph.replay()
            torch.testing.assert_close(y, case.call(lowrank_linear_reference), rtol=1e-4, atol=1e-4)


def test_compile_is_one_graph():
    case = make_case("lowrank_linear", 256, 128, 192, 8, device="cuda", rank=torch.tensor(4, device="cuda"))
    torch._dynamo.reset()
    compiled = torch.compile(lambda **k: lowrank_linear(**k), fullgraph=True)
    y = compiled(**case.tensors, **case.options)
    torch.testing.assert_close(y, case.call(lowrank_linear_reference), rtol=1e-4, atol=1e-4)
