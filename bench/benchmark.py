"""What a file of this folder states of the layers or maps that it times; benchmarks.py lists them all."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from .rows import Case
from .shapes import BF16, Shape, StructuredShape


@dataclass(frozen=True)
class Table:
    """How the rows of a benchmark are shown: a line each.

    first: what tells them apart beside layer, type and mode, by heading. ratios: keys of rows. saved: whose bytes are
    shown. last: further cells. ends: the mode after which there is a rule. about: a line below.
    """

    title: str
    first: dict[str, Callable[[dict], str]]
    ratios: dict[str, str]
    saved: dict[str, str]
    last: dict[str, Callable[[dict], str]]
    ends: str = "both"
    about: str = ""


@dataclass(frozen=True)
class Benchmark:
    """Shapes that are timed in the same way.

    ops: of its shapes, as `--op` takes them. rows: of its rows, where those are others. cases(shape, device), and with
    `compiles` a CompileBudget: what is measured together. seconds: of the rounds of each, by grid: "tiny", "default",
    "all". shapes: by grid, "default" and "all" those of a CPU, and "cuda" in their place on a GPU.
    """

    ops: tuple[str, ...]
    cases: Callable[..., Iterator[Case]]
    seconds: dict[str, float]
    shapes: dict[str, tuple[Shape | StructuredShape, ...]]
    table: Table
    rows: tuple[str, ...] = ()
    compiles: bool = False


@dataclass
class CompileBudget:
    """Seconds left for torch.compile, which nothing can interrupt: they only decide whether one is started.

    everywhere: whether shapes are compiled that do not ask for it.
    """

    seconds: float
    everywhere: bool

    def refusal(self, shape: Shape) -> str:
        if not (shape.compiled or self.everywhere):
            return "not part of this grid (--all times it for every shape)"
        return "" if self.seconds > 0 else "the time set aside for compiling is spent"


def of_method(
    cases: Callable, default: Shape, state: Callable[[dict], str], ratios: dict[str, str], reference: str
) -> Benchmark:
    """Of a method's layer, and of a training step of a few. default: the one shape of a CPU's usual grid. state: what
    of the method a row was measured in. reference: whose saved bytes stand beside ours."""
    op = default.op
    more = [(512, 1024, 1024, 16, torch.float32), (4096, 768, 768, 16, BF16)]
    return Benchmark(
        ops=(op,),
        cases=cases,
        seconds={"tiny": 0.05, "default": 4.0, "all": 10.0},
        shapes={
            "tiny": (Shape(64, 48, 48, 4, op=op),),
            "default": (default,),
            "all": (default, *(Shape(*sizes, op=op) for sizes in more)),
            "cuda": tuple(Shape(4096, size, size, 16, BF16, op=op) for size in (4096, 768)),
        },
        table=Table(
            op,
            first={"rank": lambda row: str(row["r"]), "state": state},
            ratios=ratios,
            saved={"saved,\nours": "ours", f"saved,\n{reference}": reference},
            last={},
            ends="step",
            about="step: forward, backward, schedule and optimizer, of four layers",
        ),
    )
