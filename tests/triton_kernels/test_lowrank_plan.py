"""Plans are a pure function: no GPU, no triton, no measurement."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from peft_fused.triton_kernels import lowrank_plan as plans
from peft_fused.triton_kernels.dropout import dropout_threshold, keep_scale
from peft_fused.triton_kernels.lowrank_plan import (
    LowRankLaunch,
    LowRankProblem,
    configurations,
    plan_lowrank,
    table_key,
)
from peft_fused.triton_kernels.problem import Gpu

PROBLEM = LowRankProblem(4096, 4096, 4096, "bfloat16", "bfloat16", "cuda", Gpu("Some GPU 80GB", 132), 16, False, True)


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """Writes the tuned file of PROBLEM's GPU."""

    def write(table):
        (tmp_path / "Some-GPU-80GB.json").write_text(json.dumps(table))

    monkeypatch.setattr(plans, "TUNED", tmp_path)
    for cached in (plans._plan, plans.tuned_table):
        cached.cache_clear()
    yield write
    for cached in (plans._plan, plans.tuned_table):
        cached.cache_clear()


@pytest.mark.parametrize(
    "change, forward",
    [
        ({}, "shrink_expand_gemm"),
        ({"m": 64}, "single_kernel"),
        ({"m": 64, "r": 256}, "shrink_expand_gemm"),
        ({"m": 64, "dropout": True}, "shrink_expand_gemm"),
        ({"m": 64, "adapter_dtype": "float32"}, "single_kernel"),
        ({"n": 1024, "k": 1024}, "single_kernel"),
        ({"n": 1024}, "shrink_expand_gemm"),
        ({"k": 1024}, "shrink_expand_gemm"),
        ({"n": 1024, "k": 1024, "r": 17}, "shrink_expand_gemm"),
        ({"n": 1024, "k": 1024, "dropout": True}, "shrink_expand_gemm"),
        ({"n": 1024, "k": 1024, "adapter_dtype": "float32"}, "shrink_expand_gemm"),
        ({"has_weight": False}, "shrink_expand_add"),
        ({"m": 1, "has_weight": False}, "shrink_expand_add"),
    ],
)
def test_forward_path(change, forward):
    assert plan_lowrank(replace(PROBLEM, **change)).forward == forward


def test_rows_are_bucketed_by_powers_of_two():
    assert plan_lowrank(replace(PROBLEM, m=2049)) == plan_lowrank(PROBLEM) != plan_lowrank(replace(PROBLEM, m=2048))
    assert plan_lowrank(replace(PROBLEM, m=0)).forward == "single_kernel"


def test_what_reads_a_large_matrix_is_shared_out():
    """Between few programs, which leave the memory idle, and many, which leave partial sums."""
    shares = {m: (plan.grad_b.block_m, plan.grad_b.splits) for m, plan in by_rows(PROBLEM, (512, 2048, 4096, 16384))}
    assert shares == {512: (64, 4), 2048: (128, 4), 4096: (256, 4), 16384: (256, 1)}
    assert {m: plan.shrink.splits for m, plan in by_rows(PROBLEM, (512, 2048, 4096))} == {512: 4, 2048: 2, 4096: 1}
    assert plan_lowrank(replace(PROBLEM, n=768)).grad_b.splits == 2, "a plane has at least 256 columns"
    # Of more ranks, planes would fill the registers of whoever adds them up: shorter blocks take their place.
    wide = {m: (plan.shrink.block_m, plan.shrink.splits) for m, plan in by_rows(replace(PROBLEM, r=64), (512, 4096))}
    assert wide == {512: (16, 1), 4096: (64, 1)}


def test_members_share_a_plan():
    """Their ranks are in one block, with dropout in one each, and planes are added up whatever their number."""
    shared = replace(PROBLEM, members=3)
    plan = plan_lowrank(shared)
    assert (plan.forward, plan.linear, plan.grad_b, plan.fused_a) == ("shared_shrink", None, None, False)
    blocks = (plan.shrink.block_r, plan.expand.block_r, plan.grad_a.block_r, plan.reduce.block_r)
    assert blocks == (64, 64, 64, 64)
    dropped = plan_lowrank(replace(shared, dropout=True))
    assert (dropped.shrink.block_r, dropped.expand.block_r, dropped.grad_a.block_r) == (16, 16, 16)
    assert dropped.reduce.block_r == 64
    assert {m: plan.shrink.splits for m, plan in by_rows(shared, (64, 512, 4096))} == {64: 4, 512: 2, 4096: 1}
    assert plan_lowrank(replace(shared, m=1)).forward == "shared_shrink", "few rows have no single kernel"
    # Also of more ranks than any layer by itself has.
    for r, members, dropout in ((256, 4, True), (200, 3, False), (1, 5, False)):
        last = plan_lowrank(replace(shared, r=r, members=members, dropout=dropout)).reduce
        assert last.block_r >= r * members and last.block_m * last.block_n * last.block_r <= 8192


def test_a_given_s_leaves_no_single_kernel():
    for m in (1, 64, 4096):
        plan = plan_lowrank(replace(PROBLEM, m=m, given=True))
        assert (plan.forward, plan.linear) == ("shrink_expand_gemm", None)
    keys = [table_key(replace(PROBLEM, **more)) for more in ({}, {"given": True}, {"members": 2}, {"members": 3})]
    assert len(set(keys)) == 4


def by_rows(problem, counts):
    return [(m, plan_lowrank(replace(problem, m=m))) for m in counts]


def test_a_plan_fits_its_gpu():
    for shared_memory, capability, block_m, rows_of_a in ((227, 90, 256, 64), (163, 80, 128, 32), (99, 89, 128, 32)):
        plan = plan_lowrank(replace(PROBLEM, gpu=Gpu("", 132, shared_memory * 1024, capability)))
        assert (plan.grad_b.block_m, plan.grad_a.block_m) == (block_m, rows_of_a)
        assert plan.shrink.maxnreg == (None if capability == 90 else 255)


def test_any_problem_has_a_plan():
    for m, n, k, r in ((1, 1, 1, 1), (5, 7, 11, 256), (10**7, 128256, 28672, 200)):
        for sm_count in (1, 7, 148):
            for dtype in ("float16", "bfloat16", "float32"):
                for adapter in {dtype, "float32"}:
                    chosen = plan_lowrank(
                        LowRankProblem(m, n, k, dtype, adapter, "cuda", Gpu("unheard of", sm_count), r, True, False)
                    )
                    assert min(chosen.shrink.splits, chosen.db.splits, chosen.grad_a.splits) >= 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"r": 0}, "rank"),
        ({"r": 257}, "rank"),
        ({"dtype": "float64"}, "float64"),
        ({"adapter_dtype": "float16"}, "types"),
    ],
)
def test_unsupported_problems_raise(change, message):
    with pytest.raises(ValueError, match=message):
        plan_lowrank(replace(PROBLEM, **change))


def test_tuned_file_replaces_fields(tuned):
    default = plan_lowrank(PROBLEM)
    other = replace(PROBLEM, n=8192)
    other_default = plan_lowrank(other)
    assert default.linear is None and default.grad_b is not None
    linear = dict(block_m=128, block_n=256, block_r=16, num_warps=8, num_stages=3, block_k=64)
    tuned(
        {table_key(PROBLEM): {"forward": "single_kernel", "linear": linear, "shrink": {"block_m": 32}, "grad_b": None}}
    )
    for cached in (plans._plan, plans.tuned_table):
        cached.cache_clear()
    chosen = plan_lowrank(replace(PROBLEM, m=3000))
    assert chosen.forward == "single_kernel" and chosen.linear == LowRankLaunch(**linear) and chosen.grad_b is None
    assert chosen.shrink == replace(default.shrink, block_m=32) and chosen.expand == default.expand
    assert plan_lowrank(other) == other_default
    assert plan_lowrank(replace(PROBLEM, gpu=Gpu("Another", 132))) == default


@pytest.mark.parametrize("change", [{}, {"dropout": True}, {"has_weight": False}, {"given": True}, {"members": 2}])
def test_a_tuned_single_kernel_has_to_be_possible(tuned, change):
    problem = replace(PROBLEM, **change)
    linear = (
        {"linear": dict(block_m=128, block_n=256, block_r=16, num_warps=8, num_stages=3, block_k=64)} if change else {}
    )
    tuned({table_key(problem): {"forward": "single_kernel", **linear}})
    with pytest.raises(ValueError, match="single kernel"):
        plan_lowrank(problem)


def test_tuned_file_with_an_unknown_field_raises(tuned):
    tuned({table_key(PROBLEM): {"shrnk": {"block_m": 32}}})
    with pytest.raises(ValueError, match="shrnk"):
        plan_lowrank(PROBLEM)


def test_configurations_are_distinct():
    found = configurations()
    assert len(found) == len(set(found))
    assert {config.kernel for config in found} == {
        f"{name}_kernel" for name in ("shrink", "expand", "linear", "grad_b", "grad_a", "reduce")
    }


def test_thresholds():
    assert dropout_threshold(0.0) == 0 and keep_scale(0) == 1.0
    assert dropout_threshold(0.1) == 6554
    assert dropout_threshold(1.0) == 65535
    assert keep_scale(32768) == 2.0
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError):
            dropout_threshold(p)


def test_needs_neither_torch_nor_triton():
    code = (
        "import sys; sys.modules.update(torch=None, triton=None);"
        f"sys.path.insert(0, {str(plans.TUNED.parent.parent)!r});"
        f"import importlib; name = {plans.TUNED.parent.name!r};"
        "importlib.import_module(name + '.lowrank_plan').configurations(); importlib.import_module(name + '.dropout')"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
