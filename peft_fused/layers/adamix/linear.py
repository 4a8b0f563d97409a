"""AdaMix as a plain PyTorch layer."""

import torch
from torch import nn

from ..adapted import NO_DELTA, AdaptedLinear, FrozenProduct
from ..checks import check_adapter_dtype, check_alpha, check_choice, check_linear, features
from ..route import Route
from .blocks import AdaMixAdapter, AdaMixDelta, RoutedBlock
from .routes import RouteMember, RoutePolicy


class AdaMixLinear(AdaptedLinear):
    """A linear map with W and bias frozen, and `AdaMixDelta` beside it or `AdaMixAdapter` on its output.

    In training one expert of each side works per forward pass, drawn by `peft_fused.on_step`; in evaluation their
    average, unless `peft_fused.set_adamix_routing` asks for random ones. `merge` folds the average of the LoRA form
    into W, and raises ValueError for the adapter form. Made by `from_linear`.
    """

    def __init__(self, base: nn.Module, block: RoutedBlock):
        super().__init__(base)
        self.block = block

    @classmethod
    def from_linear(
        cls, base: nn.Module, *, kind: str = "adapter", r: int = 16, alpha: float = 16, num_experts: int = 4,
        share_down: bool = False, share_up: bool = True, activation: str = "gelu", routing: str = "batch",
        expert_init: str = "independent", dropout: float = 0.0, strict_experts: bool = False, seed: int = 0, dtype=None,
    ) -> "AdaMixLinear":  # fmt: skip
        """An adapted layer that shares, and freezes, the weight and bias Parameters of `base`.

        base: torch.nn.Linear or transformers' Conv1D, weight in fp32, fp16, bf16 or fp64. kind: "adapter" or "lora".
        r: 1..256, of the bottleneck or the LoRA factors. alpha: of "lora", whose scale is alpha / r. activation: of
        "adapter", "gelu", "gelu_tanh", "relu", "silu", "swish", "tanh" or "identity". expert_init: experts start
        "independent" or "identical". dropout: in [0, 1), on the block's input. dtype: of the block, by default fp32.
        The rest: see `RoutePolicy`. Raises TypeError or ValueError naming the argument.
        """
        check_linear("base", base)
        check_choice("kind", kind, ("adapter", "lora"))
        check_alpha("alpha", alpha)
        policy = RoutePolicy(num_experts, share_down, share_up, routing, strict_experts, seed)
        k, n = features(base)
        shared = dict(
            expert_init=expert_init, dropout=dropout, device=base.weight.device,
            dtype=check_adapter_dtype("dtype", dtype, base.weight.dtype),
        )  # fmt: skip
        if kind == "lora":
            return cls(base, AdaMixDelta(k, n, r, policy, alpha=alpha, **shared))
        return cls(base, AdaMixAdapter(n, r, policy, activation=activation, **shared))

    @property
    def additive(self) -> bool:
        return isinstance(self.block, AdaMixDelta)

    @property
    def op_name(self) -> str:
        return "lowrank_linear" if self.additive else "bottleneck"

    def schedule_members(self) -> list[RouteMember]:
        return [self.block.member()]

    def delta(self) -> torch.Tensor:
        """The dense change of the weight, [N, K]; ValueError for the adapter form, which has none."""
        if not self.additive:
            raise ValueError(f"an AdaMixAdapter has no dense delta: {NO_DELTA}")
        return self.block.delta()

    def adapted_route(self, x: torch.Tensor) -> Route:
        if not self.additive:
            return Route((FrozenProduct(self), self.block.step(x)))
        if reason := self.block.against_linear():
            return Route((FrozenProduct(self), self.block.step(x)), ((self.op_name, reason),))
        step = self.block.linear_step(x)
        step.weight, step.bias = self.operands()
        return Route((step,))

    def typical_input(self, rows: int = 1) -> torch.Tensor:
        return self.weight.new_empty(1, self.in_features).expand(*self.block.typical_shape(rows), -1)
