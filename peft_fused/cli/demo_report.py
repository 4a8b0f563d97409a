"""What the demo has to say of its methods: one record each, tables, notes, files and plots."""

import statistics
from pathlib import Path

from .demo_extra import cell
from .demo_methods import BASELINE, METHODS
from .output import err, plots, to_json
from .output import out as out_console
from .output import show as show_table

AVERAGED = (
    "accuracy",
    "trainable",
    "step_ratio_to_peft",
    "peak_bytes",
    "step_ms_median",
    "step_ms_mean",
    "final_loss",
    "final_loss_difference",
)
MIB = 1 << 20


def _spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; one value has no spread."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def record(name: str, seeds: list[dict], common: dict) -> dict:
    """A method's results over the seeds: numbers are means, their standard deviations are in "std", None for one seed.

    seeds: what each gave for the method. common: what is the same for all methods.
    """
    spreads = {key: _spread([seed[key] for seed in seeds]) for key in AVERAGED}
    found = {"method": name, **{key: mean for key, (mean, _) in spreads.items()}}
    for key in ("trainable", "peak_bytes"):
        found[key] = round(found[key])
    errors = [seed["max_relative_gradient_error"] for seed in seeds]
    found |= {
        "std": {key: std for key, (_, std) in spreads.items()},
        "max_relative_gradient_error": None if None in errors else max(errors),
        "diverged_at": next((seed["diverged_at"] for seed in seeds if seed["diverged_at"] is not None), None),
        "path": seeds[0]["path"],
        "learning_rate": common["settings"]["lr"] * METHODS[name].rate,
    }
    return found | METHODS[name].extra.combine(seeds, _spread) | common


def show(records: list[dict]) -> None:
    """Tables and notes."""
    console, by_name = out_console(), {found["method"]: found for found in records}
    first = records[0]
    data, settings = first["data"], first["settings"]
    console.print(
        f"{first['model']} on {data['train']}: {data['train_rows']} rows, {data['evaluated_rows']} of "
        f"{data['eval_rows']} evaluated, {len(data['classes'])} classes; {settings['steps']} steps of "
        f"{settings['batch_size']}, rank {settings['rank']}, alpha {settings['alpha']:g}, seeds: {settings['seeds']}",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    headings = (
        "method", "trained", "accuracy", "final\nloss", "loss -\nPEFT", "gradient\nerror", "step\nms", "step /\nPEFT",
        "MiB", "rate",
    )  # fmt: skip
    rows = []
    for name, found in by_name.items():
        error = found["max_relative_gradient_error"]
        rows.append([
            METHODS[name].title, f"{found['trainable']:,}", cell(found, "accuracy", ".3f"),
            cell(found, "final_loss", ".4f"),
            "-" if name == BASELINE else cell(found, "final_loss_difference", "+.1e"),
            "-" if name == BASELINE or error is None else f"{error:.1e}",
            cell(found, "step_ms_median", ".0f"), cell(found, "step_ratio_to_peft", ".2f"),
            cell(found, "peak_bytes", ".1f", MIB), f"{found['learning_rate']:g}",
        ])  # fmt: skip
    show_table(console, "same start, same batches, one step of each in turn", headings, rows)
    for name, found in by_name.items():
        console.print(f"path of {METHODS[name].title}: {found['path']}", soft_wrap=True, markup=False)
    for line in notes(by_name):
        console.print(line, soft_wrap=True, markup=False)
    for name, found in by_name.items():
        METHODS[name].extra.show(console, found)


def notes(by_name: dict[str, dict]) -> list[str]:
    """What the table does not say by itself."""
    lines = ["MiB: peak of one step after training, beyond the model, its optimizer and the batch"]
    lines += [
        f"{METHODS[name].title} diverged in step {found['diverged_at']}, and was trained no further"
        for name, found in by_name.items()
        if found["diverged_at"] is not None
    ]
    if any(METHODS[name].lora and name != BASELINE for name in by_name):
        lines.append("gradient error: largest relative difference from PEFT at the start, B filled, at full rank")
    for name, found in by_name.items():
        method = METHODS[name]
        lines += [method.note] if method.note else []
        lines += method.extra.notes(found, by_name[BASELINE])
    return lines


def write(result: dict, folder: Path) -> None:
    """demo.json and, where matplotlib is, demo.png."""
    written = [folder / "demo.json"]
    written[0].write_text(to_json(result, indent=1) + "\n")
    if plots():
        written.append(_plot(result["methods"], folder / "demo.png"))
    err().print("written: " + ", ".join(map(str, written)), soft_wrap=True)


def _plot(records: list[dict], path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [found for found in records if METHODS[found["method"]].extra.panel is not None]
    figure, axes = plt.subplots(1, 2 + len(panels), figsize=(9 + 5 * len(panels), 3.6), layout="constrained")
    for found in records:
        axes[0].errorbar(
            found["trainable"], found["accuracy"], found["std"]["accuracy"], marker="o", linestyle="", alpha=0.7,
            label=METHODS[found["method"]].title,
        )  # fmt: skip
    rows = f"{records[0]['data']['evaluated_rows']} rows evaluated"
    axes[0].set(xscale="log", xlabel="trained parameters, the head's included", ylabel="accuracy", title=rows)
    axes[0].legend(fontsize="x-small")
    places = range(len(records))
    baseline = records[0]["peak_bytes"]
    axes[1].barh([place - 0.2 for place in places], [r["step_ratio_to_peft"] for r in records], 0.4, label="step time")
    axes[1].barh(
        [place + 0.2 for place in places], [r["peak_bytes"] / baseline for r in records], 0.4, label="memory of a step"
    )
    axes[1].set_yticks(places, [METHODS[found["method"]].title for found in records], fontsize="small")
    axes[1].invert_yaxis()
    axes[1].set(xlabel="over PEFT LoRA's")
    axes[1].legend(fontsize="x-small")
    for axis, found in zip(axes[2:], panels, strict=True):
        METHODS[found["method"]].extra.panel(axis, found)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
