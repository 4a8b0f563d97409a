"""What all adapted linear layers share: a frozen weight taken from a base layer, merging into it, and explaining."""

import torch
import torch.nn.functional as F
from torch import nn

from .checks import check_linear, check_tensor, is_conv1d
from .replaced import ReplacedWeight, kept_through
from .route import CallBase, Route, Routed

# Of an adapter that works on a layer's output, as the end of a sentence.
NO_DELTA = "its non-linear block on the layer's output is no change of the weight"


class FrozenProduct(CallBase):
    """x W^T + bias by the frozen map alone."""

    __slots__ = ()
    name = "F.linear"

    def run(self, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        return self.base.base(x)


class AdaptedLinear(Routed, nn.Module):
    """A linear map with W and bias frozen, and an adapter beside it. Subclasses define `adapted_route`, `delta` and
    `op_name`.

    weight, bias: the Parameters of the layer it was made from, shared, not copied.
    """

    # The op that the adapter runs on.
    op_name: str

    def __init__(self, base: nn.Module):
        check_linear("base", base)
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        self.transposed = is_conv1d(base)
        self.out_features, self.in_features = self.weight_nk().shape
        self._unmerged_weight = None

    def weight_nk(self) -> torch.Tensor:
        """The base weight as [N, K]; a transposed view where the layer stores [K, N]."""
        return self.weight.t() if self.transposed else self.weight

    def operands(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight [N, K], bias) as an op takes them."""
        # torch.nn.Module takes ten times as long to find a parameter as the dictionary where it is, unless something
        # has put it elsewhere (DataParallel, parametrizations, pruning). A default of `get` would be looked up always.
        own = self._parameters
        weight = own["weight"] if "weight" in own else self.weight  # noqa: SIM401
        bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401
        return (weight.t() if self.transposed else weight), bias

    @property
    def merged(self) -> bool:
        return self._unmerged_weight is not None

    def delta(self) -> torch.Tensor:
        """The dense change of the weight, [N, K], in fp32 (fp64 for fp64 adapters)."""
        raise NotImplementedError

    @torch.no_grad()
    def merge(self) -> None:
        """Adds `delta()` to the base weight, computed in fp32 and rounded once to the weight's dtype.

        The forward pass then uses the base weight alone. The old weight is kept on the host, so merging needs no
        further device memory. Raises RuntimeError if the layer is merged already.
        """
        if self.merged:
            raise RuntimeError("merge: this layer is merged already; call unmerge() first")
        with torch.autocast(self.weight.device.type, enabled=False):
            delta = self.delta()
        merged = self.weight_nk().to(delta.dtype) + delta
        self._unmerged_weight = ReplacedWeight(self.weight)
        self.weight_nk().copy_(merged)
        self._unmerged_weight.note(self.weight)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts back the weight that `merge` replaced, bit for bit.

        Raises RuntimeError if the layer is not merged, or if something else has written to the weight since.
        """
        if not self.merged:
            raise RuntimeError("unmerge: this layer is not merged")
        self._unmerged_weight.check(self.weight, f"this {type(self).__name__}")
        self.weight.copy_(self._unmerged_weight.values)
        self._unmerged_weight = None

    def _apply(self, fn, recurse=True):
        with kept_through(self._unmerged_weight, lambda: self.weight):
            return super()._apply(fn, recurse)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., K] in the base weight's dtype. Returns [..., N]. TypeError if x is no tensor."""
        check_tensor(x)
        return self.route(x).run(x)

    def route(self, x: torch.Tensor) -> Route:
        """What `forward` runs on x: see layers/route.py."""
        if self.merged:
            return Route((FrozenProduct(self),), ((self.op_name, "the adapter is merged into the base weight"),))
        return self.adapted_route(x)

    def adapted_route(self, x: torch.Tensor) -> Route:
        """The same while the adapter is not merged."""
        raise NotImplementedError

    def base(self, x: torch.Tensor) -> torch.Tensor:
        """The frozen map alone on x: [..., K] -> [..., N]."""
        return F.linear(x, *self.operands())

    def typical_input(self, rows: int = 1) -> torch.Tensor:
        return self.weight.new_empty(1, self.in_features).expand(rows, -1)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        return text + (", merged" if self.merged else "")
