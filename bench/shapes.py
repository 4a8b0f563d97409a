"""The grids of layers that are timed."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Shape:
    """m rows through a frozen [n, k] layer with adapters of rank r."""

    m: int
    k: int
    n: int
    r: int
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    compiled: bool = False  # whether the default CPU grid also runs torch.compile of PEFT

    @property
    def name(self) -> str:
        return f"{self.m}x{self.k}x{self.n}"

    @property
    def dtype_name(self) -> str:
        short = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        base, adapter = short[self.dtype], short[self.adapter_dtype]
        return base if base == adapter else f"{base}+{adapter}"

    @property
    def calls(self) -> int:
        """Calls per sample on a CPU: layers this small measure host overhead, not arithmetic."""
        work = self.m * self.n * self.k
        return 100 if work < 1 << 14 else 10 if work < 1 << 22 else 1


BF16 = torch.bfloat16

TINY = (Shape(4, 32, 32, 8, compiled=True), Shape(64, 96, 80, 4, dropout=0.1))

CPU = (
    Shape(4, 32, 32, 8, compiled=True),
    Shape(4096, 768, 768, 8, compiled=True),
    Shape(4096, 768, 768, 8, dropout=0.1),
    Shape(4096, 768, 768, 8, BF16),
    Shape(4096, 768, 3072, 8),
    Shape(512, 4096, 4096, 16),
    Shape(512, 4096, 4096, 16, BF16),
)

CPU_ALL = (
    *CPU,
    Shape(4096, 768, 768, 8, BF16, BF16),
    Shape(4096, 768, 768, 64),
    Shape(4096, 3072, 768, 8),
    Shape(512, 4096, 4096, 16, dropout=0.1),
    Shape(512, 768, 768, 8),
    Shape(32, 768, 768, 8),
    Shape(1, 4096, 4096, 16),
)

# What matters most comes first, in case a run on a borrowed GPU is cut short.
CUDA_BF16 = [
    Shape(m, k, n, r, BF16, adapter)
    for m, k, n, r in (
        (4096, 768, 768, 8),
        (4096, 4096, 4096, 16),
        (512, 4096, 4096, 16),
        (4096, 768, 3072, 8),
        (4096, 4096, 4096, 128),
        (1, 4096, 4096, 16),
        (64, 4096, 4096, 16),
        (16384, 4096, 4096, 16),
        (16384, 8192, 8192, 64),
        (4096, 4096, 14336, 16),
    )
    for adapter in (torch.float32, BF16)
]
CUDA = (
    *CUDA_BF16,
    Shape(4, 32, 32, 8),
    Shape(4096, 768, 768, 8),
    Shape(4096, 768, 768, 8, BF16, dropout=0.1),
    Shape(4096, 4096, 4096, 16, BF16, dropout=0.1),
    Shape(4096, 4096, 4096, 16, BF16, BF16, dropout=0.1),
)


def grid(device: str, name: str) -> tuple[Shape, ...]:
    """Shapes of a named grid: "tiny" (a smoke test), "default" or "all"."""
    if name == "tiny":
        return TINY
    if device == "cuda":
        return CUDA
    return CPU_ALL if name == "all" else CPU
