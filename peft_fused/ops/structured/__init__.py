"""Structured matrices in place of low rank: circulant, skew-circulant, Toeplitz, Kronecker, low displacement rank.

Every op computes add + scale * M drop(x) for a structured M, or with transposed=True M^T, on rows x [..., K].
"""

import torch

from .circulant import circulant, circulant_reference, skew_circulant, skew_circulant_reference
from .engine import problem_of
from .kronecker import kronecker, kronecker_reference
from .ldr import ldr, ldr_reference
from .plan import StructuredPlan, StructuredProblem, plan
from .toeplitz import toeplitz, toeplitz_product, toeplitz_product_reference, toeplitz_reference, toeplitz_tail

__all__ = [
    "StructuredPlan",
    "StructuredProblem",
    "circulant",
    "circulant_reference",
    "dense",
    "kronecker",
    "kronecker_reference",
    "ldr",
    "ldr_reference",
    "plan",
    "problem_of",
    "skew_circulant",
    "skew_circulant_reference",
    "toeplitz",
    "toeplitz_product",
    "toeplitz_product_reference",
    "toeplitz_reference",
    "toeplitz_tail",
]


def dense(op, in_features: int, *parameters: torch.Tensor, **options) -> torch.Tensor:
    """The matrix [N, in_features] of a structured op, by applying it to the identity, in the parameters' dtype.

    op: one of this module's, for example `dense(toeplitz, 5, col, row)`; options go to it.
    """
    dtype = torch.promote_types(parameters[0].dtype, torch.float32)
    identity = torch.eye(in_features, dtype=dtype, device=parameters[0].device)
    with torch.autocast(identity.device.type, enabled=False):
        return op(identity, *(p.to(dtype) for p in parameters), **options).mT
