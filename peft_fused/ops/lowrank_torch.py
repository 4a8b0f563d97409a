"""The low-rank op by PyTorch alone: the fast composition behind the `torch` backend, forward and backward.

What it avoids, against writing the formula down: the product with B, its scaled copy and its sum with the base output
are one in-place GEMM; x is neither copied to the adapter's type nor kept after dropout, both happen on blocks of rows;
truncated ranks are slices, so a rank of 1 costs a product of rank 1. The base product comes last and accumulates onto
the adapter, except by oneDNN, which accumulates no faster than a separate pass: there the adapter follows, in place.
`csrc/autograd/lowrank.cpp` is the same composition in C++.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from .common import base_product, blocks, cast_and_drop, product, rows, scaled, unflatten
from .dropout import drop


def _expert(factor, index):
    if factor is None or factor.dim() == 2:
        return factor
    if isinstance(index, int):
        return factor[index]
    return factor.index_select(0, index.reshape(1).long()).squeeze(0)


class _Adapter:
    """The factors one call works with: experts chosen, rank applied, u, v and scale folded into B.

    So they cost passes over matrices of B's size, none over the rows of x or dY. Backward may come without A, where no
    gradient reads it.
    """

    def __init__(self, call):
        self.c = c = call.on_host()
        A, B, u, v = c.A, c.B, c.u, c.v
        self.r = B.shape[-1]
        self.A, self.B, self.u, self.v = _expert(A, c.expert_a), _expert(B, c.expert_b), u, v
        self.kept = None
        if isinstance(c.rank, int):
            self.width = c.rank
            self.A, self.B = None if A is None else self.A[: c.rank], self.B[:, : c.rank]
            self.u = None if u is None else u[: c.rank]
        else:
            self.width = self.r
            self.kept = (torch.arange(self.r, device=B.device) < c.rank).to(B.dtype)

    def mask(self, S):
        return S if self.kept is None else S * self.kept

    def weighted(self):
        """v . B."""
        return self.B if self.v is None else self.B * self.v.unsqueeze(1)

    def outer(self):
        """scale * v . B . u, the operand beside S forward and beside dY backward."""
        outer = scaled(self.weighted(), self.c.scale)
        return outer if self.u is None else outer * self.u


def _widened(call):
    """The call with fp32 factors where u, v and scale, folded into B, may leave fp16's range; None where they stay."""
    if call.B is None or call.B.dtype != torch.float16 or (call.u is None and call.v is None):
        return None
    wide = {name: getattr(call, name) for name in ("A", "B", "u", "v", "S")}
    return replace(call, **{name: None if t is None else t.float() for name, t in wide.items()})


def forward(call):
    """(y [..., N] in x's type, S [M, r] in A's type)."""
    if (wide := _widened(call)) is not None:
        y, S = forward(wide)
        return y, S.to(call.B.dtype)
    ad = _Adapter(call)
    x, weight, bias, dtype = call.x, call.weight, call.bias, call.B.dtype
    x2 = rows(x)
    M, N = x2.shape[0], call.B.shape[-2]
    S = call.S
    if S is None:
        S = x.new_zeros(M, ad.r, dtype=dtype) if ad.width < ad.r else x.new_empty(M, ad.r, dtype=dtype)
        kept = S[:, : ad.width]
        if ad.c.threshold > 0 or dtype != x.dtype:
            for i, j in blocks(M, x2.shape[1], x.device):
                kept[i:j] = ad.mask(product(cast_and_drop(x2[i:j], dtype, ad.c.seed, ad.c.threshold, i), ad.A.t()))
        else:
            kept.copy_(ad.mask(product(x2, ad.A.t())))

    P, Q = S[:, : ad.width], ad.outer().t()
    y = base_product(x2, weight, bias) if weight is not None else None
    onto = y
    if y is None and weight is None:
        y = x.new_empty(M, N)
        onto = None if call.add is None else rows(call.add)
    elif y is None:
        y = x.new_empty(M, N)
    if dtype == x.dtype:
        if onto is not None:
            torch.addmm(onto, P, Q, out=y)
            if weight is None and bias is not None:
                y += bias
        elif bias is not None:
            torch.addmm(bias, P, Q, out=y)
        else:
            torch.mm(P, Q, out=y)
    else:
        for i, j in blocks(M, N, x.device):
            delta = product(P[i:j], Q)
            if onto is None or weight is None:
                delta = delta if bias is None else delta + bias
            y[i:j] = delta if onto is None else delta + onto[i:j]
    if weight is not None and onto is None:
        y.addmm_(x2, weight.t())
    return unflatten(y, x), S


def backward(dy, call, S, like: dict, needs: set[str]) -> dict[str, torch.Tensor]:
    """The gradients of `needs` by name. Of the call, and S, what none of them reads may be None; like: its shapes.

    Each gradient has its parameter's dtype. A gradient of a truncated factor is zero in the rows that were dropped.
    """
    if (wide := _widened(call)) is not None:
        grads = backward(dy, wide, None if S is None else S.float(), like, needs)
        return {name: grad if name in ("x", "weight", "bias") else grad.half() for name, grad in grads.items()}
    x, weight, A, B, u, v = call.x, call.weight, call.A, call.B, call.u, call.v
    dy2 = rows(dy)
    M, N = dy2.shape
    grads = {}
    if "bias" in needs:
        grads["bias"] = dy2.sum(0)
    if "weight" in needs:
        grads["weight"] = dy2.t() @ rows(x)
    if B is None:
        return grads
    if M == 0:  # zeros times a factor that is not finite would be NaN
        others = needs - grads.keys()
        return grads | {name: dy.new_zeros(like[name][0], dtype=like[name][1]) for name in others}
    ad = _Adapter(call)
    c, b = ad.c, ad.width
    mixed = B.dtype != dy.dtype
    if S is not None:
        S = S[:, :b]
    of_x = "x" in needs and A is not None  # whether the adapter has a part in dx
    need_dS = of_x or not needs.isdisjoint(("A", "S"))

    dS = dy2.new_empty(M, b, dtype=B.dtype) if need_dS else None
    raw = None if needs.isdisjoint(("B", "u", "v")) else dy2.new_zeros(b, N, dtype=B.dtype)
    outer = ad.mask(ad.outer()) if need_dS else None
    for i, j in blocks(M, N, dy.device) if mixed else [(0, M)]:
        block = dy2[i:j].to(B.dtype)
        if need_dS:
            dS[i:j] = product(block, outer)
        if raw is not None:
            raw += product(S[i:j].t(), block)
    if raw is not None:
        raw = scaled(raw, c.scale)
    if "u" in needs:
        grads["u"] = u.new_zeros(u.shape)
        grads["u"][:b] = (ad.weighted().t() * raw).sum(1)
    if raw is not None and u is not None:
        raw = raw * ad.u.unsqueeze(1)
    if "v" in needs:
        grads["v"] = (ad.B.t() * raw).sum(0)
    if "B" in needs:
        grad = raw if v is None else raw * v
        grads["B"] = _place(grad.t(), B, c.expert_b, c, b, columns=True)

    if "S" in needs:
        grads["S"] = F.pad(dS, (0, like["S"][0][1] - b))
    K = like["x"][0][-1]
    blocked = c.threshold > 0 or mixed
    if "A" in needs:
        x2, grad = rows(x), dS.new_zeros(b, K)
        for i, j in blocks(M, K, dy.device) if blocked else [(0, M)]:
            grad += product(dS[i:j].t(), cast_and_drop(x2[i:j], A.dtype, c.seed, c.threshold, i))
        grads["A"] = _place(grad, A, c.expert_a, c, b, columns=False)
    if "x" in needs and not of_x:
        dx = base_product(dy2, weight.t(), None)
        grads["x"] = (dy2 @ weight if dx is None else dx).view(*dy.shape[:-1], K)
    elif "x" in needs:
        dx = None if blocked or weight is None else base_product(dy2, weight.t(), None)
        if dx is not None:
            dx.addmm_(dS, ad.A)
        else:
            dx = dy2.new_empty(M, K)
            for i, j in blocks(M, K, dy.device) if blocked else [(0, M)]:
                block = product(dS[i:j], ad.A)
                dx[i:j] = drop(block, c.seed, c.threshold, i) if c.threshold else block
            if weight is not None:
                dx.addmm_(dy2, weight)
        grads["x"] = dx.view(*dy.shape[:-1], K)
    return grads


def _place(grad, factor, expert, c, b: int, columns: bool):
    """The gradient of the live rows (or columns) in a tensor like the factor, zero elsewhere."""
    if c.frozen:
        ranks = torch.arange(b, device=grad.device)
        others = ranks != c.rank - 1
        grad = grad.masked_fill(others if columns else others.unsqueeze(1), 0)  # a product would leave NaNs in them
    if factor.dim() == 2 and b == factor.shape[1 if columns else 0]:
        return grad
    full = grad.new_zeros(factor.shape)
    if factor.dim() == 3 and not isinstance(expert, int):
        return full.index_copy_(0, expert.reshape(1).long(), grad.unsqueeze(0))
    slot = full[expert] if factor.dim() == 3 else full
    (slot[:, :b] if columns else slot[:b]).copy_(grad)
    return full
