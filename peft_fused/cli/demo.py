"""`peft-fused demo`: PEFT LoRA and the methods trained side by side on one data set, and their comparison."""

import math
import random
from dataclasses import asdict
from pathlib import Path

from . import demo_data, demo_report
from .demo_methods import METHODS, Settings, choose
from .demo_train import ModelError, default_model, run_seed
from .output import fail, plots, print_json, progress, result_folder, torch_device

__all__ = ["Settings", "run"]


def run(
    settings: Settings, data: Path | None, evaluation: Path | None, text_column: str, label_column: str,
    out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Trains, prints tables or one JSON object per method, writes demo.json, demo.png and what methods note to `out`.

    Exit code 2 on bad input.
    """
    torch_device(settings.device)
    try:
        names = choose(settings.methods)
    except ValueError as error:
        fail(f"--method {error}")
    for name in ("alpha", "lr"):
        if not math.isfinite(getattr(settings, name)):
            fail(f"--{name} must be finite, got {getattr(settings, name)}")
    result_folder(out)
    try:
        loaded = _load(data, evaluation, text_column, label_column)
        rows = loaded.evaluation
        if len(rows) > settings.eval_rows:
            rows = random.Random(0).sample(rows, settings.eval_rows)
        results = _train(loaded, settings, rows, as_json, out)
    except (demo_data.DataError, ModelError) as error:
        fail(str(error))
    common = {
        "seeds": settings.seeds,
        "model": settings.model or default_model().parent.name,
        "data": {
            "train": str(data) if data else "bundled remarks", "train_rows": len(loaded.train),
            "eval_rows": len(loaded.evaluation), "evaluated_rows": len(rows), "classes": loaded.classes,
        },
        "settings": asdict(settings),
    }  # fmt: skip
    records = [demo_report.record(name, [result["methods"][name] for result in results], common) for name in names]
    if as_json:
        for record in records:
            print_json(record)
    else:
        demo_report.show(records)
    if out:
        demo_report.write({"methods": records, "seeds": results}, out)


def _load(data: Path | None, evaluation: Path | None, text_column: str, label_column: str) -> demo_data.Data:
    if data is None:
        if evaluation is not None:
            raise demo_data.DataError("--eval needs --data: the labels of the two files have to agree")
        bundled = demo_data.bundled
        return demo_data.load(bundled("train"), bundled("eval"), "text", "label")
    return demo_data.load(data, evaluation, text_column, label_column)


def _train(data: demo_data.Data, settings: Settings, rows: list, as_json: bool, out: Path | None) -> list[dict]:
    results, names = [], choose(settings.methods)
    extras = [METHODS[name].extra for name in names]
    pictures = out is not None and any(extra.draws for extra in extras) and plots()
    units = sum(extra.units(settings) for extra in extras)
    total, done = settings.seeds * (settings.steps + units), 0
    with progress(lines=as_json) as tell:

        def advance() -> None:
            nonlocal done
            done += 1
            tell(what, done, total)

        for seed in range(settings.seeds):
            what = f"training, seed {seed}" if settings.seeds > 1 else "training"
            tell(what, done, total)
            results.append(run_seed(data, settings, seed, rows, advance, out, pictures))
    return results
