"""The package at another commit, for `--base`: built once, and measured in turns with this one.

Each has processes of its own with the variants of one shape. What else this process has, PEFT's layers and compiled
ones, costs ours some percent.

Where its tensors lie makes a process faster or slower than its twin, by up to a third and for as long as it lives. So
a shape is measured by one pair of processes after another, with scattered heaps, until their median ratio is known.

A commit's own benchmark builds its variants; only when they are timed is up to this process (base_worker.py).
"""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path

import torch

import peft_fused
from peft_fused.ops import native

from .shapes import Shape, StructuredShape
from .timing import Times, Turn, interleave, ratio_error

ROOT = Path(__file__).resolve().parent.parent
BUILDS = ROOT / "build" / "base"
# Pairs of processes: at least so many, and then until the standard error of each ratio is below SETTLED.
LEAST_PAIRS, MOST_PAIRS = 6, 60
SETTLED = 0.01
# Seconds of a shape, as multiples of those that its benchmark takes for the rounds of this process: of a pair's rounds,
# and of all pairs.
PAIR_SHARE, PAIRS_SHARE = 0.1, 4.0


class BaseError(RuntimeError):
    """The other commit cannot be had, built or run."""


def _git(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, **options)


def commit_of(revision: str) -> str:
    """The commit that a revision of this checkout names."""
    if shutil.which("git") is None or _git("ls-files", "--error-unmatch", "bench/run.py").returncode:
        raise BaseError("--base needs a git checkout of peft_fused, with bench installed from it (pip install -e .)")
    found = _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}", text=True)
    if found.returncode:
        raise BaseError(f"--base {revision} names no commit of this checkout")
    return found.stdout.strip()


def build(revision: str) -> tuple[Path, str]:
    """(folder to import from, commit), with an extension if this process has one; PEFT_FUSED_BUILD says otherwise.

    What was built for the same commit, torch and Python is used again.
    """
    commit = commit_of(revision)
    with_cuda = native.stamp.get("cuda_kernels")
    mode = os.environ.get("PEFT_FUSED_BUILD") or ("off" if native.module is None else "cuda" if with_cuda else "force")
    kind = f"{commit[:12]}-{mode}-torch{torch.__version__}-{sys.implementation.cache_tag}"
    folder = BUILDS / kind
    if folder.is_dir():
        return folder, commit
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        source, target, archive = Path(place, "source"), Path(place, "target"), Path(place, "archive.tar")
        _git("archive", "--output", str(archive), commit, check=True)
        with tarfile.open(archive) as file:
            file.extractall(source, filter="data")
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
        done = subprocess.run(
            [*command, "--target", target, source],
            env={**os.environ, "PEFT_FUSED_BUILD": mode}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-20:])
            raise BaseError(f"--base {revision} ({commit[:12]}) does not build:\n{said}")
        target.rename(folder)
    return folder, commit


@dataclass(frozen=True)
class Remote:
    """A variant of a worker, which measures itself."""

    worker: "Worker"
    name: str


class RemoteClock:
    """Has variants measured where they are."""

    def measure(self, variant: Remote) -> dict[str, float]:
        return variant.worker.measured(variant.name)


class Worker:
    """One of the two commits: a process that starts another for each time that it measures a shape.

    `missing`: why it has nothing more to measure of this shape; "" while it may. `waits`: to be told what to measure.
    """

    def __init__(self, folder: Path | None, what: str):
        """folder: to import from, before whatever else is installed; None for what this process has."""
        self.missing, self.waits = "", False
        self.pipe, there = Pipe()
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # as -P, which Python 3.10 does not have
        environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # whether there is a GPU is asked without a context
        if folder is not None:
            environment["PYTHONPATH"] = str(folder)
        imported = folder or Path(peft_fused.__file__).parents[1]
        worker = Path(__file__).with_name("base_worker.py")
        with tempfile.TemporaryFile("w+") as said:
            self.process = subprocess.Popen(
                [sys.executable, str(worker), str(there.fileno()), str(imported)],
                env=environment, pass_fds=[there.fileno()], stdout=subprocess.DEVNULL, stderr=said,
            )  # fmt: skip
            there.close()
            try:
                self.pipe.recv()
            except EOFError:
                self.process.wait()
                said.seek(0)
                raise BaseError(f"{what} does not start: {' '.join(said.read().strip().splitlines()[-3:])}") from None

    def start(self, shape: Shape | StructuredShape, grid: str, device: torch.device) -> None:
        self.missing, self.waits = "", False
        self._send("shape", (shape.op, shape.name, shape.dtype_name, shape.dropout), grid, str(device))

    def _send(self, *message) -> None:
        try:
            self.pipe.send(message)
        except OSError:
            raise BaseError("the process of a commit has ended") from None

    def _received(self):
        """Its next answer, or None when it has ended with this shape."""
        try:
            what, value = self.pipe.recv()
        except (EOFError, OSError):
            raise BaseError("the process of a commit has ended") from None
        if what == "end":
            self.missing, self.waits = value, False
            return None
        return value

    def ready(self) -> list[str]:
        """Waits for what it measures together next: the names of these variants, none at its end."""
        names = [] if self.missing else self._received() or []
        self.waits = not self.missing
        return names

    def measured(self, name: str) -> dict[str, float]:
        self._send("measure", name)
        times = self._received()
        if times is None:
            raise BaseError(self.missing)
        return times

    def finish(self) -> None:
        """It goes on to what it measures next, if it waits for that."""
        if self.waits:
            self.waits = False
            self._send("finish", None)

    def end(self) -> None:
        self.finish()
        while self.ready():
            self.finish()

    def close(self) -> None:
        self.pipe.close()  # ends a process that measures
        self.process.kill()
        self.process.wait()


# Added to the names of variants.
BASE, APART = " at base", " apart"


class Base:
    """The other commit and this one, to be compared."""

    def __init__(self, revision: str):
        folder, self.commit = build(revision)
        self.workers = {BASE: Worker(folder, f"--base {revision} ({self.commit[:12]})")}
        try:
            self.workers[APART] = Worker(None, "this commit")
        except BaseError:
            self.close()
            raise

    @property
    def missing(self) -> str:
        return self.workers[BASE].missing

    def measure(
        self, shape: Shape | StructuredShape, grid: str, device: torch.device, turns: list[Turn], seconds: float
    ) -> None:
        """Adds the times of "<ours> at base" and "<ours> apart", an entry per pair of processes, to each turn.

        turns: of this shape, all and in order. seconds: that its benchmark takes for each of them.
        """
        start = time.perf_counter()
        for pairs in range(1, MOST_PAIRS + 1):
            for worker in self.workers.values():
                worker.start(shape, grid, device)
            try:
                found = [self._pair(turn, seconds * PAIR_SHARE) for turn in turns]
            finally:
                for worker in self.workers.values():
                    worker.end()
            spent = time.perf_counter() - start > seconds * PAIRS_SHARE
            if not any(found) or (pairs >= LEAST_PAIRS and (spent or all(map(_is_settled, turns)))):
                break

    def _pair(self, turn: Turn, seconds: float) -> bool:
        """Measures it with the processes at hand. Whether they have any of it."""
        there = {which: worker.ready() for which, worker in self.workers.items()}
        variants = {
            name + which: Remote(worker, name)
            for name in turn.ours
            if all(name in names for names in there.values())
            for which, worker in self.workers.items()
        }
        for name, by_mode in interleave(variants, RemoteClock(), seconds=seconds, least=3).items() if variants else ():
            times = turn.times.setdefault(name, {mode: Times() for mode in by_mode})
            for mode, in_rounds in by_mode.items():
                times[mode].ms.append(in_rounds.median)
        for worker in self.workers.values():
            worker.finish()
        return bool(variants)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


def _is_settled(turn: Turn) -> bool:
    return all(
        ratio_error(turn.times[name + APART][mode], reference) <= SETTLED
        for name in turn.ours
        for mode, reference in turn.times.get(name + BASE, {}).items()
    )
