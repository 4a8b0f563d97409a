"""What the parts cost: measurements that decide between plans, the most valuable first, each beside its prediction.

    python -m peft_fused.bench.parts [cuda|cpu] --out FILE [--tiny] [--seconds 60] [--only PART ...]

    ceilings     copy bandwidth, GEMM rates, and what a GEMM loses by accumulating onto its output
    linear       the single Triton kernel against cuBLAS
    kernels      each low-rank kernel alone, in one pass and in two
    bottleneck   those of the bottleneck adapter
    dropout      the same with and without a mask
    host         wall time per call of a tiny problem, by backend
    structured   tensor-core DFTs against torch.fft and the dense product
    methods      DyLoRA's ranks and AdaMix's experts against plain LoRA and one expert, q/k/v that share their input
    graphs       the device's share of `host`, replayed from a CUDA graph

Every row is a JSON line of FILE as soon as it is measured. `us` is the median and `iqr_us` the spread of interleaved
rounds; `ratio` is to the row named by `against`, of the same group; `predicted_us` is the larger of compulsory `bytes`
at copy bandwidth and `flops` at the GEMM rate, both as measured in this run, and `share_of_ceiling` is that over `us`.
What is not measured has a row with `skipped` or `error` instead, and an error is exit status 1. On a CPU it is a
rehearsal in miniature; with TRITON_INTERPRET=1 the Triton kernels take part.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from . import run
from .part_groups import CUDA, FP16, FP32, PARTS, TINY, Entry, Grid, Group, Work, groups
from .roofline import Ceilings, floor_us, measure
from .shapes import BF16, SHORT
from .timing import MODES, CpuClock, CudaClock, Times, interleave, ratio
from .verify import TOLERANCE, WrongResult, relative_rms

FIELDS = (
    "part", "what", "shape", "dtype", "us", "iqr_us", "ratio", "against", "bytes", "flops", "gb_s", "tflop_s",
    "predicted_us", "share_of_ceiling",
)  # fmt: skip
# What every part is sure of, as a share of the time; what one leaves over goes to those after it.
SHARES = {
    "ceilings": 3, "linear": 2, "kernels": 4, "bottleneck": 1, "dropout": 1, "host": 2, "structured": 5, "methods": 3,
    "graphs": 1,
}  # fmt: skip
# Of the time, at most this much goes into compiling Triton kernels in several processes before anything is timed.
COMPILING = 0.4


class _InSettings:
    """A clock that sets what an entry asks for, before its time begins."""

    def measure(self, entry: Entry) -> dict[str, float]:
        with entry.settings():
            return super().measure(entry)


class HostClock(_InSettings, CpuClock):
    """Wall time per call, of which the device may still have the work to do."""

    def measure(self, entry: Entry) -> dict[str, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return super().measure(entry)


class DeviceClock(_InSettings, CudaClock):
    """Time of the device; of a kernel alone, of its call."""

    def measure(self, entry: Entry) -> dict[str, float]:
        if entry.work.keys() != {"forward"}:
            return super().measure(entry)
        with entry.settings():
            return {"forward": self._timed(entry.forward)[0]}


class Budget:
    """Shares out the seconds that are left among the parts that are left."""

    def __init__(self, seconds: float, parts: list[str], now: Callable[[], float] = time.perf_counter):
        self.now, self.end, self.parts = now, now() + seconds, list(parts)

    def begin(self) -> float:
        """The next part starts; the time from which on it may begin nothing new."""
        weights = [SHARES[part] for part in self.parts]
        self.parts.pop(0)
        now = self.now()
        return now + max(0.0, self.end - now) * weights[0] / sum(weights)


def make_row(part: str, what: str, shape: str, dtype: str, **values) -> dict:
    """A row with every field, None where there is nothing to say, and the other values after them."""
    known = {"part": part, "what": what, "shape": shape, "dtype": dtype}
    return dict.fromkeys(FIELDS) | known | {k: _short(v) for k, v in values.items() if v is not None}


def _short(value):
    return float(f"{value:.5g}") if isinstance(value, float) else value


def measured(times: Times, work: Work | None, ceilings: Ceilings) -> dict:
    """What follows from times and the work that was done in them."""
    us = 1e3 * times.median
    found = {"us": us, "iqr_us": 1e3 * times.iqr}
    if work is None:
        return found
    predicted = floor_us(work.bytes, work.flops, work.rate, ceilings)
    return found | {
        "bytes": work.bytes, "flops": work.flops, "gb_s": work.bytes / us / 1e3, "tflop_s": work.flops / us / 1e6,
        "predicted_us": predicted, "share_of_ceiling": predicted / us,
    }  # fmt: skip


def _named(value: str, mode: str, entry: Entry) -> str:
    return value if entry.work.keys() == {"forward"} else f"{value}, {mode}"


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:1000]}"


def _settle() -> None:
    """Raises what the device has failed to do, before it is blamed on what runs next."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _check(entry: Entry, truth: list[torch.Tensor] | None) -> list[torch.Tensor]:
    """Runs an entry once, and with that compiles it; WrongResult beyond the tolerance of the coarsest of its types."""
    results = entry.results()
    _settle()
    if truth is not None:
        limit = max(TOLERANCE[t.dtype] for t in results)
        errors = [relative_rms(a, b) for a, b in zip(results, truth, strict=True)]
        if not all(error <= limit for error in errors):
            raise WrongResult(f"relative errors {', '.join(f'{e:.1e}' for e in errors)} beyond {limit:.0e}")
    return results


def measure_group(
    part: str, group: Group, clock: CpuClock | CudaClock, grid: Grid, ceilings: Ceilings
) -> Iterator[dict]:
    """Its rows. An entry that fails or is wrong has a row with the error, and the others are timed."""

    def row(name: str, **values) -> dict:
        return make_row(part, f"{group.what}: {name}", group.shape, group.dtype, **values)

    torch.manual_seed(0)
    kept, truths = {}, {}
    for name, entry in group.build().items():
        if isinstance(entry, str):
            yield row(name, skipped=entry)
            continue
        try:
            truths[name] = _check(entry, truths.get(entry.equals))
        except Exception as error:  # whatever a compiler, a kernel or a graph raises: the rest is worth measuring
            yield row(name, error=_message(error))
            _settle()
            continue
        if entry.work:
            kept[name] = entry
    truths.clear()
    if not kept:
        return
    times = interleave(kept, clock, seconds=grid.seconds, least=grid.least)
    for name, entry in kept.items():
        for mode, work in entry.work.items():
            values = measured(times[name][mode], work, ceilings)
            if entry.against in times:
                values["ratio"] = ratio(times[name][mode], times[entry.against][mode])
                values["against"] = f"{group.what}: {_named(entry.against, mode, entry)}"
            yield row(_named(name, mode, entry), **values, note=entry.note)


def ceiling_rows(ceilings: Ceilings) -> Iterator[dict]:
    row = partial(make_row, "ceilings", shape="")
    yield row(what="copy", dtype="", gb_s=ceilings.copy_gb_s)
    for dtype, rate in ceilings.gemm_gflop_s.items():
        yield row(what="square GEMM", dtype=SHORT[getattr(torch, dtype)], tflop_s=rate / 1e3)


def rows_of(device: torch.device, grid: Grid, ceilings: Ceilings, parts: list[str], budget: Budget) -> Iterator[dict]:
    """The rows of the parts, of each as many groups as its time allows, and a row for each of those left out."""
    host, clock = HostClock(grid.calls), DeviceClock(device) if device.type == "cuda" else HostClock()
    for part in parts:
        deadline = budget.begin()
        for group in groups(part, grid, device):
            row = partial(make_row, part, group.what, group.shape, group.dtype)
            if budget.now() >= deadline:
                yield row(skipped="the time for this part is spent")
                continue
            try:
                yield from measure_group(part, group, host if group.host else clock, grid, ceilings)
            except Exception as error:  # see measure_group: of its inputs, or while it is timed
                yield row(error=_message(error))
                try:
                    _settle()
                except RuntimeError:
                    yield row(error="the CUDA context is lost, so that nothing after this is measured")
                    return


# --------------------------------------------------------------------------------------------------- compiling, output


def run_once(device: torch.device, grid: Grid, parts: list[str], index: int, count: int) -> None:
    """Runs every count-th group once, untimed, for what it leaves in Triton's cache on the disk."""
    chosen = [group for part in parts for group in groups(part, grid, device)]
    for group in chosen[index::count]:
        with contextlib.suppress(Exception):  # the process that measures meets it too, and reports it
            for entry in group.build().values():
                if isinstance(entry, Entry):
                    with contextlib.suppress(Exception):
                        entry.results()


def compile_ahead(arguments: list[str], processes: int, seconds: float) -> None:
    """run_once in several processes, for so many seconds at most."""
    command = [sys.executable, "-m", "peft_fused.bench.parts", *arguments]
    # Without the current directory, whose folders may bear names of packages.
    options = dict(env=os.environ | {"PYTHONSAFEPATH": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started = []
    try:
        for index in range(processes):
            started.append(subprocess.Popen([*command, "--once", str(index), str(processes)], **options))
        end = time.perf_counter() + seconds
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.perf_counter()))
    finally:
        for process in started:
            process.kill()
            process.wait()


# Characters of the summary: what the last of an output is still sure to hold.
SUMMARY, WIDTH = 8_900, 165
# Modes that it leaves to the file.
UNSHOWN = {"structured": ("both",), "methods": ("forward", "backward")}


def _cell(row: dict, name: str) -> str:
    numbers = [f"{row['us']:.4g}"]
    numbers += [] if row["ratio"] is None else [f"x{row['ratio']:.2f}"]
    numbers += [] if row["share_of_ceiling"] is None else [f"{row['share_of_ceiling']:.0%}"]
    return f"{name} {' '.join(numbers)}"


def summary(rows: list[dict]) -> str:
    """A table with a line for each group and mode, then errors and what was left out; at most SUMMARY characters."""
    lines: dict[tuple, list[str]] = {}
    errors, left_out = [], {}
    for row in rows:
        group, _, name = row["what"].partition(": ")
        mode = next((mode for mode in MODES if name.endswith(f", {mode}")), "")
        where = " ".join(filter(None, (row["what"], row["shape"], row["dtype"])))
        if "error" in row:
            errors.append(f"error in {where}: {' '.join(row['error'].split())[:200]}")
        elif "skipped" in row:
            left_out.setdefault(row["skipped"], []).append(where)
        elif row["us"] is None:
            lines[(group, row["dtype"])] = [f"{row['gb_s'] or row['tflop_s']:.4g} {'GB' if row['gb_s'] else 'TFLOP'}/s"]
        elif mode not in UNSHOWN.get(row["part"], ()):
            key = f"{group} {mode}".strip(), f"{row['shape']} {row['dtype']}"
            lines.setdefault(key, []).append(_cell(row, name.removesuffix(f", {mode}")))
    told = [*errors, *(f"left out: {len(places)} rows, as {places[0]}: {why}" for why, places in left_out.items())]
    end = "\n".join(line[:400] for line in told)[: SUMMARY // 2]
    shown = Table(box=None, pad_edge=False, header_style="")
    for heading in ("what", "of", "us, ratio (to what, is in the file), share of the ceiling"):
        shown.add_column(heading, no_wrap=len(shown.columns) < 2)
    for key, cells in lines.items():
        shown.add_row(*key, "; ".join(cells))
    console = Console(file=io.StringIO(), width=WIDTH, highlight=False, markup=False, color_system=None)
    console.print(shown)
    text = [line.rstrip() for line in console.file.getvalue().splitlines()]
    more = "... and more in the file"
    room = SUMMARY - len(end) - len(more) - 2
    if sum(len(line) + 1 for line in text) > room:
        while sum(len(line) + 1 for line in text) > room:
            text.pop()
        text.append(more)
    return "\n".join([*text, *([end] if end else [])])


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 when something raised or was wrong."""
    parser = argparse.ArgumentParser(prog="python -m peft_fused.bench.parts", description="What the parts cost.")
    parser.add_argument("device", nargs="?", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="file of JSON lines, or a folder, in which it is parts.jsonl")
    parser.add_argument("--tiny", action="store_true", help="in miniature, as always on a CPU")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all of it; what does not fit is left out")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument(
        "--processes", type=int, help="that compile kernels before anything is timed (default: on a GPU, up to 8)"
    )
    parser.add_argument("--once", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device, begin = torch.device(options.device), time.perf_counter()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("this torch sees no CUDA device")
    cuda = options.device == "cuda"
    grid = CUDA if cuda and not options.tiny else TINY
    if options.once:
        run_once(device, grid, options.only, *options.once)
        return 0

    path = options.out / "parts.jsonl" if options.out and options.out.is_dir() else options.out
    rows = []
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") if path else contextlib.nullcontext() as file:

        def keep(row: dict) -> None:
            rows.append(row)
            if file:
                file.write(json.dumps(row) + "\n")
                file.flush()

        about = {"versions": run.versions(), "commit": run.commit(), "device": run.device_name(device)}
        keep(make_row("about", about["device"], "", "", about=about))
        try:
            processes = min(8, (os.cpu_count() or 1) // 2) if options.processes is None else options.processes
            if processes and (cuda or options.processes):
                again = [options.device, *(["--tiny"] if options.tiny else []), "--only", *options.only]
                compile_ahead(again, processes, COMPILING * options.seconds)
            dtypes = (BF16, FP16, FP32) if cuda else (FP32, FP16)
            ceilings = measure(device, dtypes) if grid is CUDA else measure(device, dtypes, repeats=1, size=128)
            for row in ceiling_rows(ceilings):
                keep(row)
            budget = Budget(options.seconds - (time.perf_counter() - begin), options.only)
            for row in rows_of(device, grid, ceilings, options.only, budget):
                keep(row)
        finally:  # of a run that is stopped, too
            print(summary(rows[1:]), flush=True)
    if path:
        print(f"rows: {path}")
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
