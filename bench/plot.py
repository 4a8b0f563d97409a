"""A picture of one run: time of ours over each reference's, per shape and mode: layers, methods, and maps."""

from pathlib import Path

# What the rows of each family are compared with; a row belongs to the family whose first reference it has.
FAMILIES = (
    {"ratio_to_peft": "PEFT", "ratio_to_addmm": "addmm_ lines", "ratio_to_base": "frozen base"},
    {"ratio_to_one": "one expert", "ratio_to_lines": "plain modules"},
    {"ratio_to_lora": "LoRA of the same rank", "ratio_to_lines": "plain lines"},
    {"ratio_to_chain": "plain lines", "ratio_to_c3a": "PEFT C3A", "ratio_to_dense": "dense matrix"},
)

# The usual ones of a logarithmic axis are too far apart for ratios around 1 to be read.
TICKS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50)


def _label(row: dict) -> str:
    rank = f" r{row['active_rank']}" if "active_rank" in row else ""
    drop = f" p={row['dropout']:g}" if row["dropout"] else ""
    state = f" {row['kind']} E={row['experts']}" if "experts" in row else ""
    if "frozen" in row:
        state = f" {row['frozen'] or 'nothing'} frozen"
    return f"{row['op']} {row['shape']}{rank}{state} {row['dtype']}{drop}"


def plot(rows: list[dict], path: Path) -> Path:
    """One panel per family and mode, one marker per reference. Left of 1 is faster than the reference."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    families = [(names, [row for row in rows if next(iter(names)) in row]) for names in FAMILIES]
    families = [(names, chosen) for names, chosen in families if chosen]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    heights = [len({_label(row) for row in chosen}) + 3 for _, chosen in families]
    figure, axes = plt.subplots(
        len(families), len(modes), sharey="row", squeeze=False, layout="constrained",
        figsize=(4 * len(modes) + 2, 0.35 * sum(heights) + 0.8), height_ratios=heights,
    )  # fmt: skip
    for line, (names, chosen) in zip(axes, families, strict=True):
        _family(line, modes, names, chosen)
    figure.suptitle(rows[0]["device"], fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _family(axes, modes: list[str], names: dict[str, str], rows: list[dict]) -> None:
    from matplotlib.ticker import NullLocator

    labels = list(dict.fromkeys(_label(row) for row in rows))
    for axis, mode in zip(axes, modes, strict=True):
        for (key, name), marker in zip(names.items(), "osx"[: len(names)], strict=True):
            points = [
                (row[key], labels.index(_label(row))) for row in rows if row["mode"] == mode and row[key] is not None
            ]
            if points:
                axis.scatter(*zip(*points, strict=True), marker=marker, label=name)
        axis.axvline(1, color="grey", linewidth=0.8)
        axis.set(title=mode, xlabel="time of peft_fused / reference", xscale="log")
        low, high = axis.get_xlim()
        axis.set_xticks([tick for tick in TICKS if low <= tick <= high])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    axes[-1].legend(loc="best", fontsize="small")
