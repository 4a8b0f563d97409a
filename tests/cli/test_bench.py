"""`bench` on the tiny grid: what it prints and writes, and when it refuses."""

import json

import pytest
import torch
from peft_fused.bench import run as runner
from peft_fused.bench.verify import WrongResult


@pytest.fixture
def one_shape(monkeypatch):
    """The first of the tiny shapes, with no time for more than the least number of rounds."""
    monkeypatch.setattr(runner, "grid", lambda device, name: runner_grid(device, name)[:1])
    monkeypatch.setitem(runner.ROUND_SECONDS, "tiny", 0.0)


runner_grid = runner.grid


def test_json_lines_equal_the_file_that_is_written(cli, one_shape, tmp_path):
    result = cli("bench", "--tiny", "--json", "--out", tmp_path / "results")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {(row["op"], row["mode"]) for row in rows} == {
        (op, mode) for op in ("lora", "dylora") for mode in ("forward", "backward", "both")
    }
    written = (tmp_path / "results" / "results.jsonl").read_text()
    assert [json.loads(line) for line in written.splitlines()] == rows
    assert (tmp_path / "results" / "results.png").exists()
    assert "written" in result.stderr


def test_the_table_shows_every_row_and_why_something_is_left_out(cli, one_shape, tmp_path, monkeypatch):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "run.py").touch()  # a smoke test does not replace the results of a repository
    monkeypatch.chdir(tmp_path)
    result = cli("bench", "--tiny")
    for word in ("lora", "dylora", "forward", "backward", "both", "/ PEFT", "compiled PEFT left out"):
        assert word in result.stdout
    assert "nothing written" in result.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bench", "run.py"]


def test_a_wrong_result_ends_it_without_times(cli, one_shape, monkeypatch, tmp_path):
    def refuse(case):
        raise WrongResult("fused at 4x32x32 fp32: dA 5e-01 beyond 1e-04")

    monkeypatch.setattr(runner, "verify", refuse)
    result = cli("bench", "--tiny", "--out", tmp_path, code=1)
    assert "dA 5e-01" in result.stderr and "ms" not in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--device", "tpu"), "must be cpu or cuda, got 'tpu'"), (("--all", "--tiny"), "exclude each other")],
)
def test_bad_options(cli, arguments, message):
    assert message in cli("bench", *arguments, code=2).stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("command", ["bench", "check", "demo"])
def test_cuda_without_a_gpu(cli, command):
    assert "no CUDA device" in cli(command, "--device", "cuda", code=2).stderr
