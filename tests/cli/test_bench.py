"""`bench` on the tiny grid: what it prints and writes, and when it refuses."""

import json

import pytest
import torch
from peft_fused.bench import lowrank
from peft_fused.bench import run as runner
from peft_fused.bench.benchmarks import BENCHMARKS, OPS, benchmark_of
from peft_fused.bench.timing import MODES, Times
from peft_fused.bench.verify import WrongResult


@pytest.fixture
def one_shape(monkeypatch):
    """The first tiny layer, map and AdaMix layer, with no time for more than the least number of rounds."""
    for benchmark in BENCHMARKS:
        most = 0 if benchmark.ops == ("aflora",) else 1
        monkeypatch.setitem(benchmark.shapes, "tiny", benchmark.shapes["tiny"][:most])
        monkeypatch.setitem(benchmark.seconds, "tiny", 0.0)


def test_json_lines_equal_the_file_that_is_written(cli, one_shape, tmp_path):
    result = cli("bench", "--tiny", "--json", "--out", tmp_path / "results")
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert {(row["op"], row["mode"]) for row in rows} == {
        *((op, mode) for op in ("lora", "dylora", "circulant", "adamix") for mode in ("forward", "backward", "both")),
        ("adamix", "step"),
    }
    written = (tmp_path / "results" / "results.jsonl").read_text()
    assert [json.loads(line) for line in written.splitlines()] == rows
    pictures = {"lora.png", "dylora.png", "circulant.png", "adamix.png", "peft.png"}
    assert {path.name for path in (tmp_path / "results").iterdir()} == pictures | {"results.jsonl"}
    assert "written" in result.stderr


def test_the_table_shows_every_row_and_why_something_is_left_out(cli, one_shape, tmp_path, monkeypatch):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "run.py").touch()  # a smoke test does not replace the results of a repository
    monkeypatch.chdir(tmp_path)
    result = cli("bench", "--tiny")
    words = (
        "lora",
        "dylora",
        "circulant",
        "adamix",
        "/ one expert",
        "forward",
        "backward",
        "both",
        "/ PEFT",
        "/ plain",
        "compiled left out",
    )
    for word in words:
        assert word in result.stdout
    assert "nothing written" in result.stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bench", "run.py"]


def test_another_commit_has_a_column_and_a_sum(cli, one_shape, monkeypatch):
    class Base:
        commit, missing = "abcdef012345" + "0" * 28, ""

        def __init__(self, revision):
            assert revision == "main"

        def measure(self, shape, grid, device, turns, seconds):
            for turn in turns:
                for name, apart in (("fused", [1.05, 1.06, 1.05]), ("dylora", [1.06, 0.8, 1.3])):
                    turn.times[f"{name} at base"] = dict.fromkeys(MODES, Times([1.0, 1.0, 1.0]))
                    turn.times[f"{name} apart"] = dict.fromkeys(MODES, Times(apart))

        def close(self):
            closed.append(self)

    closed = []
    monkeypatch.setattr("peft_fused.bench.base.Base", Base)
    sums = "6 ratios to it, median 1.055; 6 above 1.03, 3 of them by more than two standard errors"
    shown = cli("bench", "--tiny", "--op", "lowrank", "--base", "main")
    assert f"base: abcdef012345; {sums}" in shown.stdout
    assert shown.stdout.count("1.050 ±0.003") == 3 and shown.stdout.count("1.060 ±0.134") == 3
    as_json = cli("bench", "--tiny", "--op", "lowrank", "--base", "main", "--json")
    assert sums in as_json.stderr
    assert {json.loads(line)["base_commit"] for line in as_json.stdout.splitlines()} == {Base.commit}
    assert len(closed) == 2


def test_one_op_alone(cli, one_shape, tmp_path):
    rows = [json.loads(line) for line in cli("bench", "--tiny", "--op", "circulant", "--json").stdout.splitlines()]
    assert {row["op"] for row in rows} == {"circulant"}
    assert "adapted layers" not in cli("bench", "--tiny", "--op", "circulant").stdout


def test_one_op_alone_does_not_replace_the_results_of_all(cli, monkeypatch, tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "run.py").touch()
    monkeypatch.chdir(tmp_path)
    benchmark = benchmark_of("ldr")
    monkeypatch.setitem(benchmark.shapes, "default", benchmark.shapes["tiny"])
    monkeypatch.setitem(benchmark.seconds, "default", 0.0)
    assert "nothing written" in cli("bench", "--op", "ldr").stderr
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bench", "run.py"]


@pytest.fixture
def wrong_layer(monkeypatch):
    def refuse(case):
        raise WrongResult("dA 5e-01 beyond 1e-04")

    monkeypatch.setattr(lowrank, "verify", refuse)


def test_a_wrong_result_has_no_times(cli, one_shape, wrong_layer, tmp_path):
    result = cli("bench", "--tiny", "--op", "lowrank", "--out", tmp_path, code=1)
    assert "lowrank 4x32x32 fp32: dA 5e-01" in result.stderr and "ms" not in result.stdout
    assert not list(tmp_path.iterdir())


def test_the_other_shapes_are_measured_all_the_same(cli, one_shape, wrong_layer, tmp_path):
    result = cli("bench", "--tiny", "--json", "--out", tmp_path, code=1)
    assert "dA 5e-01" in result.stderr
    assert {json.loads(line)["op"] for line in result.stdout.splitlines()} == {"circulant", "adamix"}
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "circulant.png", "adamix.png", "peft.png"}


def test_stopped_it_shows_what_it_has(cli, one_shape, monkeypatch, tmp_path):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    measure = runner.measure
    monkeypatch.setattr(
        runner,
        "measure",
        lambda case, *rest, **more: interrupt() if case.shape.op == "circulant" else measure(case, *rest, **more),
    )
    result = cli("bench", "--tiny", "--out", tmp_path, code=130)
    assert "1 of 3 shapes measured" in result.stderr and "4x32x32" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"results.jsonl", "lora.png", "dylora.png", "peft.png"}


def test_no_shape_is_started_after_its_time(cli, one_shape, monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(runner.time, "monotonic", lambda: next(now))
    result = cli("bench", "--tiny", "--json", "--seconds", "1")
    assert {json.loads(line)["op"] for line in result.stdout.splitlines()} == {"lora", "dylora"}
    assert "1 of 3 shapes measured" in result.stderr
    assert "not enough for the first shape" in cli("bench", "--tiny", "--seconds", "0", code=1).stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "tpu"), "must be cpu or cuda, got 'tpu'"),
        (("--all", "--tiny"), "exclude each other"),
        (("--op", "hadamard"), f"--op must be all or one of {', '.join(OPS)}, got 'hadamard'"),
    ],
)
def test_bad_options(cli, arguments, message):
    assert message in cli("bench", *arguments, code=2).stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("command", ["bench", "check", "demo"])
def test_cuda_without_a_gpu(cli, command):
    assert "no CUDA device" in cli(command, "--device", "cuda", code=2).stderr
