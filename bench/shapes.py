"""The grids of layers that are timed."""

from dataclasses import dataclass

import torch

from peft_fused.ops.cases import structured_features
from peft_fused.ops.structured.engine import STRUCTURES

SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _types(dtype: torch.dtype, adapter_dtype: torch.dtype) -> str:
    return SHORT[dtype] if dtype == adapter_dtype else f"{SHORT[dtype]}+{SHORT[adapter_dtype]}"


@dataclass(frozen=True)
class Shape:
    """m rows through a frozen [n, k] layer with adapters of rank r: of LoRA and DyLoRA, or of the method `op`."""

    m: int
    k: int
    n: int
    r: int
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype = torch.float32
    dropout: float = 0.0
    compiled: bool = False  # whether the default CPU grid also runs torch.compile of PEFT
    op: str = "lowrank"

    @property
    def name(self) -> str:
        return f"{self.m}x{self.k}x{self.n}"

    @property
    def dtype_name(self) -> str:
        return _types(self.dtype, self.adapter_dtype)

    @property
    def calls(self) -> int:
        """Calls per sample on a CPU: layers this small measure host overhead, not arithmetic."""
        work = self.m * self.n * self.k
        return 100 if work < 1 << 14 else 10 if work < 1 << 22 else 1

    def flops(self, mode: str) -> int:
        """Of the layer; backward is dX, dA and dB with the base weight frozen."""
        m, n, k, r = self.m, self.n, self.k, self.r
        each = {"forward": 2 * m * (n * k + r * k + n * r), "backward": 2 * m * (n * k + 2 * r * k + 2 * n * r)}
        return each.get(mode) or sum(each.values())

    def moved(self, mode: str) -> int:
        """Elements that have to be read or written."""
        m, n, k = self.m, self.n, self.k
        each = {"forward": m * k + n * k + m * n, "backward": m * n + n * k + 2 * m * k}
        return each.get(mode) or sum(each.values())


@dataclass(frozen=True)
class StructuredShape:
    """m rows through a structured map alone. sizes: as in `ops.structured.StructuredProblem`."""

    op: str
    m: int
    sizes: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    adapter_dtype: torch.dtype = torch.float32
    dropout = 0.0

    @property
    def k(self) -> int:
        return structured_features(self.op, self.sizes)[0]

    @property
    def n(self) -> int:
        return structured_features(self.op, self.sizes)[1]

    @property
    def name(self) -> str:
        parts = {"kronecker": " A {}x{}", "ldr": " q {}"}.get(self.op, "")
        return f"{self.m}x{self.k}x{self.n}{parts.format(*self.sizes)}"

    @property
    def dtype_name(self) -> str:
        return _types(self.dtype, self.adapter_dtype)

    @property
    def calls(self) -> int:
        return 20 if self.m * max(self.n, self.k) < 1 << 16 else 1

    def flops(self, mode: str) -> int:
        """None are counted: how few will do is not known, and they are few beside the traffic."""
        return 0

    def moved(self, mode: str) -> int:
        m, n, k = self.m, self.n, self.k
        return {"forward": m * (k + n), "backward": m * (n + 2 * k), "both": m * (2 * n + 3 * k)}[mode]


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


def _structured(m: int, op: str, *sizes: tuple[int, ...], dtype=torch.float32) -> tuple[StructuredShape, ...]:
    return tuple(StructuredShape(op, m, each, dtype) for each in sizes)


STRUCTURED_TINY = tuple(
    StructuredShape(op, 33, sizes)
    for op, sizes in (
        ("circulant", (48,)), ("skew_circulant", (48,)), ("toeplitz", (40, 48)), ("toeplitz_product", (48,)),
        ("kronecker", (6, 8, 8, 6)), ("ldr", (2, 48)),
    )
)  # fmt: skip

STRUCTURED_CPU = (
    *_structured(2048, "circulant", (384,), (768,), (1024,), (1536,), (3072,), (4096,), (8192,)),
    *_structured(2048, "circulant", (768,), (3072,), dtype=BF16),
    *_structured(2048, "toeplitz", (768, 768), (3072, 768)),
    *_structured(2048, "kronecker", (24, 32, 32, 24), (64, 64, 48, 48)),
    *_structured(2048, "skew_circulant", (768,)),
    *_structured(2048, "toeplitz_product", (768,)),
    *_structured(2048, "ldr", (1, 768)),
)

STRUCTURED_CPU_ALL = (
    *STRUCTURED_CPU,
    *_structured(2048, "circulant", (8192,), dtype=BF16),
    *_structured(32, "circulant", (768,), (3072,)),
    *_structured(2048, "toeplitz", (3072, 3072), (768, 3072)),
    *_structured(2048, "toeplitz", (768, 768), dtype=BF16),
    *_structured(2048, "kronecker", (24, 32, 32, 24), dtype=BF16),
    *_structured(2048, "skew_circulant", (3072,)),
    *_structured(2048, "toeplitz_product", (3072,)),
    *_structured(2048, "ldr", (4, 768), (1, 3072)),
)

STRUCTURED_CUDA = (
    *_structured(4096, "circulant", (4096,), (768,), (1024,), (3072,), (8192,), dtype=BF16),
    *_structured(4096, "circulant", (4096,), (768,), (1024,), (3072,), (8192,)),
    *_structured(4096, "toeplitz", (4096, 4096), (768, 768), (3072, 768), dtype=BF16),
    *_structured(4096, "kronecker", (64, 64, 64, 64), (24, 32, 32, 24), dtype=BF16),
    *_structured(4096, "toeplitz", (4096, 4096), (768, 768)),
    *_structured(4096, "toeplitz_product", (768,), (4096,), dtype=BF16),
    *_structured(4096, "ldr", (1, 4096), (4, 768), dtype=BF16),
    *_structured(4096, "skew_circulant", (4096,), dtype=BF16),
    *_structured(4096, "kronecker", (64, 64, 64, 64)),
)

METHODS = ("adamix", "aflora")
METHODS_TINY = tuple(Shape(64, 48, 48, 4, op=op) for op in METHODS)
METHODS_CPU = (Shape(4096, 768, 768, 16, op="adamix"), Shape(4096, 768, 768, 8, op="aflora"))
METHODS_CPU_ALL = (
    *METHODS_CPU,
    *(
        Shape(*sizes, 16, dtype, op=op)
        for op in METHODS
        for sizes, dtype in (((512, 1024, 1024), torch.float32), ((4096, 768, 768), BF16))
    ),
)
METHODS_CUDA = tuple(Shape(4096, size, size, 16, BF16, op=op) for op in METHODS for size in (4096, 768))

OPS = ("lowrank", *STRUCTURES, *METHODS)
# Low-rank layers that a GPU's grid starts with, before the structured maps: all of it may not be reached.
CUDA_FIRST = 8


def grid(device: str, name: str, op: str = "all") -> tuple[Shape | StructuredShape, ...]:
    """Shapes of a named grid, "tiny" (a smoke test), "default" or "all", for one of OPS or all of them."""
    if name == "tiny":
        layers, maps, methods = TINY, STRUCTURED_TINY, METHODS_TINY
    elif device == "cuda":
        layers, maps, methods = CUDA, STRUCTURED_CUDA, METHODS_CUDA
    elif name == "all":
        layers, maps, methods = CPU_ALL, STRUCTURED_CPU_ALL, METHODS_CPU_ALL
    else:
        layers, maps, methods = CPU, STRUCTURED_CPU, METHODS_CPU
    if op == "all":
        first = CUDA_FIRST if device == "cuda" else len(layers)
        return (*layers[:first], *maps, *methods, *layers[first:])
    return layers if op == "lowrank" else tuple(shape for shape in (*maps, *methods) if shape.op == op)
