"""Formulas by which torch.utils.flop_counter.FlopCounterMode counts the registered ops. Importing this registers them.

It stands apart because that module imports Triton where it is installed. The PEFT integration imports it; without PEFT,
`import peft_fused.ops.flops` before the mode is entered.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from . import structured as structured  # which registers the ops that are counted below
from .lowrank import NAMES


@register_flop_formula(torch.ops.peft_fused.lowrank_fwd)
def _forward_flops(x, weight, add, bias, A, B, *rest, out_shape=None, **kwargs) -> int:
    """Of lowrank_fwd, from shapes: two per multiply-add of its products, as the mode counts those of aten."""
    m, n, k, r = math.prod(x[:-1]), B[-2], x[-1], A[-2]
    return 2 * m * ((n * k if weight is not None else 0) + r * (n + k))


@register_flop_formula(torch.ops.peft_fused.lowrank_bwd)
def _backward_flops(dy, x, weight, A, B, u, v, S, *rest, out_shape=None, **kwargs) -> int:
    """Of lowrank_bwd, in the same way."""
    need = dict(zip(NAMES, rest[-1], strict=True))
    m, n = math.prod(dy[:-1]), dy[-1]
    k = A[-1] if A is not None else x[-1] if x is not None else 0
    r = B[-1] if B is not None else 0
    base = (need["x"] and weight is not None) + need["weight"]
    to_ranks = (need["x"] or need["A"] or need["u"]) + (need["B"] or need["v"])
    return 2 * m * (base * n * k + r * (n * to_ranks + k * (need["x"] + need["A"])))


def _structured(m: int, kind: str, p, q, passes: int) -> int:
    """Of `passes` visits of a structured map. A convolution of L numbers is two transforms of 2.5 L log2 L and 3 L."""
    if kind == "kronecker":
        (a1, a2), (b1, b2) = p, q
        return 2 * m * passes * min(b2 * a1 * (a2 + b1), b1 * a2 * (b2 + a1))
    convolutions = math.prod(p[:2]) if len(p) == 3 else {"toeplitz_product": 2, "ldr": 2 * p[0]}.get(kind, 1)
    length = p[0] + q[0] if kind == "toeplitz" else p[-1] if kind in ("circulant", "ldr") else 2 * p[-1] - 1
    return int(m * passes * convolutions * length * (5 * math.log2(max(2, length)) + 3))


@register_flop_formula(torch.ops.peft_fused.structured_fwd)
def _structured_forward_flops(x, p, q, add, kind, n, *rest, out_shape=None, **kwargs) -> int:
    """Of structured_fwd by transforms or small products, whatever its plan makes of it."""
    return _structured(math.prod(x[:-1]), kind, p, q, 1)


@register_flop_formula(torch.ops.peft_fused.structured_bwd)
def _structured_backward_flops(dy, x, p, q, kind, k, *rest, out_shape=None, **kwargs) -> int:
    """Of structured_bwd, in the same way: a pass for dx and one for the vectors."""
    need_x, *need_vectors = rest[-1]
    return _structured(math.prod(dy[:-1]), kind, p, q, need_x + any(need_vectors))


@register_flop_formula(torch.ops.peft_fused.bottleneck_fwd)
def _bottleneck_forward_flops(h, down, down_bias, up, *rest, out_shape=None, **kwargs) -> int:
    """Of bottleneck_fwd: its two products. Additions and the activation count nothing, as in the mode itself."""
    return 2 * math.prod(h[:-1]) * down[-2] * (h[-1] + up[-2])


@register_flop_formula(torch.ops.peft_fused.bottleneck_bwd)
def _bottleneck_backward_flops(dy, h, down, up, z, experts_d, experts_u, r, *rest, out_shape=None, **kwargs) -> int:
    """Of bottleneck_bwd, in the same way."""
    need_h, need_down, need_down_bias, need_up, _ = rest[-1]
    n, k = dy[-1], h[-1] if h is not None else down[-1] if down is not None else 0
    passes = (need_h or need_down or need_down_bias) + need_up
    return 2 * math.prod(dy[:-1]) * r * (n * passes + k * (need_h + need_down))
