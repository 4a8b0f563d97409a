"""The rows of AdaMix's benchmark, and the check before it, on layers of a few kilobytes."""

import json

import pytest
import torch
from peft_fused.bench import adamix, run
from peft_fused.bench.benchmarks import grid
from peft_fused.bench.plot import plot
from peft_fused.bench.rows import measure
from peft_fused.bench.shapes import Shape
from peft_fused.bench.timing import MODES, STEP
from peft_fused.bench.verify import WrongResult

CPU = torch.device("cpu")
SMALL = Shape(64, 24, 24, 4, op="adamix")


@pytest.fixture(scope="module")
def rows():
    return list(run.run(CPU, "tiny", op="adamix"))


def test_one_row_per_kind_number_of_experts_and_mode(rows):
    found = [(row["kind"], row["experts"], row["mode"]) for row in rows]
    expected = [(k, e, m) for k in adamix.KINDS for e in adamix.EXPERTS for m in (*MODES, STEP)]
    assert found == expected
    for row in rows:
        assert row["ratio_to_one"] > 0 and row["ratio_to_baseline"] > 0 and row["rounds"] >= 5
        assert row["ratio_to_one"] == 1 or row["experts"] > 1
        assert max(row["error_vs_reference"].values()) < 1e-4
        assert ("lowrank_linear" if row["kind"] == "lora" else "bottleneck") in row["path"]
    json.dumps(rows, allow_nan=False)


def test_plot(rows, tmp_path):
    (path,) = plot(rows, tmp_path)
    assert path.name == "adamix.png" and path.read_bytes().startswith(b"\x89PNG")


def test_rectangular_layers_have_no_steps():
    rows = [row for case in adamix.cases(Shape(64, 24, 16, 4), CPU) for row in measure(case, CPU, seconds=0.0).rows()]
    assert {row["mode"] for row in rows} == set(MODES)


@pytest.mark.parametrize("kind", adamix.KINDS)
def test_a_wrong_expert_is_no_result(kind, monkeypatch):
    base = torch.nn.Linear(24, 24)
    x, dy = torch.randn(64, 24, requires_grad=True), torch.randn(64, 24)
    layer = adamix._layer(base, SMALL, kind, 4)
    assert max(adamix.verify(layer, x, dy, SMALL).values()) < 1e-5
    first = adamix.write_routes
    monkeypatch.setattr(adamix, "write_routes", lambda states, values: first(states, [((0, 0), (0, 0))]))
    with pytest.raises(WrongResult, match="adamix"):
        adamix.verify(layer, x, dy, SMALL)


def test_the_grids_hold_the_shape_that_is_reported_on():
    for device in ("cpu", "cuda"):
        assert {"adamix", "aflora"} <= {shape.op for shape in grid(device, "default")}
    assert any((s.m, s.k, s.n) == (4096, 768, 768) for s in grid("cpu", "default", "adamix"))
