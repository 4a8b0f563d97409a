"""A picture of one run: time of ours over PEFT's, the three lines' and the frozen layer's, per shape and mode."""

from pathlib import Path

REFERENCES = {"ratio_to_peft": "PEFT", "ratio_to_addmm": "addmm_ lines", "ratio_to_base": "frozen base"}


def _label(row: dict) -> str:
    drop = f" p={row['dropout']:g}" if row["dropout"] else ""
    return f"{row['op']} {row['shape']} r{row['active_rank']} {row['dtype']}{drop}"


def plot(rows: list[dict], path: Path) -> Path:
    """One panel per mode, one marker per reference. Left of 1 is faster than the reference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

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
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="x", which="both", labelsize=7)
        axis.grid(alpha=0.3)
    axes[0][0].set_yticks(range(len(labels)), labels)
    axes[0][0].invert_yaxis()
    axes[0][-1].legend(loc="best", fontsize="small")
    figure.suptitle(rows[0]["device"], fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
