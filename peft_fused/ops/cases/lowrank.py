"""Calls of the low-rank ops. B is never zero: with LoRA's own initialisation every wrong adapter passes."""

from collections.abc import Iterator
from functools import partial

import torch

from ..lowrank import (
    LowRankProblem,
    lowrank_adapter,
    lowrank_adapter_reference,
    lowrank_linear,
    lowrank_linear_reference,
    lowrank_problem,
)
from .case import Case, Normal, OpCases

GRADIENTS = ("x", "weight", "bias", "A", "B", "u", "v", "add")


def make_lowrank(
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
    normal = Normal.of(data_seed, device, dtype, adapter_dtype)
    x = normal.x(m, k, strided)
    stack = lambda size, *shape: shape if size is None else (size, *shape)  # noqa: E731
    tensors = {
        "x": x,
        "A": normal.adapter(*stack(experts[0], r, k), std=k**-0.5),
        "B": normal.adapter(*stack(experts[1], n, r), std=max(r, 1) ** -0.5),
        "u": normal.adapter(r, std=0.3, mean=1.0) if uv else None,
        "v": normal.adapter(n, std=0.3, mean=1.0) if uv else None,
    }
    if op == "lowrank_linear":
        tensors["weight"] = normal(n, k, std=k**-0.5) if base else x.new_zeros(n, k)
        tensors["bias"] = normal(n) if base and bias else None
    else:
        tensors["add"] = normal(m, n) if base else None
    if wrt is None:
        wrt = tuple(name for name in GRADIENTS if tensors.get(name) is not None and name != "weight")
    return Case.of(op, f"{m}x{k}x{n}, r={r}{', with base' if base else ''}", n, tensors, options, wrt)


def lowrank_cases(
    op: str, dtype: torch.dtype, adapter_dtype: torch.dtype, device: str = "cpu", base: bool = False
) -> Iterator[Case]:
    """The sizes and features every backend is held to: none a multiple of a block, ranks from 1, every control."""
    make = partial(make_lowrank, op, dtype=dtype, adapter_dtype=adapter_dtype, device=device, base=base)
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


def _cases(op: str, dtype: torch.dtype, adapter_dtype: torch.dtype, device: str) -> Iterator[Case]:
    """The common cases, small and of the delta alone; some large enough for each base product; all gradients."""
    yield from lowrank_cases(op, dtype, adapter_dtype, device)
    make = partial(make_lowrank, op, dtype=dtype, adapter_dtype=adapter_dtype, device=device)
    for base in (False, True):
        yield make(257, 160, 136, 8, base=base)
    every = tuple(name for name in GRADIENTS if name != "add") if op == "lowrank_linear" else None
    yield make(26, 22, 18, 4, uv=True, wrt=every)


def _control(op: str, dtype: torch.dtype, adapter_dtype: torch.dtype, device: str) -> Case:
    return make_lowrank(op, 67, 96, 80, 8, dtype=dtype, adapter_dtype=adapter_dtype, device=device, base=False)


def _layer(op: str, dtype: torch.dtype, adapter_dtype: torch.dtype, device: str) -> Case:
    return make_lowrank(op, 1, 768, 768, 8, dtype=dtype, adapter_dtype=adapter_dtype, device=device)


def _problem(case: Case) -> LowRankProblem:
    t, p = case.tensors, case.options.get("dropout_p", 0.0)
    uv = t["u"] is not None or t["v"] is not None
    return lowrank_problem(t["x"], t["A"], t["B"], has_weight="weight" in t, dropout=p > 0, uv=uv)


def _mutations(case: Case) -> dict[str, Case]:
    r = case.tensors["A"].shape[-2]
    droppable = r > 1 and case.options.get("rank") is None
    return {"one rank dropped": case.with_options(rank=r - 1)} if droppable else {}


CASES = (
    OpCases("lowrank_linear", lowrank_linear, lowrank_linear_reference, _cases, _control, _layer, _problem, _mutations),
    OpCases("lowrank", lowrank_adapter, lowrank_adapter_reference, _cases, _control, _layer, _problem, _mutations),
)
