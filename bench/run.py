"""Runs a grid: one result per (op, shape, dtype, dropout, mode), with the versions and the commit that made it."""

import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import torch
import transformers

import peft_fused

from . import adamix, aflora, baselines, roofline, structured
from .shapes import MethodShape, Shape, StructuredShape, grid
from .timing import MODES, Times, clock_of, interleave, ratio, wall_ms
from .verify import verify

# Seconds of rounds per shape, and in all for torch.compile unless every shape is to be compiled.
ROUND_SECONDS = {"tiny": 0.2, "default": 6.0, "all": 15.0}
STRUCTURED_SECONDS = {"tiny": 0.05, "default": 2.0, "all": 6.0}
METHOD_SECONDS = {"tiny": 0.05, "default": 4.0, "all": 10.0}
METHODS = {"adamix": adamix.run_case, "aflora": aflora.run_case}
COMPILE_SECONDS = {"tiny": 0.0, "default": 45.0, "all": 1800.0}
# op: (our variant, its frozen layer, PEFT's counterpart, the three lines, compiled PEFT); PEFT has no DyLoRA.
OPS = {"lora": ("fused", "peft", "addmm", "compiled"), "dylora": ("dylora", None, "dylora_addmm", None)}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            model = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def slug(name: str) -> str:
    """A device name as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str | None:
    """Git commit of the checkout this module lies in, with "-dirty" for local changes; outside a checkout, what the
    environment variable PEFT_FUSED_COMMIT says, or None."""
    here = Path(__file__).parent

    def git(*arguments) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed copy may lie inside an unrelated checkout: only one that tracks this file names our commit.
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return os.environ.get("PEFT_FUSED_COMMIT")
    head = git("rev-parse", "HEAD")
    return f"{head}-dirty" if head and git("status", "--porcelain") else head


def versions() -> dict[str, str]:
    found = {m.__name__: m.__version__ for m in (torch, peft, transformers, peft_fused)}
    return {"python": platform.python_version(), **found}


def _row(case, op: str, mode: str, times: dict[str, dict[str, Times]], saved: dict[str, int]) -> dict:
    ours, reference, addmm, compiled = OPS[op]
    mine = times[ours][mode]

    def against(name: str | None) -> float | None:
        return ratio(mine, times[name][mode]) if name in times else None

    shape = case.shape
    shown = {"base": "base", ours: "ours", reference: "peft", addmm: "addmm", compiled: "compiled"}
    return {
        "op": op,
        "shape": shape.name,
        "r": shape.r,
        "active_rank": case.dylora_rank if op == "dylora" else shape.r,
        "dtype": shape.dtype_name,
        "dropout": shape.dropout,
        "mode": mode,
        "ratio_to_base": against("base"),
        "ratio_to_peft": against(reference),
        "ratio_to_addmm": against(addmm),
        "ratio_to_compiled": against(compiled),
        "ms_median": {label: times[name][mode].median for name, label in shown.items() if name in times},
        "ms_iqr": {label: times[name][mode].iqr for name, label in shown.items() if name in times},
        "rounds": len(mine.ms),
        "path": case.variants[ours].path,
        "saved_bytes": {"ours": saved[ours], "peft": saved.get(reference)},
        "skipped": {"compiled": case.skipped["compiled"]} if op == "lora" and case.skipped else {},
    }


def run_case(shape: Shape, device: torch.device, *, seconds: float, compile_budget: float | None) -> tuple[list, float]:
    """(one row per op and mode, seconds spent compiling). compile_budget None leaves the compiled variant out."""
    case = baselines.build(shape, device)
    errors = verify(case)
    spent = 0.0
    if compile_budget is None:
        case.skipped["compiled"] = "not part of this grid (--all times it for every shape)"
    else:
        spent = baselines.compile_peft(case, compile_budget)
    saved = {name: baselines.saved_bytes(case.variants[name]) for name in ("fused", "peft", "dylora")}
    cuda = device.type == "cuda"
    times = interleave(case.variants, clock_of(device, shape.calls), seconds=seconds)
    rows = []
    for op, (ours, reference, _, _) in OPS.items():
        extra = {"error_vs_reference": errors[ours]}
        if cuda:
            measured = {"ours": ours, "peft": reference}
            extra["peak_bytes"] = {k: baselines.cuda_peak_bytes(case.variants[v]) for k, v in measured.items() if v}
            extra["wall_ms"] = {k: wall_ms(case.variants[v]) for k, v in measured.items() if v}
        rows += [_row(case, op, mode, times, saved) | extra for mode in MODES]
    return rows, spent


def run(
    device: torch.device,
    name: str = "default",
    progress: Callable[[str, int, int], None] | None = None,
    op: str = "all",
    seconds: float = math.inf,
    failed: Callable[[str, Exception], None] | None = None,
) -> Iterator[dict]:
    """Rows of the grid `name` ("tiny", "default" or "all") as they are measured. op: one of shapes.OPS, or "all".

    progress(shape, done, total) is told before each shape; no shape is started after `seconds`, so that `done` may stay
    below `total`. A shape that raises, verify.WrongResult before anything wrong is timed, ends the run, unless
    failed(shape, error) takes it: the other shapes are then measured all the same.
    """
    start = time.monotonic()
    shapes = grid(device.type, name, op)
    dtypes = tuple({shape.dtype: None for shape in shapes})
    ceilings = roofline.measure(device, dtypes, repeats=1 if name == "tiny" else 5)
    about = {"versions": versions(), "commit": commit(), "device": device_name(device), "ceilings": ceilings.as_dict()}
    budget = min(COMPILE_SECONDS[name], seconds / 5)
    for index, shape in enumerate(shapes):
        if time.monotonic() - start > seconds:
            break
        if progress:
            progress(f"{shape.name} {shape.dtype_name}", index, len(shapes))
        try:
            if isinstance(shape, StructuredShape):
                rows = structured.run_case(shape, device, seconds=STRUCTURED_SECONDS[name])
            elif isinstance(shape, MethodShape):
                rows = METHODS[shape.op](shape, device, seconds=METHOD_SECONDS[name])
            else:
                compiling = shape.compiled or name == "all" or device.type == "cuda"
                limit = budget if compiling else None
                rows, spent = run_case(shape, device, seconds=ROUND_SECONDS[name], compile_budget=limit)
                budget -= spent
        except Exception as error:
            if failed is None:
                raise
            failed(f"{getattr(shape, 'op', 'lowrank')} {shape.name} {shape.dtype_name}", error)
            continue
        for row in rows:
            floor = row.get("layers", 1) * roofline.floor_ms(shape, row["mode"], ceilings)
            yield row | {"floor_ms": floor} | about


def default_folder(device: torch.device) -> Path | None:
    """bench/results/<device> when the current directory is the repository root; None elsewhere."""
    if not Path("bench/run.py").is_file():
        return None
    return Path("bench/results") / slug(device_name(device))


def write(row: dict, folder: Path, *, first: bool) -> Path:
    """Adds a row to results.jsonl, which the first row starts anew: a run cut short leaves what it has measured."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.jsonl"
    with path.open("w" if first else "a") as file:
        file.write(json.dumps(row) + "\n")
    return path
