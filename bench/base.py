"""The package at another commit, for `--base`: built once, and measured in turns with this one.

Both have processes of their own, since what this one has compiled and timed costs ours some percent. Where its tensors
lie makes a process faster or slower than its twin, by up to a third and for as long as it lives. So a shape is measured
by one pair of processes after another, with scattered heaps, until their median ratio is known or the time is spent.
One of a pair starts when the other has ended: two that live at a time slow each other by a quarter and more, even if
only one is measured at a time. Each is forked from a process that has imported the commit, whose own luck it inherits
(some percent of the smallest layers): so there are several of these.

A commit's own benchmark builds and times its variants; which and for how long is up to this process (base_worker.py).
"""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from multiprocessing import Pipe
from pathlib import Path

import torch

import peft_fused
from peft_fused.ops import native

from .shapes import Shape, StructuredShape
from .timing import Times, Turn, ratio_error

ROOT = Path(__file__).resolve().parent.parent
BUILDS = ROOT / "build" / "base"
# What tells shapes of a grid apart; one that lacks an attribute has None.
KEYS = ("op", "name", "r", "dtype_name", "dropout")
# Of each commit, processes that have imported it: 300 MB each.
IMPORTED = 8
# Pairs of processes: at least so many, and then until the standard error of each ratio is below SETTLED.
LEAST_PAIRS, MOST_PAIRS = 8, 60
SETTLED = 0.01
# As multiples of the seconds that this process takes for its rounds: those of each process of a pair, and all pairs.
PAIR_SHARE, PAIRS_SHARE = 0.1, 3.0
# What glibc hands back to the system, and asks for again page by page, costs a process up to a tenth, at random.
# It takes no higher threshold of mmap.
KEPT_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
# A variant as a process has measured it: its class, and the median of the rounds by mode.
Found = tuple[str, dict[str, float]]


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


class Worker:
    """One of the two commits: a process that starts another for each time that it measures a shape."""

    def __init__(self, folder: Path | None, what: str):
        """folder: to import from, before whatever else is installed; None for what this process has."""
        self.pipe, there = Pipe()
        environment = {**os.environ, **KEPT_MEMORY, "PYTHONSAFEPATH": "1"}  # as -P, which Python 3.10 does not have
        environment["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # whether there is a GPU is asked without a context
        if folder is not None:
            environment["PYTHONPATH"] = str(folder)
        imported = folder or Path(peft_fused.__file__).parents[1]
        worker = Path(__file__).with_name("base_worker.py")
        with tempfile.TemporaryFile("w+") as said:
            self.process = subprocess.Popen(
                [sys.executable, str(worker), str(there.fileno()), str(imported)],
                env=environment, pass_fds=[there.fileno()], stdout=subprocess.DEVNULL, stderr=said,
                start_new_session=True,  # Ctrl-C is for this process, which then closes them
            )  # fmt: skip
            there.close()
            try:
                self.pipe.recv()
            except EOFError:
                self.process.wait()
                said.seek(0)
                raise BaseError(f"{what} does not start: {' '.join(said.read().strip().splitlines()[-3:])}") from None

    def measure(
        self, shape: Shape | StructuredShape, grid: str, device: torch.device, ours: list[list[str]], seconds: float
    ) -> tuple[list[dict[str, Found]], str]:
        """What it has of each turn, and why it has no more than that. ours: the names that are wanted of each turn.
        seconds: of the rounds of each turn.
        """
        wanted = {name: getattr(shape, name, None) for name in KEYS}
        turns, why = [], ""
        try:
            self.pipe.send((wanted, grid, str(device), ours, seconds))
            while True:
                what, value = self.pipe.recv()
                if what == "end":
                    return turns, value or why
                if what == "why":
                    why = value
                else:
                    turns.append(value)
        except (EOFError, OSError):
            raise BaseError("the process of a commit has ended") from None

    def close(self) -> None:
        self.pipe.close()
        os.killpg(self.process.pid, signal.SIGKILL)  # and the process that it has started
        self.process.wait()


# Added to the names of variants.
BASE, APART = " at base", " apart"


class Base:
    """The other commit and this one, to be compared. `missing`: why some of the last shape could not be.

    workers: the ith are those of the pairs i, i + IMPORTED and so on of each shape.
    """

    def __init__(self, revision: str):
        folder, self.commit = build(revision)
        self.folders = {BASE: (folder, f"--base {revision} ({self.commit[:12]})"), APART: (None, "this commit")}
        self.workers, self.missing = [], ""
        self.workers_of(0)

    def workers_of(self, pair: int) -> dict[str, Worker]:
        """Those of the `pair`th pair of a shape, started if they are not yet."""
        if pair == len(self.workers) < IMPORTED:
            self.workers.append({})
            try:
                for which, (folder, what) in self.folders.items():
                    self.workers[pair][which] = Worker(folder, what)
            except BaseException:
                self.close()
                raise
        return self.workers[pair % IMPORTED]

    def measure(
        self, shape: Shape | StructuredShape, grid: str, device: torch.device, turns: list[Turn], seconds: float
    ) -> None:
        """Adds the times of "<ours> at base" and "<ours> apart", an entry per pair of processes, to each turn.

        turns: of this shape, all and in order. seconds: that its benchmark takes for each of them.
        """
        self.missing = ""
        request = shape, grid, device, [turn.ours for turn in turns], seconds * PAIR_SHARE
        try:
            self._measure_pairs(request, turns, limit=seconds * PAIRS_SHARE * len(turns))
        except BaseError as error:  # what this process has measured remains; the next shape starts new ones
            self.missing = str(error)
            self.close()

    def _measure_pairs(self, request: tuple, turns: list[Turn], limit: float) -> None:
        spent = 0.0
        for index in range(MOST_PAIRS):
            workers = self.workers_of(index)
            start = time.perf_counter()
            # Whoever comes first is the other one in every second pair, of each of the workers as well.
            turned = (index + index // IMPORTED) % 2
            pair = {which: each.measure(*request) for which, each in list(workers.items())[:: -1 if turned else 1]}
            spent += time.perf_counter() - start
            if not self._add_pair(pair, turns):
                break
            if index + 1 >= LEAST_PAIRS and (spent > limit or all(map(_is_settled, turns))):
                break

    def _add_pair(self, pair: dict[str, tuple[list[dict[str, Found]], str]], turns: list[Turn]) -> bool:
        """Whether anything could be compared, so that another pair makes sense."""
        lacking, compared = set(), False
        for index, turn in enumerate(turns):
            found = {which: measured[index] if index < len(measured) else {} for which, (measured, _) in pair.items()}
            kinds = {which: {name: kind for name, (kind, _) in variants.items()} for which, variants in found.items()}
            both = kinds[BASE].items() & kinds[APART].items()  # a layer is no training step
            names = [name for name in turn.ours if name in dict(both)]
            if len(names) < len(turn.ours):
                lacking |= {which for which in pair if not set(turn.ours) <= set(found[which])} or set(pair)
            for name in names:
                for which in pair:
                    _, by_mode = found[which][name]
                    times = turn.times.setdefault(name + which, {mode: Times() for mode in by_mode})
                    for mode, ms in by_mode.items():
                        times[mode].ms.append(ms)
            compared = compared or bool(names)
        if lacking:
            self.missing = "; ".join(f"{which.strip()}: {pair[which][1]}" for which in sorted(lacking))
        return compared

    def close(self) -> None:
        while self.workers:
            for worker in self.workers.pop().values():
                worker.close()


def _is_settled(turn: Turn) -> bool:
    errors = [
        ratio_error(turn.times[name + APART][mode], reference)
        for name in turn.ours
        for mode, reference in turn.times.get(name + BASE, {}).items()
    ]
    return all(error is not None and error <= SETTLED for error in errors)
