"""Measured ceilings of this machine: copy bandwidth and GEMM rate. A time is judged against what the machine did here,
not against a data sheet."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch

from .shapes import Shape, StructuredShape


@dataclass(frozen=True)
class Ceilings:
    """copy_gb_s counts bytes read plus bytes written; gemm_gflop_s is keyed by dtype name and counts 2 m n k."""

    copy_gb_s: float
    gemm_gflop_s: dict[str, float]

    def as_dict(self) -> dict:
        return asdict(self)


# An idle GPU takes this long to come to its full clocks.
WARM_SECONDS = 0.2


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()  # takes the time in which the host queues the rest
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _best_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    begin = time.perf_counter()
    run()
    while device.type == "cuda" and time.perf_counter() - begin < WARM_SECONDS:
        _seconds(run, device)
    return min(_seconds(run, device) for _ in range(repeats))


def _products(device: torch.device, dtype: torch.dtype) -> list[Callable]:
    """Products to try. On a CPU torch.mm takes MKL for fp32, which oneDNN outruns on CPUs that Intel did not make."""
    products = [torch.mm]
    if device.type == "cpu" and dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        products.append(lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    return products


def measure(
    device: torch.device, dtypes: tuple[torch.dtype, ...], repeats: int = 5, size: int | None = None
) -> Ceilings:
    """Best of a few runs: a ceiling is what the machine can do undisturbed. size: of the square product.

    The data are random: on zeros a GPU draws less power and clocks higher.
    """
    cuda = device.type == "cuda"
    block = torch.randint(256, (1 << 20,), dtype=torch.uint8, device=device)
    source = block.repeat(512 if cuda else 256)
    target = torch.empty_like(source)
    target.copy_(source)
    copy = 2 * source.numel() / _best_seconds(lambda: target.copy_(source), device, repeats) / 1e9
    n = size or (8192 if cuda else 1024)
    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        seconds = min(_best_seconds(partial(run, a, b), device, repeats) for run in _products(device, dtype))
        rates[str(dtype).removeprefix("torch.")] = 2 * n**3 / seconds / 1e9
    return Ceilings(copy, rates)


def floor_us(moved: float, flops: float, dtype: torch.dtype, ceilings: Ceilings) -> float:
    """Least time of work that moves so many bytes at copy bandwidth and computes at the GEMM rate of a type."""
    return max(flops / ceilings.gemm_gflop_s[str(dtype).removeprefix("torch.")], moved / ceilings.copy_gb_s) / 1e3


def floor_ms(shape: Shape | StructuredShape, mode: str, ceilings: Ceilings) -> float:
    """Least time of a layer or map: the larger of its arithmetic at the GEMM rate and its compulsory traffic at copy
    bandwidth."""
    return floor_us(shape.moved(mode) * shape.dtype.itemsize, shape.flops(mode), shape.dtype, ceilings) / 1e3


def main() -> None:
    """`python -m peft_fused.bench.roofline [cpu|cuda]` prints the ceilings as JSON."""
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    print(json.dumps(measure(device, (torch.float32, torch.bfloat16, torch.float16)).as_dict()))


if __name__ == "__main__":
    main()
