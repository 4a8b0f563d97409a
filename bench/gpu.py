"""What `make gpu` runs on a CUDA machine, with no network and no virtual environment: build, tests, check, benchmark.

The most valuable stages come first, each has a time budget that adds up to less than nine minutes, and what a stage
finds is written as soon as it ends, so that a run cut short still leaves results in bench/results/<gpu>/.

    python bench/gpu.py [build tests check ceilings bench]
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Seconds per stage. The build needs about a minute; tests compile every Triton kernel that they launch.
BUDGET = {"build": 120, "tests": 180, "check": 60, "ceilings": 20, "bench": 130}


def sh(command: list[str], log: Path, seconds: float, env: dict[str, str] | None = None) -> tuple[int, str]:
    """(exit status, output) of a command that is stopped after its budget; 124 stands for that."""
    start = time.time()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}
        )
        try:
            status = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status = 124
    print(f"  {' '.join(command[:6])} ...: exit {status} after {time.time() - start:.0f} s", flush=True)
    return status, log.read_text()


def machine() -> dict:
    """GPU, driver, clocks, versions and commit: a number without them is none."""
    import torch
    import triton

    query = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,memory.total"
    smi = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True
    )
    git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "gpu": torch.cuda.get_device_name(0),
        "nvidia_smi": dict(zip(query.split(","), (v.strip() for v in smi.stdout.split(",")), strict=False)),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": sys.version.split()[0],
        "commit": git.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
    }


def main(stages: list[str]) -> int:
    unknown = [stage for stage in stages if stage not in BUDGET]
    if unknown:
        sys.exit(f"unknown stages {unknown}, allowed: {' '.join(BUDGET)}")
    try:
        import torch
    except ImportError:
        sys.exit(f"make gpu: {sys.executable} has no torch; set PYTHON to one that has (make gpu PYTHON=...)")
    if not torch.cuda.is_available():
        sys.exit(f"make gpu: torch {torch.__version__} of {sys.executable} sees no CUDA device")

    about = machine()
    folder = ROOT / "bench" / "results" / "".join(c if c.isalnum() else "-" for c in about["gpu"].lower())
    folder.mkdir(parents=True, exist_ok=True)
    python, outcome = sys.executable, {}

    def write_summary():
        (folder / "summary.json").write_text(json.dumps({**about, "stages": outcome}, indent=1) + "\n")

    def cli(*arguments):
        return [python, "-P", "-c", "from peft_fused.cli import app; app()", *arguments]

    commands = {
        "build": [python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation", "-e", "."],
        "tests": [python, "-P", "-m", "pytest", "-q", "-m", "gpu", "--durations=15", "-p", "no:cacheprovider"],
        "check": cli("check", "--device", "cuda", "--json"),
        "ceilings": [python, "-P", "-m", "peft_fused.bench.roofline", "cuda"],
        "bench": cli("bench", "--device", "cuda", "--out", str(folder)),
    }
    for stage in stages:
        print(stage, flush=True)
        start = time.time()
        env = {"PEFT_FUSED_BUILD": "force"} if stage == "build" else None
        status, text = sh(commands[stage], folder / f"{stage}.log", BUDGET[stage], env)
        lines = text.strip().splitlines()
        outcome[stage] = {
            "exit": status,
            "seconds": round(time.time() - start, 1),
            "last_line": lines[-1][:400] if lines else "",
        }
        write_summary()
        if status:
            print("\n".join(lines[-40:]), flush=True)
        if stage == "build" and status:
            return status
    print(f"results: {folder.relative_to(ROOT)}", flush=True)
    return max((abs(result["exit"]) for result in outcome.values()), default=0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(BUDGET)))
