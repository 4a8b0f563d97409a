"""What every experiment writes: its numbers with what made them, and a picture of them."""

from pathlib import Path

import torch
from peft_fused.bench.run import commit, versions

from peft_fused.cli.output import to_json

FOLDER = Path("bench/results/evidence")


def write(name: str, result: dict, folder: Path) -> Path:
    """folder/name.json, with versions and commit."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    about = {"versions": versions(), "commit": commit(), "threads": torch.get_num_threads()}
    path.write_text(to_json(result | about, indent=1) + "\n")
    return path


def picture(name: str, figure, folder: Path) -> Path:
    """folder/name.png."""
    import matplotlib.pyplot as plt

    path = folder / f"{name}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def axes(count: int, width: float, height: float):
    """(figure, its `count` axes in a row), drawn without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, found = plt.subplots(1, count, squeeze=False, figsize=(width, height), layout="constrained")
    return figure, list(found[0])


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation of two values or more."""
    found = torch.tensor(values, dtype=torch.float64)
    return {"mean": found.mean().item(), "std": found.std().item()}
