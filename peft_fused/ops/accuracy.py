"""When is a kernel right: its error against float64 is at most twice that of plain PyTorch in the same dtype.

The rule needs no tolerance per dtype or size. It is applied to the delta alone (`make_case(base=False)`): beside the
base product a scale that is 2 % off would pass. `mutations` are the controls that must fail.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .cases import Case

FACTOR = 2.0
DRAWS = 4


@dataclass(frozen=True)
class Verdict:
    """Error of one output or gradient: the larger of max and RMS error, each as a multiple of what is allowed."""

    name: str
    error: float
    allowed: float
    ratio: float

    @property
    def ok(self) -> bool:
        return self.ratio <= 1.0


def outputs(fn: Callable, case: Case, dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """y and the gradients of a case, as float64."""
    y = case.call(fn)
    found = {"y": y.detach()}
    if case.wrt:
        grads = torch.autograd.grad(y, [case.tensors[name] for name in case.wrt], dy.to(y.dtype), allow_unused=True)
        for name, grad in zip(case.wrt, grads, strict=True):
            found[name] = torch.zeros_like(case.tensors[name]) if grad is None else grad
    return {name: value.double() for name, value in found.items()}


def judge(got: list[dict], plain: list[dict], truth: list[dict], dtypes: dict[str, torch.dtype]) -> list[Verdict]:
    """One verdict per name over all draws. A result with a NaN, or of another shape, is infinitely wrong."""
    verdicts = []
    for name in truth[0]:
        if any(g[name].shape != t[name].shape for g, t in zip(got, truth, strict=True)):
            verdicts.append(Verdict(name, float("inf"), 0.0, float("inf")))
            continue
        true, found, simple = (torch.cat([draw[name].flatten() for draw in draws]) for draws in (truth, got, plain))
        if true.numel() == 0:
            verdicts.append(Verdict(name, 0.0, 0.0, 0.0))
            continue
        # Where plain PyTorch happens to be exact, one rounding of the result stays allowed.
        eps = torch.finfo(dtypes[name]).eps
        worst = Verdict(name, 0.0, 0.0, 0.0)
        for norm in (lambda t: t.abs().max().item(), lambda t: t.pow(2).mean().sqrt().item()):
            error, allowed = norm(found - true), FACTOR * norm(simple - true) + eps * norm(true)
            ratio = error / allowed if allowed else (0.0 if error == 0 else float("inf"))
            ratio = float("inf") if math.isnan(ratio) else ratio
            worst = max(worst, Verdict(name, error, allowed, ratio), key=lambda v: v.ratio)
        verdicts.append(worst)
    return verdicts


def compare(fn: Callable, reference: Callable, case: Case) -> list[Verdict]:
    """Verdicts for the output and every gradient of fn, against `reference` in float64 and in the case's own dtype.

    Several upstream gradients are drawn and judged together: for a vector of r numbers one draw is a coin toss.
    """
    x = case.input
    shape = (*x.shape[:-1], case.outputs)
    generator = torch.Generator().manual_seed(99)
    dys = [torch.randn(shape, generator=generator).to(x) for _ in range(DRAWS)]
    exact = case.to(torch.float64)
    truth = [outputs(reference, exact, dy.double()) for dy in dys]
    plain = [outputs(reference, case, dy) for dy in dys]
    got = [outputs(fn, case, dy) for dy in dys]
    return judge(got, plain, truth, {n: x.dtype if n == "y" else case.tensors[n].dtype for n in truth[0]})


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


# What a defect shows in, where that is not the output.
SHOWS_IN = {"activation derivative missing": "h"}


def _bottleneck_mutations(case: Case) -> dict[str, Case]:
    tensors, options = case.tensors, case.options

    def replaced(name: str, change: Callable) -> Case:
        wrong = tensors[name].detach().clone()
        change(wrong)
        return replace(case, tensors=tensors | {name: wrong.requires_grad_(tensors[name].requires_grad)})

    found = {"one unit dropped": replaced("up", lambda up: up[..., 0].zero_())}
    for name in ("down_bias", "up_bias"):
        if tensors[name] is not None:
            found[f"{name} dropped"] = replaced(name, torch.Tensor.zero_)
    if options.get("activation", "gelu") != "identity" and "h" in case.wrt:
        found["activation derivative missing"] = _WithoutDerivative(**vars(case))
    expert = options.get("expert")
    pair = tuple(expert) if isinstance(expert, tuple | list) else (expert, expert)
    for position, name in enumerate(("down", "up")):
        if tensors[name].dim() == 3 and len(tensors[name]) > 1:
            wrong = (0 if pair[position] is None else pair[position]) + 1
            chosen = (*pair[:position], wrong % len(tensors[name]), *pair[position + 1 :])
            found[f"wrong expert of {name}"] = replace(case, options={**options, "expert": chosen})
    return found


def mutations(case: Case) -> dict[str, Case]:
    """The same call with a typical defect: judged as the sound one, each must fail, in the output or `SHOWS_IN`."""
    found = {"scale x 1.02": replace(case, options={**case.options, "scale": case.options["scale"] * 1.02})}
    if case.op == "bottleneck":
        found |= _bottleneck_mutations(case)
    elif case.op not in ("lowrank", "lowrank_linear"):
        name = list(case.tensors)[1]  # the first of the op's parameters, behind its input
        wrong = case.tensors[name].detach().clone()
        wrong.view(-1)[0] = 0
        found["one entry zeroed"] = replace(case, tensors=case.tensors | {name: wrong.requires_grad_()})
    elif (r := case.tensors["A"].shape[-2]) > 1 and case.options.get("rank") is None:
        found["one rank dropped"] = replace(case, options={**case.options, "rank": r - 1})
    return found


def compare_mutated(fn: Callable, reference: Callable, case: Case) -> dict[str, list[Verdict]]:
    """Verdicts of fn on each mutation, judged as if it had been called soundly."""
    return {name: compare(lambda bad=bad, **_: bad.call(fn), reference, case) for name, bad in mutations(case).items()}
