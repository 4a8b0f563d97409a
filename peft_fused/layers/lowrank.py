"""What the low-rank layers share: two factors beside a frozen linear map."""

import math
from typing import ClassVar

from torch import nn

from ..ops.lowrank import LowRankProblem, lowrank_problem
from .adapted import AdaptedLinear
from .checks import check_adapter_dtype, check_alpha, check_dropout, check_linear, check_rank


class LowRankLinear(AdaptedLinear):
    """y = x W^T + bias + scale * B (A drop(x)) with W and bias frozen. Base class: see LoraLinear and DyLoraLinear.

    lora_A: [r, K], lora_B: [N, r].
    """

    op_name = "lowrank_linear"

    SCALES_RANKS: ClassVar[bool] = False  # whether it gives the op u and v

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float, use_rslora: bool, dtype):
        check_linear("base", base)
        check_rank("r", r)
        check_alpha("alpha", alpha)
        check_dropout("dropout", dropout)
        # Gradients of a half-precision adapter lose the small updates that fine-tuning makes, so fp32 is the default.
        dtype = check_adapter_dtype("dtype", dtype, base.weight.dtype)
        super().__init__(base)
        self.r, self.alpha, self.use_rslora = r, alpha, use_rslora
        self.dropout = nn.Dropout(dropout)
        self.lora_A = nn.Parameter(self.weight.new_empty(r, self.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(self.weight.new_empty(self.out_features, r, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A from kaiming_uniform(a=sqrt(5)), B zero: the adapter starts as a change of nothing."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    @property
    def dropout_p(self) -> float:
        return self.dropout.p if self.training else 0.0

    def op_problem(self, rows: int) -> LowRankProblem | None:
        """What a forward pass on x [rows, K] gives lowrank_linear; None if it does not call it."""
        if self.merged:
            return None
        x = self.weight.new_empty(1, self.in_features).expand(rows, -1)
        dropout = self.dropout_p > 0
        return lowrank_problem(x, self.lora_A, self.lora_B, has_weight=True, dropout=dropout, uv=self.SCALES_RANKS)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, alpha={self.alpha}"
