"""Has torch.utils.flop_counter.FlopCounterMode count the registered ops, by the formula that each op states.

It stands apart because that module imports Triton where it is installed. The PEFT integration imports it; without PEFT,
`import peft_fused.ops.flops` before the mode is entered.
"""

import torch
from torch.utils.flop_counter import register_flop_formula

from .operation import OPERATIONS, Operation


def _register(op: Operation) -> None:
    """A formula gets the columns of the schema, with the shapes of tensors in their places."""

    @register_flop_formula(getattr(torch.ops.peft_fused, f"{op.name}_fwd"))
    def forward(*columns, out_shape=None, **kwargs) -> int:
        return op.flops(dict(zip(op.names, columns, strict=False)), op.call_of(columns[:-1]), None)

    @register_flop_formula(getattr(torch.ops.peft_fused, f"{op.name}_bwd"))
    def backward(dy, *columns, out_shape=None, **kwargs) -> int:
        call, _, shapes, _, needs, _ = op.split_backward(columns)
        return op.flops(shapes, call, needs)


for _op in OPERATIONS:
    _register(_op)
