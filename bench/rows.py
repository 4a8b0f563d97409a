"""The one way from a case, the variants of a shape and what is compared, to rows: measured together, a row per mode."""

from dataclasses import dataclass, field

import torch

from .base import APART, BASE, Base
from .shapes import Shape, StructuredShape
from .timing import STEP, CpuClock, CudaClock, Times, clock_of, interleave, ratio, step_clock, wall_ms
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


def measure(case: Case, device: torch.device, *, seconds: float, base: Base | None = None) -> list[dict]:
    """A row per comparison and mode; the mode "step" is a whole training step of STEP_LAYERS layers.

    base: measures the same variants of another commit in between, for `ratio_to_base`.
    """
    memory = {id(c): _memory(case, c, device) for c in case.comparisons}
    ours = [c.ours for c in case.comparisons]
    times = _timed(case.variants, clock_of(device, case.shape.calls), seconds, ours, base)
    if case.steps:
        for name, found in _timed(case.steps, step_clock(device), seconds, ours, base).items():
            times[name][STEP] = found["both"]
    return [_row(case, c, mode, times, base) | memory[id(c)] for c in case.comparisons for mode in times[c.ours]]


def _timed(variants: dict, clock: CpuClock | CudaClock, seconds: float, ours: list[str], base: Base | None) -> dict:
    """{variant: {mode: Times}}; with another commit also "<variant> at base", and "<variant> apart" of this one."""
    if base is None:
        return interleave(variants, clock, seconds=seconds)
    with base.variants(ours) as others:
        both = {}
        for name, variant in variants.items():  # side by side; every second round has the reverse order
            both[name] = variant
            both |= {f"{name} {which}": there[name] for which, there in others.items() if name in there}
        return interleave(both, base.clock(clock), seconds=seconds)


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
    references, skipped = dict(c.references), {k: why for k, why in case.skipped.items() if c.references.get(k)}
    ratios, beside = dict(c.ratios), {}
    if base is not None:
        beside = {"apart": f"{c.ours} {APART}", "base": f"{c.ours} {BASE}"}
        ratios["ratio_to_base"] = beside["apart"], beside["base"]
        skipped |= {} if beside["base"] in times else {"base": base.missing}

    def at(name: str | None) -> Times | None:
        return times.get(name, {}).get(mode)

    def against(ours: str, reference: str | None) -> float | None:
        return ratio(at(ours), at(reference)) if at(ours) and at(reference) else None

    shown = {"ours": c.ours} | references | beside | {name: name for pair in c.ratios.values() for name in pair}
    shown = {label: at(name) for label, name in shown.items() if at(name)}
    return {
        "op": c.op,
        "shape": case.shape.name,
        **c.about,
        "dtype": case.shape.dtype_name,
        "dropout": case.shape.dropout,
        "mode": mode,
        **{f"ratio_to_{label}": against(c.ours, name) for label, name in references.items()},
        **{key: against(*pair) for key, pair in ratios.items()},
        "ms_median": {label: found.median for label, found in shown.items()},
        "ms_iqr": {label: found.iqr for label, found in shown.items()},
        "rounds": len(at(c.ours).ms),
        "layers": STEP_LAYERS if mode == STEP else 1,
        "path": c.path,
        "skipped": skipped,
        "error_vs_reference": c.errors,
    }
