"""`make gpu` as far as it goes without a GPU: its stages, their time, and what they leave behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from peft_fused.bench import gpu

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stages(monkeypatch, tmp_path):
    """Runs main() on stages that are short Python programs: (exit status, summary, seconds told to the benchmarks)."""
    told = {}

    def run(programs, *arguments, reserved=30, limit=100):
        def stages_of(device, folder, seconds, rehearse):
            told[len(told)] = seconds
            return {
                name: program if isinstance(program, gpu.Stage) else gpu.Stage([sys.executable, "-c", program])
                for name, program in programs.items()
            }

        monkeypatch.setattr(gpu, "stages_of", stages_of)
        monkeypatch.setattr(gpu, "RESERVED", dict.fromkeys(programs, reserved))
        monkeypatch.setattr(gpu, "LIMIT", limit)
        monkeypatch.setattr(gpu, "GRACE", 1)
        monkeypatch.setattr(gpu, "LEAST", 1)
        monkeypatch.setattr(sys, "argv", ["gpu.py", *(arguments or programs), "--rehearse", "--out", str(tmp_path)])
        status = gpu.main()
        return status, json.loads((tmp_path / "summary.json").read_text()), list(told.values())

    return run


def test_a_failure_is_shown_and_the_next_stages_run(stages, capsys):
    programs = {
        "tests": "print('FAILED test_a'); print('1 failed'); raise SystemExit(3)",
        "parts": "print('fine')",
        "memcheck": gpu.Stage(["absent"], missing="compute-sanitizer is not on the PATH"),
    }
    status, summary, _ = stages(programs)
    assert status == 1
    found = {name: (stage["exit"], stage["last_line"]) for name, stage in summary["stages"].items()}
    assert found["tests"] == (3, "1 failed") and found["parts"] == (0, "fine")
    assert found["memcheck"] == (None, "compute-sanitizer is not on the PATH")
    assert "FAILED test_a" in capsys.readouterr().out


def test_an_extension_that_does_not_build_is_left_out(stages):
    programs = {"build": "raise SystemExit(1)", "build-python": "print('built without')", "bench": "print('measured')"}
    status, summary, _ = stages(programs, "build", "bench")
    assert status == 1
    assert {name: stage["exit"] for name, stage in summary["stages"].items()} == {
        "build": 1,
        "build-python": 0,
        "bench": 0,
    }
    status, summary, _ = stages(programs | {"build-python": "raise SystemExit(1)"}, "build", "bench")
    assert status == 1 and list(summary["stages"]) == ["build", "build-python"]


def test_a_stage_out_of_time_is_stopped_with_its_processes_and_keeps_what_it_wrote(stages, tmp_path):
    child = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    hang = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
        f"subprocess.Popen([sys.executable, '-c', 'import os, time; ' + {child!r}]);"
        "print('first row'); time.sleep(60)"
    )
    start = time.monotonic()
    status, summary, _ = stages({"tests": hang, "bench": "print('measured')"}, reserved=3, limit=8)
    assert status == 1 and time.monotonic() - start < 60
    assert summary["stages"]["tests"] | {"seconds": 0} == {
        "exit": 124, "seconds": 0, "limit": 5, "last_line": "first row", "clocks": {}
    }  # fmt: skip
    assert summary["stages"]["bench"]["exit"] == 0
    child = int((tmp_path / "pid").read_text())
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_a_stage_may_take_what_others_left_but_not_what_they_need(stages):
    _, summary, told = stages(dict.fromkeys(("build", "tests", "bench"), "pass"), reserved=20, limit=100)
    limits = [stage["limit"] for stage in summary["stages"].values()]
    assert limits[0] == 60 and 75 <= limits[1] <= 80 and 90 <= limits[2] <= 100
    assert told[0] in (50, 51)
    _, summary, _ = stages(dict.fromkeys(("build", "tests", "bench"), "pass"), "bench", reserved=20, limit=100)
    assert list(summary["stages"]) == ["bench"] and summary["stages"]["bench"]["limit"] == 100


def test_stages_for_which_no_time_is_left_are_left_out(stages):
    programs = {"tests": "import time; time.sleep(3)", "memcheck": "pass"}
    _, summary, _ = stages(programs, reserved=30, limit=3.9)
    found = {name: (stage["exit"], stage["limit"]) for name, stage in summary["stages"].items()}
    assert found["tests"] == (0, 4) and found["memcheck"][0] is None and found["memcheck"][1] <= 1
    assert summary["stages"]["memcheck"]["last_line"] == "there is no time left"


def test_the_default_stages_fit_and_every_stage_has_its_time():
    stages = gpu.stages_of("cuda", Path("results"), 100, False)
    assert stages.keys() == gpu.RESERVED.keys()
    # The limit of `make gpu` is nine minutes: what is left pays for stopping the last stage and for its last rows.
    assert sum(gpu.RESERVED[name] for name in gpu.DEFAULT) <= gpu.LIMIT <= 540 - gpu.GRACE
    assert all("--no-index" in stage.command for stage in stages.values() if "pip" in stage.command)


def test_the_summary_names_what_a_number_needs(monkeypatch):
    monkeypatch.setenv("PEFT_FUSED_COMMIT", "of-a-copy")
    about = gpu.machine()
    assert {"gpu", "date", "commit", "python", "cuda", "torch", "triton", "peft", "transformers"} <= about.keys()
    inside = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert about["commit"].startswith(inside or "of-a-copy")
    monkeypatch.setattr(gpu, "ROOT", Path("/"))
    assert gpu.machine()["commit"] == "of-a-copy"


def test_clocks_are_told_by_stage(tmp_path):
    now = time.time()
    clocks = gpu.Clocks(tmp_path / "clocks.csv")
    clocks.process = True
    lines = [(now - 60, 345, 70), (now + 1, 1980, 600), (now + 2, 1900, 650), (now + 3, 1950, 700)]
    stamp = [time.strftime("%Y/%m/%d %H:%M:%S", time.localtime(at)) + ".500" for at, *_ in lines]
    text = [f"{at}, {sm}, 3201, {power}.5, 40" for at, (_, sm, power) in zip(stamp, lines, strict=True)]
    clocks.path.write_text("\n".join([*text, "2026/01/0"]))
    found = clocks.since(now)
    assert found["clocks.sm"] == [1900, 1950, 1980] and found["power.draw"] == [600.5, 650.5, 700.5]
    clocks.path.write_text("\n".join(line.replace(", 40", ", [N/A]") for line in text))
    assert clocks.since(now) == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("tests", "tset"), "unknown stages tset, allowed: build tests"), (("tests",), "sees no CUDA device")],
)
def test_refusals(arguments, message):
    command = [sys.executable, "bench/gpu.py", *arguments]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and message in done.stderr


def test_rehearsal(tmp_path):
    """The real stages that measure, in miniature, from a shell in another folder."""
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "parts", "bench", "--rehearse", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    written = {path.name for path in tmp_path.iterdir()}
    assert {"summary.json", "parts.log", "parts.jsonl", "bench.log", "results.jsonl", "lora.png", "peft.png"} <= written
