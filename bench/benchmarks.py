"""All benchmarks that `peft-fused bench` runs, and the grids of their shapes."""

from . import adamix, aflora, lowrank, structured
from .benchmark import Benchmark
from .shapes import Shape, StructuredShape

BENCHMARKS: tuple[Benchmark, ...] = (lowrank.BENCHMARK, structured.BENCHMARK, adamix.BENCHMARK, aflora.BENCHMARK)
OPS = tuple(op for benchmark in BENCHMARKS for op in benchmark.ops)
# Shapes of the first benchmark that a GPU's grid starts with, before the others: all of it may not be reached.
CUDA_FIRST = 8


def benchmark_of(op: str) -> Benchmark:
    """The benchmark of a shape, or of a row, by its op."""
    return next(benchmark for benchmark in BENCHMARKS if op in benchmark.ops + benchmark.rows)


def grid(device: str, name: str, op: str = "all") -> tuple[Shape | StructuredShape, ...]:
    """Shapes of a named grid, "tiny" (a smoke test), "default" or "all", for one of OPS or all of them."""
    name = "cuda" if device == "cuda" and name != "tiny" else name
    if op != "all":
        return tuple(shape for shape in benchmark_of(op).shapes[name] if shape.op == op)
    first, *others = (benchmark.shapes[name] for benchmark in BENCHMARKS)
    cut = CUDA_FIRST if device == "cuda" else len(first)
    return (*first[:cut], *(shape for shapes in others for shape in shapes), *first[cut:])
