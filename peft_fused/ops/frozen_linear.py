"""A linear layer that nothing adapts or trains, by the library whose fp32 products are the faster ones on this CPU.

    y = x W^T + bias        dx = dy W

torch runs these products in MKL, whose fast kernels run on Intel's CPUs only; elsewhere oneDNN takes about half the
time. The ops of adapters choose for their base products by the same rule, `dispatch.uses_onednn`. This is no op in
graphs, and no kernel: where the rule, the layer or a call speaks against oneDNN, the layer is torch's.
"""

import torch
from torch.autograd import forward_ad

from . import dispatch
from .arguments import autocasts, is_recorded, is_subclass, is_watched, saved_tensors
from .common import onednn_product, rows, unflatten


def against_layer(weight, bias, number_of_rows: int) -> str | None:
    """What speaks against oneDNN for a layer of weight [N, K] and bias [N] or None on so many rows; None if nothing."""
    if is_subclass(weight) or not (bias is None or type(bias) in (torch.Tensor, torch.nn.Parameter)):
        return "its weight or bias is no plain tensor"
    if not dispatch.uses_onednn(weight.dtype, number_of_rows * weight.numel()):
        return "oneDNN is not the faster library for it"
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype):
        return f"its bias is {bias.dtype} {list(bias.shape)}"
    if any(t is not None and (t.device.type != "cpu" or t.layout != torch.strided) for t in (weight, bias)):
        return "it is not in the memory of a CPU as it is"
    if weight.dim() != 2 or not (weight.is_contiguous() or weight.t().is_contiguous()):
        return "its weight is no dense matrix"
    return None


def against_now(weight, bias) -> str | None:
    """What speaks against oneDNN for any call made now."""
    if dispatch.state.backend == "reference":
        return "the reference backend is forced"
    if is_watched() or forward_ad._current_level >= 0:
        return "a mode or a transform has to see torch's own operation"
    if autocasts("cpu"):
        return "autocast is on"
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return "it is trained"
    return None


def frozen_linear(x, weight, bias=None) -> torch.Tensor | None:
    """x W^T + bias, [..., N]; None where torch's own is to run. x: [..., K]; weight: [N, K]; bias: [N]; all in fp32."""
    # A graph that is recorded must not depend on the size of x.
    if is_recorded() or is_subclass(x) or x.is_nested or x.dtype != torch.float32 or x.dim() == 0:
        return None
    if against_layer(weight, bias, x.shape[:-1].numel()) or against_now(weight, bias):
        return None
    if x.shape[-1] != weight.shape[1] or x.layout != torch.strided or x.device.type != "cpu":
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        return _FrozenLinear.apply(x, weight, bias)
    return _product(x, weight, bias)


def _product(x, weight, bias=None):
    return unflatten(onednn_product(rows(x).contiguous(), weight, bias), x)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        (weight,) = saved_tensors(ctx, ("weight",))
        dx = dy @ weight if torch.is_grad_enabled() else _product(dy, weight.t())  # the first has a derivative
        return dx, None, None
