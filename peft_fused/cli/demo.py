"""`peft-fused demo`: PEFT LoRA, the accelerated LoRA, DyLoRA and SURM trained side by side, and their comparison."""

import math
import random
import statistics
from dataclasses import asdict
from pathlib import Path

from rich.progress import Progress
from rich.table import Table

from . import demo_data
from .demo_train import LORA, ModelError, Settings, default_model, run_seed
from .output import err, fail, plots, print_json, result_folder, to_json, torch_device
from .output import out as out_console

__all__ = ["Settings", "run"]

TITLES = {"peft": "PEFT LoRA", "fused": "accelerated LoRA", "dylora": "DyLoRA", "surm": "SURM, circulant"}


def run(
    settings: Settings, data: Path | None, evaluation: Path | None, text_column: str, label_column: str,
    out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Trains, prints tables or one JSON object, writes demo.json and demo.png to `out`. Exit code 2 on bad input."""
    torch_device(settings.device)
    for name in ("alpha", "lr"):
        if not math.isfinite(getattr(settings, name)):
            fail(f"--{name} must be finite, got {getattr(settings, name)}")
    result_folder(out)
    try:
        loaded = _load(data, evaluation, text_column, label_column)
        rows = loaded.evaluation
        if len(rows) > settings.eval_rows:
            rows = random.Random(0).sample(rows, settings.eval_rows)
        results = _train(loaded, settings, rows, as_json)
    except (demo_data.DataError, ModelError) as error:
        fail(str(error))
    result = {
        "model": settings.model or default_model().parent.name,
        "data": {
            "train": str(data) if data else "bundled remarks", "train_rows": len(loaded.train),
            "eval_rows": len(loaded.evaluation), "evaluated_rows": len(rows), "classes": loaded.classes,
        },
        "settings": asdict(settings),
        "summary": _summary(results),
        "seeds": results,
    }  # fmt: skip
    if as_json:
        print_json(result)
    else:
        _print(result)
    if out:
        _write(result, out)


def _load(data: Path | None, evaluation: Path | None, text_column: str, label_column: str) -> demo_data.Data:
    if data is None:
        if evaluation is not None:
            raise demo_data.DataError("--eval needs --data: the labels of the two files have to agree")
        bundled = demo_data.bundled
        return demo_data.load(bundled("train"), bundled("eval"), "text", "label")
    return demo_data.load(data, evaluation, text_column, label_column)


def _train(data: demo_data.Data, settings: Settings, rows: list, as_json: bool) -> list[dict]:
    results = []
    with Progress(console=err(), disable=as_json, transient=True) as progress:
        task = progress.add_task("", total=settings.seeds * (settings.steps + settings.rank))
        for seed in range(settings.seeds):
            progress.update(task, description=f"training, seed {seed}" if settings.seeds > 1 else "training")
            results.append(run_seed(data, settings, seed, rows, lambda: progress.advance(task)))
    return results


def _spread(values: list[float]) -> dict:
    """Mean and standard deviation; one value has no spread."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def _summary(results: list[dict]) -> dict:
    methods = {}
    for name in TITLES:
        found = [result["methods"][name] for result in results]
        methods[name] = {
            key: _spread([method[key] for method in found])
            for key in ("accuracy", "final_loss", "final_loss_difference", "step_ratio_to_peft", "step_ms_median")
        } | {
            "trainable_parameters": found[0]["trainable_parameters"],
            "max_relative_gradient_error": max(
                (method["max_relative_gradient_error"] for method in found if name in LORA), default=None
            ),
            "path": found[0]["path"],
        }
    ranks = [
        {
            "rank": entries[0]["rank"],
            "dylora": _spread([entry["dylora"] for entry in entries]),
            "lora_truncated": _spread([entry["lora_truncated"] for entry in entries]),
        }
        for entries in zip(*(result["ranks"] for result in results), strict=True)
    ]
    return {"methods": methods, "ranks": ranks}


def _cell(value: dict, style: str) -> str:
    text = format(value["mean"], style)
    return text if value["std"] is None else f"{text} ± {value['std']:.1g}"


def _print(result: dict) -> None:
    console, data, settings = out_console(), result["data"], result["settings"]
    summary = result["summary"]
    console.print(
        f"{result['model']} on {data['train']}: {data['train_rows']} rows, {data['evaluated_rows']} of "
        f"{data['eval_rows']} evaluated, {len(data['classes'])} classes; {settings['steps']} steps of "
        f"{settings['batch_size']}, rank {settings['rank']}, alpha {settings['alpha']:g}, seeds: {settings['seeds']}",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    table = Table(title="same start, same batches, one step of each in turn")
    table.add_column("")
    for heading in ("trained", "accuracy", "gradient error", "final loss", "loss - PEFT", "step ms", "step / PEFT"):
        table.add_column(heading, justify="right")
    table.add_column("path", overflow="fold")
    for name, title in TITLES.items():
        method = summary["methods"][name]
        error, difference = method["max_relative_gradient_error"], _cell(method["final_loss_difference"], "+.1e")
        if name == "peft":
            error, difference = None, "-"
        table.add_row(
            title, f"{method['trainable_parameters']:,}", _cell(method["accuracy"], ".3f"),
            "-" if error is None else f"{error:.1e}",
            _cell(method["final_loss"], ".4f"), difference,
            _cell(method["step_ms_median"], ".0f"), _cell(method["step_ratio_to_peft"], ".2f"), method["path"],
        )  # fmt: skip
    console.print(table)
    console.print("gradient error: largest relative difference from PEFT at the start, B filled; DyLoRA at full rank")
    console.print("SURM trains other parameters than LoRA: a circulant matrix, two vectors, beside each weight")
    ranks = Table(title="accuracy when only the first b ranks are kept")
    ranks.add_column("b", justify="right")
    for title in ("DyLoRA", "trained LoRA, cut"):
        ranks.add_column(title, justify="right")
    for entry in summary["ranks"]:
        ranks.add_row(str(entry["rank"]), _cell(entry["dylora"], ".3f"), _cell(entry["lora_truncated"], ".3f"))
    console.print(ranks)
    console.print("DyLoRA runs at its scale alpha / b; the cut LoRA keeps the alpha / r that it was trained with")


def _write(result: dict, folder: Path) -> None:
    written = [folder / "demo.json"]
    written[0].write_text(to_json(result, indent=1) + "\n")
    if plots():
        written.append(_plot(result, folder / "demo.png"))
    err().print("written: " + ", ".join(map(str, written)), soft_wrap=True)


def _plot(result: dict, path: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    ranks = result["summary"]["ranks"]
    for key, title in (("dylora", "DyLoRA, alpha / b"), ("lora_truncated", "trained LoRA, cut, alpha / r")):
        spread = [entry[key]["std"] or 0.0 for entry in ranks]
        axis.errorbar([e["rank"] for e in ranks], [e[key]["mean"] for e in ranks], spread, marker="o", label=title)
    axis.set(xlabel="ranks kept", ylabel="accuracy", title=f"{result['data']['evaluated_rows']} rows evaluated")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
