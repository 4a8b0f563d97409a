"""Every op with calls that it is judged by: by `peft-fused check`, the tests, the fuzzer and the benchmark alike.

An op takes part in all of them by being listed here.
"""

import torch

from . import (
    bottleneck,
    lowrank,
    structured,
)
from .bottleneck import bottleneck_cases, make_bottleneck
from .case import Case, OpCases
from .lowrank import lowrank_cases, make_lowrank
from .structured import SQUARE_SIZES, make_structured, parameter_shapes, structured_cases, structured_features

__all__ = [
    "DTYPES",
    "OPS",
    "SQUARE_SIZES",
    "Case",
    "OpCases",
    "bottleneck_cases",
    "lowrank_cases",
    "make_bottleneck",
    "make_lowrank",
    "make_structured",
    "parameter_shapes",
    "structured_cases",
    "structured_features",
]

OPS = {
    op.name: op
    for cases in (
        lowrank.CASES,
        bottleneck.CASES,
        structured.CASES,
    )
    for op in cases
}
# Types of the input and of the parameters that every backend is held to.
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.float16, torch.float16),
)
