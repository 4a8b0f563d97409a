"""`--base`: another commit, built and measured in turns with ours, and what is said where it cannot be."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from peft_fused.bench import base, run
from peft_fused.bench.base import APART, BASE, Base, BaseError, Worker
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


# --------------------------------------------------------------------------------------------------------------- pairs


SHAPE = grid("cpu", "tiny", "lowrank")[0]


class Served:
    """A Worker without a process: answers every shape with these turns, names that it has or {name: class}, and why
    there are no more. ms: what it then measures. asked: those of all workers that were asked, in order."""

    asked: ClassVar[list] = []

    def __init__(self, *turns, ms=None):
        *self.turns, self.why = turns
        self.ms = ms or itertools.repeat(2.0)

    def measure(self, shape, grid, device, ours, seconds):
        self.asked.append(self)
        turns = [names if isinstance(names, dict) else dict.fromkeys(names, "Layer") for names in self.turns]
        return [
            {name: (kind, dict.fromkeys(MODES, next(self.ms))) for name, kind in names.items() if name in wanted}
            for names, wanted in zip(turns, ours, strict=False)
        ], self.why


@pytest.fixture(autouse=True)
def _nobody_was_asked():
    Served.asked.clear()


def compared(at_base: Served, apart: Served) -> Base:
    found = Base.__new__(Base)
    found.commit, found.missing = "0" * 40, ""
    found.workers = [{BASE: at_base, APART: apart}] * base.IMPORTED
    return found


def test_only_what_both_commits_have_of_ours_is_compared():
    other = compared(Served(["fused", "peft"], ["later"], "over"), Served(["fused", "dylora"], ["other"], "over"))
    turns = [Turn(["fused", "dylora"]), Turn(["later"])]
    other.measure(SHAPE, "tiny", CPU, turns, seconds=0.0)
    assert set(turns[0].times) == {"fused at base", "fused apart"} and not turns[1].times
    for by_mode in turns[0].times.values():
        assert set(by_mode) == set(MODES)
        assert all(times.ms == [2.0] * base.LEAST_PAIRS for times in by_mode.values())
    assert other.missing == "apart: over; at base: over", "each lacks something"


def test_a_layer_is_not_compared_with_a_step_of_the_same_name():
    other = compared(Served({"lora": "Layer"}, "over"), Served({"lora": "TrainingStep"}, "over"))
    turn = Turn(["lora"])
    other.measure(SHAPE, "tiny", CPU, [turn], seconds=0.0)
    assert not turn.times and other.missing == "apart: over; at base: over"


def test_the_ratio_is_of_this_commit_to_the_other(monkeypatch):
    monkeypatch.setattr(run, "grid", lambda *_: [SHAPE])
    slow, fast = (Served(["fused", "dylora"], "over", ms=itertools.repeat(ms)) for ms in (3.0, 1.5))
    rows = list(run.run(CPU, "tiny", op="lowrank", base=compared(slow, fast)))
    assert {row["ratio_to_base"] for row in rows} == {0.5} and {row["base_pairs"] for row in rows} == {base.LEAST_PAIRS}
    assert all((row["ms_median"]["base"], row["ms_median"]["apart"]) == (3.0, 1.5) for row in rows)
    assert Served.asked[:4] == [slow, fast, fast, slow], "neither always comes first"


@pytest.mark.parametrize(
    ("ms", "seconds", "pairs"),
    [
        (itertools.cycle([2.0, 2.001]), 60.0, base.LEAST_PAIRS),
        (itertools.cycle([2.0, 1.0, 4.0, 3.0, 2.5]), 60.0, base.MOST_PAIRS),
        (itertools.cycle([2.0, 1.0, 4.0, 3.0, 2.5]), 0.0, base.LEAST_PAIRS),
        # Five ratios of 2 among ones: of 21 they lie beyond the upper quartile.
        (itertools.chain([1.0] * 5, itertools.repeat(2.0)), 60.0, 21),
    ],
)
def test_pairs_are_measured_until_the_ratio_is_known_or_the_time_is_spent(ms, seconds, pairs):
    turn = Turn(["fused"])
    compared(Served(["fused"], "over", ms=ms), Served(["fused"], "over")).measure(SHAPE, "tiny", CPU, [turn], seconds)
    assert len(turn.times["fused at base"]["both"].ms) == pairs


def test_a_shape_that_it_does_not_have(monkeypatch):
    monkeypatch.setattr(run, "grid", lambda *_: [SHAPE])
    at_base, apart = Served("has no such shape"), Served(["fused", "dylora"], "over")
    rows = list(run.run(CPU, "tiny", op="lowrank", base=compared(at_base, apart)))
    assert rows and all(row["ratio_to_base"] is row["ratio_to_base_error"] is None for row in rows)
    assert {row["skipped"]["base"] for row in rows} == {"at base: has no such shape"}
    assert Served.asked == [at_base, apart], "each is asked once, not once per pair"


def test_a_process_that_ends_leaves_what_was_measured():
    """Of the pairs before it."""
    at_base, apart = Served(["fused"], "over"), Served(["fused"], "over")
    answers = iter([at_base.measure] * 2)
    at_base.measure = lambda *request: next(answers, lambda *_: ([], "ended with status -9"))(*request)
    found, turn = compared(at_base, apart), Turn(["fused"])
    found.measure(SHAPE, "tiny", CPU, [turn], seconds=0.0)
    assert {len(times.ms) for by_mode in turn.times.values() for times in by_mode.values()} == {2}
    assert found.missing == "at base: ended with status -9"


def test_every_pair_has_processes_of_its_own_until_there_are_enough(monkeypatch):
    """And all of them are closed."""
    closed, left = [], iter(range(100))
    monkeypatch.setattr(base, "build", lambda _: (Path("there"), "0" * 40))

    class Counted(Served):
        def __init__(self, folder, what):
            super().__init__(["fused"], "over")
            self.number = next(left)

        def close(self):
            closed.append(self.number)

    monkeypatch.setattr(base, "Worker", Counted)
    other = Base("HEAD")
    assert len(other.workers) == 1, "the others wait until they are needed"
    monkeypatch.setattr(base, "LEAST_PAIRS", base.IMPORTED + 1)
    for _ in range(2):
        Served.asked.clear()
        other.measure(SHAPE, "tiny", CPU, [Turn(["fused"])], seconds=0.0)
        assert sorted(worker.number for worker in Served.asked) == [0, 0, 1, 1, *range(2, 2 * base.IMPORTED)]
    other.close()
    assert sorted(closed) == list(range(2 * base.IMPORTED))


def test_a_turn_that_one_pair_has_ends_no_others():
    turns = [Turn(["fused"]), Turn(["step"])]
    at_base, apart = Served(["fused"], ["step"], "over"), Served(["fused"], ["step"], "over")
    measure, answers = at_base.measure, iter([True])
    at_base.measure = lambda *request: (measure(*request)[0][: 2 if next(answers, False) else 1], "killed")
    other = compared(at_base, apart)
    other.measure(SHAPE, "tiny", CPU, turns, seconds=0.0)
    pairs = [{len(times.ms) for by_mode in turn.times.values() for times in by_mode.values()} for turn in turns]
    assert pairs == [{base.LEAST_PAIRS}, {1}] and other.missing == "at base: killed"


def test_the_time_that_an_import_takes_is_not_the_pairs(monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(base.time, "perf_counter", lambda: next(now))
    other = compared(
        Served(["fused"], "over", ms=itertools.cycle([2.0, 1.0, 4.0, 3.0, 2.5])), Served(["fused"], "over")
    )
    workers_of = other.workers_of
    other.workers_of = lambda pair: (next(itertools.islice(now, 1000, None)), workers_of(pair))[1]
    turn = Turn(["fused"])
    other.measure(SHAPE, "tiny", CPU, [turn], seconds=12.5 / base.PAIRS_SHARE)  # a pair takes one
    assert len(turn.times["fused at base"]["both"].ms) == 13


def test_a_worker_that_ends_leaves_ours(monkeypatch):
    def ended(*_):
        raise BaseError("the process of a commit has ended")

    closed = []
    other = compared(Served(["fused"], "over"), Served(["fused"], "over"))
    other.workers = other.workers[:1]
    other.workers[0][APART].measure = ended
    monkeypatch.setattr(Served, "close", lambda worker: closed.append(worker), raising=False)
    monkeypatch.setattr(run, "grid", lambda *_: [SHAPE])
    rows = list(run.run(CPU, "tiny", op="lowrank", base=other, failed=pytest.fail))
    assert {row["skipped"]["base"] for row in rows} == {"the process of a commit has ended"}
    assert len(closed) == 2 and not other.workers, "the next shape starts new ones"


def test_an_interrupt_is_no_failure_of_a_shape():
    def interrupted(*_):
        raise KeyboardInterrupt

    other = compared(Served(["fused"], "over"), Served(["fused"], "over"))
    other.workers[0][APART].measure = interrupted
    with pytest.raises(KeyboardInterrupt):
        list(run.run(CPU, "tiny", op="lowrank", base=other, failed=pytest.fail))


# ----------------------------------------------------------------------------------------------------------- processes


def test_all_shapes_are_told_apart():
    class Pipe:
        def send(self, request):
            asked.append(request[0])

        def recv(self):
            return "end", ""

    worker, asked = Worker.__new__(Worker), []
    worker.pipe = Pipe()
    for device in ("cpu", "cuda"):
        asked.clear()
        for shape in grid(device, "all"):
            worker.measure(shape, "all", CPU, [["fused"]], 0.0)
        assert not [wanted for wanted in asked if asked.count(wanted) > 1]


CHILDREN = "/proc/{pid}/task/{pid}/children"


@pytest.mark.skipif(not Path(CHILDREN.format(pid=os.getpid())).exists(), reason="this system names no children")
def test_a_process_that_is_killed_ends_its_shape_alone():
    """And the one that starts them all shapes."""
    worker = Worker(None, "this commit")

    def kill_its_child():
        while not (children := Path(CHILDREN.format(pid=worker.process.pid)).read_text().split()):
            time.sleep(0.01)
        os.kill(int(children[0]), signal.SIGKILL)

    def measured():
        return worker.measure(SHAPE, "tiny", CPU, [["fused", "other"]], 0.0)

    try:
        killer = threading.Thread(target=kill_its_child)
        killer.start()
        assert measured() == ([], "ended with status -9")
        killer.join()
        (found,), why = measured()
        assert not Path(CHILDREN.format(pid=worker.process.pid)).read_text(), "the next one would run beside it"
        assert why == "has no such variant" and set(found) == {"fused"}
        kind, by_mode = found["fused"]
        assert kind == "Layer" and set(by_mode) == set(MODES) and min(by_mode.values()) > 0
        worker.process.kill()
        with pytest.raises(BaseError, match="has ended"):
            measured()
    finally:
        worker.close()
