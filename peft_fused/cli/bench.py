"""`peft-fused bench`: the table, JSON lines and files of peft_fused.bench."""

import signal
from pathlib import Path

import typer

from .output import err, fail, out, plots, print_json, progress, result_folder, show, torch_device

# Exit status of what SIGINT ended, as shells count it.
INTERRUPTED = 128 + signal.SIGINT

# Columns of ratios, by the op of a row: layers that PEFT has a counterpart of, maps, and methods.
LAYERS = {
    "/ frozen": "ratio_to_frozen",
    "/ PEFT": "ratio_to_peft",
    "/ addmm_": "ratio_to_addmm",
    "/ compiled": "ratio_to_compiled",
}
MAPS = {
    "/ plain": "ratio_to_baseline",
    "/ C3A": "ratio_to_c3a",
    "/ dense": "ratio_to_dense",
    "fft/dense": "fft_over_dense",
}
METHODS = {
    "adamix": {"/ one expert": "ratio_to_one", "/ plain": "ratio_to_baseline"},
    "aflora": {"/ LoRA": "ratio_to_lora", "/ plain": "ratio_to_baseline"},
}
BASE = {"/ base": "ratio_to_base"}


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
    times; the exit code is then 1. base: a commit whose variants take turns with ours.

    Without `out` it writes to bench/results/<device> of the repository that it is run from; tiny grids and those of one
    op, nowhere: they would replace the results of all.
    """
    if everything and tiny:
        fail("--all and --tiny exclude each other")
    device = torch_device(device_name)
    from peft_fused.bench import run as runner
    from peft_fused.bench import shapes
    from peft_fused.bench.base import Base, BaseError
    from peft_fused.bench.plot import plot
    from peft_fused.bench.verify import WrongResult

    if op not in ("all", *shapes.OPS):
        fail(f"--op must be all or one of {', '.join(shapes.OPS)}, got {op!r}")
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
    console = out()
    console.print(f"{rows[0]['device']}, torch {rows[0]['versions']['torch']}, peft {rows[0]['versions']['peft']}")
    ceilings = rows[0]["ceilings"]
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in ceilings["gemm_gflop_s"].items())
    console.print(f"measured ceilings: copy {ceilings['copy_gb_s']:.1f} GB/s; GEMM, GFLOP/s: {rates}")
    if "base_commit" in rows[0]:
        console.print(f"base: {rows[0]['base_commit'][:12]}, in the same rounds", markup=False)
    layers = [row for row in rows if "ratio_to_peft" in row]
    maps = [row for row in rows if "plan" in row]
    if layers:
        _show_layers(console, layers)
    if maps:
        _show_maps(console, maps)
    for op in METHODS:
        if chosen := [row for row in rows if row["op"] == op]:
            _show_method(console, op, chosen)
    for path in dict.fromkeys(row["path"] for row in rows):
        console.print(f"path: {path}", markup=False)
    for what, reason in dict.fromkeys(pair for row in rows for pair in row["skipped"].items()):
        console.print(f"{what} left out for some shapes: {reason}", markup=False)


KEYS = ("op", "layer", "dtype", "mode")


def _show(console, title: str, rows: list[dict], headings: tuple[str, ...], cells, last: str, about: str = "") -> None:
    """A table of a line per row: KEYS, then cells(row) under the headings. last: the mode that ends a section."""
    lines = [[row["op"], row["shape"], row["dtype"], row["mode"], *cells(row)] for row in rows]
    show(console, title, (*KEYS, *headings), lines, keys=len(KEYS), ends=lambda number: rows[number]["mode"] == last)
    console.print("ratios: time of ours / reference, median of per-round ratios; below 1 is faster" + about)


def _headings(rows: list[dict], headings: dict[str, str]) -> dict[str, str]:
    """With the column of the other commit, where there is one."""
    return headings | (BASE if "ratio_to_base" in rows[0] else {})


def _ratios(row: dict, headings: dict[str, str]) -> list[str]:
    return ["-" if row[key] is None else f"{row[key]:.2f}" for key in headings.values()]


def _time(row: dict) -> str:
    return f"{row['ms_median']['ours']:.3g} ({row['ms_iqr']['ours']:.2g})"


def _show_layers(console, rows: list[dict]) -> None:
    ratios = _headings(rows, LAYERS)

    def cells(row: dict) -> list[str]:
        rank = str(row["r"]) if row["active_rank"] == row["r"] else f"{row['active_rank']} of {row['r']}"
        return [
            rank, f"{row['dropout']:g}", _time(row), *_ratios(row, ratios),
            *(_size(row["saved_bytes"][who]) for who in ("ours", "peft")),
            f"{row['floor_ms'] / row['ms_median']['ours']:.0%}",
        ]  # fmt: skip

    headings = ("rank", "drop", "ms (IQR)", *ratios, "saved,\nours", "saved,\nPEFT", "of\nfloor")
    _show(console, "adapted layers", rows, headings, cells, "both")


def _show_maps(console, rows: list[dict]) -> None:
    ratios = _headings(rows, MAPS)

    def cells(row: dict) -> list[str]:
        plan = row["plan"]
        return [
            f"fft {plan['length']}" if plan["method"] == "fft" else plan["method"], _time(row),
            *_ratios(row, ratios), *(_size(row["saved_bytes"][who]) for who in ("ours", "baseline")),
        ]  # fmt: skip

    about = (
        "\nplain: PyTorch as anyone would write it; C3A: PEFT's; dense: by the matrix, written down in PyTorch"
        "\nfft/dense: ours by FFT over ours by the dense matrix; saved: bytes for backward beside x"
    )
    headings = ("plan", "ms (IQR)", *ratios, "saved", "plain saves")
    _show(console, "structured maps, no base layer", rows, headings, cells, "both", about)


def _show_method(console, op: str, rows: list[dict]) -> None:
    reference, ratios = "baseline" if op == "adamix" else "lora", _headings(rows, METHODS[op])

    def cells(row: dict) -> list[str]:
        state = f"{row['kind']}, E={row['experts']}" if op == "adamix" else f"frozen: {row['frozen'] or 'nothing'}"
        return [
            str(row["r"]), state, _time(row), *_ratios(row, ratios),
            *(_size(row["saved_bytes"][who]) for who in ("ours", reference)),
        ]  # fmt: skip

    headings = ("rank", "state", "ms (IQR)", *ratios, "saved,\nours", f"saved,\n{reference}")
    about = "\nstep: forward, backward, schedule and optimizer, of four layers"
    _show(console, op, rows, headings, cells, "step", about)


def _size(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 2**20:.2f} MiB" if size >= 2**18 else f"{size / 2**10:.1f} KiB"
