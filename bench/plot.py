"""A picture of one run: time of ours over PEFT's, the three lines' and the frozen layer's, per shape and mode."""

from pathlib import Path

REFERENCES = {"ratio_to_peft": "PEFT", "ratio_to_addmm": "addmm_ lines", "ratio_to_base": "frozen base"}

# The usual ones of a logarithmic axis are too far apart for ratios around 1 to be read.
TICKS = (0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50)


def _label(row: dict) -> str:
    drop = f" p={row['dropout']:g}" if row["dropout"] else ""
    return f"{row['op']} {row['shape']} r{row['active_rank']} {row['dtype']}{drop}"


def plot(rows: list[dict], path: Path) -> Path:
    """One panel per mode, one marker per reference. Left of 1 is faster than the reference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    modes = list(dict.fromkeys(row["mode"] for row in rows))
    labels = list(dict.fromkeys(_label(row) for row in rows))
    size = (4 * len(modes) + 2, 0.35 * len(labels) + 1.8)
    figure, axes = plt.subplots(1, len(modes), sharey=True, squeeze=False, figsize=size, layout="constrained")
    for axis, mode in zip(axes[0], modes, strict=True):
        chosen = [row for row in rows if row["mode"] == mode]
        for (key, name), marker in zip(REFERENCES.items(), "osx", strict=True):
            points = [(row[key], labels.index(_label(row))) for row in chosen if row[key] is not None]
            if points:
                axis.scatter(*zip(*points, strict=True), marker=marker, label=name)
        axis.axvline(1, color="grey", linewidth=0.8)
        axis.set(title=mode, xlabel="time of peft_fused / reference", xscale="log")
        low, high = axis.get_xlim()
        axis.set_xticks([tick for tick in TICKS if low <= tick <= high])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(labels)), labels)
    axes[0][0].invert_yaxis()
    axes[0][-1].legend(loc="best", fontsize="small")
    figure.suptitle(rows[0]["device"], fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
