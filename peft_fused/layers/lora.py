"""LoRA as a plain PyTorch layer."""

import math

import torch
from torch import nn

from .checks import check_flag
from .lowrank import LowRankLinear, LowRankStep
from .route import Route


class LoraLinear(LowRankLinear):
    """y = x W^T + bias + (alpha / r) B A drop(x) in one fused op.

    Sources: LoRA, Hu et al. 2021, eq. 3; rank-stabilised scale alpha / sqrt(r), Kalajdzievski 2023. Made by
    `from_linear`; `merge`, `unmerge` and `delta` are inherited.
    """

    @classmethod
    def from_linear(
        cls,
        base: nn.Module,
        *,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        use_rslora: bool = False,
        dtype=None,
    ) -> "LoraLinear":
        """An adapted layer that shares, and freezes, the weight and bias Parameters of `base`.

        base: torch.nn.Linear or transformers' Conv1D, weight in fp32, fp16, bf16 or fp64. r: 1..256. dropout: in [0,
        1), on the adapter's input, in training only. use_rslora: scale alpha / sqrt(r). dtype: of A and B, by default
        fp32. Raises TypeError or ValueError naming the argument, the value and what is allowed.
        """
        check_flag("use_rslora", use_rslora)
        return cls(base, r, alpha, dropout, use_rslora, dtype)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def delta(self) -> torch.Tensor:
        """The dense change of the weight, [N, K], in fp32 (fp64 for fp64 factors)."""
        A, B = self.factors()
        dtype = torch.promote_types(A.dtype, torch.float32)
        return self.scale * (B.to(dtype) @ A.to(dtype))

    def adapted_route(self, x: torch.Tensor) -> Route:
        dropout_p = self.dropout.p if self.training else 0.0
        step = LowRankStep(*self.factors(), {"scale": self.scale, "dropout_p": dropout_p})
        step.weight, step.bias = self.operands()
        return Route((step,))
