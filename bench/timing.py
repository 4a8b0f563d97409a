"""Interleaved timing. Every round runs each variant once, so slow drift of the machine hits all variants alike, and a
ratio is the median of the per-round ratios rather than a ratio of medians.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch

FLUSH_BYTES = 1 << 30
# Cycles that a GPU spins before a timed region, about a millisecond: time for the host to queue all of it.
HEAD_START, MOST_HEAD_START = 2_000_000, 64_000_000
MODES = ("forward", "backward", "both")
# Of methods: forward, backward, schedule and optimizer, of a few layers.
STEP = "step"


class Variant(Protocol):
    """One way to compute a layer. `clear` drops the gradients and is never timed."""

    def forward(self) -> torch.Tensor: ...

    def backward(self, y: torch.Tensor) -> None: ...

    def clear(self) -> None: ...


@dataclass
class Times:
    """Milliseconds per call of one variant and mode, one entry per round, or per pair of processes: see base.py."""

    ms: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def iqr(self) -> float:
        if len(self.ms) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.ms, n=4, method="inclusive")
        return high - low


def _ratios(times: Times, reference: Times) -> Times:
    return Times([a / b for a, b in zip(times.ms, reference.ms, strict=True)])


def ratio(times: Times, reference: Times) -> float:
    """Median over the rounds of times / reference; below 1 means faster than the reference."""
    return _ratios(times, reference).median


def ratio_error(times: Times, reference: Times) -> float | None:
    """Standard error of `ratio`: that of the median of as many normal values with the same interquartile range. None
    for one round, which does not tell."""
    if len(times.ms) < 2:
        return None
    return 0.929 * _ratios(times, reference).iqr / math.sqrt(len(times.ms))


def order(names: list[str], round_index: int) -> list[str]:
    """Order of one round: rotated, and reversed in every second round (ABBA), so that no variant always follows the
    same neighbour or always runs on a warm cache."""
    shift = (round_index // 2) % len(names)
    rotated = names[shift:] + names[:shift]
    return rotated[::-1] if round_index % 2 else rotated


@dataclass
class Turn:
    """What was measured together: the names of ours in it, and {variant: {mode: Times}} of all."""

    ours: list[str]
    times: dict[str, dict[str, Times]] = field(default_factory=dict)


class CpuClock:
    """Stamps one training step at its start, between forward and backward, and at its end: one run gives all modes.

    `calls` forwards, then as many backwards, are timed together where a single call is too short for the clock.
    """

    def __init__(self, calls: int = 1, now: Callable[[], float] = time.perf_counter):
        self.calls = calls
        self.now = now

    def measure(self, variant: Variant) -> dict[str, float]:
        variant.clear()
        start = self.now()
        outputs = [variant.forward() for _ in range(self.calls)]
        middle = self.now()
        while outputs:
            variant.backward(outputs.pop())
            if outputs:  # accumulating into an existing gradient is a cost no first backward has
                variant.clear()
        end = self.now()
        scale = 1e3 / self.calls
        return {"forward": (middle - start) * scale, "backward": (end - middle) * scale, "both": (end - start) * scale}


class CudaClock:
    """Times by CUDA events. Reading far more than the L2 cache holds precedes each timed region and leaves nothing of
    it there, nor anything to be written back; then the device spins while the host queues the region, so that the
    events see device time. Where it does not spin long enough, it spins twice as long from then on."""

    def __init__(self, device: torch.device):
        self.flush = torch.zeros(FLUSH_BYTES // 4, device=device)
        self.head_start = HEAD_START

    def _timed(self, run: Callable[[], object]) -> tuple[float, object]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.sum()
        torch.cuda._sleep(self.head_start)
        start.record()
        result = run()
        end.record()
        if start.query():
            self.head_start = min(2 * self.head_start, MOST_HEAD_START)
        end.synchronize()
        return start.elapsed_time(end), result

    def measure(self, variant: Variant) -> dict[str, float]:
        variant.clear()
        forward, y = self._timed(variant.forward)
        backward, _ = self._timed(lambda: variant.backward(y))
        variant.clear()
        both, _ = self._timed(lambda: variant.backward(variant.forward()))
        return {"forward": forward, "backward": backward, "both": both}


def clock_of(device: torch.device, calls: int = 1) -> CpuClock | CudaClock:
    """The clock of layers: of the device's time on a GPU, of `calls` at a time on a CPU."""
    return CudaClock(device) if device.type == "cuda" else CpuClock(calls)


def step_clock(device: torch.device) -> CpuClock:
    """The clock of training steps, with all that the host does: one at a time, since each changes the parameters."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return CpuClock(now=now)


def wall_ms(variant: Variant, calls: int = 20) -> float:
    """Wall time per training step on a GPU, back to back: the larger of host time and device time."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        variant.clear()
        variant.backward(variant.forward())
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / calls


def interleave(
    variants: dict[str, Variant], clock: CpuClock | CudaClock, *, seconds: float, least: int = 5, most: int = 40
) -> dict[str, dict[str, Times]]:
    """Runs rounds until `seconds` are spent, never fewer than `least` or more than `most`: {variant: {mode: Times}}.

    One untimed round comes first: allocations, packing of weights and compilation happen there.
    """
    names = list(variants)
    for name in names:
        clock.measure(variants[name])
    times = {name: {mode: Times() for mode in MODES} for name in names}
    start = time.perf_counter()
    for index in range(most):
        for name in order(names, index):
            for mode, ms in clock.measure(variants[name]).items():
                times[name][mode].ms.append(ms)
        if index + 1 >= least and time.perf_counter() - start > seconds:
            break
    return times
