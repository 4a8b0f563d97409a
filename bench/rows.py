"""The one way from a case, the variants of a shape and what is compared, to rows: measured together, a row per mode."""

from dataclasses import dataclass, field

import torch

from .base import APART, BASE, Base
from .shapes import Shape, StructuredShape
from .timing import STEP, Times, Turn, clock_of, interleave, ratio, ratio_error, step_clock, wall_ms
from .variants import Layer, TrainingStep, cuda_peak_bytes, saved_bytes

STEP_LAYERS = 4


@dataclass
class Comparison:
    """One variant of ours, which gets a row per mode, and those that it is compared with.

    references: variants by the label that they have in rows, None for one that there cannot be; a row has a ratio to
    each. ratios: further ones, numerator and denominator by their key. memory: labels whose bytes are counted. about:
    what else tells the row from others. errors: of ours against the truth.
    """

    op: str
    ours: str
    references: dict[str, str | None]
    path: str
    errors: dict[str, float]
    memory: tuple[str, ...]
    about: dict = field(default_factory=dict)
    ratios: dict[str, tuple[str, str]] = field(default_factory=dict)


@dataclass
class Case:
    """All variants of a shape that are timed together, and why those that are missing are.

    steps: training steps, by names of variants. with_input: whether the input counts among the bytes that are kept.
    """

    shape: Shape | StructuredShape
    variants: dict[str, Layer]
    comparisons: list[Comparison]
    skipped: dict[str, str] = field(default_factory=dict)
    steps: dict[str, TrainingStep] = field(default_factory=dict)
    with_input: bool = False


@dataclass
class Measured:
    """A case, the bytes of each of its comparisons, and the times: of the layers, then of the training steps if any."""

    case: Case
    memory: list[dict]
    turns: list[Turn]

    def rows(self, base: Base | None = None) -> list[dict]:
        """A row per comparison and mode; the mode "step" is a whole training step of STEP_LAYERS layers.

        base: has measured the turns as well, for `ratio_to_base`.
        """
        layers, *steps = (turn.times for turn in self.turns)
        times = {name: dict(by_mode) for name, by_mode in layers.items()}
        for by_name in steps:
            for name, by_mode in by_name.items():
                times.setdefault(name, {})[STEP] = by_mode["both"]
        return [
            _row(self.case, comparison, mode, times, base) | memory
            for comparison, memory in zip(self.case.comparisons, self.memory, strict=True)
            for mode in times[comparison.ours]
        ]


def measure(case: Case, device: torch.device, *, seconds: float) -> Measured:
    memory = [_memory(case, comparison, device) for comparison in case.comparisons]
    ours = [comparison.ours for comparison in case.comparisons]
    turns = [Turn(ours, interleave(case.variants, clock_of(device, case.shape.calls), seconds=seconds))]
    if case.steps:
        turns.append(Turn(ours, interleave(case.steps, step_clock(device), seconds=seconds)))
    # Rows need none of the tensors, which would crowd what is measured next.
    case.variants, case.steps = {}, {}
    return Measured(case, memory, turns)


def _memory(case: Case, comparison: Comparison, device: torch.device) -> dict:
    names = {"ours": comparison.ours} | comparison.references
    chosen = {label: case.variants.get(names[label]) for label in comparison.memory}
    found = {
        "saved_bytes": {
            label: None if variant is None else saved_bytes(variant, with_input=case.with_input)
            for label, variant in chosen.items()
        }
    }
    if device.type == "cuda":
        there = {label: variant for label, variant in chosen.items() if variant}
        found["peak_bytes"] = {label: cuda_peak_bytes(variant) for label, variant in there.items()}
        found["wall_ms"] = {label: wall_ms(variant) for label, variant in there.items()}
    return found


def _row(case: Case, c: Comparison, mode: str, times: dict[str, dict[str, Times]], base: Base | None) -> dict:
    def at(name: str | None) -> Times | None:
        return times.get(name, {}).get(mode)

    def against(ours: str, reference: str | None) -> float | None:
        return ratio(at(ours), at(reference)) if at(ours) and at(reference) else None

    skipped = {label: why for label, why in case.skipped.items() if c.references.get(label)}
    ratios = {f"ratio_to_{label}": against(c.ours, name) for label, name in c.references.items()}
    ratios |= {key: against(*pair) for key, pair in c.ratios.items()}
    shown = {"ours": c.ours} | c.references | {name: name for pair in c.ratios.values() for name in pair}
    if base is not None:
        apart, there = c.ours + APART, c.ours + BASE
        shown |= {"apart": apart, "base": there}
        ratios["ratio_to_base"] = against(apart, there)
        ratios["ratio_to_base_error"] = ratio_error(at(apart), at(there)) if at(there) else None
        ratios["base_pairs"] = len(at(there).ms) if at(there) else 0
        skipped |= {} if at(there) else {"base": base.missing}
    shown = {label: at(name) for label, name in shown.items() if at(name)}
    return {
        "op": c.op,
        "shape": case.shape.name,
        **c.about,
        "dtype": case.shape.dtype_name,
        "dropout": case.shape.dropout,
        "mode": mode,
        **ratios,
        "ms_median": {label: found.median for label, found in shown.items()},
        "ms_iqr": {label: found.iqr for label, found in shown.items()},
        "rounds": len(at(c.ours).ms),
        "layers": STEP_LAYERS if mode == STEP else 1,
        "path": c.path,
        "skipped": skipped,
        "error_vs_reference": c.errors,
    }
