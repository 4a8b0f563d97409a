"""No speed is reported for a wrong result: every variant of ours is compared with its reference before it is timed."""

import torch

# Relative RMS error. Both sides round, so these are a few roundings of the type; a scale off by 2 % fails in each.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}


class WrongResult(RuntimeError):
    """A variant does not compute what its reference does."""


def relative_rms(value: torch.Tensor, truth: torch.Tensor) -> float:
    value, truth = value.double(), truth.double()
    return ((value - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def refuse_wrong(errors: dict[str, float], shape, who: str) -> dict[str, float]:
    """The errors by what they are of; WrongResult when one is beyond the tolerance of the shape's type, or NaN."""
    limit = TOLERANCE[shape.dtype]
    if wrong := {what: error for what, error in errors.items() if not error <= limit}:
        text = ", ".join(f"{what} {error:.2e}" for what, error in wrong.items())
        raise WrongResult(f"{who} at {shape.name} {shape.dtype_name}: {text} beyond {limit:.0e}")
    return errors
