"""`--base`: another commit, built and measured in turns with ours, and what is said where it cannot be."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import threading
from multiprocessing import Pipe
from pathlib import Path

import pytest
import torch
from peft_fused.bench import base, run
from peft_fused.bench.base import APART, BASE, Base, BaseError, EndedError, Worker
from peft_fused.bench.benchmarks import grid
from peft_fused.bench.timing import MODES, Turn

CPU = torch.device("cpu")


def git(folder, *arguments):
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@localhost"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of a package that does not build."""
    if shutil.which("git") is None:
        pytest.skip("there is no git")
    folder = tmp_path / "checkout"
    (folder / "bench").mkdir(parents=True)
    (folder / "bench" / "run.py").touch()
    (folder / "setup.py").write_text("raise SystemExit('no such compiler')\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "broken")
    monkeypatch.setattr(base, "ROOT", folder)
    monkeypatch.setattr(base, "BUILDS", tmp_path / "builds")
    return folder


def test_the_same_commit_is_measured_in_turns_with_ours(monkeypatch, tmp_path):
    """Whatever has changed since: its variants bear the same names and have ratios in every row."""
    try:
        commit = base.commit_of("HEAD")
    except BaseError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(base, "BUILDS", tmp_path)
    monkeypatch.setenv("PEFT_FUSED_BUILD", "off")
    monkeypatch.setattr(base, "LEAST_PAIRS", 2)
    other = Base("HEAD")
    try:
        rows = [row for op in ("lowrank", "circulant", "aflora") for row in run.run(CPU, "tiny", op=op, base=other)]
    finally:
        other.close()
    assert {row["op"] for row in rows} == {"lora", "dylora", "circulant", "aflora"}
    for row in rows:
        assert row["base_commit"] == commit and "base" not in row["skipped"]
        assert row["ratio_to_base"] > 0 and row["ms_median"]["base"] > 0 and row["ms_median"]["apart"] > 0
        assert row["ratio_to_base_error"] > 0 and row["base_pairs"] >= 2
    json.dumps(rows, allow_nan=False)
    assert base.build("HEAD")[0] == next(tmp_path.iterdir()), "what is built is used again"


def test_a_revision_that_does_not_exist(checkout):
    with pytest.raises(BaseError, match="--base nonsense names no commit"):
        base.build("nonsense")


def test_a_commit_that_does_not_build(checkout):
    with pytest.raises(BaseError, match=r"does not build:\n[\s\S]*no such compiler"):
        base.build("HEAD")
    assert not list((checkout.parent / "builds").iterdir())


def test_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "ROOT", tmp_path)
    with pytest.raises(BaseError, match="needs a git checkout"):
        base.build("HEAD")


def test_the_command_says_why_it_does_not_start(checkout, monkeypatch):
    from typer.testing import CliRunner

    from peft_fused.cli import app

    result = CliRunner().invoke(app, ["bench", "--tiny", "--base", "nonsense"])
    assert result.exit_code == 2 and "names no commit" in result.stderr


# ------------------------------------------------------------------------------------------------------------ protocol


SHAPE = grid("cpu", "tiny", "lowrank")[0]


@pytest.fixture
def served():
    """served(*turns, ms): a Worker whose process, a thread, answers each shape with these turns: names that it is ready
    to measure, or {name: class}, at last a text to end with. ms: what it then measures. Told is what it was asked."""

    def start(*turns, ms=None):
        ours, theirs = Pipe()
        times = ms or itertools.repeat(2.0)

        def ask():
            told.append(theirs.recv())
            return told[-1][0]

        def answer():
            with contextlib.suppress(EOFError, OSError):  # at the end of the test
                answer_shapes()

        def answer_shapes():
            while ask() == "shape":
                for names in turns[:-1]:
                    theirs.send(("ready", names if isinstance(names, dict) else dict.fromkeys(names, "Layer")))
                    while ask() == "measure":
                        theirs.send(("measured", dict.fromkeys(MODES, next(times))))
                theirs.send(("end", turns[-1]))

        found = Worker.__new__(Worker)
        found.pipe, found.missing, found.waits = ours, "", False
        threading.Thread(target=answer, daemon=True).start()
        return found

    told = []
    start.told = told
    return start


def compared(at_base: Worker, apart: Worker) -> Base:
    found = Base.__new__(Base)
    found.commit, found.workers, found.missing = "0" * 40, {BASE: at_base, APART: apart}, ""
    return found


def test_only_what_both_commits_have_of_ours_is_measured(served):
    other = compared(served(["fused", "peft"], ["later"], "over"), served(["fused", "dylora"], ["other"], "over"))
    turns = [Turn(["fused", "dylora"]), Turn(["later"])]
    other.measure(SHAPE, "tiny", CPU, turns, seconds=0.0)
    assert set(turns[0].times) == {"fused at base", "fused apart"} and not turns[1].times
    for by_mode in turns[0].times.values():
        assert set(by_mode) == set(MODES)
        assert all(times.ms == [2.0] * base.LEAST_PAIRS for times in by_mode.values())
    assert {name for what, name, *_ in served.told if what == "measure"} == {"fused"}
    assert other.missing == "apart: over; at base: over", "each lacks something"


def test_a_layer_is_not_compared_with_a_step_of_the_same_name(served):
    layer, step = {"lora": "Layer"}, {"lora": "TrainingStep"}
    other = compared(served(layer, "over"), served(step, "over"))
    turn = Turn(["lora"])
    other.measure(SHAPE, "tiny", CPU, [turn], seconds=0.0)
    assert not turn.times and other.missing == "apart: over; at base: over"


def test_the_ratio_is_of_this_commit_to_the_other(served, monkeypatch):
    monkeypatch.setattr(run, "grid", lambda *_: [SHAPE])
    slow, fast = (served(["fused", "dylora"], "over", ms=itertools.repeat(ms)) for ms in (3.0, 1.5))
    rows = list(run.run(CPU, "tiny", op="lowrank", base=compared(slow, fast)))
    assert {row["ratio_to_base"] for row in rows} == {0.5} and {row["base_pairs"] for row in rows} == {base.LEAST_PAIRS}
    assert all((row["ms_median"]["base"], row["ms_median"]["apart"]) == (3.0, 1.5) for row in rows)


@pytest.mark.parametrize(
    ("ms", "seconds", "pairs"),
    [
        (itertools.cycle([2.0, 2.001]), 60.0, base.LEAST_PAIRS),
        (itertools.cycle([2.0, 1.0, 4.0, 3.0, 2.5]), 60.0, base.MOST_PAIRS),
        (itertools.cycle([2.0, 1.0, 4.0, 3.0, 2.5]), 0.0, base.LEAST_PAIRS),
        # Five ratios of 2 among ones: of 21 they lie beyond the upper quartile.
        (itertools.chain([1.0, 2.0] * 5, itertools.repeat(2.0)), 60.0, 21),
    ],
)
def test_pairs_are_measured_until_the_ratio_is_known_or_the_time_is_spent(served, monkeypatch, ms, seconds, pairs):
    monkeypatch.setattr(base, "interleave", lambda variants, clock, **_: interleaved(variants, clock))

    def interleaved(variants, clock):  # a round, which is one entry
        return {name: {m: base.Times([t]) for m, t in clock.measure(v).items()} for name, v in variants.items()}

    turn = Turn(["fused"])
    other = compared(served(["fused"], "over", ms=ms), served(["fused"], "over"))
    other.measure(SHAPE, "tiny", CPU, [turn], seconds)
    assert len(turn.times["fused at base"]["both"].ms) == pairs


def test_all_shapes_are_told_apart():
    asked = []
    worker = Worker.__new__(Worker)
    worker._send = lambda what, wanted, *_: asked.append(wanted)
    for device in ("cpu", "cuda"):
        asked.clear()
        for shape in grid(device, "all"):
            worker.start(shape, "all", CPU)
        assert not [wanted for wanted in asked if asked.count(wanted) > 1]


def test_an_error_between_two_shapes_leaves_both_ready(served, monkeypatch):
    other = compared(served(["fused"], ["later"], "over"), served(["fused"], "over"))

    def fails(*_, **__):
        raise ValueError

    with monkeypatch.context() as patched:
        patched.setattr(base, "interleave", fails)
        with pytest.raises(ValueError):
            other.measure(SHAPE, "tiny", CPU, [Turn(["fused"])], seconds=0.0)
    turn = Turn(["fused"])
    other.measure(SHAPE, "tiny", CPU, [turn], seconds=0.0)
    assert len(turn.times) == 2


def test_an_interrupt_is_not_held_up(served, monkeypatch):
    """Whoever then closes the workers need not wait for what they have not said."""

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(base, "interleave", interrupted)
    other = compared(served(["fused"], "over"), served(["fused"], "over"))
    with pytest.raises(KeyboardInterrupt):
        list(run.run(CPU, "tiny", op="lowrank", base=other, failed=pytest.fail))
    assert "finish" not in [what for what, *_ in served.told]


def test_a_shape_that_it_does_not_have(served, monkeypatch):
    monkeypatch.setattr(run, "grid", lambda *_: [SHAPE])
    other = compared(served("has no such shape"), served(["fused", "dylora"], "over"))
    rows = list(run.run(CPU, "tiny", op="lowrank", base=other))
    assert rows and all(row["ratio_to_base"] is row["ratio_to_base_error"] is None for row in rows)
    assert {row["skipped"]["base"] for row in rows} == {"at base: has no such shape"}
    assert sum(what == "shape" for what, *_ in served.told) == 2, "it is asked once, not once per pair"


CHILDREN = "/proc/{pid}/task/{pid}/children"


@pytest.mark.skipif(not Path(CHILDREN.format(pid=os.getpid())).exists(), reason="this system names no children")
def test_a_process_that_is_killed_ends_its_shape_alone():
    worker = Worker(None, "this commit")
    try:
        worker.start(SHAPE, "tiny", CPU)
        assert worker.ready()["fused"] == "Layer"
        (child,) = Path(CHILDREN.format(pid=worker.process.pid)).read_text().split()
        os.kill(int(child), signal.SIGKILL)
        with pytest.raises(EndedError, match="ended with status -9"):
            worker.measured("fused")
        worker.start(SHAPE, "tiny", CPU)
        assert "fused" in worker.ready()
        assert set(worker.measured("fused")) == set(MODES)
    finally:
        worker.close()


def test_a_process_that_ends_leaves_what_was_measured(served):
    """Of this process, and of the pairs before it."""

    def then_fails():
        yield from [2.0] * 12
        worker.missing = "ended with status -9"
        raise EndedError(worker.missing)

    times = then_fails()
    worker, other = served(["fused"], "over"), served(["fused"], "over")
    worker.measured = lambda name: dict.fromkeys(MODES, next(times))
    found = compared(worker, other)
    turn = Turn(["fused"])
    found.measure(SHAPE, "tiny", CPU, [turn], seconds=0.0)
    assert {len(times.ms) for by_mode in turn.times.values() for times in by_mode.values()} == {3}
    assert found.missing == "at base: ended with status -9"
