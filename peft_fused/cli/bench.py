"""`peft-fused bench`: the table, JSON lines and files of peft_fused.bench."""

from pathlib import Path

from rich.progress import Progress
from rich.table import Table

from .output import err, fail, out, plots, print_json, result_folder, torch_device

HEADINGS = {
    "/ base": "ratio_to_base",
    "/ PEFT": "ratio_to_peft",
    "/ addmm_": "ratio_to_addmm",
    "/ compiled": "ratio_to_compiled",
}


def run(device_name: str, *, everything: bool, tiny: bool, out: Path | None, as_json: bool) -> None:
    """Runs the grid, prints it, and writes results.jsonl and results.png. Exit code 1 when a result is wrong.

    Without `out` it writes to bench/results/<device> of the repository that it is run from; tiny grids, nowhere.
    """
    if everything and tiny:
        fail("--all and --tiny exclude each other")
    device = torch_device(device_name)
    from peft_fused.bench import run as runner
    from peft_fused.bench.plot import plot
    from peft_fused.bench.verify import WrongResult

    folder = result_folder(out) or (None if tiny else runner.default_folder(device))
    rows = []
    with Progress(console=err(), disable=as_json, transient=True) as progress:
        task = progress.add_task("")

        def tell(shape: str, done: int, total: int) -> None:
            progress.update(task, description=shape, completed=done, total=total)

        try:
            for row in runner.run(device, "tiny" if tiny else "all" if everything else "default", tell):
                rows.append(row)
                if folder:
                    written = [runner.write(row, folder, first=len(rows) == 1)]
                if as_json:
                    print_json(row)
        except WrongResult as error:
            fail(f"wrong result, so no times: {error}", 1)
    if not as_json:
        _print(rows)
    if folder is None:
        err().print("nothing written: give --out, or run from the repository root")
        return
    if plots():
        written.append(plot(rows, folder / "results.png"))
    err().print("written: " + ", ".join(map(str, written)), soft_wrap=True)


def _print(rows: list[dict]) -> None:
    console = out()
    console.print(f"{rows[0]['device']}, torch {rows[0]['versions']['torch']}, peft {rows[0]['versions']['peft']}")
    ceilings = rows[0]["ceilings"]
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in ceilings["gemm_gflop_s"].items())
    console.print(f"measured ceilings: copy {ceilings['copy_gb_s']:.1f} GB/s; GEMM, GFLOP/s: {rates}")
    table = Table(caption="ratios are time of ours / reference, median of per-round ratios: below 1 is faster")
    for name in ("op", "layer", "dtype", "mode"):
        table.add_column(name, no_wrap=True)
    for name in ("rank", "drop", "ms (IQR)", *HEADINGS, "saved, ours", "saved, PEFT", "of floor"):
        table.add_column(name, no_wrap=True, justify="right")
    for row in rows:
        ms, iqr = row["ms_median"]["ours"], row["ms_iqr"]["ours"]
        rank = str(row["r"]) if row["active_rank"] == row["r"] else f"{row['active_rank']} of {row['r']}"
        table.add_row(
            row["op"], row["shape"], row["dtype"], row["mode"], rank, f"{row['dropout']:g}", f"{ms:.3g} ({iqr:.2g})",
            *("-" if row[key] is None else f"{row[key]:.2f}" for key in HEADINGS.values()),
            *(_size(row["saved_bytes"][who]) for who in ("ours", "peft")), f"{row['floor_ms'] / ms:.0%}",
            end_section=row["mode"] == "both",
        )  # fmt: skip
    console.print(table)
    for path in dict.fromkeys(row["path"] for row in rows):
        console.print(f"path: {path}", markup=False)
    for reason in dict.fromkeys(reason for row in rows for reason in row["skipped"].values()):
        console.print(f"compiled PEFT left out for some shapes: {reason}", markup=False)


def _size(size: int | None) -> str:
    if size is None:
        return "-"
    return f"{size / 2**20:.2f} MiB" if size >= 2**18 else f"{size / 2**10:.1f} KiB"
