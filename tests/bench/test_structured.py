"""The structured benchmark: forced methods are what they say, wrong variants are refused, rows and files."""

import functools
import json

import pytest
import torch
from peft.tuners.c3a.utils import BlockCircularConvolution
from peft_fused.bench import plot as plots
from peft_fused.bench import run, structured
from peft_fused.bench.benchmarks import OPS, grid
from peft_fused.bench.shapes import StructuredShape
from peft_fused.bench.timing import MODES
from peft_fused.bench.verify import WrongResult

from peft_fused.ops import structured as ops
from peft_fused.ops.structured.engine import STRUCTURES

CPU_DEVICE = torch.device("cpu")
FIELDS = {
    "op", "shape", "dtype", "mode", "ratio_to_baseline", "ratio_to_c3a", "ratio_to_dense", "plan", "fft_over_dense",
    "ms_median", "ms_iqr", "rounds", "path", "saved_bytes", "skipped", "versions", "commit", "device", "floor_ms",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return [row for op in STRUCTURES for row in run.run(CPU_DEVICE, "tiny", op=op)]


def test_one_row_per_op_and_mode(rows):
    found = [(row["op"], row["shape"], row["mode"]) for row in rows]
    assert sorted(found) == sorted((shape.op, shape.name, mode) for shape in structured.TINY for mode in MODES)
    assert {shape.op for shape in structured.TINY} == {shape.op for shape in structured.CPU} == set(STRUCTURES)
    assert all(row.keys() >= FIELDS for row in rows)
    json.dumps(rows, allow_nan=False)


def test_ratios_are_there_exactly_where_there_is_something_to_compare_with(rows):
    for row in rows:
        assert row["ratio_to_baseline"] > 0 and row["floor_ms"] > 0
        assert (row["ratio_to_c3a"] is None) == (row["op"] != "circulant")
        assert (row["ratio_to_dense"] is None) == (row["op"] in ("toeplitz_product", "ldr"))
        assert (row["fft_over_dense"] is None) == (row["op"] in ("toeplitz_product", "ldr", "kronecker"))


def test_grids_split_by_op():
    everything = grid("cpu", "default")
    by_op = [shape for op in OPS for shape in grid("cpu", "default", op)]
    assert sorted(map(str, everything)) == sorted(map(str, by_op))
    sizes = {shape.sizes for shape in grid("cpu", "default", "circulant") if shape.dtype == torch.float32}
    assert {(768,), (3072,)} <= sizes, "the sizes that the project reports on"


def test_forced_methods_run_what_they_say(monkeypatch):
    ran = []

    def noted(method, name, original, *arguments, **options):
        ran.append((method, name))
        return original(*arguments, **options)

    for method, module in {"fft": ops.engine.fft, "dense": ops.engine.materialized}.items():
        for name in ("forward", "backward"):
            monkeypatch.setattr(module, name, functools.partial(noted, method, name, getattr(module, name)))
    case = structured.build(StructuredShape("circulant", 5, (12,)), CPU_DEVICE)
    for method in ("fft", "dense"):
        ran.clear()
        case.layers[f"ours_{method}"].gradients()
        assert ran == [(method, "forward"), (method, "backward")]
    assert ops.plan_structured(case.problem) == case.problem.plan, "the choice is put back"


@pytest.mark.parametrize("shape", structured.TINY, ids=lambda shape: shape.op)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_variant_is_verified(shape, dtype):
    shape = StructuredShape(shape.op, shape.m, shape.sizes, dtype)
    errors = structured.verify(structured.build(shape, CPU_DEVICE))
    assert set(errors) >= {"ours", "baseline"}
    for name in set(errors):
        case = structured.build(shape, CPU_DEVICE)
        right = case.layers[name].call
        case.layers[name].call = lambda x, right=right: 1.02 * right(x)
        with pytest.raises(WrongResult, match=f"{name} of {shape.op}"):
            structured.verify(case)


def test_a_wrong_gradient_is_refused():
    case = structured.build(structured.TINY[0], CPU_DEVICE)
    case.layers["ours"].trainable[0].register_hook(lambda grad: 1.02 * grad)
    with pytest.raises(WrongResult, match="c 2"):
        structured.verify(case)


def test_c3a_is_still_wrong_in_the_gradient_that_is_not_compared():
    """Once this fails, PEFT has repaired it and C3A.unchecked has to go."""
    x, w = torch.randn(2, 5, dtype=torch.float64, requires_grad=True), torch.randn(1, 1, 5, dtype=torch.float64)
    assert not torch.autograd.gradcheck(lambda x: BlockCircularConvolution.apply(x, w), x, raise_exception=False)


def test_dense_products_that_take_too_long_are_left_out_with_a_reason(monkeypatch):
    monkeypatch.setitem(structured.DENSE_LIMIT, "cpu", 10)
    case = structured.build(structured.TINY[0], CPU_DEVICE)
    assert not {"dense", "ours_dense"} & set(case.layers) and case.skipped["dense"]


def test_a_picture_per_op_without_empty_panels(rows, tmp_path, monkeypatch):
    panels = []
    real = plots._panel
    monkeypatch.setattr(plots, "_panel", lambda axis, *rest: panels.append(axis) or real(axis, *rest))
    written = plots.plot(rows, tmp_path)
    assert [path.stem for path in written] == [*STRUCTURES, "peft"]
    assert all(path.stat().st_size > 5000 for path in written)
    assert len(panels) == 3 * len(STRUCTURES) + 1, "forward, backward and both of each, and C3A in the headline"
    for axis in panels:
        shown = [text.get_text() for text in axis.get_legend().get_texts()]
        assert shown == [points.get_label() for points in axis.collections] and len(axis.collections) > 0
        assert all(len(points.get_offsets()) for points in axis.collections)
