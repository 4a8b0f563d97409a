"""No speed is reported for a wrong result: every fused variant is compared with its reference before it is timed."""

import torch

from .baselines import Case, Layer

# Relative RMS error. Both sides round, so these are a few roundings of the type; a scale off by 2 % fails in each.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
# The share of the delta that dropout leaves on average is 1; with thousands of masked inputs it is met within this.
DROPOUT_TOLERANCE = 0.1
DROPOUT_LEAST = 1 << 16


class WrongResult(RuntimeError):
    """A variant does not compute what its reference does."""


def relative_rms(value: torch.Tensor, truth: torch.Tensor) -> float:
    value, truth = value.double(), truth.double()
    return ((value - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def _set_training(case: Case, training: bool) -> None:
    for variant in case.variants.values():
        if isinstance(variant.call, torch.nn.Module):
            variant.call.train(training)


def _errors(ours: Layer, reference: Layer, base: torch.Tensor) -> dict[str, float]:
    """Relative RMS error of the delta alone and of every gradient."""
    delta, truth = (variant.forward().detach().double() - base.double() for variant in (ours, reference))
    errors = {"delta": relative_rms(delta, truth)}
    for name, grad, expected in zip(("dx", "dA", "dB"), ours.gradients(), reference.gradients(), strict=True):
        errors[name] = relative_rms(grad, expected)
    return errors


def _check_dropout(name: str, dropped: torch.Tensor, full: torch.Tensor) -> None:
    """Masks differ between implementations, so dropout is judged by what it leaves of the delta: the projection on
    the undropped delta is 1 on average, and something was dropped."""
    dropped, full = dropped.double(), full.double()
    share = ((dropped * full).sum() / (full * full).sum()).item()
    if relative_rms(dropped, full) < 1e-2:
        raise WrongResult(f"{name}: dropout is configured but nothing is dropped")
    if full.numel() >= DROPOUT_LEAST and abs(share - 1) > DROPOUT_TOLERANCE:
        raise WrongResult(f"{name}: with dropout {share:.3f} of the delta is left on average, expected 1")


def verify(case: Case) -> dict[str, dict[str, float]]:
    """Errors per fused variant with dropout off; WrongResult when one is beyond the tolerance."""
    base = case.variants["base"].forward().detach()
    _set_training(case, False)
    try:
        found = {name: _errors(case.variants[name], case.references[name], base) for name in case.references}
    finally:
        _set_training(case, True)
    limit = TOLERANCE[case.shape.dtype]
    for name, errors in found.items():
        wrong = {what: error for what, error in errors.items() if not error <= limit}
        if wrong:
            text = ", ".join(f"{what} {error:.2e}" for what, error in wrong.items())
            raise WrongResult(f"{name} at {case.shape.name} {case.shape.dtype_name}: {text} beyond {limit:.0e}")
    if case.shape.dropout:
        for name, reference in case.references.items():
            _set_training(case, False)
            undropped = reference.forward().detach()
            _set_training(case, True)
            _check_dropout(name, dropped=case.variants[name].forward().detach() - base, full=undropped - base)
    return found
