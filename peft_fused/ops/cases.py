"""Inputs of the ops, for tests, `peft-fused check` and the benchmark alike.

A case holds everything one call takes. B is never zero: with LoRA's own initialisation every wrong adapter passes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

GRADIENTS = ("x", "weight", "bias", "A", "B", "u", "v", "add")


@dataclass(frozen=True)
class Case:
    """One call `op(**tensors, **options)` and the names of the tensors whose gradients count."""

    op: str
    name: str
    tensors: dict[str, torch.Tensor | None]
    options: dict[str, object]
    wrt: tuple[str, ...] = field(default=())

    def call(self, fn: Callable) -> torch.Tensor:
        return fn(**self.tensors, **self.options)

    def to(self, dtype: torch.dtype) -> "Case":
        """The same values in another dtype, each tensor its own leaf."""
        tensors = {n: None if t is None else t.detach().to(dtype) for n, t in self.tensors.items()}
        for name in self.wrt:
            tensors[name].requires_grad_()
        return replace(self, tensors=tensors)


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
    """A case of `lowrank_linear` or `lowrank`.

    experts: stack sizes of A and B, None for a plain factor. base=False leaves the delta alone: a zero weight, no bias,
    nothing to add. strided: every second row of a larger x. wrt: default all tensors there are but the base weight.
    """
    generator = torch.Generator().manual_seed(data_seed)
    adapter_dtype = adapter_dtype or dtype

    def normal(*shape, std=1.0, kind=dtype):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(device=device, dtype=kind)

    x = normal(2 * m, k)[::2] if strided else normal(m, k)
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
    label = ", ".join(
        [f"{m}x{k}x{n}", f"r={r}"] + [f"{key}={value}" for key, value in options.items() if key != "scale"]
    )
    return Case(op, label, tensors, options, wrt)


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
