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

from . import roofline
from .base import Base
from .benchmark import CompileBudget
from .benchmarks import benchmark_of, grid
from .rows import measure

# Seconds in all for torch.compile, unless every shape is to be compiled.
COMPILE_SECONDS = {"tiny": 0.0, "default": 45.0, "all": 1800.0}


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


def run(
    device: torch.device,
    name: str = "default",
    progress: Callable[[str, int, int], None] | None = None,
    op: str = "all",
    seconds: float = math.inf,
    failed: Callable[[str, Exception], None] | None = None,
    base: Base | None = None,
) -> Iterator[dict]:
    """Rows of the grid `name` ("tiny", "default" or "all") as they are measured. op: one of benchmarks.OPS, or "all".
    base: another commit, which measures each shape in turns with this one.

    progress(shape, done, total) is told before each shape; no shape is started after `seconds`, so that `done` may stay
    below `total`. A shape that raises, verify.WrongResult before anything wrong is timed, ends the run, unless
    failed(shape, error) takes it: the other shapes are then measured all the same.
    """
    start = time.monotonic()
    shapes = grid(device.type, name, op)
    dtypes = tuple({shape.dtype: None for shape in shapes})
    ceilings = roofline.measure(device, dtypes, repeats=1 if name == "tiny" else 5)
    about = {"versions": versions(), "commit": commit(), "device": device_name(device), "ceilings": ceilings.as_dict()}
    about |= {"base_commit": base.commit} if base else {}
    budget = CompileBudget(min(COMPILE_SECONDS[name], seconds / 5), everywhere=name == "all" or device.type == "cuda")
    for index, shape in enumerate(shapes):
        if time.monotonic() - start > seconds:
            break
        if progress:
            progress(f"{shape.name} {shape.dtype_name}", index, len(shapes))
        benchmark = benchmark_of(shape.op)
        more = {"budget": budget} if benchmark.compiles else {}
        try:
            seconds_each = benchmark.seconds[name]
            found = [measure(case, device, seconds=seconds_each) for case in benchmark.cases(shape, device, **more)]
            if base:
                base.measure(shape, name, device, [turn for each in found for turn in each.turns], seconds_each)
            rows = [row for each in found for row in each.rows(base)]
        except Exception as error:
            if failed is None:
                raise
            failed(f"{shape.op} {shape.name} {shape.dtype_name}", error)
            continue
        for row in rows:
            floor = row["layers"] * roofline.floor_ms(shape, row["mode"], ceilings)
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
