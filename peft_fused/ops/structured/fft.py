"""Structured products by torch.fft, forward and backward: real transforms throughout, a block of rows at a time.

A map is one convolution, or a sum of products of two. Each convolution is diagonal in a ring's transform; all of them
together need one transform of the input, one of the output, and two of each intermediate. The transposed map has the
conjugate spectra in the opposite order, so that one function serves forward and dx.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..common import cast_and_drop
from . import maps

# Elements of a block of rows: few enough to bound the temporary memory and to stay near a CPU's caches, enough for
# torch's FFT, which costs tens of microseconds a call, and to fill a GPU.
BLOCK_ELEMENTS = {"cpu": 1 << 21}
BLOCK_ELEMENTS_GPU = 1 << 25


@dataclass(frozen=True)
class Cyclic:
    """Real sequences under cyclic convolution: polynomials modulo z^length - 1."""

    length: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft(x, n=self.length)

    def inverse(self, X: torch.Tensor) -> torch.Tensor:
        return torch.fft.irfft(X, n=self.length)


@dataclass(frozen=True)
class Negacyclic:
    """Real sequences under negacyclic convolution: polynomials modulo z^length + 1.

    An even length 2 h is the complex polynomials modulo z^h - i, by z^h -> i, and a rotation of the coefficients makes
    that ring cyclic: one complex transform of half the length. In an odd one z -> -z makes the real ring cyclic.
    """

    length: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turn = _turn(self.length, x.dtype, x.device)
        if self.length % 2:
            return torch.fft.rfft(x * turn)
        half = self.length // 2
        return torch.fft.fft(torch.complex(x[..., :half].contiguous(), x[..., half:].contiguous()) * turn)

    def inverse(self, X: torch.Tensor) -> torch.Tensor:
        if self.length % 2:
            x = torch.fft.irfft(X, n=self.length)
            return x * _turn(self.length, x.dtype, X.device)
        z = torch.fft.ifft(X)
        z = z * _turn(self.length, z.real.dtype, X.device).conj_physical()
        return torch.cat([z.real, z.imag], -1)


@lru_cache(maxsize=64)
def _turn(length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What multiplies the coefficients before the transform: signs, or exp(i pi k / length) for the first half.

    Made on the host: what a stream or a CUDA graph is yet to compute is not for other streams to find here.
    """
    if length % 2:
        return (1 - 2 * (torch.arange(length, device="cpu") % 2)).to(dtype).to(device)
    angle = torch.arange(length // 2, dtype=torch.float64, device="cpu") * (torch.pi / length)
    return torch.polar(torch.ones_like(angle), angle).to(torch.promote_types(dtype, torch.complex32)).to(device)


@dataclass(frozen=True)
class Stage:
    """Convolutions in one ring: spectra [terms, F], or [O, I, F] of blocks; results are cropped to `width`."""

    ring: Cyclic | Negacyclic
    spectra: torch.Tensor
    width: int

    def transposed(self, width: int) -> "Stage":
        # Not lazily: an op that runs below the conjugate key, as in a compiled function, would not see it.
        spectra = self.spectra.conj_physical()
        return replace(self, spectra=spectra.transpose(0, 1) if spectra.dim() == 3 else spectra, width=width)

    def transform(self, x: torch.Tensor) -> torch.Tensor:
        """x [m, width] -> [m, F]; of blocks [m, blocks, F]."""
        return self.ring.forward(x.unflatten(-1, (-1, self.ring.length)) if self.spectra.dim() == 3 else x)

    def multiply(self, X: torch.Tensor, term: int = 0) -> torch.Tensor:
        if self.spectra.dim() == 3:
            return torch.einsum("mif,oif->mof", X, self.spectra)
        return X * self.spectra[term]

    def back(self, X: torch.Tensor) -> torch.Tensor:
        x = self.ring.inverse(X)
        return x.flatten(-2) if self.spectra.dim() == 3 else x[..., : self.width]

    def correlate(self, X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
        """Spectrum of the gradient of the kernel: input times upstream gradient, summed over the rows."""
        if self.spectra.dim() == 3:
            return torch.einsum("mif,mof->oif", X.conj_physical(), Y)
        return (X.conj_physical() * Y).sum(0)


def stages(kind, p, q, n: int, k: int, length: int, scale) -> list[Stage]:
    """The convolutions of a map from k inputs to n outputs, in order, with the scale in the last one's spectra."""
    p, q = _wide(p), _wide(q)

    def spectra(ring, part, a, b=None, scale=None):
        kernel = maps.kernel(part, a, b, ring.length)
        kernel = kernel if scale is None or (isinstance(scale, float) and scale == 1.0) else kernel * scale
        return ring.forward(kernel)

    if kind == "toeplitz_product":
        ring = Cyclic(length)
        return [
            Stage(ring, spectra(ring, "toeplitz", p, p[1:]).unsqueeze(0), k),
            Stage(ring, spectra(ring, "toeplitz", q, q[1:], scale).unsqueeze(0), n),
        ]
    if kind == "ldr":
        own = length == n
        skew, ring = Negacyclic(n) if own else Cyclic(length), Cyclic(length)
        first = torch.stack([spectra(skew, "skew_circulant", h) for h in q])
        last = torch.stack([spectra(ring, "circulant", g, None, scale) for g in p])
        return [Stage(skew, first, n), Stage(ring, last, n)]
    ring = Negacyclic(length) if kind == "skew_circulant" and length == p.shape[-1] else Cyclic(length)
    found = spectra(ring, kind, p, q, scale)
    return [Stage(ring, found if kind == "circulant" and p.dim() == 3 else found.unsqueeze(0), n)]


def _wide(t):
    """Transforms run in fp32 at least: no FFT library has bf16, and fp16 ones are inexact and of few lengths."""
    return None if t is None else t.to(torch.promote_types(t.dtype, torch.float32))


def _transposed(chain: list[Stage], k: int) -> list[Stage]:
    widths = [k, *(stage.width for stage in chain[:-1])]
    return [stage.transposed(width) for stage, width in zip(chain, widths, strict=True)][::-1]


def _through(chain: list[Stage], X: torch.Tensor) -> torch.Tensor:
    """The map of a transformed input."""
    if len(chain) == 1:
        return chain[0].back(chain[0].multiply(X))
    first, last = chain
    total = None
    for term in range(first.spectra.shape[0]):
        inner = last.transform(first.back(first.multiply(X, term)))
        inner = last.multiply(inner, term)
        total = inner if total is None else total.add_(inner)
    return last.back(total)


def _blocks(rows: int, length: int, device: torch.device):
    size = max(1, BLOCK_ELEMENTS.get(device.type, BLOCK_ELEMENTS_GPU) // max(1, length))
    return [(i, min(rows, i + size)) for i in range(0, rows, size)]


def _work_dtype(x, p):
    return torch.promote_types(torch.promote_types(x.dtype, p.dtype), torch.float32)


def forward(x2, p, q, add2, *, kind, n, length, scale, threshold, seed, transposed) -> torch.Tensor:
    """y [m, n] in x2's type of x2 [m, k]."""
    k, dtype = x2.shape[1], _work_dtype(x2, p)
    chain = stages(kind, p, q, *((k, n) if transposed else (n, k)), length, scale)
    if transposed:
        chain = _transposed(chain, n)
    y = x2.new_empty(x2.shape[0], n)
    for i, j in _blocks(x2.shape[0], length, x2.device):
        delta = _through(chain, chain[0].transform(cast_and_drop(x2[i:j], dtype, seed, threshold, i)))
        if add2 is None:
            y[i:j] = delta
        elif add2.dtype == delta.dtype:
            torch.add(add2[i:j], delta, out=y[i:j])
        else:
            y[i:j] = delta.add_(add2[i:j])
    return y


def backward(dy2, x2, p, q, *, kind, k, length, scale, threshold, seed, needs):
    """Gradients (dx [m, k], dp, dq) of the map that is not transposed, None where not needed.

    x2 may be None when neither p nor q needs a gradient.
    """
    need_x, need_p, need_q = needs
    n, dtype = dy2.shape[1], _work_dtype(dy2, p)
    chain = stages(kind, p, q, n, k, length, scale)
    back = _transposed(chain, k)
    need_params = need_p or need_q
    dx = dy2.new_empty(dy2.shape[0], k) if need_x else None
    sums = [torch.zeros_like(stage.spectra) for stage in chain] if need_params else None
    for i, j in _blocks(dy2.shape[0], length, dy2.device):
        Y = back[0].transform(dy2[i:j].to(dtype))
        X = chain[0].transform(cast_and_drop(x2[i:j], dtype, seed, threshold, i)) if need_params else None
        if len(chain) == 1:
            if need_params:
                part = chain[0].correlate(X, Y)
                sums[0] += part if part.dim() == 3 else part.unsqueeze(0)
            dX = back[0].multiply(Y) if need_x else None
        else:
            dX = _two_stage_backward(chain, back, X, Y, sums, need_x)
        if need_x:
            dx[i:j] = cast_and_drop(back[-1].back(dX), dtype, seed, threshold, i)
    if not need_params:
        return dx, None, None
    dks = [stage.ring.inverse(total) for stage, total in zip(chain, sums, strict=True)]
    dks[-1] = dks[-1] * scale  # what reaches an earlier stage has come through the last one's spectra
    if len(chain) == 2:
        dp, dq = maps.fold_terms(kind, list(zip(*dks, strict=True)), _wide(p), _wide(q))
    else:
        dp, dq = maps.fold(kind, dks[0] if chain[0].spectra.dim() == 3 else dks[0][0], _wide(p), _wide(q))
    return dx, dp.to(p.dtype) if need_p else None, dq.to(q.dtype) if need_q else None


def _two_stage_backward(chain, back, X, Y, sums, need_x):
    """Adds the terms' spectra to `sums`; returns that of dx. The intermediates are recomputed, not saved."""
    first, last = chain
    total = None
    for term in range(first.spectra.shape[0]):
        dinner = back[0].back(back[0].multiply(Y, term))
        D = back[1].transform(dinner)
        if sums is not None:
            inner = last.transform(first.back(first.multiply(X, term)))
            sums[1][term] += last.correlate(inner, Y)
            sums[0][term] += first.correlate(X, D)
        if need_x:
            D = back[1].multiply(D, term)
            total = D if total is None else total.add_(D)
    return total
