"""The bottleneck op on a CUDA device: every backend by the 2x rule, and the promises that only a GPU can break."""

import pytest
import torch

import peft_fused
from peft_fused.ops import bottleneck, bottleneck_reference, dispatch
from peft_fused.ops.accuracy import SHOWS_IN, compare, compare_mutated
from peft_fused.ops.bottleneck import problem_of
from peft_fused.ops.cases import bottleneck_cases, make_bottleneck

pytestmark = pytest.mark.gpu

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TYPES = [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32)]
TYPE_IDS = ["fp32", "bf16", "fp16", "bf16+fp32", "fp16+fp32"]
BACKENDS = ("torch", "triton")
EXPERTS = {"experts": (4, 4)}


def skip_unless(backend, case):
    t, options = case.tensors, case.options
    problem = problem_of(t["h"], t["down"], t["up"], options.get("activation", "gelu"), options.get("expert"))
    if reasons := dispatch.why_not(backend, problem):
        pytest.skip("; ".join(reasons))


def failures(case):
    return [f"{v.name}: {v.ratio:.2f}" for v in compare(bottleneck, bottleneck_reference, case) if not v.ok]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
def test_error_is_at_most_twice_pytorchs(types, backend, poisoned):
    with peft_fused.use_backend(backend):
        for case in bottleneck_cases("bottleneck", *types, device="cuda"):
            skip_unless(backend, case)
            assert not failures(case), case.name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
def test_defects_do_not_pass(types, backend):
    expert = torch.tensor([2, 0], device="cuda")
    case = make_bottleneck(
        196, 96, 80, 8, dtype=types[0], adapter_dtype=types[1], device="cuda", expert=expert, **EXPERTS
    )
    skip_unless(backend, case)
    with peft_fused.use_backend(backend):
        for defect, verdicts in compare_mutated(bottleneck, bottleneck_reference, case).items():
            shown = SHOWS_IN.get(defect, "y")
            assert not next(v for v in verdicts if v.name == shown).ok, defect


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(4096, 768, 768, 16), (1024, 4096, 4096, 48), (512, 1024, 3072, 256)], ids=str)
@pytest.mark.parametrize("types", [(BF16, BF16), (BF16, F32), (F32, F32)], ids=["bf16", "bf16+fp32", "fp32"])
def test_sizes_of_real_layers(types, sizes, backend):
    """Every size of block, several stripes and parts of the columns, and more units than one launch holds."""
    for expert in (torch.tensor(3, device="cuda"), torch.arange(32, device="cuda") * 7 % 4):
        case = make_bottleneck(
            *sizes, dtype=types[0], adapter_dtype=types[1], device="cuda", expert=expert, **EXPERTS
        )  # fmt: skip
        skip_unless(backend, case)
        with peft_fused.use_backend(backend):
            assert not failures(case), case.name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("types", TYPES, ids=TYPE_IDS)
def test_two_runs_are_bitwise_equal(types, backend):
    expert = torch.arange(8, device="cuda") % 3
    case = make_bottleneck(
        4000, 768, 640, 16, dtype=types[0], adapter_dtype=types[1], device="cuda", expert=expert, **EXPERTS
    )
    skip_unless(backend, case)

    def run():
        with peft_fused.use_backend(backend):
            y = case.call(bottleneck)
        return [y, *torch.autograd.grad(y, [case.tensors[n] for n in case.wrt], torch.ones_like(y))]

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [0, 8], ids=["0-d", "per group"])
def test_no_host_sync_in_a_step(groups, backend):
    expert = torch.arange(groups, device="cuda") % 4 if groups else torch.tensor(1, device="cuda")
    scale = torch.tensor(1.5, device="cuda")
    case = make_bottleneck(256, 128, 192, 8, dtype=BF16, device="cuda", expert=expert, scale=scale, **EXPERTS)
    skip_unless(backend, case)

    def step():
        with peft_fused.use_backend(backend):
            case.call(bottleneck).float().square().sum().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expert.fill_(3)
        scale.fill_(0.5)
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_values_do_not_recompile():
    """Other experts, scales and numbers of rows and groups reuse the compiled kernels."""
    from peft_fused.triton_kernels import bottleneck_kernels

    kernels = [value for name, value in vars(bottleneck_kernels).items() if name.endswith("_kernel")]

    def compiled():
        return sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())

    def step(rows, expert):
        case = make_bottleneck(rows, 128, 192, 8, dtype=BF16, device="cuda", expert=expert, scale=1.0 + rows, **EXPERTS)
        with peft_fused.use_backend("triton"):
            case.call(bottleneck).float().sum().backward()

    counts = []
    for i in range(4):
        step(1000 + i, i)
        step(1000 + i, torch.tensor(i, device="cuda"))
        step(96 * (2 + i), torch.arange(2 + i, device="cuda") % 4)
        counts.append(compiled())
    assert counts[0] > 0 and counts[0] == counts[-1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [0, 8], ids=["0-d", "per group"])
def test_cuda_graph_replays_with_other_data_and_expert(groups, backend):
    expert = torch.zeros(groups, dtype=torch.int64, device="cuda") if groups else torch.tensor(0, device="cuda")
    case = make_bottleneck(256, 128, 192, 8, device="cuda", expert=expert, **EXPERTS)
    skip_unless(backend, case)
    inputs = [case.tensors[name] for name in case.wrt]
    dy = torch.randn(256, 192, device="cuda")

    def step(function):
        y = case.call(function)
        return [y, *torch.autograd.grad(y, inputs, dy)]

    with peft_fused.use_backend(backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(bottleneck)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = step(bottleneck)
        for first in (0, 2, 3):
            expert.copy_((torch.arange(groups, device="cuda") + first) % 4 if groups else torch.tensor(first))
            with torch.no_grad():
                case.tensors["h"].normal_()
            graph.replay()
            torch.testing.assert_close(found, step(bottleneck_reference), rtol=1e-3, atol=1e-3)


def test_compile_is_one_graph():
    case = make_bottleneck(256, 128, 192, 8, device="cuda", expert=torch.tensor(1, device="cuda"), **EXPERTS)
    torch._dynamo.reset()
    y = torch.compile(lambda **k: bottleneck(**k), fullgraph=True)(**case.tensors, **case.options)
    torch.testing.assert_close(y, case.call(bottleneck_reference), rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert all(case.tensors[name].grad is not None for name in case.wrt)
