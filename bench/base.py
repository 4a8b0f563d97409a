"""The package at another commit, for `--base`: built once, and measured by a process of its own in the same rounds.

Its own benchmark builds its variants there; only when they are timed is up to this process (base_worker.py). So are
those of this commit that they are compared with. Samples interleave, each after a call that nobody times, since what
another process did has cooled the caches.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import peft_fused
from peft_fused.ops import native

from .shapes import Shape, StructuredShape
from .timing import CpuClock, CudaClock, Variant

ROOT = Path(__file__).resolve().parent.parent
BUILDS = ROOT / "build" / "base"
# After this long the threads of the other process, or of torch, no longer look out for work; base_worker.py has it too.
SETTLE = 0.005


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


def _received(pipe: Connection):
    try:
        return pipe.recv()
    except EOFError:
        raise BaseError("the process of the other commit has ended") from None


@dataclass
class Remote:
    """A variant of the other commit, which measures itself."""

    pipe: Connection
    name: str

    def measured(self) -> dict[str, float]:
        self.pipe.send(("measure", self.name))
        return _received(self.pipe)


@dataclass
class WarmClock:
    """A clock, of variants here and there, that starts from warm caches and idle threads."""

    clock: CpuClock | CudaClock

    def measure(self, variant: Variant | Remote) -> dict[str, float]:
        if isinstance(variant, Remote):
            return variant.measured()
        return measure_warm(self.clock, variant)


def measure_warm(clock: CpuClock | CudaClock, variant: Variant) -> dict[str, float]:
    time.sleep(SETTLE)
    variant.clear()
    variant.backward(variant.forward())
    return clock.measure(variant)


class Worker:
    """A process with one of the two commits. `missing`: why its last shape has nothing to compare with."""

    def __init__(self, folder: Path | None, what: str):
        """folder: to import from, before whatever else is installed; None for what this process has."""
        self.missing = ""
        self.pipe, there = Pipe()
        environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # as -P, which Python 3.10 does not have
        if folder is not None:
            environment["PYTHONPATH"] = str(folder)
        imported = folder or Path(peft_fused.__file__).parents[1]
        worker = Path(__file__).with_name("base_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, str(worker), str(there.fileno()), str(imported)],
            env=environment, pass_fds=[there.fileno()], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        there.close()
        try:
            self.pipe.recv()
        except EOFError:
            said = self.process.communicate()[1].strip().splitlines()
            raise BaseError(f"{what} does not start: {' '.join(said[-3:])}") from None

    @contextlib.contextmanager
    def shape(self, shape: Shape | StructuredShape, grid: str, device: torch.device) -> Iterator[None]:
        """It runs the same shape, and ends with it."""
        self.missing = ""
        self.pipe.send(("shape", (shape.op, shape.name, shape.dtype_name, shape.dropout), grid, str(device)))
        try:
            yield
        except Exception:
            self._finish()
            raise
        self._finish()

    def _finish(self) -> None:
        while self._next() or not self.missing:
            self.pipe.send(("finish", None))

    def _next(self) -> list[str]:
        """Names of the variants that it is ready to measure; none at its end, of which `missing` says why."""
        if self.missing:
            return []
        what, value = _received(self.pipe)
        self.missing = value if what == "end" else ""
        return value if what == "ready" else []

    @contextlib.contextmanager
    def variants(self, names: list[str]) -> Iterator[dict[str, Remote]]:
        """Its variants that bear these names, of what it measures together next."""
        there = self._next()
        try:
            yield {name: Remote(self.pipe, name) for name in names if name in there}
        finally:
            if there:
                self.pipe.send(("finish", None))

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


BASE, APART = "at base", "apart"


class Base:
    """The other commit and this one, each in a process that has its variants alone. What else this process has, PEFT's
    layers and compiled ones, costs ours some percent, so that they are not compared with those of the other commit."""

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

    @contextlib.contextmanager
    def shape(self, *arguments) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for worker in self.workers.values():
                stack.enter_context(worker.shape(*arguments))
            yield

    @contextlib.contextmanager
    def variants(self, names: list[str]) -> Iterator[dict[str, dict[str, Remote]]]:
        """By commit, BASE or APART, its variants that bear these names."""
        with contextlib.ExitStack() as stack:
            yield {which: stack.enter_context(worker.variants(names)) for which, worker in self.workers.items()}

    def clock(self, clock: CpuClock | CudaClock) -> WarmClock:
        return WarmClock(clock)

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()
