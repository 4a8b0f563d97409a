"""Formulas by which torch.utils.flop_counter.FlopCounterMode counts the registered ops. Importing this registers them.

It stands apart because that module imports Triton where it is installed. The PEFT integration imports it; without PEFT,
`import peft_fused.ops.flops` before the mode is entered.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from .bottleneck import BOTTLENECK
from .lowrank import LOWRANK
from .structured.engine import STRUCTURED


def _forward(op, columns):
    """(shape of every input by name, None for an absent one, the other columns) of <op>_fwd, to whose formula tensors
    come as their shapes."""
    return dict(zip(op.names, columns, strict=False)), columns[len(op.names) :]


def _backward(op, columns):
    """(m, n, shape of every input by name, names of the needed gradients) of <op>_bwd."""
    dy, columns = columns[0], columns[1:]
    sizes, dims = columns[len(op.names) + 1 : len(op.names) + 3]
    needs = {name for name, need in zip(op.own, columns[-1], strict=True) if need}
    return math.prod(dy[:-1]), dy[-1], op.shapes(sizes, dims), needs


@register_flop_formula(torch.ops.peft_fused.lowrank_fwd)
def _lowrank_forward(*columns, out_shape=None, **kwargs) -> int:
    """Two per multiply-add of its products, as the mode counts those of aten."""
    t, _ = _forward(LOWRANK, columns)
    m, n, k, r = math.prod(t["x"][:-1]), t["B"][-2], t["x"][-1], t["A"][-2]
    return 2 * m * ((n * k if t["weight"] is not None else 0) + r * (n + k))


@register_flop_formula(torch.ops.peft_fused.lowrank_bwd)
def _lowrank_backward(*columns, out_shape=None, **kwargs) -> int:
    m, n, t, needs = _backward(LOWRANK, columns)
    k, r = t["x"][-1], t["B"][-1]
    base = ("x" in needs and t["weight"] is not None) + ("weight" in needs)
    to_ranks = bool(needs & {"x", "A", "u"}) + bool(needs & {"B", "v"})
    return 2 * m * (base * n * k + r * (n * to_ranks + k * len(needs & {"x", "A"})))


def _structured(m: int, kind: str, p, q, passes: int) -> int:
    """Of `passes` visits of a structured map. A convolution of L numbers is two transforms of 2.5 L log2 L and 3 L."""
    if kind == "kronecker":
        (a1, a2), (b1, b2) = p, q
        return 2 * m * passes * min(b2 * a1 * (a2 + b1), b1 * a2 * (b2 + a1))
    convolutions = math.prod(p[:2]) if len(p) == 3 else {"toeplitz_product": 2, "ldr": 2 * p[0]}.get(kind, 1)
    length = p[0] + q[0] if kind == "toeplitz" else p[-1] if kind in ("circulant", "ldr") else 2 * p[-1] - 1
    return int(m * passes * convolutions * length * (5 * math.log2(max(2, length)) + 3))


@register_flop_formula(torch.ops.peft_fused.structured_fwd)
def _structured_forward(*columns, out_shape=None, **kwargs) -> int:
    """By transforms or small products, whatever its plan makes of it."""
    t, (kind, *_) = _forward(STRUCTURED, columns)
    return _structured(math.prod(t["x"][:-1]), kind, t["p"], t["q"], 1)


@register_flop_formula(torch.ops.peft_fused.structured_bwd)
def _structured_backward(*columns, out_shape=None, **kwargs) -> int:
    """A pass for dx and one for the vectors."""
    m, _, t, needs = _backward(STRUCTURED, columns)
    kind = columns[1 + len(STRUCTURED.names) + 4]
    return _structured(m, kind, t["p"], t["q"], ("x" in needs) + bool(needs & {"p", "q"}))


@register_flop_formula(torch.ops.peft_fused.bottleneck_fwd)
def _bottleneck_forward(*columns, out_shape=None, **kwargs) -> int:
    """Its two products. Additions and the activation count nothing, as in the mode itself."""
    t, _ = _forward(BOTTLENECK, columns)
    return 2 * math.prod(t["h"][:-1]) * t["down"][-2] * (t["h"][-1] + t["up"][-2])


@register_flop_formula(torch.ops.peft_fused.bottleneck_bwd)
def _bottleneck_backward(*columns, out_shape=None, **kwargs) -> int:
    m, n, t, needs = _backward(BOTTLENECK, columns)
    passes = bool(needs & {"h", "down", "down_bias"}) + ("up" in needs)
    return 2 * m * t["down"][-2] * (n * passes + t["h"][-1] * len(needs & {"h", "down"}))
