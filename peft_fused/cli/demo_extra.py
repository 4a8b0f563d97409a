"""What a method may add to the demo: numbers, notes, tables and a part of the plot of its own."""

from collections.abc import Callable
from pathlib import Path

from torch import nn


class Extra:
    """What the demo finds out and says of one method beside the table.

    A method has its own where there is a `cli/demo_<method>.py`, which defines a class of this name. One is made for a
    model before it is trained; folder: where it may write while that goes on, None for nowhere, with `pictures` or not.
    """

    draws = False  # whether it draws pictures

    def __init__(self, model: nn.Module, settings, seed: int, folder: Path | None, pictures: bool):
        self.model, self.settings = model, settings

    @staticmethod
    def units(settings) -> int:
        """How often `measure` calls its `advance`."""
        return 0

    def after_step(self) -> None:
        """After every step of all methods."""

    def measure(self, models: dict[str, nn.Module], batches: list[dict], advance: Callable[[], None]) -> dict:
        """Further numbers of the trained model. models: all that were trained, by method."""
        return {}

    @staticmethod
    def combine(seeds: list[dict], spread: Callable) -> dict:
        """Those numbers over the seeds. spread(values): their mean and standard deviation."""
        return {}

    @staticmethod
    def notes(found: dict, baseline: dict) -> list[str]:
        """What is to be said of a record; baseline: PEFT's."""
        return []

    @staticmethod
    def show(console, found: dict) -> None:
        """Prints tables of its own."""

    # Draws what there is in a record on an axis of the demo's plot; None if there is nothing.
    panel: Callable | None = None


def trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def cell(found: dict, key: str, style: str, unit: float = 1) -> str:
    """A number of a record with its spread, as it stands in tables."""
    text, std = format(found[key] / unit, style), found["std"][key]
    return text if std is None else f"{text} ± {std / unit:.1g}"
