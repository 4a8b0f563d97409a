"""Ratios, rotation and rounds on fake clocks, where the right answer is known."""

import itertools
import statistics
from random import Random
from types import SimpleNamespace

import pytest
import torch
from peft_fused.bench import timing
from peft_fused.bench.timing import MODES, CpuClock, Times, interleave, order, ratio, ratio_error


class FakeTime:
    """A clock that only the variants move."""

    def __init__(self):
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds


class FakeVariant:
    def __init__(self, time: FakeTime, forward: float, backward: float, clear: float = 0.0, slowdown=None):
        self.time, self.costs, self.cleared = time, (forward, backward, clear), 0
        self.slowdown = slowdown or itertools.repeat(1.0)
        self.pace = 1.0

    def forward(self):
        self.pace = next(self.slowdown)
        self.time.seconds += self.costs[0] * self.pace
        return "y"

    def backward(self, y):
        assert y == "y"
        self.time.seconds += self.costs[1] * self.pace

    def clear(self):
        self.cleared += 1
        self.time.seconds += self.costs[2]


def test_one_step_gives_every_mode_and_leaves_clearing_out():
    time = FakeTime()
    variant = FakeVariant(time, forward=0.002, backward=0.003, clear=5.0)
    assert CpuClock(now=time.now).measure(variant) == pytest.approx({"forward": 2, "backward": 3, "both": 5})
    assert variant.cleared == 1


def test_many_calls_are_reported_per_call():
    time = FakeTime()
    variant = FakeVariant(time, forward=0.002, backward=0.004)
    assert CpuClock(calls=7, now=time.now).measure(variant) == pytest.approx({"forward": 2, "backward": 4, "both": 6})
    assert variant.cleared == 7, "a second backward must not accumulate into the first one's gradients"


def test_a_gpu_is_timed_from_cold_caches_and_behind_a_head_start(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            told.append("event")

        def query(self):
            return next(late)

        def synchronize(self):
            told.append("wait")

        def elapsed_time(self, end):
            return 2.0

    class Variant:
        def clear(self):
            told.append("clear")

        def forward(self):
            told.append("forward")

        def backward(self, y):
            told.append("backward")

    told = []
    monkeypatch.setattr(timing, "FLUSH_BYTES", 8)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    late = iter((False, True, False))
    monkeypatch.setattr(torch.cuda, "_sleep", told.append)
    clock = timing.CudaClock(torch.device("cpu"))
    clock.flush = SimpleNamespace(sum=lambda: told.append("flush"))
    assert clock.measure(Variant()) == dict.fromkeys(MODES, 2.0)

    def region(cycles, *calls):
        return ["flush", cycles, "event", *calls, "event", "wait"]

    short, longer = timing.HEAD_START, 2 * timing.HEAD_START
    both = region(longer, "forward", "backward")
    assert told == ["clear", *region(short, "forward"), *region(short, "backward"), "clear", *both]


def test_ratio_is_the_median_of_per_round_ratios():
    # The machine is ten times slower in the second round; a ratio of medians would be 20 / 3.
    assert ratio(Times([2.0, 20.0, 90.0]), Times([1.0, 10.0, 3.0])) == 2.0
    with pytest.raises(ValueError):
        ratio(Times([1.0]), Times([1.0, 2.0]))


def test_the_error_of_a_ratio_is_how_far_medians_of_as_many_rounds_scatter():
    random = Random(0)
    samples = [Times([random.gauss(1.0, 0.05) for _ in range(25)]) for _ in range(400)]
    ones = Times([1.0] * 25)
    scatter = statistics.stdev(ratio(times, ones) for times in samples)
    assert statistics.mean(ratio_error(times, ones) for times in samples) == pytest.approx(scatter, rel=0.1)


def test_a_drifting_machine_does_not_change_the_ratio():
    time = FakeTime()
    drift = [1.0 + 0.5 * i for i in range(20)]
    variants = {
        "ours": FakeVariant(time, 0.003, 0.003, slowdown=iter(drift)),
        "peft": FakeVariant(time, 0.004, 0.006, slowdown=iter(drift)),
    }
    times = interleave(variants, CpuClock(now=time.now), seconds=0.0, least=9, most=9)
    assert {mode: ratio(times["ours"][mode], times["peft"][mode]) for mode in MODES} == pytest.approx(
        {"forward": 0.75, "backward": 0.5, "both": 0.6}
    )
    assert times["ours"]["forward"].iqr > 0


def test_spread_is_the_interquartile_range():
    times = Times([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (times.median, times.iqr) == (3.0, 2.0)
    assert Times([7.0]).iqr == 0.0


def test_order_rotates_and_turns_around():
    names = ["a", "b", "c"]
    rounds = [order(names, index) for index in range(6)]
    assert rounds == [list(text) for text in ("abc", "cba", "bca", "acb", "cab", "bac")]
    for position in range(3):
        assert sorted(row[position] for row in rounds) == sorted(names * 2), "every variant takes every place equally"


def test_rounds_stop_at_the_limits():
    time = FakeTime()
    variants = {"a": FakeVariant(time, 0.001, 0.001), "b": FakeVariant(time, 0.001, 0.001)}
    few = interleave(variants, CpuClock(now=time.now), seconds=0.0, least=4, most=9)
    many = interleave(variants, CpuClock(now=time.now), seconds=60.0, least=4, most=9)
    assert (len(few["a"]["both"].ms), len(many["b"]["both"].ms)) == (4, 9)
