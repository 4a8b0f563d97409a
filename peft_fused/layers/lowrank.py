"""What the low-rank layers share: two factors beside a frozen linear map, and their part in a forward pass."""

import math

import torch
from torch import nn

from ..ops import lowrank_adapter, lowrank_linear
from ..ops.lowrank import LowRankProblem, lowrank_problem
from .adapted import AdaptedLinear
from .checks import check_adapter_dtype, check_alpha, check_dropout, check_linear, check_rank
from .route import Route, Step
from .scheduled import ScheduleState


class LowRankStep(Step):
    """y plus what a low-rank adapter makes of x; with a weight, the base product and that in one op.

    options: of the op, such as scale, dropout_p, u, v. state: what notices whether a schedule sets it, if any. weight
    [N, K]: of the base product, None until it is set; bias is set with it.
    """

    __slots__ = ("A", "B", "bias", "options", "state", "weight")

    def __init__(self, A: torch.Tensor, B: torch.Tensor, options: dict, state: ScheduleState | None = None):
        self.A, self.B, self.options, self.state, self.weight = A, B, options, state, None

    @property
    def name(self) -> str:
        return "lowrank added to it" if self.weight is None else "lowrank_linear"

    def run(self, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        if self.state is not None:
            self.state.count_forward()
        if self.weight is None:
            return lowrank_adapter(x, self.A, self.B, add=y, **self.options)
        return lowrank_linear(x, self.weight, self.bias, self.A, self.B, **self.options)

    def problem(self, x: torch.Tensor) -> LowRankProblem:
        dropout, uv = self.options.get("dropout_p", 0.0) > 0, not self.options.keys().isdisjoint(("u", "v"))
        has_weight, scale = self.weight is not None, self.options.get("scale", 1.0)
        return lowrank_problem(x, self.A, self.B, has_weight=has_weight, dropout=dropout, uv=uv, scale=scale)


class LowRankLinear(AdaptedLinear):
    """y = x W^T + bias + scale * B (A drop(x)) with W and bias frozen. Base class; subclasses define `adapter`.

    lora_A: [r, K], lora_B: [N, r].
    """

    op_name = "lowrank_linear"

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

    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A [r, K] and B [N, r]."""
        own = self._parameters  # see `operands`
        A = own["lora_A"] if "lora_A" in own else self.lora_A  # noqa: SIM401
        return A, own["lora_B"] if "lora_B" in own else self.lora_B  # noqa: SIM401

    def adapter(self):
        """The adapter, with `step(x)`, a `LowRankStep`, and `delta()`."""
        raise NotImplementedError

    def delta(self) -> torch.Tensor:
        """The dense change of the weight, [N, K], in fp32 (fp64 for fp64 factors)."""
        return self.adapter().delta()

    def adapted_route(self, x: torch.Tensor) -> Route:
        step = self.adapter().step(x)
        step.weight, step.bias = self.operands()
        return Route((step,))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}, alpha={self.alpha}"
