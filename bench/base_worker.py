"""Serves the benchmark of a commit: `base_worker.py descriptor folder`, started by base.py.

A process of its own, forked for each shape that it is asked for, runs that commit's `peft_fused.bench.run.run` on it,
with `timing.interleave` told which variants to measure and for how long. So of that commit it needs these two
functions, with `seconds` and `least`, `timing.Times` with its median, `timing.MODES`, `run.grid`, `run.commit`,
`run.COMPILE_SECONDS` and `roofline.measure`, whatever else has changed. Functions named `verify` are left out: of
another commit only the time is of interest.
"""

import os
import random
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

# When PEFT imports it, it opens a CUDA context, which would be of no use to a process that is forked afterwards.
sys.modules["bitsandbytes"] = None

import torch  # noqa: E402
from peft_fused.bench import roofline, run, timing  # noqa: E402

import peft_fused  # noqa: E402


class Unverified(dict):
    """Errors of whatever is asked for."""

    def __missing__(self, key):
        return self


class Done(BaseException):
    """All that was asked for; not to be caught by the benchmark of a commit."""


class Wanted:
    """In place of a commit's timing.interleave: measures, in each of its calls, what is wanted of that turn."""

    def __init__(self, pipe: Connection, interleave: Callable, ours: list[list[str]], seconds: float):
        self.pipe, self.interleave, self.ours, self.seconds = pipe, interleave, ours, seconds

    def __call__(self, variants: dict, clock, **_) -> dict:
        """The times that it returns are of no account."""
        ours, *self.ours = self.ours
        there = {name: variants[name] for name in ours if name in variants}
        times = self.interleave(there, clock, seconds=self.seconds, least=3) if there else {}
        medians = {name: {mode: found.median for mode, found in by_mode.items()} for name, by_mode in times.items()}
        self.pipe.send(("turn", {name: (type(there[name]).__name__, found) for name, found in medians.items()}))
        if not self.ours:
            raise Done
        return {name: {mode: timing.Times([1.0]) for mode in timing.MODES} for name in variants}


def replace(function: str, by: Callable) -> None:
    """Wherever the benchmark of a commit has imported it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("peft_fused.bench") and callable(getattr(module, function, None)):
            setattr(module, function, by)


def scatter_heap() -> list[torch.Tensor]:
    """Leaves holes of random sizes in the heap, as long as it is kept, so that what is allocated next lies elsewhere in
    every process. Which tensors share their place in a page makes one process of the same code up to a third slower
    than another, and this process hands its heap on to all that it forks."""
    sizes = [int(2 ** random.uniform(6, 22)) for _ in range(400)]
    return [torch.empty(size, dtype=torch.uint8) for size in sizes][::2]


def run_shape(wanted: dict, name: str, device: torch.device) -> str:
    """Runs it, and says why there is no more of it than was measured."""
    if torch.cuda.is_initialized():
        return "has opened a CUDA context before it was forked"
    older = {"op": "lowrank", "dropout": 0.0}  # what shapes of older commits lack
    grid = run.grid(device.type, name)
    chosen = [s for s in grid if all(getattr(s, key, older.get(key)) == value for key, value in wanted.items())][:1]
    if not chosen:
        return "has no such shape"
    run.grid = lambda *_: chosen
    try:
        for _ in run.run(device, name):
            pass
    except Done:
        pass
    except Exception as error:  # of that commit: the row says so, and ours is measured all the same
        return f"{type(error).__name__}: {error}"
    return "has no such variant"


def main(descriptor: str, folder: str) -> None:
    pipe = Connection(int(descriptor))
    if Path(folder) not in Path(peft_fused.__file__).parents:
        sys.exit(f"imported {peft_fused.__file__} instead of {folder}")
    interleave = timing.interleave
    replace("verify", lambda *_, **__: Unverified())
    ceilings = roofline.Ceilings(1.0, dict.fromkeys(("float32", "bfloat16", "float16"), 1.0))
    roofline.measure = lambda *_, **__: ceilings
    run.commit = lambda: None
    run.COMPILE_SECONDS = dict.fromkeys(run.COMPILE_SECONDS, 0.0)
    pipe.send("started")
    while True:
        try:
            wanted, name, device, ours, seconds = pipe.recv()
        except EOFError:
            return
        child = os.fork()
        if not child:
            kept = scatter_heap()  # noqa: F841
            replace("interleave", Wanted(pipe, interleave, ours, seconds))
            pipe.send(("why", run_shape(wanted, name, torch.device(device))))
            os._exit(0)
        # The end is told when there is nothing left of it.
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        pipe.send(("end", f"ended with status {status}" if status else ""))


if __name__ == "__main__":
    main(*sys.argv[1:])
