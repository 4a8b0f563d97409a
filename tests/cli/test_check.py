"""`check` passes what is right, catches what is wrong, and never calls green what did not run."""

from dataclasses import replace

import pytest
import torch

from peft_fused.cli import check
from peft_fused.ops import lowrank_linear, native
from peft_fused.ops.cases import make_case


def few_cases(op, dtype, adapter_dtype, device):
    make = dict(dtype=dtype, adapter_dtype=adapter_dtype, device=device, base=False)
    yield make_case(op, 67, 96, 80, 8, **make)
    yield make_case(op, 53, 40, 24, 6, uv=True, rank=4, **make)


@pytest.fixture
def small(monkeypatch):
    """Both ops with two cases in fp32 and bf16 + fp32."""
    monkeypatch.setattr(check, "DTYPES", check.DTYPES[:2])
    for name, entry in check.OPS.items():
        monkeypatch.setitem(check.OPS, name, replace(entry, cases=few_cases))


def by_status(rows):
    found = {}
    for row in rows:
        found.setdefault(row["status"], []).append(row)
    return found


def test_every_combination_is_listed_and_what_ran_is_right(cli, small):
    result = cli.json("check")
    rows = result["rows"]
    assert len({(row["op"], row["path"], row["dtype"]) for row in rows}) == len(rows) == 2 * len(check.PATHS) * 2
    found = by_status(rows)
    assert "wrong" not in found and result["ok"] == len(found["ok"]) and result["wrong"] == 0
    assert {row["path"] for row in found["ok"]} >= {"reference", "torch, Python node"}
    for row in found["ok"]:
        assert row["cases"] == 2 and row["worst"]["ratio"] <= 1
        assert row["controls"] == {"scale x 1.02": True, "one rank dropped": True}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_what_cannot_run_says_why_and_is_not_counted_as_right(cli, small):
    found = by_status(cli.json("check")["rows"])["cannot run"]
    assert {row["path"] for row in found} >= {"cuda"}
    for row in found:
        assert row["reasons"] and row["cases"] == 0 and row["worst"] is None and row["controls"] is None
    text = cli("check").stdout
    assert "CUDA kernels need a CUDA device" in text and "cannot run here and are not checked" in text


def test_without_the_extension_its_node_cannot_run(cli, small, monkeypatch):
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "why_missing", "taken away")
    rows = [row for row in cli.json("check")["rows"] if row["path"] == "torch, C++ node"]
    assert len(rows) == 4
    assert all(row["status"] == "cannot run" and "C++ extension: taken away" in row["reasons"] for row in rows)


def scaled(*args, scale, **options):
    return lowrank_linear(*args, scale=scale * 1.02, **options)


class WrongB(torch.autograd.Function):
    @staticmethod
    def forward(ctx, B):
        return B.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.02


def wrong_gradient(*args, B, **options):
    return lowrank_linear(*args, B=WrongB.apply(B), **options)


def broken(*args, **options):
    raise RuntimeError("illegal instruction\nand more")


def not_a_number(*args, **options):
    return lowrank_linear(*args, **options) * float("nan")


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (scaled, "beyond twice the error of plain PyTorch: y at"),
        (wrong_gradient, "beyond twice the error of plain PyTorch: B at"),
        (not_a_number, "beyond twice the error of plain PyTorch: y at"),
        (broken, "RuntimeError: illegal instruction"),
    ],
)
def test_a_wrong_op_is_caught(cli, small, monkeypatch, fn, reason):
    monkeypatch.setitem(check.OPS, "lowrank_linear", replace(check.OPS["lowrank_linear"], fn=fn))
    result = cli.json("check", code=1)
    rows = [row for row in result["rows"] if row["op"] == "lowrank_linear" and row["status"] != "cannot run"]
    assert rows and all(row["status"] == "wrong" for row in rows)
    assert all(any(text.startswith(reason) for text in row["reasons"]) for row in rows)
    assert not [row for row in result["rows"] if row["op"] == "lowrank" and row["status"] == "wrong"]


def test_a_control_that_passes_fails_the_check(cli, small, monkeypatch):
    """A judgement that accepts everything must not come out green."""
    blind = check.compare
    monkeypatch.setattr(check, "compare_mutated", lambda fn, reference, case: {"blind": blind(fn, reference, case)})
    result = cli.json("check", code=1)
    assert result["ok"] == 0
    assert all(
        "the control 'blind' passed: this check would not see a wrong result" in row["reasons"]
        for row in result["rows"]
        if row["status"] == "wrong"
    )


def test_the_table_merges_types_that_cannot_run_and_keeps_the_others_apart():
    row = {"op": "a", "path": "p", "dtype": "x", "status": "cannot run", "reasons": ["r"]}
    rows = [row, row | {"dtype": "y"}, row | {"dtype": "z", "reasons": ["s"]}, row | {"status": "ok"}]
    assert [r["dtype"] for r in check._merged(rows)] == ["x\ny", "z", "x"]


def test_the_full_set_reaches_every_base_product():
    """The small cases stay below the size at which the base product changes hands."""
    from peft_fused.ops import dispatch

    cases = list(check.OPS["lowrank_linear"].cases("lowrank_linear", torch.float32, torch.float32, "cpu"))
    sizes = [case.tensors["x"].numel() * case.tensors["B"].shape[-2] for case in cases]
    assert min(sizes) < dispatch.ONEDNN_LEAST < max(sizes)
    assert any(case.tensors["weight"].any() for case in cases), "a zero base weight hides a wrong base product"
