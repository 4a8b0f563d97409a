"""Serves the benchmark of another commit: `base_worker.py descriptor folder`, started by base.py of this one.

It runs that commit's own `peft_fused.bench.run.run` on one shape after another, with `timing.interleave` replaced by
one that measures what it is asked to and when. So of that commit it needs these two functions, `run.grid`,
`run.COMPILE_SECONDS` and `roofline.measure`, whatever else has changed.
"""

import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from peft_fused.bench import roofline, run, timing

import peft_fused

SETTLE = 0.005


def serve(pipe: Connection, variants: dict, clock) -> dict:
    """In place of timing.interleave; the times that it returns are of no account."""
    for variant in variants.values():
        clock.measure(variant)  # what it packs, allocates and compiles
    pipe.send(("ready", list(variants)))
    while True:
        what, name = pipe.recv()
        if what == "finish":
            return {name: {mode: timing.Times([1.0]) for mode in timing.MODES} for name in variants}
        variant = variants[name]
        time.sleep(SETTLE)
        variant.clear()
        variant.backward(variant.forward())
        pipe.send(clock.measure(variant))


def main(descriptor: str, folder: str) -> None:
    pipe = Connection(int(descriptor))
    if Path(folder) not in Path(peft_fused.__file__).parents:
        sys.exit(f"imported {peft_fused.__file__} instead of {folder}")

    def interleave(variants, clock, **_):
        return serve(pipe, variants, clock)

    for name, module in list(sys.modules.items()):
        if name.startswith("peft_fused.bench") and hasattr(module, "interleave"):
            module.interleave = interleave
    ceilings = roofline.Ceilings(1.0, dict.fromkeys(("float32", "bfloat16", "float16"), 1.0))
    roofline.measure = lambda *_, **__: ceilings
    run.COMPILE_SECONDS = dict.fromkeys(run.COMPILE_SECONDS, 0.0)
    grid = run.grid

    def key(shape):
        return getattr(shape, "op", "lowrank"), shape.name, shape.dtype_name, getattr(shape, "dropout", 0.0)

    pipe.send(("started", None))
    while True:
        try:
            _, wanted, name, device = pipe.recv()
        except EOFError:
            return
        chosen = [shape for shape in grid(torch.device(device).type, name) if key(shape) == wanted][:1]
        why = "" if chosen else "the other commit does not have this shape"
        run.grid = lambda *_, chosen=chosen: chosen
        try:
            for _ in run.run(torch.device(device), name):
                pass
        except Exception as error:  # of that commit: the row says so, and ours is measured all the same
            why = f"{type(error).__name__}: {error}"
        pipe.send(("end", why or "the other commit does not have this variant"))


if __name__ == "__main__":
    main(*sys.argv[1:])
