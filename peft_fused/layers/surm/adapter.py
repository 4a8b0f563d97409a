"""SURM's adapter block: one structured square map and a bias in place of a bottleneck's two projections."""

import torch
from torch import nn

from ...ops.structured import StructuredProblem
from ..adapted import NO_DELTA
from ..checks import check_adapter_dtype, check_flag, check_linear, check_size, features
from .linear import MapLinear, StructuredDelta
from .maps import MapSpec


class LiveReLU(nn.Module):
    """max(x, 0) whose derivative at 0 is 1. torch's is 0, with which a map that starts at zero never trains."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x < 0, 0, x)  # whose derivative no version of torch changes, unlike clamp's at its bound


MODULES = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": LiveReLU,
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "elu": nn.ELU,
    "mish": nn.Mish,
    "tanh": nn.Tanh,
    "identity": nn.Identity,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
}


def make_activation(activation: str | nn.Module, allow_nonidentity: bool = False, features: int = 1) -> nn.Module:
    """The activation of that name, or the module given, which must keep the shape [..., features].

    Raises TypeError or ValueError naming the argument; ValueError for one that is not zero at zero, with which an
    adapter does not start as the identity, unless allow_nonidentity, and for one that is flat there, such as
    torch.nn.ReLU(), with which the map would never leave its start.
    """
    check_flag("allow_nonidentity", allow_nonidentity)
    names = ", ".join(map(repr, MODULES))
    if isinstance(activation, str):
        if activation not in MODULES:
            raise ValueError(f"activation must be one of {names} or a torch.nn.Module, got {activation!r}")
        module = MODULES[activation]()
    elif isinstance(activation, nn.Module):
        module = activation
    else:
        raise TypeError(f"activation must be one of {names} or a torch.nn.Module, got {activation!r}")
    like = next(module.parameters(), torch.empty(0, device="cpu"))
    with torch.inference_mode(False), torch.enable_grad():
        zero = torch.zeros(1, features, dtype=like.dtype, device=like.device, requires_grad=True)
        value = module(zero.clone())  # a module that works in place must not write to the leaf
        if value.shape != zero.shape:
            raise ValueError(f"activation must keep the shape of its input, got {activation!r}")
        (slope,) = torch.autograd.grad(value.sum(), zero)
    if value.is_meta:
        return module
    if not allow_nonidentity and value.any():
        raise ValueError(
            f"activation must be 0 at 0, so that the adapter starts as the identity, got {activation!r}; "
            "allow_nonidentity=True accepts it"
        )
    if not slope.any():
        raise ValueError(
            f"activation must not have derivative 0 at 0, which would keep the map at its start, got {activation!r}; "
            "that of the name 'relu' is 1"
        )
    return module


class SurmAdapter(StructuredDelta):
    """h' = h + act(scale * M drop(h)) + beta on h [..., n], for a structured M [n, n] and a trained beta [n].

    Source: SURM (Sehanobish et al. 2024), adapters: on the output of a layer, before what is added to it; the bias
    comes after the activation. With beta = 0, M = 0 and act(0) = 0 it starts as the identity.

    structure, and r, q, product, rectangular, block_size: of M, see `MapSpec`. activation: "gelu", "relu", "silu",
    "tanh", "identity", ... or a torch.nn.Module; one that is not 0 at 0 needs allow_nonidentity=True. alpha: the scale;
    None means 1, for "kronecker" it is alpha / r. dropout: in [0, 1), on h, in training only. dtype, device: of the
    parameters. Raises TypeError or ValueError naming the argument, the value and what is allowed.
    """

    on_output = True
    spared_from_decay = True

    def __init__(
        self, n: int, structure: str = "circulant", *, activation: str | nn.Module = "gelu",
        allow_nonidentity: bool = False, alpha: float | None = None, dropout: float = 0.0, dtype=None, device=None,
        **options,
    ):  # fmt: skip
        check_size("n", n)
        spec = MapSpec(structure, "adapter", **options)
        activation = make_activation(activation, allow_nonidentity, n)
        super().__init__(spec.make(n, n, dtype=dtype, device=device), alpha, dropout)
        self.activation = activation
        self.beta = nn.Parameter(torch.zeros(n, dtype=dtype, device=device))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """h: [..., n] in the parameters' dtype, or half beside fp32 parameters. Returns the same shape and dtype."""
        return h + self.change(h)

    def apply_to(self, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        """On the output y; for None what would be added to an output x, alone."""
        return self.change(x) if y is None else self(y)

    @property
    def path(self) -> str:
        return f"{self.map.op_name}, activation and bias on its output"

    def problem(self, x: torch.Tensor) -> StructuredProblem:
        return super().problem(x[..., :1].expand(*x.shape[:-1], self.map.in_features))

    def change(self, h: torch.Tensor) -> torch.Tensor:
        """act(scale * M drop(h)) + beta, what is added to h, in h's dtype."""
        change = self.activation(super().forward(h))
        # As biases are everywhere: rounded to the activations' type rather than widening them to its own.
        return (change + self.beta.to(change.dtype)).to(h.dtype)

    def delta(self) -> torch.Tensor:
        """Raises ValueError: there is none."""
        raise ValueError(f"a SurmAdapter has no dense delta: {NO_DELTA}")

    def is_zero(self) -> bool:
        return super().is_zero() and (self.beta.is_meta or not self.beta.any())

    def randomize(self) -> None:
        super().randomize()
        nn.init.normal_(self.beta, std=self.beta.shape[0] ** -0.5)


class SurmAdapterLinear(MapLinear):
    """A linear map with W and bias frozen, and a `SurmAdapter` on its output. Made by `from_linear`.

    `merge` raises ValueError: the adapter is not linear in the layer's weight.
    """

    @classmethod
    def from_linear(cls, base: nn.Module, structure: str = "circulant", *, dtype=None, **options):
        """An adapted layer that shares, and freezes, the weight and bias Parameters of `base`.

        base: torch.nn.Linear or transformers' Conv1D, weight in fp32, fp16, bf16 or fp64. dtype: of the adapter, by
        default fp32. The rest: see `SurmAdapter`. Raises TypeError or ValueError naming the argument.
        """
        check_linear("base", base)
        _, n = features(base)
        dtype = check_adapter_dtype("dtype", dtype, base.weight.dtype)
        return cls(base, SurmAdapter(n, structure, dtype=dtype, device=base.weight.device, **options))
