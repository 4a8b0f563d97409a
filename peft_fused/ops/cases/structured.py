"""Calls of the structured ops, a kind of map each."""

from collections.abc import Iterator
from functools import partial

import torch

from .. import structured
from ..structured.engine import STRUCTURES
from .case import Case, Normal, OpCases


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
    factor: whether a circulant map has one. strided, wrt: as in `make_lowrank`.
    """
    normal = Normal.of(data_seed, device, dtype, adapter_dtype)
    k, n = structured_features(op, sizes)
    k, n = inputs or k, options.get("out_features", n)
    if options.get("transposed"):
        k, n = n, k
    shapes = parameter_shapes(op, sizes)
    # Outputs of unit variance: the standard deviations of the factors of one entry multiply to 1 / sqrt(inputs).
    terms = sizes[0] if op == "ldr" else 1
    std = {"toeplitz_product": k**-0.5, "kronecker": k**-0.25, "ldr": terms**-0.25 * k**-0.5}.get(op, k**-0.5)
    tensors = {"x": normal.x(m, k, strided)}
    tensors |= {name: normal.adapter(*shape, std=std) for name, shape in shapes.items()}
    if factor:
        tensors["factor"] = normal.adapter(*sizes, std=0.3, mean=1.0)
    if add:
        tensors["add"] = normal(m, n)
    wrt = tuple(tensors) if wrt is None else wrt
    features = "x".join(str(size) for size in sizes)
    more = "".join(f", {name}" for name, on in (("factor", factor), ("add", add), ("strided", strided)) if on)
    return Case.of(op, f"{m} rows, {features}{more}", n, tensors, options, wrt)


# One, even, odd, prime; two lengths of real layers; no power of two; enough for several blocks of a long transform.
SQUARE_SIZES = (1, 2, 3, 7, 97, 384, 768, 1000, 1536, 3072, 4096)


def structured_cases(
    op: str, dtype: torch.dtype, adapter_dtype: torch.dtype, device: str = "cpu", sizes: tuple[int, ...] = SQUARE_SIZES
) -> Iterator[Case]:
    """The sizes and features every backend is held to, on few rows: square maps of `sizes`, and every option once."""
    make = partial(make_structured, op, dtype=dtype, adapter_dtype=adapter_dtype, device=device)
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


def _control(op: str, dtype: torch.dtype, adapter_dtype: torch.dtype, device: str) -> Case:
    sizes = {"toeplitz": (80, 96), "kronecker": (8, 12, 10, 8), "ldr": (2, 96)}.get(op, (96,))
    return make_structured(op, 67, *sizes, dtype=dtype, adapter_dtype=adapter_dtype, device=device)


def _layer(op: str, dtype: torch.dtype, adapter_dtype: torch.dtype, device: str) -> Case:
    sizes = {"toeplitz": (768, 768), "kronecker": (24, 32, 32, 24), "ldr": (1, 768)}.get(op, (768,))
    return make_structured(op, 1, *sizes, dtype=dtype, adapter_dtype=adapter_dtype, device=device)


def _problem(case: Case) -> structured.StructuredProblem:
    t, dropout = case.tensors, case.options.get("dropout_p", 0.0) > 0
    first, second = (t.get(name) for name in STRUCTURES[case.op].names)
    second = second[1:] if case.op == "toeplitz" else second
    transposed = case.options.get("transposed", False)
    return structured.structured_problem(case.op, t["x"], first, second, case.outputs, dropout, transposed)


def _mutations(case: Case) -> dict[str, Case]:
    first, _ = STRUCTURES[case.op].names
    return {"one entry zeroed": case.replaced(first, lambda p: p.view(-1)[0].zero_())}


def _of(kind: str) -> OpCases:
    fn, reference = (getattr(structured, name) for name in (f"{kind}_matmul", f"{kind}_matmul_reference"))
    return OpCases(kind, fn, reference, structured_cases, _control, _layer, _problem, _mutations)


CASES = tuple(map(_of, STRUCTURES))
