"""Structured matrices in place of low rank: circulant, skew-circulant, Toeplitz, Kronecker, low displacement rank.

Every op computes add + scale * M drop(x) for a structured M, or with transposed=True M^T, on rows x [..., K].
"""

import torch

from .circulant import (
    circulant_matmul,
    circulant_matmul_reference,
    skew_circulant_matmul,
    skew_circulant_matmul_reference,
)
from .engine import structured_problem
from .kronecker import kronecker_matmul, kronecker_matmul_reference
from .ldr import ldr_matmul, ldr_matmul_reference
from .plan import StructuredPlan, StructuredProblem, plan_structured
from .toeplitz import (
    toeplitz_matmul,
    toeplitz_matmul_reference,
    toeplitz_product_matmul,
    toeplitz_product_matmul_reference,
    toeplitz_tail,
)

__all__ = [
    "StructuredPlan",
    "StructuredProblem",
    "circulant_matmul",
    "circulant_matmul_reference",
    "dense",
    "kronecker_matmul",
    "kronecker_matmul_reference",
    "ldr_matmul",
    "ldr_matmul_reference",
    "plan_structured",
    "skew_circulant_matmul",
    "skew_circulant_matmul_reference",
    "structured_problem",
    "toeplitz_matmul",
    "toeplitz_matmul_reference",
    "toeplitz_product_matmul",
    "toeplitz_product_matmul_reference",
    "toeplitz_tail",
]


def dense(op, in_features: int, *parameters: torch.Tensor, **options) -> torch.Tensor:
    """The matrix [N, in_features] of a structured op, by applying it to the identity, in the parameters' dtype.

    op: one of this module's, for example `dense(toeplitz_matmul, 5, col, row)`; options go to it. TypeError where op is
    none, or a parameter no tensor; what op raises.
    """
    if not callable(op):
        raise TypeError(f"op must be an op of peft_fused.ops.structured, such as circulant_matmul, got {op!r}")
    if not parameters or not all(isinstance(p, torch.Tensor) for p in parameters):
        kinds = ", ".join(type(p).__name__ for p in parameters)
        raise TypeError(f"parameters must be the op's, one tensor or more, got {kinds or 'none'}")
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    identity = torch.eye(in_features, dtype=dtype, device=parameters[0].device)
    with torch.autocast(identity.device.type, enabled=False):
        return op(identity, *(p.to(dtype) for p in parameters), **options).mT
