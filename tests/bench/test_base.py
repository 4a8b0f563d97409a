"""`--base`: another commit, built and measured in the same rounds, and what is said where it cannot be."""

import json
import shutil
import subprocess
import threading
from multiprocessing import Pipe

import pytest
import torch
from peft_fused.bench import base, run
from peft_fused.bench.base import APART, BASE, Base, BaseError, Remote, Worker
from peft_fused.bench.benchmarks import grid
from peft_fused.bench.timing import MODES

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


def test_the_same_commit_takes_turns_with_ours(monkeypatch, tmp_path):
    """Whatever has changed since: its variants bear the same names and have ratios in every row."""
    try:
        commit = base.commit_of("HEAD")
    except BaseError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(base, "BUILDS", tmp_path)
    monkeypatch.setenv("PEFT_FUSED_BUILD", "off")
    other = Base("HEAD")
    try:
        rows = [row for op in ("lowrank", "circulant", "aflora") for row in run.run(CPU, "tiny", op=op, base=other)]
    finally:
        other.close()
    assert {row["op"] for row in rows} == {"lora", "dylora", "circulant", "aflora"}
    for row in rows:
        assert row["base_commit"] == commit and "base" not in row["skipped"]
        assert row["ratio_to_base"] > 0 and row["ms_median"]["base"] > 0 and row["ms_median"]["apart"] > 0
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


@pytest.fixture
def served():
    """served(*turns): a Worker whose process, a thread, answers a shape with these: names that it is ready to measure,
    or a text to end with. Told is what it was asked."""

    def start(*turns):
        ours, theirs = Pipe()

        def answer():
            told.append(theirs.recv())
            for turn in turns:
                theirs.send(("end", turn) if isinstance(turn, str) else ("ready", turn))
                while not isinstance(turn, str) and told[-1][0] != "finish":
                    told.append(theirs.recv())
                    if told[-1][0] == "measure":
                        theirs.send(dict.fromkeys(MODES, 2.0))
                told.append(("next", None))

        found = Worker.__new__(Worker)
        found.pipe, found.missing = ours, ""
        threading.Thread(target=answer, daemon=True).start()
        return found

    told = []
    start.told = told
    return start


SHAPE = grid("cpu", "tiny", "lowrank")[0]


def test_only_what_is_asked_for_is_measured_and_the_rest_is_finished(served):
    other = served(["fused", "peft"], ["later"], "over")
    with other.shape(SHAPE, "tiny", CPU), other.variants(["fused", "dylora"]) as there:
        assert there == {"fused": Remote(other.pipe, "fused")}
        assert there["fused"].measured() == dict.fromkeys(MODES, 2.0)
    assert [what for what, *_ in served.told if what != "next"] == ["shape", "measure", "finish", "finish"]
    assert other.missing == "over"


def test_an_error_of_ours_leaves_it_ready_for_the_next_shape(served):
    other = served(["fused"], "over")
    with pytest.raises(ValueError), other.shape(SHAPE, "tiny", CPU):
        raise ValueError
    assert other.missing == "over"


def test_a_shape_that_it_does_not_have(served, monkeypatch):
    monkeypatch.setattr(run, "grid", lambda *_: [SHAPE])
    other = Base.__new__(Base)
    other.commit = "0" * 40
    other.workers = {BASE: served("the other commit does not have this shape"), APART: served(["fused"], "over")}
    rows = list(run.run(CPU, "tiny", op="lowrank", base=other))
    assert rows and all(row["ratio_to_base"] is None for row in rows)
    assert {row["skipped"]["base"] for row in rows} == {"the other commit does not have this shape"}
