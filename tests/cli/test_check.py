"""`check` passes what is right, catches what is wrong, and never calls green what did not run."""

from dataclasses import replace
from itertools import islice

import pytest
import torch

from peft_fused.cli import check
from peft_fused.ops import dispatch, lowrank_linear, native, structured
from peft_fused.ops.bottleneck import BOTTLENECK_ACTIVATIONS
from peft_fused.ops.cases import make_bottleneck, make_lowrank, make_structured
from peft_fused.ops.structured.engine import STRUCTURES

# Those of all ops, before a test takes others.
CASES = {op: entry.cases for op, entry in check.OPS.items()}


def few_cases(op, dtype, adapter_dtype, device):
    make = dict(dtype=dtype, adapter_dtype=adapter_dtype, device=device)
    if op in STRUCTURES:
        sizes = {"toeplitz": (12, 9), "kronecker": (3, 2, 4, 5), "ldr": (2, 12)}.get(op, (12,))
        yield make_structured(op, 67, *sizes, **make)
        yield make_structured(op, 53, *sizes, dropout_p=0.3, seed=5, add=True, **make)
    elif op == "bottleneck":
        yield make_bottleneck(67, 96, 80, 8, **make)
        yield make_bottleneck(54, 40, 40, 6, experts=(3, 3), expert=torch.tensor([2, 0]), residual="h", **make)
    elif op not in ("lowrank_linear", "lowrank"):
        yield from islice(CASES[op](op, **make), 2)
    else:
        yield make_lowrank(op, 67, 96, 80, 8, base=False, **make)
        yield make_lowrank(op, 53, 40, 24, 6, uv=True, rank=4, base=False, **make)


@pytest.fixture
def small(monkeypatch):
    """Every op with two cases in fp32 and bf16 + fp32."""
    monkeypatch.setattr(check, "DTYPES", check.DTYPES[:2])
    for name, entry in check.OPS.items():
        monkeypatch.setitem(check.OPS, name, replace(entry, cases=few_cases))


def by_status(rows):
    found = {}
    for row in rows:
        found.setdefault(row["status"], []).append(row)
    return found


def defects_of(op):
    """The names of those that its entry makes of its control, and the scale's, which is one of every op."""
    entry = check.OPS[op]
    return {"scale x 1.02", *entry.mutations(entry.control(op, torch.float32, torch.float32, "cpu"))}


def test_every_combination_is_listed_and_what_ran_is_right(cli, small):
    result = cli.json("check")
    rows = result["rows"]
    assert (
        len({(row["op"], row["path"], row["dtype"]) for row in rows})
        == len(rows)
        == 2 * len(check.PATHS) * len(check.OPS)
    )
    found = by_status(rows)
    assert "wrong" not in found and result["ok"] == len(found["ok"]) and result["wrong"] == 0
    assert {row["path"] for row in found["ok"]} >= {"reference", "torch, Python node"}
    defects = {op: defects_of(op) for op in check.OPS}
    for row in found["ok"]:
        assert row["cases"] == 2 and row["worst"]["ratio"] <= 1
        assert len(defects[row["op"]]) > 1 and row["controls"] == dict.fromkeys(defects[row["op"]], True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_what_cannot_run_says_why_and_is_not_counted_as_right(cli, small):
    found = by_status(cli.json("check")["rows"])["cannot run"]
    assert {row["path"] for row in found} >= {"cuda"}
    for row in found:
        assert row["reasons"] and row["cases"] == 0 and row["worst"] is None and row["controls"] is None
    text = cli("check").stdout
    assert "CUDA kernels need a CUDA" in text and "cannot run here and are not checked" in text
    assert "cannot run: cuda (lowrank_linear: float32, bfloat16+float32; " in text


def test_without_the_extension_its_node_cannot_run(cli, small, monkeypatch):
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "why_missing", "taken away")
    rows = [row for row in cli.json("check")["rows"] if row["path"] == "torch, C++ node"]
    assert len(rows) == 2 * len(check.OPS)
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


def test_a_structured_map_off_by_one_entry_is_caught(cli, small, monkeypatch):
    def rolled(x, c, **options):
        return structured.circulant_matmul(x, c.roll(1), **options)

    monkeypatch.setitem(check.OPS, "circulant", replace(check.OPS["circulant"], fn=rolled))
    rows = [row for row in cli.json("check", code=1)["rows"] if row["status"] == "wrong"]
    assert rows and {row["op"] for row in rows} == {"circulant"}


def test_a_map_without_a_cpp_node_does_not_count_as_run_by_it():
    """The Python node would be checked twice under two names."""
    problem = check.OPS["ldr"].problem(next(few_cases("ldr", torch.float32, torch.float32, "cpu")))
    by_name = {path.name: path.why_not(problem) for path in check.PATHS}
    assert by_name["torch, C++ node"] and not by_name["torch, Python node"]


def test_a_control_that_passes_fails_the_check(cli, small, monkeypatch):
    """A judgement that accepts everything must not come out green."""
    blind = check.compare
    monkeypatch.setattr(check, "compare_mutated", lambda fn, reference, case: {"blind": blind(fn, reference, case)[0]})
    result = cli.json("check", code=1)
    assert result["ok"] == 0
    assert all(
        "the control 'blind' passed: this check would not see a wrong result" in row["reasons"]
        for row in result["rows"]
        if row["status"] == "wrong"
    )


def test_a_reason_is_told_once_for_all_that_it_is_true_of():
    row = {"op": "a", "path": "p", "dtype": "x", "status": "cannot run", "reasons": ["r"]}
    others = [{"dtype": "y"}, {"dtype": "z", "reasons": ["s"]}, {"op": "b"}, {"status": "ok"}]
    found = check._by_reason([row, *(row | other for other in others)], "cannot run")
    assert found == {("p", ("r",)): {"a": ["x", "y"], "b": ["x"]}, ("p", ("s",)): {"a": ["z"]}}


def test_the_full_set_reaches_every_base_product():
    """The small cases stay below the size at which the base product changes hands."""
    cases = list(check.OPS["lowrank_linear"].cases("lowrank_linear", torch.float32, torch.float32, "cpu"))
    sizes = [case.tensors["x"].numel() * case.tensors["B"].shape[-2] for case in cases]
    assert min(sizes) < dispatch.ONEDNN_LEAST < max(sizes)
    assert any(case.tensors["weight"].any() for case in cases), "a zero base weight hides a wrong base product"


@pytest.mark.parametrize("op", check.OPS)
def test_a_verdict_names_its_case(op):
    names = [case.name for case in check.OPS[op].cases(op, torch.float32, torch.float32, "cpu")]
    assert len(set(names)) == len(names) > 1


def test_the_bottleneck_cases_reach_every_option_and_defect():
    entry = check.OPS["bottleneck"]
    assert defects_of("bottleneck") == {
        "scale x 1.02", "one unit dropped", "down_bias dropped", "up_bias dropped", "activation derivative missing",
        "wrong expert of down", "wrong expert of up",
    }  # fmt: skip
    cases = list(entry.cases("bottleneck", torch.float32, torch.float32, "cpu"))
    assert {case.options.get("activation", "gelu") for case in cases} == set(BOTTLENECK_ACTIVATIONS)
    assert {entry.problem(case).groups for case in cases} == {1, 2, 5, 6}
    assert {case.tensors["residual"] is None for case in cases} == {True, False}
    assert any(case.tensors["down_bias"] is None for case in cases)
    assert any(not case.tensors["h"].is_contiguous() for case in cases)
    for case in cases:
        assert case.call(entry.reference).shape == (case.input.shape[0], case.outputs)


@pytest.mark.parametrize("op", ["lowrank_linear", "lowrank"])
def test_a_rank_is_dropped_of_the_lowrank_ops(op):
    assert defects_of(op) == {"scale x 1.02", "one rank dropped"}


@pytest.mark.parametrize("op", STRUCTURES)
def test_the_structured_cases_reach_every_method_and_option(op):
    entry = check.OPS[op]
    assert defects_of(op) == {"scale x 1.02", "one entry zeroed"}
    cases = list(entry.cases(op, torch.float32, torch.float32, "cpu"))
    problems = [entry.problem(case) for case in cases]
    methods = {"kronecker": {"gemm"}, "toeplitz_product": {"fft"}, "ldr": {"fft"}}.get(op, {"dense", "fft"})
    assert {problem.plan.method for problem in problems} == methods
    options = {name for case in cases for name in (*case.options, *case.tensors)}
    assert options >= {"scale", "dropout_p", "seed", "transposed", "add"}
    assert any(not case.tensors["x"].is_contiguous() for case in cases)
    for case in cases:
        assert case.call(entry.reference).shape[-1] == case.outputs
