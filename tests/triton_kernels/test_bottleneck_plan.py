"""Plans of the bottleneck kernels: pure functions of the problem."""

import subprocess
import sys
from dataclasses import replace
from itertools import product

import pytest
from peft_fused.triton_kernels import bottleneck_plan as plans
from peft_fused.triton_kernels.bottleneck_plan import (
    BOTTLENECK_ACTIVATIONS,
    BottleneckProblem,
    configurations,
    kernel_configs,
    plan_bottleneck,
    shrink_only,
)
from peft_fused.triton_kernels.problem import H200, Gpu
from peft_fused.triton_kernels.tiles import DTYPES

PROBLEM = BottleneckProblem(4096, 1024, 1024, "bfloat16", "bfloat16", "cuda", Gpu("Some GPU", 132), 16, 1, "gelu")
TYPES = [(dtype, adapter) for dtype in DTYPES for adapter in dict.fromkeys((dtype, "float32"))]


def test_limits_and_words():
    assert PROBLEM.limits("triton") == []
    assert PROBLEM.limits("cuda") == ["bottleneck has no CUDA C++ kernel of its own"]
    rank, activation = replace(PROBLEM, r=257, activation="mish").limits("triton")
    assert "257" in rank and "256" in rank and "mish" in activation and "gelu_tanh" in activation
    assert PROBLEM.preference() == ("triton", "torch")
    assert PROBLEM.words("triton") == ", one kernel"
    assert replace(PROBLEM, r=256).words("triton") == ", two kernels"
    assert PROBLEM.words("torch") == ", two GEMMs"
    text = replace(PROBLEM, groups=32, adapter_dtype="float32").describe()
    assert "32 groups" in text and "r=16" in text and "bfloat16 h, float32 parameters" in text


@pytest.mark.parametrize(
    "change, message",
    [
        ({"r": 0}, "1..256"),
        ({"r": 257}, "1..256"),
        ({"activation": "mish"}, "mish"),
        ({"dtype": "float64"}, "float64"),
        ({"adapter_dtype": "float16"}, "parameters float16"),
    ],
)
def test_what_has_no_plan_says_why(change, message):
    with pytest.raises(ValueError, match=message):
        plan_bottleneck(replace(PROBLEM, **change))


def test_any_problem_has_a_plan():
    for m, n, k, r in ((1, 1, 1, 1), (5, 7, 11, 256), (10**7, 28672, 8192, 200)):
        for sm_count in (1, 7, 148):
            for dtype, adapter in TYPES:
                for groups in (1, 5):
                    chosen = plan_bottleneck(
                        BottleneckProblem(m, n, k, dtype, adapter, "cuda", Gpu("", sm_count), r, groups, "relu")
                    )
                    for launches in (chosen.forward, chosen.backward):
                        assert all(launch.block_m in (16, 32, 64) and launch.splits >= 1 for launch in launches)
                        fused = [launch for launch in launches if launch.shrink and launch.expand]
                        assert all(launch.block_r >= r for launch in fused)
                        assert chosen.fused == (len(fused) == 1) and len(launches) == 2 - len(fused)
                    assert min(chosen.grad_down.splits, chosen.grad_up.splits) >= 1


def test_blocks_fill_the_gpu():
    """Few rows are cut into the least blocks and share their columns out, many into the largest."""
    (few,), (many,) = (plan_bottleneck(replace(PROBLEM, m=m)).forward for m in (100, 100_000))
    assert few.block_m == 16 and few.splits > 1 and few.splits * few.block_n <= PROBLEM.n
    assert many.block_m == 64 and many.splits == 1
    # Rows of two groups never share a block, so that 32 groups of 20 rows are 64 blocks.
    (grouped,) = plan_bottleneck(replace(PROBLEM, m=640, groups=32)).forward
    assert grouped.block_m == 16 and grouped.splits == 2


def test_a_few_idle_multiprocessors_do_not_halve_the_blocks():
    """Smaller blocks convert the parameters more often: 128 blocks are enough for 132 multiprocessors, 127 are not."""
    for m, block_m in ((4096, 32), (4064, 16)):
        (launch,) = plan_bottleneck(replace(PROBLEM, m=m)).forward
        assert launch.block_m == block_m and launch.splits == 1, m


def test_blocks_are_lower_where_there_is_no_wgmma():
    for r, kind in ((64, "float32"), (256, "bfloat16")):
        problem = replace(PROBLEM, m=100_000, r=r, dtype=kind, adapter_dtype="float32")
        for shared_memory, block_m in ((99 * 1024, 32), (163 * 1024, 32), (227 * 1024, 64)):
            plan = plan_bottleneck(replace(problem, gpu=Gpu("Some GPU", 132, shared_memory)))
            assert plan.forward[0].block_m == plan.backward[0].block_m == block_m


def test_partial_sums_do_not_grow_with_the_groups():
    splits = [plan_bottleneck(replace(PROBLEM, m=2**20, groups=groups)).grad_down.splits for groups in (1, 64, 2**20)]
    assert max(splits) <= 2 * PROBLEM.gpu.sm_count // (PROBLEM.k // 64) + 1


def test_shrink_only_leaves_the_second_product_out():
    for r in (16, 256):
        (launch,) = shrink_only(plan_bottleneck(replace(PROBLEM, m=64, r=r)).backward)
        assert launch.shrink and not launch.expand and launch.splits == 1


def test_compiled_configurations_are_all_that_plans_give():
    """The compile tests see every tile that a problem of another size would launch, for gelu."""
    smaller = replace(H200, shared_memory=99 * 1024)
    known = {gpu: set(configurations(gpu)) for gpu in (H200, smaller)}
    for m, groups in ((1, 1), (96, 8), (2048, 2), (5000, 1), (8192, 64), (10**6, 1)):
        for r in (1, 8, 24, 100, 129):
            for n, k in ((768, 3072), (4096, 4096)):
                for (dtype, adapter), gpu in product(TYPES, known):
                    problem = BottleneckProblem(m, n, k, dtype, adapter, "cuda", gpu, r, groups, "gelu")
                    assert set(kernel_configs(problem)) <= known[gpu], problem
    for dtype, adapter in TYPES:
        for activation in BOTTLENECK_ACTIVATIONS:
            problem = replace(PROBLEM, dtype=dtype, adapter_dtype=adapter, activation=activation)
            assert set(kernel_configs(problem)) <= known[H200], problem


def test_needs_neither_torch_nor_triton():
    folder = plans.__file__.rsplit("/", 1)[0]
    code = (
        "import sys; sys.modules.update(torch=None, triton=None);"
        "sys.path.insert(0, sys.argv[1]); import importlib;"
        "importlib.import_module(sys.argv[2] + '.bottleneck_plan').configurations()"
    )
    subprocess.run([sys.executable, "-P", "-c", code, *folder.rsplit("/", 1)], check=True)
