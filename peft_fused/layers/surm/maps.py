"""Structured matrices as modules: they own the parameters of a map, start them, and know its dense matrix.

Sources: SURM (Sehanobish et al. 2024), sections 3 and 4, and the initialisations of its code. Every map starts at zero
with a gradient that is not: where it is a product, the factor on the output's side starts at zero and the other one
random.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from ...ops.structured import (
    StructuredProblem,
    circulant_matmul,
    dense,
    kronecker_matmul,
    ldr_matmul,
    structured_problem,
    toeplitz_product_matmul,
    toeplitz_tail,
)
from ..checks import check_choice, check_flag, check_size

# "lora": M beside a weight, as in LoRA. "adapter": M inside of a non-linear block on a layer's output. They differ in
# how the authors start them.
KINDS = ("lora", "adapter")
RECTANGULAR = ("pad", "block")
# Standard deviation of vectors that do not start at zero.
SPREAD = 0.02


class StructuredMap(nn.Module):
    """add + scale * M drop(x) for a structured matrix M [N, K] = [out_features, in_features]. Base class.

    Subclasses name the structure and the op, list in `options` the keyword arguments of their own, which
    `check_options` checks as far as no size is needed, and define `op` and `operands`.

    kind: "lora" or "adapter", see `reset_parameters`. dtype, device: of the parameters, torch's defaults if None.
    Raises TypeError or ValueError naming the argument, the value and what is allowed.
    """

    structure: str
    op_name: str
    options: tuple[str, ...] = ()
    # A few numbers stand for a whole matrix, and where one factor starts at zero, decay of the other shrinks the
    # gradient of the first.
    spared_from_decay = True

    def __init__(self, in_features: int, out_features: int, kind: str):
        check_size("in_features", in_features)
        check_size("out_features", out_features)
        check_choice("kind", kind, KINDS)
        super().__init__()
        self.in_features, self.out_features, self.kind = in_features, out_features, kind

    def register(self, shapes: dict[str, tuple], zeros: tuple[str, ...], dtype, device) -> None:
        """Makes the parameters of these names and starts them, those named in zeros at zero."""
        self.zeros = zeros
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device=device)))
        self.reset_parameters()

    @staticmethod
    def check_options() -> None:
        """TypeError or ValueError for options that are wrong whatever the sizes."""

    def reset_parameters(self, zero: bool = True) -> None:
        """Starts the parameters as the authors do, so that M is zero. zero=False: random throughout, for tests."""
        for name, parameter in self.named_parameters():
            if name not in self.zeros:
                self.spread(parameter)
            elif zero:
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=self.in_features**-0.5)

    def spread(self, parameter: nn.Parameter) -> None:
        """Starts a parameter that is not zero."""
        nn.init.normal_(parameter, std=SPREAD)

    def is_zero(self) -> bool:
        """Whether the parameters that make M start at zero still are zero, or hold nothing yet (on meta)."""
        starts = [getattr(self, name) for name in self.zeros]
        return all(parameter.is_meta or not parameter.any() for parameter in starts)

    def operands(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The parameters as the op takes them."""
        raise NotImplementedError

    def op(self, x: torch.Tensor, *operands, **options) -> torch.Tensor:
        """add + scale * M drop(x) for M of these operands. options: add, scale, dropout_p, seed."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, add: torch.Tensor | None = None, *, scale=1.0, dropout_p: float = 0.0):
        """x: [..., K] -> [..., N] in x's dtype; x and add in the parameters' dtype, or half beside fp32 parameters.

        add: [..., N], not written to. scale: number or 0-d tensor. dropout_p: on x, whenever it is not 0.
        """
        return self.op(x, *self.operands(), add=add, scale=scale, dropout_p=dropout_p)

    def delta(self) -> torch.Tensor:
        """M as a dense matrix [N, K], in fp32 (fp64 for fp64 parameters)."""
        return dense(self.op, self.in_features, *(t for t in self.operands() if t is not None))

    def problem(self, x: torch.Tensor, *, scale=1.0, dropout: bool = False) -> StructuredProblem:
        """What the op is given with x [..., K]; see `peft_fused.explain`."""
        return structured_problem(self.op_name, x, *self.operands(), self.out_features, dropout, scale=scale)

    def scale(self, alpha: float | None) -> float:
        """The scale that alpha stands for: alpha itself, 1 for None."""
        return 1.0 if alpha is None else float(alpha)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def check_square(self) -> None:
        if self.in_features != self.out_features:
            raise ValueError(
                f"structure {self.structure!r} must be on a square layer, got in_features = {self.in_features} and "
                f"out_features = {self.out_features}; 'circulant', 'toeplitz' (ToeplitzLinear's structure='general') "
                "and 'kronecker' may be rectangular"
            )


class CirculantMap(StructuredMap):
    """M = C(a . b), or with product=False M = C(c): n parameters per vector.

    rectangular: "pad" makes one vector of n = max(K, N) entries, x padded with zeros or the result cropped; "block"
    makes M of [N / block_size, K / block_size] circulant blocks. block_size: must divide K and N, None means their
    greatest common divisor. dtype, device: of the parameters.

    a ~ N(0, 1), N(0, 0.02^2) for kind "adapter", and b = 0; a single vector starts at zero.
    """

    structure = "circulant"
    op_name = "circulant"
    options = ("product", "rectangular", "block_size")

    def __init__(
        self, in_features: int, out_features: int, *, kind="lora", product: bool = True, rectangular: str = "pad",
        block_size: int | None = None, dtype=None, device=None,
    ):  # fmt: skip
        self.check_options(product, rectangular, block_size)
        super().__init__(in_features, out_features, kind)
        shape = (max(in_features, out_features),)
        if rectangular == "block":
            shape = self._blocks(in_features, out_features, block_size)
        self.product, self.has_blocks = product, len(shape) == 3
        names = ("a", "b") if product else ("c",)
        self.register(dict.fromkeys(names, shape), names[-1:], dtype, device)

    @staticmethod
    def check_options(product=True, rectangular="pad", block_size=None) -> None:
        check_flag("product", product)
        check_choice("rectangular", rectangular, RECTANGULAR)
        if block_size is not None:
            check_size("block_size", block_size)
            if rectangular != "block":
                raise ValueError(f"block_size must be None unless rectangular is 'block', got {block_size}")

    @staticmethod
    def _blocks(k, n, size) -> tuple[int, ...]:
        size = math.gcd(k, n) if size is None else size
        if k % size or n % size:
            raise ValueError(f"block_size must divide in_features = {k} and out_features = {n}, got {size}")
        # A single block is one vector, for which the op has more than one algorithm.
        return (n // size, k // size, size) if max(k, n) > size else (size,)

    def spread(self, parameter):
        nn.init.normal_(parameter, std=1.0 if self.kind == "lora" else SPREAD)

    def operands(self):
        return (self.a, self.b) if self.product else (self.c, None)

    def op(self, x, c, factor=None, **options):
        return circulant_matmul(
            x, c, factor=factor, out_features=None if self.has_blocks else self.out_features, **options
        )


class ToeplitzMap(StructuredMap):
    """M = T(col, tail), any N x K Toeplitz matrix by its N + K - 1 entries: first column and rest of the first row.

    All start at zero; their gradients are not.
    """

    structure = "toeplitz"
    op_name = "toeplitz"

    def __init__(self, in_features: int, out_features: int, *, kind="lora", dtype=None, device=None):
        super().__init__(in_features, out_features, kind)
        self.register({"col": (out_features,), "tail": (in_features - 1,)}, ("col", "tail"), dtype, device)

    def operands(self):
        return self.col, self.tail

    def op(self, x, col, tail, **options):
        return toeplitz_tail(x, col, tail, **options)


class SymmetricToeplitzMap(StructuredMap):
    """M = T(t) T(s), two symmetric Toeplitz matrices; itself neither. Square only. s ~ N(0, 0.02^2), t = 0.

    Not named as the vectors of CirculantMap, so that a checkpoint of one is not taken for one of the other.
    """

    structure = "symmetric_toeplitz"
    op_name = "toeplitz_product"

    def __init__(self, in_features: int, out_features: int, *, kind="lora", dtype=None, device=None):
        super().__init__(in_features, out_features, kind)
        self.check_square()
        self.register({"s": (in_features,), "t": (in_features,)}, ("t",), dtype, device)

    def operands(self):
        return self.s, self.t

    def op(self, x, s, t, **options):
        return toeplitz_product_matmul(x, s, t, **options)


class KroneckerMap(StructuredMap):
    """M = B (x) A with A [r, K / r] and B [N / r, r]: N + K parameters and rank(A) rank(B), whatever r.

    r: must divide K and N; None means the divisor of both with the highest rank that can be attained, the smallest of
    them on ties (24 for 768, rank 576). Sizes without a common divisor leave r = 1, a matrix of rank 1.

    A from kaiming_uniform(a=sqrt(5)), N(0, 0.02^2) for kind "adapter", and B = 0.
    """

    structure = "kronecker"
    op_name = "kronecker"
    options = ("r",)

    def __init__(
        self, in_features: int, out_features: int, *, kind="lora", r: int | None = None, dtype=None, device=None
    ):
        self.check_options(r)
        super().__init__(in_features, out_features, kind)
        self.r = best_kronecker_r(in_features, out_features) if r is None else r
        if in_features % self.r or out_features % self.r:
            raise ValueError(f"r must divide in_features = {in_features} and out_features = {out_features}, got {r}")
        self.register(
            {"A": (self.r, in_features // self.r), "B": (out_features // self.r, self.r)}, ("B",), dtype, device
        )

    @staticmethod
    def check_options(r=None) -> None:
        if r is not None:
            check_size("r", r)

    def spread(self, parameter):
        if self.kind == "lora":
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        else:
            super().spread(parameter)

    def operands(self):
        return self.A, self.B

    def op(self, x, A, B, **options):
        return kronecker_matmul(x, A, B, **options)

    def scale(self, alpha):
        """alpha / r, as the authors have it; 1 for None."""
        return 1.0 if alpha is None else alpha / self.r

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.r}"


def best_kronecker_r(k: int, n: int) -> int:
    """The divisor r of k and n with the highest attainable rank, min(r, k / r) min(n / r, r); the smallest on ties."""
    common = math.gcd(k, n)
    divisors = [r for r in range(1, common + 1) if common % r == 0]
    return max(divisors, key=lambda r: (min(r, k // r) * min(n // r, r), -r))


class LdrMap(StructuredMap):
    """M = sum_i C(g_i) S(h_i), i = 1..q: circulant times skew-circulant, of displacement rank q. Square only.

    G, H: [q, n]. H ~ N(0, 0.02^2), G = 0.
    """

    structure = "ldr"
    op_name = "ldr"
    options = ("q",)

    def __init__(self, in_features: int, out_features: int, *, kind="lora", q: int = 1, dtype=None, device=None):
        self.check_options(q)
        super().__init__(in_features, out_features, kind)
        self.check_square()
        self.register({"G": (q, in_features), "H": (q, in_features)}, ("G",), dtype, device)

    @staticmethod
    def check_options(q=1) -> None:
        check_size("q", q)

    def operands(self):
        return self.G, self.H

    def op(self, x, G, H, **options):
        return ldr_matmul(x, G, H, **options)


STRUCTURES = {cls.structure: cls for cls in (CirculantMap, ToeplitzMap, SymmetricToeplitzMap, KroneckerMap, LdrMap)}


@dataclass(frozen=True)
class MapSpec:
    """Which structured map layers get, whatever their sizes.

    structure: "circulant", "toeplitz", "symmetric_toeplitz", "kronecker" or "ldr". kind: "lora" or "adapter". r:
    "kronecker" only; q: "ldr" only; product, rectangular, block_size: "circulant" only; see the maps. Raises TypeError
    or ValueError naming the field, also for one that the structure does not have.
    """

    structure: str = "circulant"
    kind: str = "lora"
    r: int | None = None
    q: int = 1
    product: bool = True
    rectangular: str = "pad"
    block_size: int | None = None

    def __post_init__(self):
        check_choice("structure", self.structure, tuple(STRUCTURES))
        check_choice("kind", self.kind, KINDS)
        for cls in STRUCTURES.values():
            options = {name: getattr(self, name) for name in cls.options}
            cls.check_options(**options)
            for name, value in options.items():
                if cls.structure != self.structure and value != getattr(MapSpec, name):
                    raise ValueError(f"{name} is an option of {cls.structure!r}, got {value!r} with {self.structure!r}")

    def make(self, in_features: int, out_features: int, *, dtype=None, device=None) -> StructuredMap:
        """A map of these sizes. ValueError if the structure has none."""
        cls = STRUCTURES[self.structure]
        options = {name: getattr(self, name) for name in cls.options}
        return cls(in_features, out_features, kind=self.kind, **options, dtype=dtype, device=device)
