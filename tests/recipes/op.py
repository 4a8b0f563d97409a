"""What a user of the recipe's op can do with it beyond what every op has to keep, run by tests/test_recipes.py."""

import pytest
import torch

import peft_fused
from peft_fused.cli.check import PATHS, check_one
from peft_fused.ops import projection, projection_adapter
from peft_fused.ops.cases import OPS

X, D, P = torch.randn(7, 12), torch.ones(12), torch.randn(10, 12)


def test_it_is_explained():
    ((name, path, against),) = peft_fused.explain(projection.projection_problem(X, D, P)).lines
    assert name == "projection [7, 12] -> [7, 10], float32 on cpu"
    assert path == "torch: Python autograd node"
    assert any("the op has no kernel of its own" in reason for reason in against)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"d must have shape \[K\]"):
        projection_adapter(X, torch.ones(3), P)
    with pytest.raises(TypeError, match=r"d must be a torch\.Tensor, got int"):
        projection_adapter(X, 1, P)


def test_peft_fused_check_finds_it_right():
    rows = [
        check_one("projection", OPS["projection"], path, torch.float32, torch.float32, "cpu")
        for path in PATHS
        if path.backend in ("reference", "torch")
    ]
    assert [row["status"] for row in rows] == ["ok", "cannot run", "ok"]
    assert all(all(row["controls"].values()) for row in rows if row["status"] == "ok")
