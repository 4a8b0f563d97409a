"""The benchmark of AFLoRA: rows for every state of freezing, and wrong layers refused."""

import json

import pytest
import torch
from peft_fused.bench import aflora
from peft_fused.bench.rows import measure
from peft_fused.bench.shapes import Shape
from peft_fused.bench.timing import MODES
from peft_fused.bench.verify import WrongResult

CPU = torch.device("cpu")


def rows_of(shape, seconds):
    return [row for case in aflora.cases(shape, CPU) for row in measure(case, CPU, seconds=seconds).rows()]


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
def test_a_row_per_state_and_mode_with_what_is_kept(adapter):
    dtype = torch.float32 if adapter == torch.float32 else torch.bfloat16
    rows = rows_of(Shape(64, 32, 32, 4, dtype, adapter), 0.02)
    assert [(row["frozen"], row["mode"]) for row in rows] == [
        (frozen, mode) for frozen in ("", "A", "B", "AB") for mode in (*MODES, "step")
    ]
    json.dumps(rows, allow_nan=False)
    for row in rows:
        assert row["ratio_to_lora"] > 0 and row["rounds"] >= 5
        assert (row["ratio_to_baseline"] is None) == (row["frozen"] in ("A", "B") or row["mode"] == "step")
        kept_x = 0 if "A" in row["frozen"] else 64 * 32 * dtype.itemsize
        assert row["saved_bytes"]["ours"] == 64 * 4 * adapter.itemsize + kept_x
        assert row["saved_bytes"]["lora"] == 64 * 4 * adapter.itemsize + 64 * 32 * dtype.itemsize
    assert {row["mode"] for row in rows_of(Shape(8, 32, 16, 4), 0.01)} == set(MODES)


def test_a_wrong_layer_is_refused(monkeypatch):
    monkeypatch.setattr(aflora.AfLoraLinear, "forward", lambda layer, x: aflora.baseline(layer)(x) * 1.02)
    with pytest.raises(WrongResult, match="delta"):
        rows_of(Shape(64, 32, 32, 4), 0.01)
