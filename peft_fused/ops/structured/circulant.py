"""Products with circulant and skew-circulant matrices, given by their first column.

    circulant:       C[i, j] = c[(i - j) mod n]           C x = irfft(rfft(c) . rfft(x), n)
    skew_circulant:  S[i, j] = h[i - j] for i >= j, else -h[n + i - j]

Source: SURM (structured unrestricted-rank matrices, Sehanobish et al. 2024), section 3; C(a . b) is the product form of
its code. Gradients: dx is the product with the transposed matrix, dc the correlation of dy with x, summed over rows.
"""

import torch

from . import engine
from .engine import check_input
from .toeplitz import plain_toeplitz


def _plain_circulant(x, c, factor, n):
    c = c if factor is None else c * factor
    size = c.shape[-1]
    if c.dim() == 3:
        blocks = torch.fft.rfft(x.unflatten(-1, (-1, size)))
        y = torch.einsum("...if,oif->...of", blocks, torch.fft.rfft(c))
        return torch.fft.irfft(y, n=size).flatten(-2)
    # irfft has to be told an odd length. n: padding x with zeros and cropping y makes a rectangular map.
    return torch.fft.irfft(torch.fft.rfft(x, n=size) * torch.fft.rfft(c), n=size)[..., :n]


def _plain_skew_circulant(x, h, _, n):
    return plain_toeplitz(x, h, -h.flip(0)[:-1], n)


def circulant_matmul(
    x, c, *, factor=None, out_features=None, add=None, scale=1.0, dropout_p=0.0, seed=None, transposed=False
):
    """add + scale * C(c) drop(x), differentiable in x, c, factor and add.

    x: [..., n]; fp32, fp16, bf16, or fp64 on the torch and reference backends; any strides. c: [n] for any n >= 1, odd
    and prime included, in x's dtype or fp32. factor: [n] or None; then the map is C(c . factor).
    c: [O, I, n] is a matrix of O x I circulant blocks of n, from I n inputs to O n outputs.
    out_features: with c [n], the outputs of a rectangular map: x [..., K] is padded with zeros to n or the result is
    cropped to out_features, n = max(K, out_features). None means n.
    add: [..., N] in x's dtype or None; it is not written to. scale: number or 0-d tensor, finite in fp32 (fp64 beside
    an fp64 x); times the sum of |c| it has to stay in that range as well. dropout_p: in [0, 1), on x, whenever it is
    not 0. seed: None draws one from torch's generator of x's device; an int or a 0-d int64 tensor fixes the mask.
    transposed: C(c)^T in place of C(c).

    Convolutions are computed in fp32 at least and rounded once to x's dtype.
    Raises ValueError or TypeError naming the argument, RuntimeError when a forced backend cannot run.
    """
    return engine.run(
        "circulant", x, c, factor, out_features=out_features, add=add, scale=scale, dropout_p=dropout_p, seed=seed,
        transposed=transposed,
    )  # fmt: skip


def _circulant_outputs(x, c, factor, out_features, transposed, names) -> int:
    engine.check_parameter("c", c, (1, 3), "[n] or [O, I, n]")
    if factor is not None:
        engine.check_parameter("factor", factor, (1, 3), "c's shape")
        if factor.shape != c.shape:
            raise ValueError(f"factor must have c's shape {list(c.shape)}, got {list(factor.shape)}")
    size = c.shape[-1]
    if c.dim() == 3:
        if out_features is not None:
            raise ValueError(f"out_features must be None where c has blocks, got {out_features}")
        outputs, inputs = (c.shape[i] * size for i in ((1, 0) if transposed else (0, 1)))
        check_input(x, inputs, "the blocks of c")
        return outputs
    if out_features is None:
        check_input(x, size, "the length of c")
        return size
    if isinstance(out_features, bool) or not isinstance(out_features, int) or out_features < 1:
        raise ValueError(f"out_features must be a positive int or None, got {out_features!r}")
    check_input(x, None, "")
    if size != max(x.shape[-1], out_features):
        raise ValueError(
            f"c must have max(K, out_features) = {max(x.shape[-1], out_features)} entries, got shape {list(c.shape)}"
        )
    return out_features


def circulant_matmul_reference(x, c, *, factor=None, out_features=None, **options):
    """`circulant_matmul` written down in plain PyTorch, differentiated by autograd. Same arguments, same result."""
    return engine.reference("circulant", x, c, factor, out_features=out_features, **options)


def skew_circulant_matmul(x, h, *, add=None, scale=1.0, dropout_p=0.0, seed=None, transposed=False):
    """add + scale * S(h) drop(x), differentiable in x, h and add.

    x: [..., n]; h: [n]; the rest: see `circulant_matmul`.
    """
    return engine.run(
        "skew_circulant", x, h, None, add=add, scale=scale, dropout_p=dropout_p, seed=seed, transposed=transposed
    )


def _skew_outputs(x, h, _, out_features, transposed, names) -> int:
    engine.check_parameter("h", h, (1,), "[n]")
    check_input(x, h.shape[0], "the length of h")
    return h.shape[0]


def skew_circulant_matmul_reference(x, h, **options):
    """`skew_circulant_matmul` in plain PyTorch, differentiated by autograd. Same arguments, same result."""
    return engine.reference("skew_circulant", x, h, None, **options)


engine.register("circulant", ("c", "factor"), _plain_circulant, _circulant_outputs)
engine.register("skew_circulant", ("h", None), _plain_skew_circulant, _skew_outputs)
