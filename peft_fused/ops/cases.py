"""Inputs of the ops, for tests, `peft-fused check` and the benchmark alike.

A case holds everything one call takes. B is never zero: with LoRA's own initialisation every wrong adapter passes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from .structured.engine import STRUCTURES

GRADIENTS = ("x", "weight", "bias", "A", "B", "u", "v", "add")


@dataclass(frozen=True)
class Case:
    """One call `op(**tensors, **options)`, the features of its output, and the tensors whose gradients count.

    The first tensor is the op's input, whose rows and type its output has.
    """

    op: str
    name: str
    outputs: int
    tensors: dict[str, torch.Tensor | None]
    options: dict[str, object]
    wrt: tuple[str, ...] = field(default=())

    @property
    def input(self) -> torch.Tensor:
        return next(iter(self.tensors.values()))

    def call(self, fn: Callable) -> torch.Tensor:
        return fn(**self.tensors, **self.options)

    def to(self, dtype: torch.dtype) -> "Case":
        """The same values in another dtype, each tensor its own leaf."""
        tensors = {n: None if t is None else t.detach().to(dtype) for n, t in self.tensors.items()}
        for name in self.wrt:
            tensors[name].requires_grad_()
        return replace(self, tensors=tensors)


@dataclass(frozen=True)
class _Normal:
    """Normal numbers of one generator in the types and on the device of a case."""

    generator: torch.Generator
    device: str
    dtype: torch.dtype

    def __call__(self, *shape: int, std: float = 1.0, kind: torch.dtype | None = None) -> torch.Tensor:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float64) * std
        return values.to(device=self.device, dtype=kind or self.dtype)

    def x(self, m: int, k: int, strided: bool) -> torch.Tensor:
        return self(2 * m, k)[::2] if strided else self(m, k)


def make_case(
    op: str,
    m: int,
    k: int,
    n: int,
    r: int,
    *,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    device: str = "cpu",
    data_seed: int = 0,
    experts: tuple[int | None, int | None] = (None, None),
    uv: bool = False,
    bias: bool = True,
    base: bool = True,
    strided: bool = False,
    wrt: tuple[str, ...] | None = None,
    **options,
) -> Case:
    """A case of `lowrank_linear` or `lowrank_adapter`.

    experts: stack sizes of A and B, None for a plain factor. base=False leaves the delta alone: a zero weight, no bias,
    nothing to add. strided: every second row of a larger x. wrt: default all tensors there are but the base weight.
    """
    normal = _Normal(torch.Generator().manual_seed(data_seed), device, dtype)
    adapter_dtype = adapter_dtype or dtype
    x = normal.x(m, k, strided)
    stack = lambda size, *shape: shape if size is None else (size, *shape)  # noqa: E731
    tensors = {
        "x": x,
        "A": normal(*stack(experts[0], r, k), std=k**-0.5, kind=adapter_dtype),
        "B": normal(*stack(experts[1], n, r), std=max(r, 1) ** -0.5, kind=adapter_dtype),
        "u": 1 + normal(r, std=0.3, kind=adapter_dtype) if uv else None,
        "v": 1 + normal(n, std=0.3, kind=adapter_dtype) if uv else None,
    }
    if op == "lowrank_linear":
        tensors["weight"] = normal(n, k, std=k**-0.5) if base else x.new_zeros(n, k)
        tensors["bias"] = normal(n) if base and bias else None
    else:
        tensors["add"] = normal(m, n) if base else None
    tensors = {name: t if t is None else t.detach() for name, t in tensors.items()}
    options = {"scale": 2.0, **options}
    if wrt is None:
        wrt = tuple(name for name in GRADIENTS if tensors.get(name) is not None and name != "weight")
    for name in wrt:
        tensors[name].requires_grad_()
    return Case(op, _label(f"{m}x{k}x{n}, r={r}{', with base' if base else ''}", options), n, tensors, options, wrt)


def _label(sizes: str, options: dict) -> str:
    return ", ".join([sizes, *(f"{key}={value}" for key, value in options.items() if key != "scale")])


def lowrank_cases(
    op: str, dtype: torch.dtype, adapter_dtype: torch.dtype, device: str = "cpu", base: bool = False
) -> Iterator[Case]:
    """The sizes and features every backend is held to: none a multiple of a block, ranks from 1, every control."""
    make = lambda *sizes, **more: make_case(  # noqa: E731
        op, *sizes, dtype=dtype, adapter_dtype=adapter_dtype, device=device, base=base, **more
    )
    index = lambda value: torch.tensor(value, device=device)  # noqa: E731
    yield make(1, 40, 24, 4)
    yield make(67, 96, 80, 8)
    yield make(131, 200, 72, 1)
    yield make(64, 128, 136, 16, strided=True)
    yield make(53, 88, 104, 33)
    yield make(97, 72, 56, 8, rank=3)
    yield make(97, 72, 56, 8, rank=index(5), scale=torch.tensor(1.5, device=device))
    yield make(97, 72, 56, 8, rank=index(5), frozen=True)
    yield make(61, 80, 64, 6, uv=True)
    yield make(61, 80, 64, 6, experts=(3, None), expert=(2, None))
    yield make(61, 80, 64, 6, experts=(3, 4), expert=(index(1), index(3)), uv=True)
    yield make(83, 120, 96, 8, dropout_p=0.3, seed=1234567)
    yield make(83, 120, 96, 8, dropout_p=0.3, seed=-7, rank=4, uv=True)


def parameter_shapes(op: str, sizes: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of a structured op of these sizes (see `structured.StructuredProblem`)."""
    names = STRUCTURES[op].names
    if op == "toeplitz":
        return {"col": sizes[:1], "row": sizes[1:]}
    if op == "kronecker":
        return {"A": sizes[:2], "B": sizes[2:]}
    return {name: sizes for name in names if name not in (None, "factor")}


def structured_features(op: str, sizes: tuple[int, ...]) -> tuple[int, int]:
    """(inputs, outputs) of a structured map of these sizes."""
    if op == "toeplitz":
        return sizes[1], sizes[0]
    if op == "kronecker":
        return sizes[1] * sizes[3], sizes[0] * sizes[2]
    if op == "circulant" and len(sizes) == 3:
        return sizes[1] * sizes[2], sizes[0] * sizes[2]
    return sizes[-1], sizes[-1]


def make_structured(
    op: str,
    m: int,
    *sizes: int,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    device: str = "cpu",
    data_seed: int = 0,
    inputs: int | None = None,
    factor: bool = False,
    add: bool = False,
    strided: bool = False,
    wrt: tuple[str, ...] | None = None,
    **options,
) -> Case:
    """A case of a structured op, of the delta alone unless there is something to `add`.

    sizes: as in `structured.StructuredProblem`. inputs: of a circulant map that pads, beside the option out_features.
    factor: whether a circulant map has one. strided, wrt: as in `make_case`.
    """
    normal = _Normal(torch.Generator().manual_seed(data_seed), device, dtype)
    k, n = structured_features(op, sizes)
    k, n = inputs or k, options.get("out_features", n)
    if options.get("transposed"):
        k, n = n, k
    shapes = parameter_shapes(op, sizes)
    # Outputs of unit variance: the standard deviations of the factors of one entry multiply to 1 / sqrt(inputs).
    terms = sizes[0] if op == "ldr" else 1
    std = {"toeplitz_product": k**-0.5, "kronecker": k**-0.25, "ldr": terms**-0.25 * k**-0.5}.get(op, k**-0.5)
    tensors = {"x": normal.x(m, k, strided)}
    tensors |= {name: normal(*shape, std=std, kind=adapter_dtype) for name, shape in shapes.items()}
    if factor:
        tensors["factor"] = 1 + normal(*sizes, std=0.3, kind=adapter_dtype)
    if add:
        tensors["add"] = normal(m, n)
    tensors = {name: t.detach() for name, t in tensors.items()}
    wrt = tuple(tensors) if wrt is None else wrt
    for name in wrt:
        tensors[name].requires_grad_()
    options = {"scale": 2.0, **options}
    features = "x".join(str(size) for size in sizes)
    more = "".join(f", {name}" for name, on in (("factor", factor), ("add", add), ("strided", strided)) if on)
    return Case(op, _label(f"{m} rows, {features}{more}", options), n, tensors, options, wrt)


# One, even, odd, prime; two lengths of real layers; no power of two; enough for several blocks of a long transform.
SQUARE_SIZES = (1, 2, 3, 7, 97, 384, 768, 1000, 1536, 3072, 4096)


def structured_cases(
    op: str, dtype: torch.dtype, adapter_dtype: torch.dtype, device: str = "cpu", sizes: tuple[int, ...] = SQUARE_SIZES
) -> Iterator[Case]:
    """The sizes and features every backend is held to, on few rows: square maps of `sizes`, and every option once."""
    make = lambda m, *shape, **more: make_structured(  # noqa: E731
        op, m, *shape, dtype=dtype, adapter_dtype=adapter_dtype, device=device, **more
    )
    shapes = {
        "toeplitz": [(n, n) for n in sizes] + [(5, 13), (96, 40), (40, 96)],
        "kronecker": [(1, 1, 1, 1), (3, 5, 7, 4), (24, 32, 32, 24), (16, 16, 48, 48)],
        "ldr": [(1, n) for n in sizes if n <= 1536] + [(3, 97), (3, 128)],
    }.get(op, [(n,) for n in sizes])
    for shape in shapes:
        yield make(5 if max(shape) < 3072 else 3, *shape)
    some = {"toeplitz": (72, 60), "kronecker": (6, 5, 9, 8), "ldr": (2, 72)}.get(op, (72,))
    yield make(1, *some)
    yield make(131, *some, strided=True)
    yield make(31, *some, transposed=True)
    yield make(31, *some, add=True, scale=torch.tensor(1.5, device=device))
    yield make(31, *some, dropout_p=0.3, seed=1234567)
    yield make(31, *some, dropout_p=0.3, seed=-7, transposed=True)
    # Rows enough for transforms where a few rows of the same size go to a dense product, and the other way round.
    if op != "kronecker":
        yield make(131, *{"toeplitz": (400, 384), "ldr": (2, 384)}.get(op, (384,)))
    if op == "circulant":
        yield make(31, 72, factor=True)
        yield make(31, 3, 2, 20)
        yield make(31, 2, 3, 15, factor=True)
        yield make(31, 50, inputs=50, out_features=33)
        yield make(31, 50, inputs=33, out_features=50)


def make_bottleneck(
    m: int,
    k: int,
    n: int,
    r: int,
    *,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    device: str = "cpu",
    data_seed: int = 0,
    experts: tuple[int | None, int | None] = (None, None),
    bias: bool = True,
    residual: str = "zeros",
    strided: bool = False,
    wrt: tuple[str, ...] | None = None,
    **options,
) -> Case:
    """A case of `bottleneck_adapter`.

    experts: stack sizes of down and up, None for a plain weight. residual: "zeros" leaves the delta alone, "h" is h
    itself, "other" a tensor of its own. strided: every second row of a larger h. wrt: default all tensors there are but
    a residual of zeros.
    """
    normal = _Normal(torch.Generator().manual_seed(data_seed), device, dtype)
    adapter_dtype = adapter_dtype or dtype
    stack = lambda size, *shape: shape if size is None else (size, *shape)  # noqa: E731
    parameter = lambda std, size, *shape: normal(*stack(size, *shape), std=std, kind=adapter_dtype)  # noqa: E731
    down, up = experts
    tensors = {"h": normal.x(m, k, strided)}
    tensors |= {"down": parameter(k**-0.5, down, r, k), "down_bias": parameter(0.5, down, r) if bias else None}
    tensors |= {"up": parameter(r**-0.5, up, n, r), "up_bias": parameter(0.5, up, n) if bias else None}
    tensors["residual"] = {"h": None, "zeros": tensors["h"].new_zeros(m, n), "other": normal(m, n)}[residual]
    tensors = {name: t if t is None else t.detach() for name, t in tensors.items()}
    options = {"scale": 2.0, **options}
    if wrt is None:
        left_out = ("residual",) if residual == "zeros" else ()
        wrt = tuple(name for name, t in tensors.items() if t is not None and name not in left_out)
    for name in wrt:
        tensors[name].requires_grad_()
    more = "".join(
        f", {text}"
        for text, on in (
            ("no bias", not bias), ("strided", strided), (f"residual {residual}", residual != "zeros"),
            (f"stacks {down} and {up}", experts != (None, None)),
        )
        if on
    )  # fmt: skip
    return Case("bottleneck", _label(f"{m}x{k}x{n}, r={r}{more}", options), n, tensors, options, wrt)


def bottleneck_cases(op: str, dtype: torch.dtype, adapter_dtype: torch.dtype, device: str = "cpu") -> Iterator[Case]:
    """The sizes and features every backend is held to: every activation, kind of index and residual, no multiples."""
    make = lambda *sizes, **more: make_bottleneck(  # noqa: E731
        *sizes, dtype=dtype, adapter_dtype=adapter_dtype, device=device, **more
    )
    index = lambda value: torch.tensor(value, device=device)  # noqa: E731
    yield make(1, 40, 24, 4)
    yield make(97, 96, 80, 8, activation="gelu_tanh")
    yield make(97, 200, 72, 1, activation="relu", bias=False)
    yield make(64, 72, 72, 16, activation="silu", residual="h", strided=True)
    yield make(53, 88, 104, 33, activation="tanh", residual="other")
    yield make(7, 80, 64, 6, activation="swish", experts=(3, None), expert=2)
    yield make(97, 72, 56, 5, activation="identity", experts=(3, 4), expert=(index(1), index(3)))
    yield make(96, 64, 64, 12, experts=(4, None), expert=index([2, 0]), residual="h")
    yield make(105, 72, 56, 6, experts=(3, 2), expert=index([0, 1, 1, 0, 1]), scale=torch.tensor(1.5, device=device))
    yield make(96, 56, 72, 6, experts=(3, 5), expert=(index([2, 0, 2]), index([1, 4, 4, 0, 1, 4])), bias=False)
