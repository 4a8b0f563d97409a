"""`peft-fused bench`: the table, JSON lines and files of peft_fused.bench."""

import signal
import statistics
from pathlib import Path

import typer

from .output import err, fail, out, plots, print_json, progress, result_folder, show, torch_device

# Exit status of what SIGINT ended, as shells count it.
INTERRUPTED = 128 + signal.SIGINT

# With another commit, the column of the ratios to it, and what counts as slower.
BASE = {"/ base": "ratio_to_base"}
SLOWER = 1.03


def run(
    device_name: str,
    *,
    op: str,
    everything: bool,
    tiny: bool,
    seconds: float | None = None,
    base: str | None = None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Runs the grid, prints it, and writes results.jsonl and a figure per op. A shape with a wrong result gets no
    times; the exit code is then 1. base: a commit that is measured in turns with this one.

    Without `out` it writes to bench/results/<device> of the repository that it is run from; tiny grids and those of one
    op, nowhere: they would replace the results of all.
    """
    if everything and tiny:
        fail("--all and --tiny exclude each other")
    device = torch_device(device_name)
    from peft_fused.bench import benchmarks
    from peft_fused.bench import run as runner
    from peft_fused.bench.base import Base, BaseError
    from peft_fused.bench.plot import plot
    from peft_fused.bench.verify import WrongResult

    if op not in ("all", *benchmarks.OPS):
        fail(f"--op must be all or one of {', '.join(benchmarks.OPS)}, got {op!r}")
    folder = result_folder(out) or (None if tiny or op != "all" else runner.default_folder(device))
    if base:
        err().print(f"building {base}", markup=False)
    try:
        other = Base(base) if base else None
    except BaseError as error:
        fail(str(error))
    rows, wrong, reached = [], [], (0, 0)
    with progress(lines=as_json) as tell_user:

        def tell(shape: str, done: int, total: int) -> None:
            nonlocal reached
            reached = done + 1, total
            tell_user(shape, done, total)

        def failed(shape: str, error: Exception) -> None:
            what = "" if isinstance(error, WrongResult) else f"{type(error).__name__}: "
            wrong.append(f"{shape}: {what}{(str(error).splitlines() or [''])[0]}")

        interrupted = False
        name = "tiny" if tiny else "all" if everything else "default"
        limit = float("inf") if seconds is None else seconds
        try:
            for row in runner.run(device, name, tell, op, limit, failed, other):
                rows.append(row)
                if folder:
                    written = [runner.write(row, folder, first=len(rows) == 1)]
                if as_json:
                    print_json(row)
        except KeyboardInterrupt:  # what has been measured is worth a table and a picture
            if not rows:
                raise
            interrupted = True
            reached = reached[0] - 1, reached[1]
        finally:
            if other:
                other.close()
    refused = f"wrong result, so no times: {'; '.join(wrong)}"
    if not rows:
        fail(refused if wrong else f"--seconds {seconds:g} is not enough for the first shape", 1)
    if not as_json:
        _print(rows)
    elif other:
        err().print(_of_base(rows), markup=False, soft_wrap=True)
    if reached[0] < reached[1]:
        err().print(f"{reached[0]} of {reached[1]} shapes measured, then it was stopped or its time was up")
    if folder is None:
        err().print("nothing written: give --out, or run every op from the repository root")
    else:
        if plots():
            written += plot(rows, folder)
        err().print("written: " + ", ".join(map(str, written)), soft_wrap=True)
    if wrong:
        fail(refused, 1)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _print(rows: list[dict]) -> None:
    from peft_fused.bench.benchmarks import BENCHMARKS, benchmark_of

    console = out()
    console.print(f"{rows[0]['device']}, torch {rows[0]['versions']['torch']}, peft {rows[0]['versions']['peft']}")
    ceilings = rows[0]["ceilings"]
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in ceilings["gemm_gflop_s"].items())
    console.print(f"measured ceilings: copy {ceilings['copy_gb_s']:.1f} GB/s; GEMM, GFLOP/s: {rates}")
    if "base_commit" in rows[0]:
        console.print(f"base: {rows[0]['base_commit'][:12]}; {_of_base(rows)}", markup=False, soft_wrap=True)
    for benchmark in BENCHMARKS:
        if chosen := [row for row in rows if benchmark_of(row["op"]) is benchmark]:
            _show(console, benchmark.table, chosen)
    for path in dict.fromkeys(row["path"] for row in rows):
        console.print(f"path: {path}", markup=False)
    for what, reason in dict.fromkeys(pair for row in rows for pair in row["skipped"].items()):
        console.print(f"{what} left out for some shapes: {reason}", markup=False)


def _of_base(rows: list[dict]) -> str:
    """How many rows are slower than at the base, and how surely."""
    found = [
        (row["ratio_to_base"], row["ratio_to_base_error"]) for row in rows if row["ratio_to_base_error"] is not None
    ]
    if not found:
        return "no row has a ratio to it"
    slower = [(ratio, error) for ratio, error in found if ratio > SLOWER]
    surely = sum(ratio - 2 * error > SLOWER for ratio, error in slower)
    median = statistics.median(ratio for ratio, _ in found)
    return (
        f"{len(found)} ratios to it, median {median:.3f}; {len(slower)} above {SLOWER}, "
        f"{surely} of them by more than two standard errors"
    )


KEYS = ("op", "layer", "dtype", "mode")


def _show(console, table, rows: list[dict]) -> None:
    """The table of a benchmark's rows."""
    ratios = table.ratios | (BASE if "ratio_to_base" in rows[0] else {})

    def cells(row: dict) -> list[str]:
        return [
            *(row[key] for key in ("op", "shape", "dtype", "mode")),
            *(cell(row) for cell in table.first.values()),
            f"{row['ms_median']['ours']:.3g} ({row['ms_iqr']['ours']:.2g})",
            *(_ratio(row, key) for key in ratios.values()),
            *(_size(row["saved_bytes"][who]) for who in table.saved.values()),
            *(cell(row) for cell in table.last.values()),
        ]

    headings = (*KEYS, *table.first, "ms (IQR)", *ratios, *table.saved, *table.last)
    show(
        console, table.title, headings, list(map(cells, rows)),
        keys=len(KEYS), ends=lambda number: rows[number]["mode"] == table.ends,
    )  # fmt: skip
    console.print("ratios: time of ours / reference, median of per-round ratios; below 1 is faster")
    if "ratio_to_base" in rows[0]:
        console.print("/ base: each in processes of its own, the median of pairs of them, and its standard error")
    if table.about:
        console.print(table.about)


def _ratio(row: dict, key: str) -> str:
    if row[key] is None:
        return "-"
    error = row.get(f"{key}_error")
    return f"{row[key]:.2f}" if error is None else f"{row[key]:.3f} ±{error:.3f}"


def _size(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 2**20:.2f} MiB" if size >= 2**18 else f"{size / 2**10:.1f} KiB"
