"""When is a kernel right: its error against float64 is at most twice that of plain PyTorch in the same dtype.

The rule needs no tolerance per dtype or size. It is applied to the delta alone (`make_lowrank(base=False)`): beside the
base product a scale that is 2 % off would pass. `mutations` are the controls that must fail.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cases import OPS, Case

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


def outputs(fn: Callable, case: Case, *dys: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """y and the gradients of a case for each upstream gradient, as float64."""
    y, leaves = case.call(fn), [case.tensors[name] for name in case.wrt]
    found = []
    for dy in dys:
        of_dy = {"y": y.detach().double()}
        if leaves:
            grads = torch.autograd.grad(y, leaves, dy.to(y.dtype), retain_graph=dy is not dys[-1], allow_unused=True)
            for name, leaf, grad in zip(case.wrt, leaves, grads, strict=True):
                of_dy[name] = (torch.zeros_like(leaf) if grad is None else grad).double()
        found.append(of_dy)
    return found


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
    truth = outputs(reference, exact, *(dy.double() for dy in dys))
    plain, got = outputs(reference, case, *dys), outputs(fn, case, *dys)
    return judge(got, plain, truth, {n: x.dtype if n == "y" else case.tensors[n].dtype for n in truth[0]})


def mutations(case: Case) -> dict[str, Case]:
    """The same call with a typical defect: judged as the sound one, each must fail, in what it `shows_in`."""
    return {"scale x 1.02": case.with_options(scale=case.options["scale"] * 1.02)} | OPS[case.op].mutations(case)


def compare_mutated(fn: Callable, reference: Callable, case: Case) -> dict[str, Verdict]:
    """Of fn on each mutation, judged as if it had been called soundly: the verdict on the one result that decides.

    That is the output wherever it can be: a control that only some gradient notices would be a weak one.
    """
    return {
        name: next(v for v in compare(lambda bad=bad, **_: bad.call(fn), reference, case) if v.name == bad.shows_in)
        for name, bad in mutations(case).items()
    }


def wrong(case: Case) -> list[str]:
    """Results of a case's op that are beyond the rule, each with the share of what is allowed: none of a right op."""
    op = OPS[case.op]
    return [f"{case.name}, {v.name}: {v.ratio:.2f}" for v in compare(op.fn, op.reference, case) if not v.ok]


def unseen(case: Case) -> list[str]:
    """Defects of a case's op that pass for right: none, or the case shows nothing."""
    op = OPS[case.op]
    return [defect for defect, verdict in compare_mutated(op.fn, op.reference, case).items() if verdict.ok]
