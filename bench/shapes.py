"""The layers and maps that are timed: their sizes, and the least that each has to compute and to move."""

from dataclasses import dataclass

import torch

from peft_fused.ops.cases import structured_features

BF16 = torch.bfloat16
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
