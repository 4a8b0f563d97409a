"""The low-rank op by PyTorch alone: the fast composition behind the `torch` backend, forward and backward.

What it avoids, against writing the formula down: the product with B, its scaled copy and its sum with the base output
are one in-place GEMM; x is neither copied to the adapter's type nor kept after dropout, both happen on blocks of rows;
truncated ranks are slices, so a rank of 1 costs a product of rank 1. The base product comes last and accumulates onto
the adapter, except by oneDNN, which accumulates no faster than a separate pass: there the adapter follows, in place.
`csrc/autograd/lowrank.cpp` is the same composition in C++.
"""

import math
from dataclasses import dataclass

import torch

from ..triton_kernels.plan import MAX_RANK
from .dispatch import problem_of, uses_onednn
from .dropout import drop, load

# Elements of x converted or dropped out at a time: few enough to bound the temporary memory and for a CPU's caches,
# enough to split over its cores or fill a GPU.
BLOCK_ELEMENTS = {"cpu": 1 << 19}
BLOCK_ELEMENTS_GPU = 1 << 24


@dataclass(frozen=True)
class Controls:
    """Runtime values of the op: numbers, or 0-d tensors on the device of x."""

    scale: float | torch.Tensor
    rank: int | torch.Tensor
    expert_a: int | torch.Tensor
    expert_b: int | torch.Tensor
    threshold: int
    seed: torch.Tensor | None
    frozen: bool

    @staticmethod
    def _value(number):
        """The number in a tensor of the CPU, where reading it costs nothing; a device tensor stays one."""
        return number.item() if isinstance(number, torch.Tensor) and number.device.type == "cpu" else number

    def on_host(self) -> "Controls":
        value = self._value
        return Controls(
            value(self.scale), value(self.rank), value(self.expert_a), value(self.expert_b),
            self.threshold, self.seed, self.frozen,
        )  # fmt: skip


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

    def __init__(self, A, B, u, v, controls: Controls):
        self.c = c = controls.on_host()
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

    def scaled(self, S, by):
        return S if isinstance(by, float) and by == 1.0 else S * by

    def weighted(self):
        """v . B."""
        return self.B if self.v is None else self.B * self.v.unsqueeze(1)

    def outer(self):
        """scale * v . B . u, the operand beside S forward and beside dY backward."""
        outer = self.scaled(self.weighted(), self.c.scale)
        return outer if self.u is None else outer * self.u


def _blocks(rows: int, columns: int, device: torch.device):
    size = max(1, BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS_GPU) // max(1, columns))
    return [(i, min(rows, i + size)) for i in range(0, rows, size)]


def _base(x2, weight, bias):
    """x W^T + bias by oneDNN; None where BLAS is the better library, and accumulates onto the adapter in place.

    A weight that is not dense would run oneDNN's reference code, thousands of times slower.
    """
    if x2.device.type != "cpu" or not (weight.is_contiguous() or weight.t().is_contiguous()):
        return None
    if uses_onednn(problem_of(x2, weight, weight, has_weight=True, dropout=False)):
        return torch.ops.mkldnn._linear_pointwise(x2, weight, bias, "none", [], "")
    return None


def product(a, b):
    """a b. oneDNN adds up in one chain where BLAS, on the CPUs that it serves, takes partial sums: for a product of the
    adapter it serves short sums only, which keeps the error BLAS has. The base product is worth more than that."""
    out = _base(a, b.t(), None) if a.shape[1] <= MAX_RANK else None
    return a @ b if out is None else out


# A long sum is in so many parts at most: longer ones, where there are more terms.
PARTS = 32


def product_in_parts(a, b, terms):
    """a b in fp32 on a CPU with sums in even parts of `terms` at most, as long as PARTS suffice; elsewhere as it comes.

    MKL on Intel's CPUs adds up 384 terms in one chain, with more error than an FFT, or a sum of short products, has.
    """
    if a.dtype != torch.float32 or a.device.type != "cpu":
        return a @ b
    parts = min(PARTS, max(1, math.ceil(a.shape[1] / terms)))
    step = max(1, math.ceil(a.shape[1] / parts))
    out = product(a[:, :step], b[:step])
    for i in range(step, a.shape[1], step):
        out.addmm_(a[:, i : i + step], b[i : i + step])
    return out


def rows(t):
    """[..., K] -> [M, K]; said in full because -1 is undefined where K is 0."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def unview(t, *shape):
    """t in another shape, and not as a view: what a custom function returns may be changed in place later."""
    return torch.ops.aten._unsafe_view(t, shape)


def unflatten(y, x):
    """y [M, N] in x's leading dimensions."""
    return y if x.dim() == 2 else unview(y, *x.shape[:-1], y.shape[1])


def _leaves_fp16(B, u, v) -> bool:
    """Whether the factors are to be fp32 for the products: u, v and scale, folded into B, may leave fp16's range."""
    return B is not None and B.dtype == torch.float16 and not (u is None and v is None)


def _wide(tensor):
    return None if tensor is None else tensor.float()


def forward(x, weight, add, bias, A, B, u, v, controls: Controls):
    """(y [..., N] in x's type, S [M, r] in A's type)."""
    if _leaves_fp16(B, u, v):
        y, S = forward(x, weight, add, bias, *map(_wide, (A, B, u, v)), controls)
        return y, S.to(A.dtype)
    ad = _Adapter(A, B, u, v, controls)
    x2 = rows(x)
    M, N = x2.shape[0], B.shape[-2]
    blocked = ad.c.threshold > 0 or A.dtype != x.dtype
    S = x.new_zeros(M, ad.r, dtype=A.dtype) if ad.width < ad.r else x.new_empty(M, ad.r, dtype=A.dtype)
    kept = S[:, : ad.width]
    if blocked:
        for i, j in _blocks(M, x2.shape[1], x.device):
            kept[i:j] = ad.mask(product(load(x2[i:j], A.dtype, ad.c.seed, ad.c.threshold, i), ad.A.t()))
    else:
        kept.copy_(ad.mask(product(x2, ad.A.t())))

    P, Q = kept, ad.outer().t()
    y = _base(x2, weight, bias) if weight is not None else None
    onto = y
    if y is None and weight is None:
        y = x.new_empty(M, N)
        onto = None if add is None else rows(add)
    elif y is None:
        y = x.new_empty(M, N)
    if A.dtype == x.dtype:
        if onto is not None:
            torch.addmm(onto, P, Q, out=y)
            if weight is None and bias is not None:
                y += bias
        elif bias is not None:
            torch.addmm(bias, P, Q, out=y)
        else:
            torch.mm(P, Q, out=y)
    else:
        for i, j in _blocks(M, N, x.device):
            delta = product(P[i:j], Q)
            if onto is None or weight is None:
                delta = delta if bias is None else delta + bias
            y[i:j] = delta if onto is None else delta + onto[i:j]
    if weight is not None and onto is None:
        y.addmm_(x2, weight.t())
    return unflatten(y, x), S


def backward(dy, x, weight, A, B, u, v, S, controls: Controls, needs: list[bool]):
    """Gradients of (x, weight, bias, A, B, u, v), None where not needed. Any input may be None where nothing reads it.

    Each gradient has its parameter's dtype. A gradient of a truncated factor is zero in the rows that were dropped.
    """
    if _leaves_fp16(B, u, v):
        grads = backward(dy, x, weight, *map(_wide, (A, B, u, v, S)), controls, needs)
        return *grads[:3], *(None if grad is None else grad.to(B.dtype) for grad in grads[3:])
    need_x, need_weight, need_bias, need_A, need_B, need_u, need_v = needs
    dy2 = rows(dy)
    M, N = dy2.shape
    dx = dweight = dbias = dA = dB = du = dv = None
    if need_bias:
        dbias = dy2.sum(0)
    if need_weight:
        dweight = dy2.t() @ rows(x)
    if B is None:
        return dx, dweight, dbias, dA, dB, du, dv
    if M == 0:  # zeros times a factor that is not finite would be NaN
        dx = dy.new_zeros(*dy.shape[:-1], A.shape[-1]) if need_x else None
        adapter = zip((A, B, u, v), needs[3:], strict=True)
        return dx, dweight, dbias, *(t.new_zeros(t.shape) if need else None for t, need in adapter)
    ad = _Adapter(A, B, u, v, controls)
    c, b = ad.c, ad.width
    mixed = B.dtype != dy.dtype
    if S is not None:
        S = S[:, :b]
    need_dS = need_x or need_A

    dS = dy2.new_empty(M, b, dtype=B.dtype) if need_dS else None
    raw = dy2.new_zeros(b, N, dtype=B.dtype) if need_B or need_u or need_v else None
    outer = ad.mask(ad.outer()) if need_dS else None
    for i, j in _blocks(M, N, dy.device) if mixed else [(0, M)]:
        block = dy2[i:j].to(B.dtype)
        if need_dS:
            dS[i:j] = product(block, outer)
        if raw is not None:
            raw += product(S[i:j].t(), block)
    if raw is not None:
        raw = ad.scaled(raw, c.scale)
    if need_u:
        du = u.new_zeros(u.shape)
        du[:b] = (ad.weighted().t() * raw).sum(1)
    if raw is not None and u is not None:
        raw = raw * ad.u.unsqueeze(1)
    if need_v:
        dv = (ad.B.t() * raw).sum(0)
    if need_B:
        grad = raw if v is None else raw * v
        dB = _place(grad.t(), B, c.expert_b, c, b, columns=True)

    K = A.shape[-1] if need_A or need_x else 0
    x2 = rows(x) if need_A else None
    blocked = c.threshold > 0 or mixed
    if need_A:
        grad = dS.new_zeros(b, K)
        for i, j in _blocks(M, K, dy.device) if blocked else [(0, M)]:
            grad += product(dS[i:j].t(), load(x2[i:j], A.dtype, c.seed, c.threshold, i))
        dA = _place(grad, A, c.expert_a, c, b, columns=False)
    if need_x:
        dx = None if blocked or weight is None else _base(dy2, weight.t(), None)
        if dx is not None:
            dx.addmm_(dS, ad.A)
        else:
            dx = dy2.new_empty(M, K)
            for i, j in _blocks(M, K, dy.device) if blocked else [(0, M)]:
                block = product(dS[i:j], ad.A)
                dx[i:j] = drop(block, c.seed, c.threshold, i) if c.threshold else block
            if weight is not None:
                dx.addmm_(dy2, weight)
        dx = dx.view(*dy.shape[:-1], K)
    return dx, dweight, dbias, dA, dB, du, dv


def _place(grad, factor, expert, c: Controls, b: int, columns: bool):
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
