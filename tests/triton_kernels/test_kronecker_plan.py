"""Plans of the Kronecker kernels: pure functions of the problem."""

import subprocess
import sys
from dataclasses import replace
from itertools import combinations

import pytest
from peft_fused.triton_kernels import kronecker_plan as plans
from peft_fused.triton_kernels.kronecker_plan import (
    LARGE,
    MEDIUM,
    SHAPES,
    SMALL,
    KroneckerProblem,
    backward_passes,
    configurations,
    constexprs,
    forward_launch,
    kernel_configs,
    limits,
)
from peft_fused.triton_kernels.problem import Gpu
from peft_fused.triton_kernels.tiles import DTYPES

PROBLEM = KroneckerProblem(4096, 64, 64, 64, 64, "bfloat16", "bfloat16", Gpu("Some GPU", 132, LARGE))
TYPES = [(dtype, factor) for dtype in DTYPES for factor in dict.fromkeys((dtype, "float32"))]


def on(shared_memory, **changes):
    return replace(PROBLEM, gpu=Gpu("Some GPU", 132, shared_memory), **changes)


@pytest.mark.parametrize("table", [plans.FORWARD, plans.BACKWARD])
def test_every_gpu_has_a_tile(table):
    """Tiles are tried in their order: those for more shared memory first, and last one for all GPUs."""
    for sizes in table.values():
        for tiles in sizes.values():
            needs = [tile.shared_memory for tile in tiles]
            assert needs == sorted(needs, reverse=True) and needs[-1] == SMALL


def test_tiles_are_smaller_where_there_is_less_shared_memory():
    sizes = dict.fromkeys(("a1", "a2", "b1", "b2"), 128)
    assert [forward_launch(on(shared, **sizes)).block_a1 for shared in (SMALL, MEDIUM, LARGE)] == [64, 128, 128]
    # One byte less than a tile takes is too little.
    assert forward_launch(on(MEDIUM - 1, **sizes)).block_a1 == 64


def test_gradients_are_taken_together_where_their_operands_fit():
    everything = frozenset("xAB")
    groups = [[group for group, _ in backward_passes(on(shared), everything)] for shared in (SMALL, MEDIUM, LARGE)]
    assert groups == [[{"x"}, {"A", "B"}], [{"x"}, {"A", "B"}], [{"x", "A", "B"}]]


@pytest.mark.parametrize("shape", SHAPES)
def test_passes_share_the_gradients_out(shape):
    needs = [frozenset(found) for count in (1, 2, 3) for found in combinations("xAB", count)]
    for dtype, factor in TYPES:
        if limits(*shape, dtype, factor):
            continue
        for shared_memory in (SMALL, MEDIUM, LARGE):
            problem = KroneckerProblem(100, *shape, dtype, factor, Gpu("", 132, shared_memory))
            for need in needs:
                groups = [group for group, _ in backward_passes(problem, need)]
                assert all(groups) and frozenset().union(*groups) == need and sum(map(len, groups)) == len(need)
                for group, launch in backward_passes(problem, need):
                    # dx sums over all columns of dY, which one program has to have.
                    assert "x" not in group or launch is None or launch.block_a1 >= problem.a1


def test_compiled_configurations_are_all_that_plans_give():
    """The compile tests see every kernel of another number of rows or of multiprocessors."""
    for shared_memory in (SMALL, MEDIUM, LARGE):
        known = set(configurations(Gpu("", 132, shared_memory)))
        for shape in SHAPES:
            for dtype, factor in TYPES:
                for m, sm_count in ((1, 132), (17, 20), (10**6, 188)):
                    if not limits(*shape, dtype, factor):
                        problem = KroneckerProblem(m, *shape, dtype, factor, Gpu("Other", sm_count, shared_memory))
                        assert set(kernel_configs(problem)) <= known, problem


def test_rows_change_the_grid_alone():
    few, many = (forward_launch(replace(PROBLEM, m=m)) for m in (1, 10**6))
    assert constexprs(PROBLEM, few) == constexprs(PROBLEM, many) and few.grid != many.grid


def test_needs_neither_torch_nor_triton():
    folder = plans.__file__.rsplit("/", 1)[0]
    code = (
        "import sys; sys.modules.update(torch=None, triton=None);"
        "sys.path.insert(0, sys.argv[1]); import importlib;"
        "importlib.import_module(sys.argv[2] + '.kronecker_plan').configurations()"
    )
    subprocess.run([sys.executable, "-P", "-c", code, *folder.rsplit("/", 1)], check=True)
