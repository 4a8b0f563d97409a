"""What `make gpu` runs on a CUDA machine, with no network and no virtual environment.

    python bench/gpu.py [build tests parts bench check memcheck racecheck] [--rehearse] [--out FOLDER]

The most valuable stages come first and all together end within LIMIT seconds: a stage may take what those before it
left over, but not what those after it need. What a stage finds is written as it comes, and summary.json after every
stage, so that a run cut short still leaves results in bench/results/<gpu>/. `--rehearse` runs the same stages on a
machine without a GPU, in miniature where they have a miniature.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 530
# Seconds that a stage is sure of. Tests compile every Triton kernel that they launch.
RESERVED = {"build": 120, "tests": 210, "parts": 90, "bench": 110, "check": 120, "memcheck": 120, "racecheck": 120}
RESERVED |= {"build-python": 30}
DEFAULT = ("build", "tests", "parts", "bench")
LEAST = 5
# From the request to stop until the stage is killed: time to write its last results.
GRACE = 10
CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


@dataclass(frozen=True)
class Stage:
    """A command and what it needs; `missing` is the reason why it cannot run here, empty if it can."""

    command: list[str]
    env: dict[str, str] = field(default_factory=dict)
    missing: str = ""


def stages_of(device: str, folder: Path, seconds: int, rehearse: bool) -> dict[str, Stage]:
    """Every stage by name. seconds: what benchmarks are told to keep within."""
    python = sys.executable
    cli = [python, "-c", "from peft_fused.cli import app; app()"]
    tiny = ["--tiny"] if rehearse else []
    # Forced, a build that fails says so; what is installed without it still has the Triton kernels.
    build = [python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation", "-e", "."]
    # One module that lacks a package here is no reason to run none of the others.
    pytest = [python, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    # Several processes, since most of the time goes into compiling kernels; a lost CUDA context then costs one of them.
    workers = max(1, min(16, (os.cpu_count() or 1) - 2))
    spread = ["-n", str(workers), "--dist", "worksteal"] if importlib.util.find_spec("xdist") and workers > 1 else []
    # Longer than the test that compiles most takes beside so many others.
    hang = ["--timeout=150", "--timeout-method=thread"] if importlib.util.find_spec("pytest_timeout") else []
    sanitizer = shutil.which("compute-sanitizer")
    missing = "" if sanitizer else "compute-sanitizer is not on the PATH"
    guarded = [sanitizer or "compute-sanitizer", "--error-exitcode", "9", "--target-processes", "all", "--tool"]
    results = ["--out", str(folder), "--seconds", str(seconds)]
    return {
        "build": Stage(build, {"PEFT_FUSED_BUILD": "force"}),
        "build-python": Stage(build, {"PEFT_FUSED_BUILD": "off"}),
        # References run on the host: one thread for each of so many processes.
        "tests": Stage([*pytest, "-m", "gpu", "--durations=25", *spread, *hang], {"OMP_NUM_THREADS": "1"}),
        "parts": Stage([python, "-m", "peft_fused.bench.parts", device, *results, *tiny]),
        "bench": Stage([*cli, "bench", "--device", device, *results, *tiny]),
        "check": Stage([*cli, "check", "--device", device]),
        # PyTorch's caching allocator would hide an access beyond a tensor inside one of its blocks.
        **{
            tool: Stage([*guarded, tool, *pytest, "-m", "sanitize"], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, missing)
            for tool in ("memcheck", "racecheck")
        },
    }


def run(stage: Stage, log: Path, seconds: float) -> int:
    """Exit status of a stage, its output in `log`; 124 when it was stopped, with all its processes, for its time."""
    # -P by its variable, which Python 3.10 ignores: the checkout's folders are no packages to import.
    env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1", **stage.env}
    with log.open("w") as file:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            for wait, number in ((GRACE, signal.SIGINT), (None, signal.SIGKILL)):
                try:
                    os.killpg(process.pid, number)
                    process.wait(timeout=wait)
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue
            return 124
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise


def query(fields: tuple[str, ...], *more: str) -> list[str]:
    return ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", *more]


def machine() -> dict:
    """GPU, driver, clocks, versions and commit: a number without them is none."""
    import torch

    # Without packages that the build stage has yet to install.
    commit = ""
    if git := shutil.which("git"):
        described = [git, "describe", "--always", "--dirty", "--abbrev=40"]
        commit = subprocess.run(described, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    about = {
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit or os.environ.get("PEFT_FUSED_COMMIT"),
        "python": sys.version.split()[0],
        "cuda": torch.version.cuda,
    }
    for name in ("torch", "triton", "peft", "transformers", "accelerate"):
        try:
            about[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            about[name] = None
    if shutil.which("nvidia-smi"):
        fields = ("name", "driver_version", "memory.total", "power.limit", "clocks.max.sm", *CLOCKS)
        answer = subprocess.run(query(fields), capture_output=True, text=True).stdout.splitlines()
        about["nvidia_smi"] = dict(zip(fields, answer[0].split(", "), strict=False)) if answer else None
    return about


class Clocks:
    """Samples the GPU's clocks twice a second into clocks.csv, as long as the block lasts: they tell whether it ran at
    full speed."""

    def __init__(self, path: Path):
        self.path, self.process = path, None

    def __enter__(self):
        if shutil.which("nvidia-smi"):
            with self.path.open("w") as file:
                self.process = subprocess.Popen(query(("timestamp", *CLOCKS), "-lms", "500"), stdout=file)
        return self

    def __exit__(self, *_):
        if self.process:
            self.process.kill()
            self.process.wait()

    def since(self, start: float) -> dict[str, list[float]]:
        """[least, median, largest] of each clock from `start`, seconds since the epoch, until now."""
        rows = []
        for line in self.path.read_text().splitlines() if self.process else ():
            when, *values = line.split(", ")
            try:
                sampled = datetime.datetime.strptime(when, "%Y/%m/%d %H:%M:%S.%f").timestamp()
                row = [float(value) for value in values]
            except ValueError:  # a line that is being written, or a clock that this GPU does not tell
                continue
            if sampled >= start and len(row) == len(CLOCKS):
                rows.append(row)
        columns = zip(*rows, strict=True)
        return {name: [min(v), statistics.median(v), max(v)] for name, v in zip(CLOCKS, columns, strict=False)}


def excerpt(stage: str, text: str, status: int) -> str:
    """What of a log is worth a look at once: which tests failed, its end, and all of the table of parts."""
    lines = text.strip().splitlines()
    if stage == "parts":
        return "\n".join(lines)[-9000:]
    failed = [line[:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
    return "\n".join([*failed[:40], *(line for line in lines[-30 if status else -3 :] if line[:200] not in failed)])


def main() -> int:
    """Exit status 1 when a stage fails or the arguments are wrong."""
    begin, outcome = time.time(), {}
    parser = argparse.ArgumentParser(description="Build, test and measure on this machine's GPU.")
    parser.add_argument(
        "stages", nargs="*", metavar="stage", help=f"of {', '.join(RESERVED)}; default: {', '.join(DEFAULT)}"
    )
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: the same stages in miniature")
    parser.add_argument("--out", type=Path, help="folder for results (default: bench/results/<gpu>)")
    options = parser.parse_args()
    chosen = options.stages or list(DEFAULT)
    if unknown := [stage for stage in chosen if stage not in RESERVED]:
        sys.exit(f"unknown stages {' '.join(unknown)}, allowed: {' '.join(RESERVED)}")
    if importlib.util.find_spec("torch") is None:
        sys.exit(f"make gpu: {sys.executable} has no torch; set PYTHON to one that has (make gpu PYTHON=...)")
    about = machine()
    if not (about["gpu"] or options.rehearse):
        sys.exit(f"make gpu: torch {about['torch']} of {sys.executable} sees no CUDA device")
    if about["commit"] is None:
        print("no commit can be named: set PEFT_FUSED_COMMIT where there is no git checkout", flush=True)

    name = "rehearsal" if options.rehearse else "".join(c if c.isalnum() else "-" for c in about["gpu"].lower())
    folder = (options.out or ROOT / ("build" if options.rehearse else "bench/results") / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    device, todo = "cpu" if options.rehearse else "cuda", list(chosen)
    with Clocks(folder / "clocks.csv") as clocks:
        while todo:
            stage, start = todo.pop(0), time.time()
            left = LIMIT - (start - begin)
            seconds = min(left, max(RESERVED[stage], left - sum(map(RESERVED.get, todo))))
            # The last rows, tables and plots take time too.
            work = stages_of(device, folder, int(0.85 * seconds), options.rehearse)[stage]
            log = folder / f"{stage}.log"
            missing = work.missing or ("" if seconds >= LEAST else "there is no time left")
            status = None if missing else run(work, log, seconds)
            text = missing or log.read_text()
            outcome[stage] = {
                "exit": status,
                "seconds": round(time.time() - start, 1),
                "limit": round(seconds),
                "last_line": (text.strip().splitlines() or [""])[-1][:400],
                "clocks": clocks.since(start),
            }
            (folder / "summary.json").write_text(json.dumps(about | {"stages": outcome}, indent=1) + "\n")
            word = {None: "left out", 0: "ok", 124: "stopped for its time"}.get(status, f"exit {status}")
            print(f"== {stage}: {word}, {outcome[stage]['seconds']} of {seconds:.0f} s", flush=True)
            print(excerpt(stage, text, status or 0), flush=True)
            if stage == "build" and status:
                todo.insert(0, "build-python")
            elif stage == "build-python" and status:
                break
    print(f"results: {folder}", flush=True)
    return int(any(result["exit"] for result in outcome.values()))


if __name__ == "__main__":
    sys.exit(main())
