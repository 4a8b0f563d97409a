"""A linear layer that nothing adapts or trains, by the library whose fp32 products are the faster ones on this CPU.

    y = x W^T + bias        dx = dy W

torch runs these products in MKL, whose fast kernels run on Intel's CPUs only; elsewhere oneDNN takes about half the
time. The ops of adapters choose for their base products by the same rule, `dispatch.uses_onednn`. This is no op in
graphs, and no kernel: where the rule or a call speaks against oneDNN, the layer is torch's.
"""

import torch

from . import dispatch
from .arguments import autocasts, check_derivative, is_recorded, is_watched, saved_tensors
from .common import base_product, rows, unflatten


def why_not(x, weight, bias=None) -> str | None:
    """Why the layer of weight [N, K] and bias [N] or None is left to torch on x [..., K]; None if it is not.

    That may be said of calls which torch refuses as well.
    """
    if is_recorded():  # first, so that a graph does not depend on the size of x
        return "a graph is recorded"
    if x.dtype != torch.float32:
        return f"x is {x.dtype}"
    if not dispatch.uses_onednn(x.dtype, x.numel() * weight.shape[0]):
        return "oneDNN is not the faster library for it"
    if dispatch.state.backend == "reference":
        return "the reference backend is forced"
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if is_watched(*tensors):
        return "a mode or a tensor has a dispatch of its own"
    if any(t.device.type != "cpu" for t in tensors):
        return "it is not on a CPU"
    if any(t.dtype != torch.float32 for t in tensors) or autocasts("cpu"):
        return "it is not in fp32"
    if any(t.requires_grad for t in tensors[1:]) and torch.is_grad_enabled():
        return "it is trained"
    n, k = weight.shape if weight.dim() == 2 else (None, None)
    if x.dim() == 0 or x.shape[-1] != k or (bias is not None and bias.shape != (n,)):
        return f"the shapes {', '.join(str(list(t.shape)) for t in tensors)} are no linear layer's"
    if not (weight.is_contiguous() or weight.t().is_contiguous()):
        return "the weight is not dense"
    return None


def frozen_linear(x, weight, bias=None) -> torch.Tensor | None:
    """x W^T + bias, [..., N]; None where torch's own is to run. x: [..., K]; weight: [N, K]; bias: [N]; all in fp32.

    Its gradient is x's alone, and has no derivative: backward raises RuntimeError where a graph of it is asked for.
    """
    if why_not(x, weight, bias) is not None:
        return None
    if torch.is_grad_enabled() and x.requires_grad:
        return _FrozenLinear.apply(x, weight, bias)
    return _product(x, weight, bias)


def _product(x, weight, bias=None):
    return unflatten(base_product(rows(x).contiguous(), weight, bias), x)


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        check_derivative("frozen_linear")
        (weight,) = saved_tensors(ctx, ("weight",))
        return _product(dy, weight.t()), None, None
