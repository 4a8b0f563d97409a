"""What the low-rank layers share: a frozen linear map, two factors beside it, their dense product, and merging."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ..ops.dispatch import Problem, problem_of
from .checks import check_adapter_dtype, check_alpha, check_dropout, check_linear, check_rank, is_conv1d


class LowRankLinear(nn.Module):
    """y = x W^T + bias + scale * B (A drop(x)) with W and bias frozen. Base class: see LoRALinear and DyLoRALinear.

    weight, bias: the Parameters of the layer it was made from, shared, not copied. lora_A: [r, K], lora_B: [N, r].
    """

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float, use_rslora: bool, dtype):
        check_linear("base", base)
        check_rank("r", r)
        check_alpha("alpha", alpha)
        check_dropout("dropout", dropout)
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.transposed = is_conv1d(base)
        self.out_features, self.in_features = self.weight_nk().shape
        self.r, self.alpha, self.use_rslora = r, alpha, use_rslora
        self.dropout = nn.Dropout(dropout)
        # Gradients of a half-precision adapter lose the small updates that fine-tuning makes, so fp32 is the default.
        dtype = check_adapter_dtype("dtype", dtype, self.weight.dtype)
        self.lora_A = nn.Parameter(self.weight.new_empty(r, self.in_features, dtype=dtype))
        self.lora_B = nn.Parameter(self.weight.new_empty(self.out_features, r, dtype=dtype))
        self._unmerged_weight = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A from kaiming_uniform(a=sqrt(5)), B zero: the adapter starts as a change of nothing."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def weight_nk(self) -> torch.Tensor:
        """The base weight as [N, K]; a transposed view where the layer stores [K, N]."""
        return self.weight.t() if self.transposed else self.weight

    @property
    def dropout_p(self) -> float:
        return self.dropout.p if self.training else 0.0

    @property
    def merged(self) -> bool:
        return self._unmerged_weight is not None

    def delta(self) -> torch.Tensor:
        """The dense change of the weight, [N, K], in fp32 (fp64 for fp64 factors)."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> None:
        """Adds `delta()` to the base weight, computed in fp32 and rounded once to the weight's dtype.

        The forward pass then uses the base weight alone. The old weight is kept on the host, so merging needs no
        further device memory. Raises RuntimeError if the layer is merged already.
        """
        if self.merged:
            raise RuntimeError("merge: this layer is merged already; call unmerge() first")
        delta = self.delta()
        merged = self.weight_nk().to(delta.dtype) + delta
        self._unmerged_weight = self.weight.detach().to("cpu", copy=True)
        self.weight_nk().copy_(merged)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts back the weight that `merge` replaced, bit for bit. Raises RuntimeError if the layer is not merged."""
        if not self.merged:
            raise RuntimeError("unmerge: this layer is not merged")
        self.weight.copy_(self._unmerged_weight)
        self._unmerged_weight = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., K] in the base weight's dtype. Returns [..., N]."""
        if self.merged:
            return F.linear(x, self.weight_nk(), self.bias)
        return self.adapted(x)

    def adapted(self, x: torch.Tensor) -> torch.Tensor:
        """Base and adapter on x: [..., K] -> [..., N]."""
        raise NotImplementedError

    def explain_path(self) -> tuple[str, list[str]]:
        """(path of a forward call, reasons against a shorter one)."""
        if self.merged:
            return "F.linear", ["lowrank_linear: the adapter is merged into the base weight"]
        return "lowrank_linear", []

    def op_problem(self, rows: int) -> Problem | None:
        """What a forward pass on x [rows, K] gives lowrank_linear; None if it does not call it."""
        if self.merged:
            return None
        x = self.weight.new_empty(1, self.in_features).expand(rows, -1)
        return problem_of(x, self.lora_A, self.lora_B, has_weight=True, dropout=self.dropout_p > 0)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, alpha={self.alpha}"
        return text + (", merged" if self.merged else "")
