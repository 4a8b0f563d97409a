"""`peft-fused check`: is every op right on this machine, forward and backward, on every backend that can run here?"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product

import torch
import typer

from peft_fused.ops import dispatch, native
from peft_fused.ops.accuracy import compare, compare_mutated
from peft_fused.ops.cases import DTYPES, OPS, OpCases
from peft_fused.triton_kernels.problem import Problem

from .output import out, print_json, progress, show, torch_device


@dataclass(frozen=True)
class Path:
    """One way to run an op: a backend under an autograd node."""

    name: str
    backend: str
    native: bool

    def why_not(self, problem: Problem) -> list[str]:
        reasons = dispatch.why_not(self.backend, problem)
        if self.backend == "torch" and self.native:
            if native.module is None:
                reasons.append(f"C++ extension: {native.why_missing}")
            elif not problem.native("torch"):
                reasons.append("no C++ node takes it")
        return reasons

    def forced(self) -> AbstractContextManager:
        return dispatch.use_backend(self.backend, native=self.native)


PATHS = (
    Path("reference", "reference", True),
    Path("torch, C++ node", "torch", True),
    Path("torch, Python node", "torch", False),
    Path("triton", "triton", True),
    Path("cuda", "cuda", True),
)


def _types(dtype: torch.dtype, adapter_dtype: torch.dtype) -> str:
    names = [str(kind).removeprefix("torch.") for kind in (dtype, adapter_dtype)]
    return names[0] if names[0] == names[1] else "+".join(names)


def check_one(op: str, entry: OpCases, path: Path, dtype, adapter_dtype, device: str) -> dict:
    """Verdict on one op, path and dtype. status: "ok", "wrong", or "cannot run" with the reasons."""
    row = {"op": op, "path": path.name, "dtype": _types(dtype, adapter_dtype), "status": "ok", "reasons": []}
    cases = list(entry.cases(op, dtype, adapter_dtype, device))
    against = {case.name: path.why_not(entry.problem(case)) for case in cases}
    runnable = [case for case in cases if not against[case.name]]
    row["reasons"] = list(dict.fromkeys(reason for reasons in against.values() for reason in reasons))
    row |= {"cases": len(runnable), "cases_left_out": len(cases) - len(runnable), "worst": None, "controls": None}
    if not runnable:
        return row | {"status": "cannot run"}
    try:
        with path.forced():
            found = [(v, case) for case in runnable for v in compare(entry.fn, entry.reference, case)]
            controls = compare_mutated(entry.fn, entry.reference, entry.control(op, dtype, adapter_dtype, device))
    except Exception as error:  # a path that raises is a wrong path, and the rows after it are still wanted
        text = (str(error).splitlines() or [""])[0]
        return row | {"status": "wrong", "reasons": [f"{type(error).__name__}: {text}"]}
    worst, where = max(found, key=lambda pair: pair[0].ratio)
    row["worst"] = {"ratio": _finite(worst.ratio), "of": worst.name, "case": where.name}
    wrong = sorted({f"{verdict.name} at {case.name}" for verdict, case in found if not verdict.ok})
    missed = [name for name, verdict in controls.items() if verdict.ok]
    row["controls"] = {name: name not in missed for name in controls}
    row["reasons"] += [f"beyond twice the error of plain PyTorch: {text}" for text in wrong]
    row["reasons"] += [f"the control {name!r} passed: this check would not see a wrong result" for name in missed]
    return row | {"status": "wrong"} if wrong or missed else row


def _finite(value: float) -> float | None:
    """JSON has no infinity: None stands for a result that holds NaN or has the wrong shape."""
    return value if value < float("inf") else None


def run_checks(device: str, tell: Callable[[str, int, int], None] = lambda what, done, total: None) -> Iterator[dict]:
    """The verdicts one after the other. tell(what, done, total) is told before each."""
    total = len(OPS) * len(PATHS) * len(DTYPES)
    for done, ((op, entry), path, dtypes) in enumerate(product(OPS.items(), PATHS, DTYPES)):
        tell(f"{op}, {path.name}", done, total)
        yield check_one(op, entry, path, *dtypes, device)


def run(device_name: str, as_json: bool) -> None:
    """Prints one row per op, path and dtype. Ends with exit code 1 if any is wrong."""
    device = torch_device(device_name)
    with progress(lines=as_json) as tell:
        rows = list(run_checks(device.type, tell))
    right = sum(row["status"] == "ok" for row in rows)
    wrong = sum(row["status"] == "wrong" for row in rows)
    if as_json:
        print_json({"device": device.type, "ok": right, "wrong": wrong, "rows": rows})
    else:
        _print(rows, right, wrong)
    if wrong:
        raise typer.Exit(1)


STYLES = {"ok": "green", "wrong": "bold red", "cannot run": "yellow"}


def _print(rows: list[dict], right: int, wrong: int) -> None:
    console = out()
    lines = []
    for row in rows:
        worst, controls = row["worst"], row["controls"]
        ratio = "-" if worst is None else "inf" if worst["ratio"] is None else f"{worst['ratio']:.2f}"
        if row["status"] != "cannot run":
            lines.append([
                row["op"], row["path"], row["dtype"], f"[{STYLES[row['status']]}]{row['status']}[/]", str(row["cases"]),
                ratio if worst is None else f"{ratio} ({worst['of']})",
                "-" if controls is None else f"{sum(controls.values())} of {len(controls)}",
            ])  # fmt: skip
    headings = ("op", "path", "dtype", "result", "cases", "worst", "controls\ncaught")
    show(console, None, headings, lines, keys=3)
    console.print("worst: largest error of output and gradients, as a share of what is allowed")
    for status in STYLES:
        for (path, reasons), names in _by_reason(rows, status).items():
            where = "; ".join(f"{op}: {', '.join(types)}" for op, types in names.items())
            console.print(f"\n[{STYLES[status]}]{status}[/]: {path} ({where})")
            for reason in reasons:
                console.print(f"    {reason}", markup=False)
    absent = len(rows) - right - wrong
    console.print(f"\n{right} right, {wrong} wrong, {absent} cannot run here and are not checked")


def _by_reason(rows: list[dict], status: str) -> dict[tuple, dict[str, list[str]]]:
    """(path, reasons): {op: dtypes} of the rows of a status that have any reason to tell."""
    found: dict[tuple, dict[str, list[str]]] = {}
    for row in rows:
        if row["status"] == status and row["reasons"]:
            ops = found.setdefault((row["path"], tuple(row["reasons"])), {})
            ops.setdefault(row["op"], []).append(row["dtype"])
    return found
