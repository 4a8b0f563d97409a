"""Plans of convolutions: pure functions of the problem."""

import math
import subprocess
import sys

import pytest
from peft_fused.triton_kernels import fft_plan as plans
from peft_fused.triton_kernels.fft_plan import (
    MAX_LENGTH,
    configurations,
    cost_of,
    cyclic_length,
    direct,
    factors_of,
    next_length,
    padded_factors,
    plan_convolution,
)
from peft_fused.triton_kernels.problem import Gpu
from peft_fused.triton_kernels.tiles import cdiv


def test_widths_of_models_need_no_longer_length():
    for n in (384, 768, 1000, 1024, 1536, 2048, 2304, 2560, 3072, 4096, 5120, 6144, 7168, 8192):
        assert direct(n) and cyclic_length(n) == n
    assert not direct(0) and not direct(509) and not direct(11008) and not direct(14336)


def test_factors_multiply_to_the_length_and_fit_the_tile():
    for n in range(1, MAX_LENGTH + 1):
        factors = factors_of(n)
        if factors is None:
            continue
        padded = padded_factors(factors)
        assert math.prod(factors) == n
        small = factors[0] in (3, 4) and factors[1] > 1
        sizes = (padded[0] == factors[0], *(p in (1, 16, 32, 64) for p in padded[1:]))
        assert all(p >= f for f, p in zip(factors, padded, strict=True))
        assert all(sizes) if small else all(p in (1, 16, 32, 64) for p in padded)
        assert padded[2] >= 16 and padded[1] in (1, 16)
        assert math.prod(padded) <= (64 if padded[0] == 1 else 2048 if small else MAX_LENGTH)


def test_a_length_costs_what_it_should():
    """By the instructions of code for sm_90, a length up to 2,048 at most 0.52 of 4,096; without padding its share."""
    assert cost_of(1536) <= 0.39 * cost_of(4096) and math.prod(padded_factors(factors_of(1536))) == 1536
    for n in (1000, 1280, 1792, 2048):
        assert cost_of(n) <= 0.52 * cost_of(4096) and math.prod(padded_factors(factors_of(n))) == 2048
    lengths = [next_length(n) for n in range(1, MAX_LENGTH + 1)]
    costs = [cost_of(length) for length in lengths]
    # Of embeddings, which may be of any length: a longer one costs no less.
    assert costs == sorted(costs)
    assert max(costs[:2048]) < 0.52 * cost_of(4096) and max(costs[:1024]) < 0.19 * cost_of(4096)


def test_next_length_holds_a_linear_convolution():
    for n in range(1, MAX_LENGTH + 1):
        length = next_length(n)
        assert n <= length <= max(64, 1.2 * n + 16) and direct(length)
    assert [next_length(n) for n in (1535, 2047, 8191)] == [1536, 2048, 8192]


def test_any_width_of_half_the_longest_has_a_length():
    for n in range(1, MAX_LENGTH // 2 + 1):
        assert cyclic_length(n) == n or cyclic_length(n) >= 2 * n - 1


def test_leading_rows_hold_the_columns():
    for n_in, n_out, length in ((384, 700, 1536), (4096, 4000, 8192), (8192, 8192, 8192), (5, 7, 7), (768, 768, 768)):
        for precision in ("half", "split"):
            for backward in (False, True):
                plan = plan_convolution(100, n_in, n_out, length, precision, backward=backward)
                rest = plan.factors[1] * plan.factors[2]
                assert plan.rows_in * rest >= n_in and plan.blocks_out * plan.rows_out * rest >= n_out
                assert plan.padded[0] % plan.band == 0 and (plan.rows_in % plan.band == 0 or plan.rows_in < plan.band)
                assert (plan.programs > 0) == backward
                assert not plan.fused or plan.band == plan.padded[0] or plan.padded[0] < 16


def test_a_chain_holds_all_frequencies_at_once():
    found = [
        plan_convolution(64, n, n, length, precision, n_mid=n)
        for length in range(1, MAX_LENGTH + 1, 13) if direct(length)
        for n in (length, (length + 1) // 2)
        for precision in ("half", "split")
    ]  # fmt: skip
    assert all(plan.band == plan.padded[0] for plan in found if plan.chained)
    assert {plan.chained for plan in found if plan.padded[0] < 16 < plan.points} == {True, False}


def test_half_of_a_toeplitz_embedding_is_skipped():
    plan = plan_convolution(64, 4096, 4096, 8192, "half")
    assert plan.padded[0] == 32 and plan.rows_in == plan.rows_out == 16


def test_rows_are_bucketed_by_powers_of_two():
    options = dict(n_in=768, n_out=768, length=768, precision="half", backward=True)
    assert plan_convolution(2049, **options) == plan_convolution(4096, **options)
    assert plan_convolution(8, **options) != plan_convolution(4096, **options)


def test_no_more_programs_than_tiles():
    for m in (1, 3, 64, 10**6):
        for n in (7, 768, 4096):
            plan = plan_convolution(m, n, n, n, "split", backward=True, gpu=Gpu("", 7))
            assert 1 <= plan.programs <= min(14, cdiv(m, plan.pairs) + 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((4, 509, 509, 509, "half"), "509"),
        ((4, 800, 768, 768, "half"), "800"),
        ((4, 768, 768, 768, "double"), "double"),
        ((4, 16384, 16384, 16384, "half"), "16384"),
    ],
)
def test_unsupported_problems_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_convolution(*arguments)


@pytest.mark.parametrize("least", [0, MAX_LENGTH + 1])
def test_lengths_out_of_range_raise(least):
    with pytest.raises(ValueError, match="length"):
        next_length(least)


def test_configurations_are_distinct():
    found = configurations()
    assert len(found) == len(set(found))
    assert {config.kernel for config in found} == {"convolve_kernel", "backward_kernel"}


def test_needs_neither_torch_nor_triton():
    folder = plans.__file__.rsplit("/", 1)[0]
    code = (
        "import sys; sys.modules.update(torch=None, triton=None);"
        "sys.path.insert(0, sys.argv[1]); import importlib;"
        "importlib.import_module(sys.argv[2] + '.fft_plan').configurations()"
    )
    subprocess.run([sys.executable, "-P", "-c", code, *folder.rsplit("/", 1)], check=True)
