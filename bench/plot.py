"""Pictures of one run: a figure per op, of the time of ours over each reference's per shape and mode; and one for all
that PEFT has a counterpart of.
"""

from collections.abc import Iterable
from pathlib import Path

# What rows are compared with, by the key of the ratio: in this order, each with its marker and colour in every figure.
REFERENCES = {
    "ratio_to_peft": "PEFT", "ratio_to_compiled": "compiled PEFT", "ratio_to_c3a": "PEFT's C3A",
    "ratio_to_lora": "LoRA of the same rank", "ratio_to_one": "one expert", "ratio_to_addmm": "addmm_ baseline",
    "ratio_to_baseline": "plain PyTorch", "ratio_to_dense": "dense matrix", "ratio_to_frozen": "frozen layer",
    "ratio_to_base": "base commit",
}  # fmt: skip
MARKERS = dict(zip(REFERENCES, "osDv^xP*+d", strict=True))
# Ratios to what PEFT has for the same: the headline.
TO_PEFT = ("ratio_to_peft", "ratio_to_c3a")

# The usual ones of a logarithmic axis are too far apart for ratios around 1 to be read. The second for narrow axes.
TICKS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50)
FINE_TICKS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 1.8, 2)


def _label(row: dict) -> str:
    """What tells a row from the others of its op and mode."""
    rank = f" r{row['active_rank']}" if "active_rank" in row else ""
    drop = f" p={row['dropout']:g}" if row["dropout"] else ""
    state = f" {row['kind']} E={row['experts']}" if "experts" in row else ""
    if "frozen" in row:
        state = f" {row['frozen'] or 'nothing'} frozen"
    return f"{row['shape']}{rank}{state} {row['dtype']}{drop}"


def _there(rows: Iterable[dict], keys: Iterable[str]) -> list[str]:
    return [key for key in keys if any(row.get(key) is not None for row in rows)]


def plot(rows: list[dict], folder: Path) -> list[Path]:
    """Writes <op>.png for each op, and peft.png where there is something to compare with PEFT, into a folder."""
    written = []
    for op in dict.fromkeys(row["op"] for row in rows):
        chosen = [row for row in rows if row["op"] == op]
        modes = [m for m in dict.fromkeys(r["mode"] for r in chosen) if _panel_rows(chosen, m, REFERENCES)]
        panels = {mode: (_panel_rows(chosen, mode, REFERENCES), REFERENCES) for mode in modes}
        written.append(_figure(panels, f"{op}, {rows[0]['device']}", folder / f"{op}.png", stacked=False))
    steps = [row for row in rows if row["mode"] == "both"]
    panels = {
        op: (_panel_rows([row for row in steps if row["op"] == op], "both", TO_PEFT), TO_PEFT)
        for op in dict.fromkeys(row["op"] for row in steps if _there([row], TO_PEFT))
    }
    if panels:
        title = f"forward and backward against PEFT, {rows[0]['device']}"
        written.append(_figure(panels, title, folder / "peft.png", stacked=True))
    return written


def _panel_rows(rows: list[dict], mode: str, keys: Iterable[str]) -> list[dict]:
    return [row for row in rows if row["mode"] == mode and _there([row], keys)]


def _figure(panels: dict[str, tuple[list[dict], Iterable[str]]], title: str, path: Path, *, stacked: bool) -> Path:
    """panels, none of them empty: by title, its rows and the ratios to show. stacked: one below the other, each with
    labels of its own; else side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = {name: list(dict.fromkeys(map(_label, rows))) for name, (rows, _) in panels.items()}
    heights = [len(labels[name]) + 6 for name in panels]
    shape = (len(panels), 1) if stacked else (1, len(panels))
    size = (8, 0.3 * sum(heights) + 0.6) if stacked else (4 * len(panels) + 2, 0.3 * max(heights) + 1)
    more = {"height_ratios": heights} if stacked else {}
    figure, axes = plt.subplots(*shape, squeeze=False, layout="constrained", figsize=size, **more)
    for axis, (name, (rows, keys)) in zip(axes.flat, panels.items(), strict=True):
        _panel(axis, name, rows, _there(rows, keys), labels[name])
    for axis, names in zip(axes.flat, labels.values(), strict=True):
        if axis is not axes.flat[0] and names == next(iter(labels.values())):
            axis.set_yticklabels([])
    figure.suptitle(title, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _panel(axis, title: str, rows: list[dict], keys: list[str], labels: list[str]) -> None:
    """A marker per reference and row; left of 1 ours is faster than the reference."""
    from matplotlib.ticker import NullLocator

    colours = list(REFERENCES)
    for key in keys:
        points = [(row[key], labels.index(_label(row))) for row in rows if row.get(key) is not None]
        axis.scatter(
            *zip(*points, strict=True), marker=MARKERS[key], color=f"C{colours.index(key)}", label=REFERENCES[key]
        )
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.set(xlabel="time of peft_fused / reference", xscale="log")
    low, high = axis.get_xlim()
    low, high = min(low, 0.85), max(high, 1.15)
    axis.set_xlim(low, high)
    axis.set_xticks([tick for tick in (FINE_TICKS if high < 3 * low else TICKS) if low <= tick <= high])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)
    axis.set_yticks(range(len(labels)), labels, fontsize="small")
    axis.set_ylim(len(labels) - 0.5, -0.5)
    # Above the panel, whatever its height: inside of it there is no corner that is sure to be free.
    axis.legend(title=title, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize="small")
