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


def _best_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    best = float("inf")
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _products(device: torch.device, dtype: torch.dtype) -> list[Callable]:
    """Products to try. On a CPU torch.mm takes MKL for fp32, which oneDNN outruns on CPUs that Intel did not make."""
    products = [torch.mm]
    if device.type == "cpu" and dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        products.append(lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    return products


def measure(device: torch.device, dtypes: tuple[torch.dtype, ...], repeats: int = 5) -> Ceilings:
    """Best of a few runs: a ceiling is what the machine can do undisturbed."""
    cuda = device.type == "cuda"
    source = torch.zeros((1 << 30) if cuda else (1 << 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    copy = 2 * source.numel() / _best_seconds(lambda: target.copy_(source), device, repeats) / 1e9
    n = 8192 if cuda else 1024
    rates = {}
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        seconds = min(_best_seconds(partial(run, a, b), device, repeats) for run in _products(device, dtype))
        rates[str(dtype).removeprefix("torch.")] = 2 * n**3 / seconds / 1e9
    return Ceilings(copy, rates)


def floor_ms(shape: Shape | StructuredShape, mode: str, ceilings: Ceilings) -> float:
    """Least time of a layer or map: the larger of its arithmetic at the GEMM rate and its compulsory traffic at copy
    bandwidth."""
    item = torch.empty(0, dtype=shape.dtype).element_size()
    rate = ceilings.gemm_gflop_s[str(shape.dtype).removeprefix("torch.")]
    return max(shape.flops(mode) / rate, shape.moved(mode) * item / ceilings.copy_gb_s) / 1e6


def main() -> None:
    """`python -m peft_fused.bench.roofline [cpu|cuda]` prints the ceilings as JSON."""
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    print(json.dumps(measure(device, (torch.float32, torch.bfloat16, torch.float16)).as_dict()))


if __name__ == "__main__":
    main()
