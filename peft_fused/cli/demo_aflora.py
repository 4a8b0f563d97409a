"""How AFLoRA freezes a model's matrices, noted while it is trained, as numbers and as a picture."""

import statistics
from pathlib import Path

from torch import nn

import peft_fused

from . import demo_extra
from .demo_extra import trainable
from .output import to_json


class FreezingLog:
    """Trained parameters and frozen matrices of one AFLoRA model over its training.

    folder: where aflora.json, and aflora.png if `picture`, are written now, whenever something was frozen, and when the
    run has ended; None for nowhere.
    """

    def __init__(self, model: nn.Module, seed: int, total_steps: int, folder: Path | None = None, picture: bool = True):
        self.model, self.seed, self.total_steps = model, seed, total_steps
        self.folder, self.picture = folder, picture
        self.done = 0
        # [steps done, parameters trained from there on], an entry for every change.
        self.trained = [[0, trainable(model)]]
        self._write()

    def after_step(self) -> None:
        """Call after every step."""
        self.done += 1
        count = trainable(self.model)
        changed = count != self.trained[-1][1]
        if changed:
            self.trained.append([self.done, count])
        if changed or self.done == self.total_steps:
            self._write()

    def mean_trained(self) -> float:
        """Parameters trained, averaged over the steps done."""
        ends = [start for start, _ in self.trained[1:]] + [self.done]
        total = sum(count * (end - start) for (start, count), end in zip(self.trained, ends, strict=True))
        return total / self.done if self.done else float(self.trained[0][1])

    def numbers(self) -> dict:
        """What is written to aflora.json. frozen_at: steps done by then, 0 for from the start, None for not yet."""
        return {
            "seed": self.seed,
            "steps": self.done,
            "total_steps": self.total_steps,
            "trainable": [{"step": step, "parameters": count} for step, count in self.trained],
            "trainable_mean": self.mean_trained(),
            "matrices": [
                {"layer": layer, "matrix": matrix, "frozen_at": step}
                for layer, matrix, step in peft_fused.freezing_history(self.model)
            ],
        }

    def _write(self) -> None:
        if self.folder is None:
            return
        numbers = self.numbers()
        # By another name first: whoever looks on while training goes on sees whole files.
        part = self.folder / "aflora.part"
        part.write_text(to_json(numbers, indent=1) + "\n")
        part.replace(self.folder / "aflora.json")
        if self.picture:
            plot(numbers, part)
            part.replace(self.folder / "aflora.png")


class Extra(demo_extra.Extra):
    draws = True

    def __init__(self, model, settings, seed, folder, pictures):
        super().__init__(model, settings, seed, folder, pictures)
        self.log = FreezingLog(model, seed, settings.steps, folder, pictures)

    def after_step(self):
        self.log.after_step()

    def measure(self, models, batches, advance):
        return {"freezing": self.log.numbers()}

    @staticmethod
    def combine(seeds, spread):
        freezing = [seed["freezing"] for seed in seeds]
        return {
            "trainable_mean": statistics.fmean(found["trainable_mean"] for found in freezing),
            "trainable_end": freezing[0]["trainable"][-1]["parameters"],
            "freezing": freezing[0],
        }

    @staticmethod
    def notes(found, baseline):
        return [
            f"AFLoRA trains {found['trainable']:,} parameters at first, {found['trainable_end']:,} at the end and "
            f"{found['trainable_mean']:,.0f} on average; its memory is that of the end"
        ]


def plot(numbers: dict, path: Path) -> None:
    """Trained parameters over the steps, and until when each matrix was trained; a PNG, whatever its name."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [matrix for matrix in numbers["matrices"] if matrix["frozen_at"] != 0]
    height = 0.16 * max(len(rows), 4)
    figure, (count, until) = plt.subplots(
        2, 1, sharex=True, figsize=(7, 2.6 + height), height_ratios=(1.6, height), layout="constrained"
    )
    steps, done = numbers["trainable"], numbers["steps"]
    count.step(
        [*(entry["step"] for entry in steps), done], [*(e["parameters"] for e in steps), steps[-1]["parameters"]],
        where="post",
    )  # fmt: skip
    count.set(ylabel="trained parameters", ylim=(0, None), title=f"AFLoRA, seed {numbers['seed']}, step {done}")
    ends = [done if row["frozen_at"] is None else row["frozen_at"] for row in rows]
    until.barh(range(len(rows)), ends, color=["C0" if row["matrix"] == "A" else "C1" for row in rows])
    until.set_yticks(range(len(rows)), [f"{short(row['layer'])} {row['matrix']}" for row in rows], fontsize="xx-small")
    until.invert_yaxis()
    until.set(xlabel="step; a bar ends where its matrix is frozen", xlim=(0, numbers["total_steps"]))
    until.locator_params(axis="x", integer=True)
    for axis in (count, until):
        axis.grid(alpha=0.3, axis="x")
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)


def short(layer: str) -> str:
    """The end of a layer's name, from the number of its block on."""
    parts = layer.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[numbers[-1] :]) if numbers else parts[-1]
