"""What a user of the recipe's op can do with it, run by tests/test_recipes.py."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import peft_fused
from peft_fused.cli.check import OPS, PATHS, check_one
from peft_fused.ops import projection, projection_adapter, projection_adapter_reference
from peft_fused.ops.cases import make_projection


def results(fn, case):
    y = case.call(fn)
    return [y, *torch.autograd.grad(y.square().sum(), [case.tensors[name] for name in case.wrt])]


@pytest.mark.parametrize("scale", [0.5, torch.tensor(0.5)])
def test_the_backends_agree_eagerly_and_compiled(scale):
    case = make_projection(7, 12, 10, add=True, scale=scale)
    want = results(projection_adapter_reference, case)
    for backend in (None, "torch", "reference"):
        with peft_fused.use_backend(backend):
            torch.testing.assert_close(results(projection_adapter, case), want)
    compiled = torch.compile(projection_adapter, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, case), want)


def test_it_is_explained():
    case = make_projection(7, 12, 10)
    ((name, path, against),) = peft_fused.explain(
        projection.projection_problem(case.tensors["x"], case.tensors["P"])
    ).lines
    assert name == "projection [7, 12] -> [7, 10], float32 on cpu"
    assert path == "torch: Python autograd node, one GEMM"
    assert any("projection has no kernel of its own" in reason for reason in against)


def test_bad_input_is_named():
    case = make_projection(7, 12, 10)
    x, P = case.tensors["x"], case.tensors["P"]
    with pytest.raises(ValueError, match=r"d must have shape \[K\]"):
        projection_adapter(x, torch.ones(3), P)
    with pytest.raises(TypeError, match=r"d must be a torch\.Tensor, got int"):
        projection_adapter(x, 1, P)


def test_peft_fused_check_finds_it_right():
    rows = [
        check_one("projection", OPS["projection"], path, torch.float32, torch.float32, "cpu")
        for path in PATHS
        if path.backend in ("reference", "torch")
    ]
    assert [row["status"] for row in rows] == ["ok", "cannot run", "ok"]
    assert all(all(row["controls"].values()) for row in rows if row["status"] == "ok")


def test_its_arithmetic_is_counted():
    import peft_fused.ops.flops  # noqa: F401

    case = make_projection(7, 12, 10)
    with FlopCounterMode(display=False) as mode:
        results(projection_adapter, case)
    assert mode.get_total_flops() == 3 * 2 * 7 * 12 * 10
