"""The bottleneck op by PyTorch alone: the fast composition behind the `torch` backend, forward and backward.

What it avoids, against writing the formula down: the residual is the start of the second product and its sum, not a
pass of its own; the activation is recomputed from z instead of kept; rows of one expert are slices, not copies; half
rows beside fp32 parameters are converted in blocks. Indices on a CPU are read, and equal neighbours share a product;
on a device they stay there, and the groups are one batched product. `csrc/autograd/bottleneck.cpp` is the same in C++.
"""

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.nn.functional as F

from .common import base_product, block_rows, product, rows, scaled, unflatten

_aten = torch.ops.aten
_FUNCTIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": torch.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "identity": lambda z: z,
}
# d(a) -> d(z), from z.
_DERIVATIVES = {
    "gelu": lambda da, z: _aten.gelu_backward(da, z),
    "gelu_tanh": lambda da, z: _aten.gelu_backward(da, z, approximate="tanh"),
    "relu": lambda da, z: _aten.threshold_backward(da, z, 0),
    "silu": lambda da, z: _aten.silu_backward(da, z),
    "swish": lambda da, z: _aten.silu_backward(da, z),
    "tanh": lambda da, z: _aten.tanh_backward(da, torch.tanh(z)),
    "identity": lambda da, z: da,
}


def activate(name: str, z: torch.Tensor) -> torch.Tensor:
    """act(z) of an activation's name."""
    return _FUNCTIONS[name](z)


# An index of one expert, or on a device of one per group.
Index = int | torch.Tensor


def _pieces(index, count: int, columns: int, device: torch.device, blocked: bool) -> Iterator[tuple[int, int, Index]]:
    """(first row, last row, expert) of the pieces that the rows are worked on in.

    index: a number, a list with one per group (neighbours with the same one share a piece), a 0-d tensor, or a 1-D
    tensor, of which a piece gets the part for its groups. blocked: in blocks of bounded size, but whole groups of a
    1-D tensor.
    """
    block = block_rows(columns, device) if blocked else max(1, count)
    if isinstance(index, torch.Tensor) and index.dim() == 1:
        size = count // len(index)
        step = max(1, block // size) if size else len(index)
        for g in range(0, len(index), step):
            part = index[g : g + step]
            yield g * size, (g + len(part)) * size, part
        return
    spans = [(0, count, index)]
    if isinstance(index, list):
        size, first, spans = count // len(index), 0, []
        for expert, group in groupby(index):
            last = first + size * len(list(group))
            spans.append((first, last, expert))
            first = last
    for first, last, expert in spans:
        for i in range(first, max(last, first + 1), block):
            yield i, min(last, i + block), expert


def _choose(parameter, index: Index, stacked: bool):
    """The parameter of one expert, or for a 1-D index those of its groups, [G, ...]."""
    if parameter is None or not stacked:
        return parameter
    if isinstance(index, int):
        return parameter[index]
    chosen = parameter.index_select(0, index.reshape(-1).long())
    return chosen if index.dim() else chosen.squeeze(0)


def _groups(x2, count: int):
    return x2.reshape(count, x2.shape[0] // count, x2.shape[1])


def _product(x2, matrix):
    """x2 [m, a] with matrix [a, b], or with one per group of its rows, [G, a, b]: [m, b]."""
    if matrix.dim() == 2:
        return product(x2, matrix)
    return torch.bmm(_groups(x2, len(matrix)), matrix).view(x2.shape[0], matrix.shape[2])


def _outer(p2, q2, index: Index, stacked: bool):
    """p2^T q2, or one per group."""
    if not stacked or isinstance(index, int) or index.dim() == 0:
        return product(p2.t(), q2)
    return torch.bmm(_groups(p2, len(index)).mT, _groups(q2, len(index)))


def _column_sums(x2, index: Index, stacked: bool):
    if not stacked or isinstance(index, int) or index.dim() == 0:
        return x2.sum(0)
    return _groups(x2, len(index)).sum(1)


def _add_rows(x2, bias):
    """x2 += bias [b], or one per group, [G, b]."""
    if bias.dim() == 1:
        x2 += bias
    else:
        _groups(x2, len(bias)).add_(bias.unsqueeze(1))


class _Sum:
    """The gradient of a parameter or of a stack of them, added up over the pieces in their order."""

    def __init__(self, experts: int):
        self.experts, self.total, self.dtype = experts, None, None

    def add(self, index: Index, part: torch.Tensor) -> None:
        self.dtype = part.dtype
        if not self.experts:
            self.total = part if self.total is None else self.total.add_(part)
            return
        per_group = isinstance(index, torch.Tensor) and index.dim() == 1
        if self.total is None:
            # Several pieces may meet in one expert: they are added up in fp32 at least and rounded once.
            wide = torch.promote_types(part.dtype, torch.float32)
            self.total = part.new_zeros(self.experts, *part.shape[1 if per_group else 0 :], dtype=wide)
        if isinstance(index, int):
            self.total[index] += part
        else:
            # On CUDA it sorts the indices; index_add_ would add atomically, in any order.
            part = part if per_group else part.unsqueeze(0)
            self.total.index_put_((index.reshape(-1).long(),), part.to(self.total.dtype), accumulate=True)

    def result(self) -> torch.Tensor:
        return self.total.to(self.dtype)


def _onto(out, start, a, U, bias, alpha: float) -> None:
    """out [m, N] = start + alpha * a U^T + bias, all of one type; U and bias may be those of groups of rows."""
    if U.dim() == 3:
        groups = len(U)
        out3, start3 = _groups(out, groups), _groups(start, groups)
        out3.copy_(start3) if bias is None else torch.add(start3, bias.unsqueeze(1), out=out3)
        out3.baddbmm_(_groups(a, groups), U.mT, alpha=alpha)
        return
    # oneDNN accumulates no faster than a separate pass: see common.base_product. fp32 only: there a keeps its digits.
    delta = base_product(scaled(a, alpha), U, bias) if a.dtype == torch.float32 else None
    if delta is not None:
        torch.add(delta, start, out=out)
        return
    out.copy_(start) if bias is None else torch.add(start, bias, out=out)
    out.addmm_(a, U.t(), alpha=alpha)


def forward(call):
    """(y [..., N] in h's type, z [M, r] in down's type)."""
    c = call.on_host()
    h, down, down_bias, up, up_bias, residual = c.h, c.down, c.down_bias, c.up, c.up_bias, c.residual
    h2, start = rows(h), rows(h if residual is None else residual)
    M, K = h2.shape
    N, r = up.shape[-2:]
    mixed = down.dtype != h.dtype

    z = h.new_empty(M, r, dtype=down.dtype)
    stacked = down.dim() == 3
    for i, j, index in _pieces(c.expert_d if stacked else 0, M, K, h.device, mixed):
        D, b = _choose(down, index, stacked), _choose(down_bias, index, stacked)
        part = h2[i:j].to(down.dtype)
        if D.dim() == 2 and b is not None:
            torch.addmm(b, part, D.t(), out=z[i:j])
            continue
        z[i:j] = _product(part, D.mT)
        if b is not None:
            _add_rows(z[i:j], b)
    a = activate(c.activation, z)

    y = h.new_empty(M, N)
    stacked = up.dim() == 3
    # A number goes into the product, where half units keep their digits; a tensor has to be multiplied by.
    number = isinstance(c.scale, float)
    if not number:
        a = a * c.scale
    alpha = c.scale if number else 1.0
    for i, j, index in _pieces(c.expert_u if stacked else 0, M, N, h.device, mixed):
        U, bias = _choose(up, index, stacked), _choose(up_bias, index, stacked)
        bias = None if bias is None else scaled(bias, c.scale)
        if mixed:
            delta = scaled(_product(a[i:j], U.mT), alpha)
            if bias is not None:
                _add_rows(delta, bias)
            torch.add(delta, start[i:j], out=delta)
            y[i:j] = delta
            continue
        _onto(y[i:j], start[i:j], a[i:j], U, bias, alpha)
    return unflatten(y, h), z


def backward(dy, call, z, like: dict, needs: set[str]) -> dict[str, torch.Tensor]:
    """The gradients of `needs` by name, each in its tensor's type. like: (shape, dtype) of every input of the call.

    h is read for down, down for h, up for these two and down_bias, z for up and, but for the identity, for those three;
    what is not read may be None.
    """
    c = call.on_host()
    h, down, up = c.h, c.down, c.up
    need_h, need_up = "h" in needs, "up" in needs
    need_dz = not needs.isdisjoint(("h", "down", "down_bias"))
    (D_shape, dtype), U_shape = like["down"], like["up"][0]
    experts_d, experts_u = (shape[0] if len(shape) == 3 else 0 for shape in (D_shape, U_shape))
    residual_is_h = like["residual"] is None
    dy2 = rows(dy)
    M, N = dy2.shape
    mixed = dtype != dy.dtype
    grads = {}

    inner = scaled(activate(c.activation, z), c.scale) if need_up else None
    dz = dy2.new_empty(M, D_shape[-2], dtype=dtype) if need_dz else None
    sums = [_Sum(experts_u), _Sum(experts_u)]
    stacked = experts_u > 0
    if needs:
        for i, j, index in _pieces(c.expert_u if stacked else 0, M, N, dy.device, mixed):
            part = dy2[i:j].to(dtype)
            if need_dz:
                dz[i:j] = scaled(_product(part, _choose(up, index, stacked)), c.scale)
            if need_up:
                sums[0].add(index, _outer(inner[i:j], part, index, stacked))
            if "up_bias" in needs:
                sums[1].add(index, scaled(_column_sums(part, index, stacked), c.scale))
    if need_up:
        grads["up"] = sums[0].result().mT
    if "up_bias" in needs:
        grads["up_bias"] = sums[1].result()
    if not need_dz:
        return grads
    dz = _DERIVATIVES[c.activation](dz, z)

    K = D_shape[-1]
    h2 = rows(h) if "down" in needs else None
    dh = dy2.new_empty(M, K) if need_h else None
    sums = [_Sum(experts_d), _Sum(experts_d)]
    stacked = experts_d > 0
    for i, j, index in _pieces(c.expert_d if stacked else 0, M, K, dy.device, mixed):
        part = dz[i:j]
        if "down" in needs:
            sums[0].add(index, _outer(part, h2[i:j].to(dtype), index, stacked))
        if "down_bias" in needs:
            sums[1].add(index, _column_sums(part, index, stacked))
        if need_h:
            D = _choose(down, index, stacked)
            back = None
            if residual_is_h and not mixed and D.dim() == 2:
                back = base_product(part, D.t(), None)
                if back is None:
                    torch.addmm(dy2[i:j], part, D, out=dh[i:j])
                    continue
            back = _product(part, D) if back is None else back
            dh[i:j] = back.add_(dy2[i:j]) if residual_is_h else back
    if need_h:
        grads["h"] = dh.view(*dy.shape[:-1], K)
    if "down" in needs:
        grads["down"] = sums[0].result()
    if "down_bias" in needs:
        grads["down_bias"] = sums[1].result()
    return grads
