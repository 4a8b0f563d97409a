"""The rows of a run, the check before it, the bytes it counts and the files it writes, on layers of a few kilobytes."""

import json
import math

import pytest
import torch
from peft_fused.bench import lowrank, roofline, run
from peft_fused.bench.benchmarks import grid
from peft_fused.bench.lowrank import CPU, CUDA, CompileBudget, verify
from peft_fused.bench.plot import plot
from peft_fused.bench.shapes import Shape, StructuredShape
from peft_fused.bench.timing import MODES
from peft_fused.bench.variants import Layer, saved_bytes
from peft_fused.bench.verify import WrongResult

CPU_DEVICE = torch.device("cpu")
SMALL = Shape(48, 40, 36, 4)
FIELDS = {
    "op", "shape", "r", "dtype", "dropout", "mode", "ratio_to_frozen", "ratio_to_peft", "ratio_to_addmm",
    "ratio_to_compiled", "ms_median", "ms_iqr", "path", "saved_bytes", "versions", "commit", "device",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    return list(run.run(CPU_DEVICE, "tiny", op="lowrank"))


def test_one_row_per_op_shape_and_mode(rows):
    found = [(row["op"], row["shape"], row["mode"]) for row in rows]
    assert sorted(found) == sorted(
        (op, shape.name, mode)
        for op in ("lora", "dylora")
        for shape in grid("cpu", "tiny", "lowrank")
        for mode in MODES
    )
    assert all(row.keys() >= FIELDS for row in rows)


def test_ratios_are_there_exactly_where_there_is_something_to_compare_with(rows):
    for row in rows:
        assert row["ratio_to_frozen"] > 0 and row["ratio_to_addmm"] > 0 and row["ms_median"]["ours"] > 0
        assert (row["ratio_to_peft"] is None) == (row["op"] == "dylora")
        assert row["ratio_to_compiled"] is None
        assert bool(row["skipped"]) == (row["op"] == "lora"), "a baseline left out needs a reason"
        assert "torch" in row["path"], "on a CPU the torch backend runs"


def test_files(rows, tmp_path):
    for attempt in range(2):  # the second run replaces the first
        for index, row in enumerate(rows):
            path = run.write(row, tmp_path / "new", first=index == 0)
            assert len(path.read_text().splitlines()) == index + 1, f"attempt {attempt}: a row is there once measured"
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    pictures = plot(rows, tmp_path)
    assert [path.name for path in pictures] == ["lora.png", "dylora.png", "peft.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size > 5000 for p in pictures)


def test_verify_accepts_what_is_right():
    errors = verify(lowrank.build(SMALL, CPU_DEVICE))
    assert set(errors) == {"fused", "dylora"}
    assert all(set(found) == {"delta", "dx", "dA", "dB"} for found in errors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["fused", "dylora"])
def test_verify_refuses_a_scale_off_by_two_percent(name, dtype):
    case = lowrank.build(Shape(48, 40, 36, 4, dtype), CPU_DEVICE)
    variant, base = case.layers[name], case.layers["frozen"]
    right = variant.call
    variant.call = lambda x: right(x) + 0.02 * (right(x) - base.call(x))
    with pytest.raises(WrongResult, match=name):
        verify(case)


def test_verify_refuses_a_wrong_gradient():
    case = lowrank.build(SMALL, CPU_DEVICE)
    case.layers["fused"].trainable[1].register_hook(lambda grad: 1.02 * grad)
    with pytest.raises(WrongResult, match="dB"):
        verify(case)


def test_verify_refuses_dropout_that_drops_nothing_or_does_not_rescale():
    shape = Shape(2048, 40, 36, 4, dropout=0.2)
    verify(lowrank.build(shape, CPU_DEVICE))
    case = lowrank.build(shape, CPU_DEVICE)
    for module in case.layers["fused"].call.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with pytest.raises(WrongResult, match="nothing is dropped"):
        verify(case)

    class Shrunk(torch.nn.Module):
        def __init__(self, layer, base):
            super().__init__()
            self.layer, self.base = layer, base

        def forward(self, x):
            y, base = self.layer(x), self.base(x)
            return base + 0.8 * (y - base) if self.training else y

    case = lowrank.build(shape, CPU_DEVICE)
    case.layers["fused"].call = Shrunk(case.layers["fused"].call, case.layers["frozen"].call)
    with pytest.raises(WrongResult, match="left on average"):
        verify(case)


def test_saved_bytes_count_each_storage_once_without_parameters_and_x():
    x = torch.randn(8, 5, requires_grad=True)
    weight = torch.randn(7, 5, requires_grad=True)

    def call(x):
        s = (x @ weight.t()).sigmoid()  # keeps its output, 8 x 7 floats
        return s * s.view(8, 7)  # the same storage again

    layer = Layer(call, x, torch.ones(8, 7), (weight,))
    assert saved_bytes(layer) == 8 * 7 * 4


def test_ours_saves_less_than_peft_under_dropout():
    case = lowrank.build(Shape(256, 64, 48, 4, dropout=0.1), CPU_DEVICE)
    ours, theirs = (saved_bytes(case.layers[name]) for name in ("fused", "peft"))
    assert 256 * 4 * 4 <= ours < theirs / 4


def test_compiling_is_left_out_with_a_reason_when_the_budget_is_spent():
    case = lowrank.build(SMALL, CPU_DEVICE)
    assert "spent" in lowrank.compile_peft(case, CompileBudget(0.0, everywhere=True))
    assert "part of this grid" in lowrank.compile_peft(case, CompileBudget(9.0, everywhere=False))
    assert "compiled" not in case.layers


def test_a_failing_compiler_is_a_reason_and_no_crash(monkeypatch):
    def broken(*args, **kwargs):
        def call(x):
            raise RuntimeError("no compiler here\nsecond line")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    case = lowrank.build(SMALL, CPU_DEVICE)
    budget = CompileBudget(10.0, everywhere=True)
    assert lowrank.compile_peft(case, budget) == "torch.compile failed: RuntimeError: no compiler here"
    assert "compiled" not in case.layers and budget.seconds < 10


def test_floor_is_bound_by_arithmetic_or_by_traffic():
    shape = Shape(1000, 100, 100, 0)
    slow_gemm = roofline.Ceilings(copy_gb_s=1e9, gemm_gflop_s={"float32": 1.0})
    assert roofline.floor_ms(shape, "forward", slow_gemm) == pytest.approx(2 * 1000 * 100 * 100 / 1e6)
    slow_copy = roofline.Ceilings(copy_gb_s=1.0, gemm_gflop_s={"float32": 1e12})
    assert roofline.floor_ms(shape, "forward", slow_copy) == pytest.approx(4 * (2 * 1000 * 100 + 100 * 100) / 1e6)


def test_measured_ceilings_are_plausible():
    found = roofline.measure(CPU_DEVICE, (torch.float32,), repeats=1)
    assert 0.1 < found.copy_gb_s < 1e5 and 0.1 < found.gemm_gflop_s["float32"] < 1e6


def test_grids_hold_the_shapes_the_project_reports_on():
    found = {(shape.name, shape.r, shape.dtype_name) for shape in CPU}
    assert {
        ("4096x768x768", 8, "fp32"), ("4096x768x3072", 8, "fp32"), ("512x4096x4096", 16, "fp32"),
        ("4096x768x768", 8, "bf16+fp32"), ("512x4096x4096", 16, "bf16+fp32"), ("4x32x32", 8, "fp32"),
    } <= found  # fmt: skip
    assert any(shape.dropout == 0.1 for shape in CPU) and any(shape.dropout == 0.1 for shape in CUDA)
    assert set(CPU) < set(grid("cpu", "all")) and set(grid("cuda", "default")) > set(CUDA)
    first = [isinstance(shape, StructuredShape) for shape in grid("cuda", "default")].index(True)
    assert 0 < first < len(CUDA), "a GPU's run, when cut short, has both families"


def test_device_names_become_folder_names():
    assert run.slug("NVIDIA H200, 2 threads") == "nvidia-h200-2-threads"
    assert run.slug(run.device_name(CPU_DEVICE))


def test_rows_are_json_without_nan(rows):
    assert all(math.isfinite(row["ratio_to_frozen"]) for row in rows)
    json.dumps(rows, allow_nan=False)
