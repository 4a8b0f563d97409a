"""SURM as plain PyTorch layers: a frozen linear map with a structured matrix beside it."""

import torch
from torch import nn

from ...ops.structured import StructuredProblem
from ..adapted import AdaptedLinear, FrozenProduct
from ..checks import check_adapter_dtype, check_alpha, check_choice, check_dropout, check_linear, features
from ..route import BlockStep, Route
from .maps import MapSpec, StructuredMap

TOEPLITZ = {"symmetric": "symmetric_toeplitz", "general": "toeplitz"}


class StructuredDelta(nn.Module):
    """scale * M drop(x), to be added to what a linear layer makes of x.

    map: M [N, K]. alpha: the scale is `map.scale(alpha)`, that is 1 for None. dropout: in [0, 1), in training only.
    """

    on_output = False

    def __init__(self, map: StructuredMap, alpha: float | None = None, dropout: float = 0.0):
        if alpha is not None:
            check_alpha("alpha", alpha)
        check_dropout("dropout", dropout)
        super().__init__()
        self.map, self.alpha, self.scale = map, alpha, map.scale(alpha)
        self.dropout = nn.Dropout(dropout)

    @property
    def dropout_p(self) -> float:
        dropout = self._modules["dropout"]  # the short way, as in `AdaptedLinear.operands`
        return dropout.p if dropout.training else 0.0

    def forward(self, x: torch.Tensor, add: torch.Tensor | None = None) -> torch.Tensor:
        """x: [..., K] -> add + scale * M drop(x), [..., N] in x's dtype."""
        return self._modules["map"](x, add=add, scale=self.scale, dropout_p=self.dropout_p)

    def apply_to(self, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        return self(x, add=y)

    @property
    def path(self) -> str:
        return f"{self.map.op_name} added to it"

    def step(self, x: torch.Tensor) -> BlockStep:
        return BlockStep(self)

    def delta(self) -> torch.Tensor:
        """scale * M as a dense matrix [N, K], in fp32 (fp64 for fp64 parameters)."""
        return self.scale * self.map.delta()

    def problem(self, x: torch.Tensor) -> StructuredProblem:
        """What the op is given with x [..., K]."""
        return self.map.problem(x, scale=self.scale, dropout=self.dropout_p > 0)

    def factor(self) -> nn.Parameter:
        """One of the map's parameters, whose dtype and device all share."""
        return self.map.operands()[0]

    def is_zero(self) -> bool:
        """Whether this is as it starts, and so adds nothing."""
        return self.map.is_zero()

    def randomize(self) -> None:
        """Random parameters in place of those that start at zero, for tests."""
        self.map.reset_parameters(zero=False)

    def extra_repr(self) -> str:
        return f"scale={self.scale:g}"


class MapLinear(AdaptedLinear):
    """A linear map with W and bias frozen, and a module with a structured map, `adapter`, after it. Base class."""

    def __init__(self, base: nn.Module, adapter: StructuredDelta):
        super().__init__(base)
        self.adapter = adapter

    @property
    def op_name(self) -> str:
        return self.adapter.map.op_name

    def delta(self) -> torch.Tensor:
        """The dense change of the weight, [N, K]; ValueError if there is none."""
        return self.adapter.delta()

    def adapted_route(self, x: torch.Tensor) -> Route:
        return Route((FrozenProduct(self), self._modules["adapter"].step(x)))


class StructuredLinear(MapLinear):
    """y = x W^T + bias + scale * M drop(x) with W and bias frozen. Base class: see the layers of each structure.

    adapter: the scaled map, which owns the parameters. The product with W comes first, the op adds M's to it.
    """

    def __init__(self, base: nn.Module, spec: MapSpec, alpha: float | None, dropout: float, dtype):
        check_linear("base", base)
        dtype = check_adapter_dtype("dtype", dtype, base.weight.dtype)
        adapter = StructuredDelta(spec.make(*features(base), dtype=dtype, device=base.weight.device), alpha, dropout)
        super().__init__(base, adapter)


class CirculantLinear(StructuredLinear):
    """y = x W^T + bias + alpha C(a . b) drop(x). Made by `from_linear`; see `CirculantMap`."""

    @classmethod
    def from_linear(
        cls, base: nn.Module, *, product: bool = True, rectangular: str = "pad", block_size: int | None = None,
        alpha: float | None = None, dropout: float = 0.0, dtype=None,
    ) -> "CirculantLinear":  # fmt: skip
        """An adapted layer that shares, and freezes, the weight and bias Parameters of `base`.

        base: torch.nn.Linear or transformers' Conv1D, weight in fp32, fp16, bf16 or fp64. product: two vectors a and b,
        or one. rectangular: "pad" or "block", with block_size; see `CirculantMap`. alpha: the scale, 1 for None.
        dropout: in [0, 1), on the adapter's input, in training only. dtype: of the vectors, by default fp32. Raises
        TypeError or ValueError naming the argument, the value and what is allowed.
        """
        spec = MapSpec("circulant", product=product, rectangular=rectangular, block_size=block_size)
        return cls(base, spec, alpha, dropout, dtype)


class ToeplitzLinear(StructuredLinear):
    """y = x W^T + bias + alpha M drop(x), M = T(b) T(a) or one general Toeplitz matrix. Made by `from_linear`."""

    @classmethod
    def from_linear(
        cls, base: nn.Module, *, structure: str = "symmetric", alpha: float | None = None, dropout: float = 0.0,
        dtype=None,
    ) -> "ToeplitzLinear":  # fmt: skip
        """An adapted layer that shares, and freezes, the weight and bias Parameters of `base`.

        structure: "symmetric", the product of two symmetric Toeplitz matrices, on square layers only, or "general". The
        rest: see `CirculantLinear.from_linear`.
        """
        check_choice("structure", structure, tuple(TOEPLITZ))
        return cls(base, MapSpec(TOEPLITZ[structure]), alpha, dropout, dtype)


class KroneckerLinear(StructuredLinear):
    """y = x W^T + bias + (alpha / r) (B (x) A) drop(x). Made by `from_linear`; see `KroneckerMap`."""

    @classmethod
    def from_linear(
        cls, base: nn.Module, *, r: int | None = None, alpha: float | None = None, dropout: float = 0.0, dtype=None
    ) -> "KroneckerLinear":
        """An adapted layer that shares, and freezes, the weight and bias Parameters of `base`.

        r: must divide both sizes; None means the one of the highest rank. alpha: the scale is alpha / r, 1 for None.
        The rest: see `CirculantLinear.from_linear`.
        """
        return cls(base, MapSpec("kronecker", r=r), alpha, dropout, dtype)


class LdrLinear(StructuredLinear):
    """y = x W^T + bias + alpha sum_i C(g_i) S(h_i) drop(x), square only. Made by `from_linear`; see `LdrMap`."""

    @classmethod
    def from_linear(
        cls, base: nn.Module, *, q: int = 1, alpha: float | None = None, dropout: float = 0.0, dtype=None
    ) -> "LdrLinear":
        """An adapted layer that shares, and freezes, the weight and bias Parameters of `base`.

        q: number of terms. The rest: see `CirculantLinear.from_linear`.
        """
        return cls(base, MapSpec("ldr", q=q), alpha, dropout, dtype)
