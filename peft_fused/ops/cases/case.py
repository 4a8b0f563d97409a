"""A call of an op that says what of it counts, and what an op has to say of its calls."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from ...triton_kernels.problem import Problem


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
    wrt: tuple[str, ...] = ()
    # Of a call with a defect: the result that cannot hide it.
    shows_in: str = "y"

    @classmethod
    def of(cls, op: str, sizes: str, outputs: int, tensors: dict, options: dict, wrt: tuple[str, ...]) -> "Case":
        """A case named after its sizes and options, of leaves; its scale is 2 unless the options say otherwise."""
        tensors = {name: t if t is None else t.detach() for name, t in tensors.items()}
        for name in wrt:
            tensors[name].requires_grad_()
        name = ", ".join([sizes, *(f"{key}={value}" for key, value in options.items() if key != "scale")])
        return cls(op, name, outputs, tensors, {"scale": 2.0, **options}, wrt)

    @property
    def input(self) -> torch.Tensor:
        return next(iter(self.tensors.values()))

    def call(self, fn: Callable) -> torch.Tensor:
        return fn(**self.tensors, **self.options)

    def replaced(self, name: str, change: Callable) -> "Case":
        """The same call with one tensor changed, in place, by change(tensor)."""
        wrong = self.tensors[name].detach().clone()
        change(wrong)
        return replace(self, tensors=self.tensors | {name: wrong.requires_grad_(self.tensors[name].requires_grad)})

    def with_options(self, **options) -> "Case":
        return replace(self, options=self.options | options)

    def to(self, dtype: torch.dtype) -> "Case":
        """The same values in another dtype, each tensor its own leaf."""
        tensors = {n: None if t is None else t.detach().to(dtype) for n, t in self.tensors.items()}
        for name in self.wrt:
            tensors[name].requires_grad_()
        return replace(self, tensors=tensors)


@dataclass(frozen=True)
class OpCases:
    """An op and its calls: how `peft-fused check`, the tests of all ops and the fuzzer know it.

    cases(op, dtype, adapter_dtype, device) yields calls of every size and option. With the same arguments, control is
    one on which every mutation shows, and layer one with the features of a model's layer, on one row. problem(case):
    what `dispatch` decides on. mutations(case): the same call with defects, each of which must fail.
    """

    name: str
    fn: Callable
    reference: Callable
    cases: Callable[..., Iterator[Case]]
    control: Callable[..., Case]
    layer: Callable[..., Case]
    problem: Callable[[Case], Problem]
    mutations: Callable[[Case], dict[str, Case]]


@dataclass(frozen=True)
class Normal:
    """Normal numbers of one generator in the types of a case, on its device."""

    generator: torch.Generator
    device: str
    dtype: torch.dtype
    adapter_dtype: torch.dtype

    @classmethod
    def of(cls, seed: int, device: str, dtype: torch.dtype, adapter_dtype: torch.dtype | None) -> "Normal":
        return cls(torch.Generator().manual_seed(seed), device, dtype, adapter_dtype or dtype)

    def __call__(self, *shape: int, std: float = 1.0) -> torch.Tensor:
        return self._wide(shape, std).to(device=self.device, dtype=self.dtype)

    def adapter(self, *shape: int, std: float, mean: float = 0.0) -> torch.Tensor:
        """For a parameter of the adapter."""
        return (mean + self._wide(shape, std)).to(device=self.device, dtype=self.adapter_dtype)

    def _wide(self, shape: tuple[int, ...], std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64) * std

    def x(self, m: int, k: int, strided: bool) -> torch.Tensor:
        return self(2 * m, k)[::2] if strided else self(m, k)
