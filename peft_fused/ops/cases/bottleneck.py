"""Calls of the bottleneck op."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from ..bottleneck import BottleneckProblem, bottleneck_adapter, bottleneck_adapter_reference, bottleneck_problem
from .case import Case, Normal, OpCases


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
    normal = Normal.of(data_seed, device, dtype, adapter_dtype)
    stack = lambda size, *shape: shape if size is None else (size, *shape)  # noqa: E731
    parameter = lambda std, size, *shape: normal.adapter(*stack(size, *shape), std=std)  # noqa: E731
    down, up = experts
    tensors = {"h": normal.x(m, k, strided)}
    tensors |= {"down": parameter(k**-0.5, down, r, k), "down_bias": parameter(0.5, down, r) if bias else None}
    tensors |= {"up": parameter(r**-0.5, up, n, r), "up_bias": parameter(0.5, up, n) if bias else None}
    tensors["residual"] = {"h": None, "zeros": tensors["h"].new_zeros(m, n), "other": normal(m, n)}[residual]
    if wrt is None:
        left_out = ("residual",) if residual == "zeros" else ()
        wrt = tuple(name for name, t in tensors.items() if t is not None and name not in left_out)
    more = "".join(
        f", {text}"
        for text, on in (
            ("no bias", not bias), ("strided", strided), (f"residual {residual}", residual != "zeros"),
            (f"stacks {down} and {up}", experts != (None, None)),
        )
        if on
    )  # fmt: skip
    return Case.of("bottleneck", f"{m}x{k}x{n}, r={r}{more}", n, tensors, options, wrt)


def bottleneck_cases(op: str, dtype: torch.dtype, adapter_dtype: torch.dtype, device: str = "cpu") -> Iterator[Case]:
    """The sizes and features every backend is held to: every activation, kind of index and residual, no multiples."""
    make = partial(make_bottleneck, dtype=dtype, adapter_dtype=adapter_dtype, device=device)
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


def _control(op: str, dtype: torch.dtype, adapter_dtype: torch.dtype, device: str) -> Case:
    expert = torch.tensor([1, 0], device=device)
    return make_bottleneck(
        64, 96, 80, 8, dtype=dtype, adapter_dtype=adapter_dtype, device=device, experts=(2, 2), expert=expert
    )


def _layer(op: str, dtype: torch.dtype, adapter_dtype: torch.dtype, device: str) -> Case:
    return make_bottleneck(1, 768, 768, 16, dtype=dtype, adapter_dtype=adapter_dtype, device=device, residual="h")


def _problem(case: Case) -> BottleneckProblem:
    t, options = case.tensors, case.options
    return bottleneck_problem(t["h"], t["down"], t["up"], options.get("activation", "gelu"), options.get("expert"))


@dataclass(frozen=True)
class _WithoutDerivative(Case):
    """A bottleneck whose output is right and whose gradient takes the activation for the identity."""

    def call(self, fn: Callable) -> torch.Tensor:
        inner, outer = dict(self.tensors), dict(self.tensors)
        for name, tensor in self.tensors.items():
            if tensor is not None:
                (outer if name in ("h", "down", "down_bias") else inner)[name] = tensor.detach()
        linear = fn(**inner, **{**self.options, "activation": "identity"})
        return fn(**outer, **self.options) + (linear - linear.detach())


def _mutations(case: Case) -> dict[str, Case]:
    tensors, options = case.tensors, case.options
    found = {"one unit dropped": case.replaced("up", lambda up: up[..., 0].zero_())}
    for name in ("down_bias", "up_bias"):
        if tensors[name] is not None:
            found[f"{name} dropped"] = case.replaced(name, torch.Tensor.zero_)
    if options.get("activation", "gelu") != "identity" and "h" in case.wrt:
        found["activation derivative missing"] = _WithoutDerivative(**{**vars(case), "shows_in": "h"})
    expert = options.get("expert")
    pair = tuple(expert) if isinstance(expert, tuple | list) else (expert, expert)
    for position, name in enumerate(("down", "up")):
        if tensors[name].dim() == 3 and len(tensors[name]) > 1:
            wrong = (0 if pair[position] is None else pair[position]) + 1
            chosen = (*pair[:position], wrong % len(tensors[name]), *pair[position + 1 :])
            found[f"wrong expert of {name}"] = case.with_options(expert=chosen)
    return found


CASES = (
    OpCases(
        "bottleneck",
        bottleneck_adapter,
        bottleneck_adapter_reference,
        bottleneck_cases,
        _control,
        _layer,
        _problem,
        _mutations,
    ),
)
