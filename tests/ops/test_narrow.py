"""The CPU's kernels for products of few columns (csrc/narrow.cpp), through the op that they are for."""

import os
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import peft_fused
from peft_fused.ops import lowrank_adapter, lowrank_adapter_reference, native
from peft_fused.ops.accuracy import unseen, wrong
from peft_fused.ops.cases import make_lowrank

pytestmark = pytest.mark.skipif(native.module is None, reason=native.why_missing or "-")

F32, BF16 = torch.float32, torch.bfloat16
TYPES = [pytest.param((F32, F32), id="fp32"), pytest.param((BF16, F32), id="bf16+fp32")]
# Rows, features, outputs and ranks at the edges of tiles: 12 rows, 16 and 32 lanes, 32 terms, 8 ranks, 48 columns.
SHAPES = [
    (1, 1, 1, 1), (11, 47, 31, 15), (12, 48, 32, 16), (13, 49, 33, 17), (24, 63, 95, 33), (25, 65, 97, 63),
    (49, 64, 64, 64), (49, 128, 130, 65), (7, 300, 5, 2), (300, 5, 300, 3), (36, 96, 96, 8), (48, 144, 160, 40),
]  # fmt: skip


def kernels_of(call) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    return {event.name for event in recorded.events()}


def in_use() -> bool:
    x, A, B = torch.randn(40, 64), torch.randn(8, 64), torch.randn(32, 8)
    return "aten::mm" not in kernels_of(lambda: lowrank_adapter(x, A, B))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("types", TYPES)
def test_rule(types, shape):
    m, k, n, r = shape
    for options in ({}, {"dropout_p": 0.3, "seed": 3}, {"rank": max(1, r - 1)}):
        case = make_lowrank("lowrank", m, k, n, r, dtype=types[0], adapter_dtype=types[1], base=False, **options)
        assert not wrong(case)


@pytest.mark.parametrize("types", TYPES)
def test_the_rule_sees_defects(types):
    case = make_lowrank("lowrank", 49, 64, 97, 17, dtype=types[0], adapter_dtype=types[1], base=False)
    assert not unseen(case)


@pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="for CPUs with AVX2")
def test_few_ranks_take_no_product_of_a_library():
    products = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::addmm_out", "mkldnn::_linear_pointwise"}

    def step(x, r):
        A, B = torch.randn(r, 64, requires_grad=True), torch.randn(32, r, requires_grad=True)
        lowrank_adapter(x, A, B).sum().backward()

    for dtype in (F32, BF16):
        x = torch.randn(40, 64, dtype=dtype, requires_grad=True)
        assert not products & kernels_of(lambda x=x: step(x, 16))
        assert products & kernels_of(lambda x=x: step(x, 65))
    assert in_use()


@pytest.mark.parametrize("types", TYPES)
def test_any_layout(types):
    dtype, adapter_dtype = types
    draws = torch.Generator().manual_seed(0)
    dense = [torch.randn(*s, generator=draws, dtype=torch.float64) for s in ((50, 70), (20, 70), (30, 20), (50, 30))]
    x, A, B, add = (t.to(d) for t, d in zip(dense, (dtype, adapter_dtype, adapter_dtype, dtype), strict=True))

    def run(*operands):
        leaves = [t.detach().requires_grad_() for t in operands]  # of the same layout
        x, A, B, add = leaves
        y = lowrank_adapter(x, A, B, add=add, scale=0.5)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    def strided(t):
        return torch.empty(t.shape[1] * 2, t.shape[0] * 3, dtype=t.dtype).t()[::3, ::2].copy_(t)

    want = run(x, A, B, add)
    for one in range(4):
        operands = [strided(t) if i == one else t for i, t in enumerate((x, A, B, add))]
        assert not operands[one].is_contiguous()
        for mine, its in zip(run(*operands), want, strict=True):
            assert torch.equal(mine, its)
    wide = x[:1].expand(50, -1)
    assert torch.equal(run(wide, A, B, add)[0], run(wide.clone(), A, B, add)[0])
    y = lowrank_adapter(x, A, B, scale=0.5)
    dy = torch.ones(1, dtype=dtype).expand(50, 30)  # as that of a sum is
    got = torch.autograd.grad(lowrank_adapter(x, A.requires_grad_(), B, scale=0.5), A, dy)[0]
    assert torch.equal(got, torch.autograd.grad(lowrank_adapter(x, A, B, scale=0.5), A, dy.clone())[0])
    assert y.dtype == dtype


def test_what_is_not_finite_stays_in_its_row():
    x = torch.randn(30, 64).bfloat16()
    A, B = torch.randn(8, 64), torch.randn(40, 8)
    want = lowrank_adapter(x, A, B)
    x[3, 5], x[20, 1] = float("nan"), float("inf")
    y = lowrank_adapter(x, A, B)
    rows = torch.ones(30, dtype=torch.bool)
    rows[[3, 20]] = False
    assert torch.equal(y[rows], want[rows])
    assert y[3].isnan().all() and not y[20].isfinite().any()


def test_rounding_to_bf16():
    """To nearest, ties to even, as torch rounds; beyond the range to infinity."""
    values = torch.tensor([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -1 - 2**-8, 3.4e38, 1e-40, 0.0])
    x, A, B = torch.ones(1, 1, dtype=BF16), torch.ones(1, 1), values.unsqueeze(1)
    assert torch.equal(lowrank_adapter(x, A, B)[0], values.bfloat16())


def test_equal_bits_whatever_the_number_of_threads():
    x, A, B = torch.randn(700, 512, requires_grad=True), torch.randn(16, 512), torch.randn(600, 16)
    A.requires_grad_(), B.requires_grad_()

    def run():
        y = lowrank_adapter(x, A, B)
        return [y, *torch.autograd.grad(y, [x, A, B], torch.ones_like(y))]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(2)
        two = run()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_reference_agrees():
    x, A, B = torch.randn(29, 70), torch.randn(8, 70), torch.randn(33, 8)
    with peft_fused.use_backend("torch"):
        torch.testing.assert_close(lowrank_adapter(x, A, B), lowrank_adapter_reference(x, A, B), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="for CPUs with AVX-512")
def test_on_a_cpu_with_avx2_alone():
    """All of the above in the code for AVX2, as torch chooses its own: in a process that has not chosen yet."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(
        command, env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]
    assert " passed, 1 skipped" in child.stdout  # this test alone
