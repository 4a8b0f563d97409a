"""Which algorithm a structured product runs: an FFT of which length, or a GEMM with the dense matrix.

Pure functions of the problem; nothing is measured at run time.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

from ...triton_kernels import fft_plan, kronecker_plan
from ...triton_kernels.problem import Problem
from . import materialized

KINDS = ("circulant", "skew_circulant", "toeplitz", "toeplitz_product", "kronecker", "ldr")
# Kinds that are one convolution: their dense matrix is a gather, and its gradient folds onto the vector.
CONVOLUTIONS = ("circulant", "skew_circulant", "toeplitz")

# A CPU's costs in nanoseconds, measured on two AMD Zen 5 cores with torch's FFT (MKL) and oneDNN's fp32 GEMM: what a
# call of a transform costs whatever its size, an element of it per factor of 2 in its length, an element of a pass over
# memory, and a multiply-add of the GEMM. Only their ratios decide.
FFT_CALL, FFT_ELEMENT, PASS_ELEMENT, GEMM_ELEMENT = 20e3, 0.045, 0.15, 1 / 175
# torch's FFT has kernels for these prime factors; a length with another one takes several times as long.
FFT_PRIMES = (2, 3, 5, 7, 11, 13)
# Seconds on an H200, computed and not measured: a multiply-add of a 16-bit GEMM; one row and unit of fft_plan.cost of
# a forward convolution, which is 12,480 instructions of a warp for 4,096 points, at 1.8 times the cycles that it takes
# to issue them; an element of a dense matrix, made through two fp32 ones; and the launches that the dense form saves.
GPU_GEMM_ELEMENT, GPU_TRANSFORM, GPU_MATRIX_ELEMENT, GPU_LAUNCHES = 2 / 780e12, 1.37e-14, 10 / 4e12, 4e-6
# In fp32, whose GEMM does not run on tensor cores.
DENSE_MOST_CUDA_FP32 = 128


def largest_prime(n: int) -> int:
    """The largest prime factor of n; 1 for n = 1."""
    largest, p = 1, 2
    while p * p <= n:
        while n % p == 0:
            largest, n = p, n // p
        p += 1
    return max(largest, n)


@lru_cache(maxsize=4096)
def fast_length(least: int, prime: int = 7) -> int:
    """The smallest length from `least` on with no prime factor above `prime`."""
    n = least
    while largest_prime(n) > prime:
        n += 1
    return n


@dataclass(frozen=True)
class StructuredPlan:
    """method: "dense", "fft", or "gemm" (the two small products of a Kronecker map). length: of the FFT, which with
    "dense" serves gradients only; 0 for "gemm".

    A length other than that of the ring which the structure lives in means a linear convolution, padded to that length.
    """

    method: str
    length: int


@dataclass(frozen=True)
class StructuredProblem(Problem):
    """x [m, k] through a structured map to [m, n].

    sizes: circulant (n,) or (blocks out, blocks in, block), skew_circulant (n,), toeplitz (n, k), toeplitz_product
    (n,), kronecker (a1, a2, b1, b2), ldr (terms, n).
    """

    kind: str
    sizes: tuple[int, ...]
    dropout: bool
    transposed: bool = False

    @property
    def blocks(self) -> bool:
        return self.kind == "circulant" and len(self.sizes) == 3

    @property
    def lengths(self) -> "Lengths":
        return fft_lengths(self.kind, self.sizes)

    @cached_property
    def plan(self) -> "StructuredPlan":
        return plan_structured(self)

    def describe(self) -> str:
        op, sizes = f"{self.kind}{' transposed' if self.transposed else ''}", "x".join(map(str, self.sizes))
        return self.sentence(op, f", sizes {sizes}", more=", dropout" if self.dropout else "")

    def limits(self, backend: str) -> list[str]:
        if backend == "cuda" and self.transposed:
            return ["a transposed map has no C++ node"]
        if self.kind == "kronecker":
            return self._kronecker_limits() if backend == "triton" else []
        if self.blocks:
            return ["a block-circulant map of several blocks runs on torch.fft"]
        if backend == "triton":
            if max(self.n, self.k) == 1:
                return ["it is a product with a number, in which a tensor-core DFT would only lose digits"]
            return _too_long(self.lengths.triton, fft_plan.MAX_LENGTH)
        if self.kind not in ("circulant", "toeplitz"):
            return [f"{self.kind} has no CUDA C++ kernel"]
        return _too_long(self.lengths.cuda, MAX_CUDA_LENGTH)

    def _kronecker_limits(self) -> list[str]:
        a1, a2, b1, b2 = self.sizes
        sizes = (a2, a1, b2, b1) if self.transposed else self.sizes
        return kronecker_plan.limits(*sizes, self.dtype, self.adapter_dtype, self.dropout)

    def preference(self) -> tuple[str, ...]:
        if self.plan.method == "dense":
            return ("torch",)
        # In fp32 the CUDA FFT does on ordinary cores what the tensor cores need three products for.
        if self.dtype == "float32" and self.kind != "kronecker":
            return ("cuda", "triton", "torch")
        return ("triton", "cuda", "torch")

    def native(self, backend: str) -> bool:
        if self.kind not in ("circulant", "toeplitz", "kronecker") or self.blocks or self.transposed:
            return False
        return backend == "cuda" or (backend == "torch" and self.device == "cpu")

    def launch_plan(self, backend: str) -> tuple | None:
        """(method, length of the FFT, n, matrix(x, p, q) where one is read) of PyTorch's functions and of the C++ node.
        Triton's launchers plan by sizes alone, in which several problems are alike."""
        if backend == "triton":
            return None
        if backend == "cuda" and self.plan.method != "gemm":
            return "fft", self.lengths.cuda, self.n, None
        matrix = partial(materialized.matrix_of, self) if self.plan.method == "dense" else None
        return self.plan.method, self.plan.length, self.n, matrix

    def words(self, backend: str) -> str:
        if self.kind == "kronecker":
            return ", one kernel" if backend == "triton" else ", two GEMMs"
        if backend == "triton":
            return f", tensor-core DFT of {self.lengths.triton}"
        if backend == "cuda":
            return f", shared-memory FFT of {self.lengths.cuda}"
        if self.plan.method == "dense":
            return ", dense matrix by GEMM"
        return f", torch.fft of {self.plan.length}"


MAX_CUDA_LENGTH = 8192


def _too_long(length: int, most: int) -> list[str]:
    return [f"it needs an FFT of {length}; the kernels go up to {most}"] if length > most else []


@dataclass(frozen=True)
class Lengths:
    """Length of the FFT of each implementation: the ring's own where it is a fast one, else that of a padded linear
    convolution."""

    torch: int
    triton: int
    cuda: int


@lru_cache(maxsize=4096)
def fft_lengths(kind: str, sizes: tuple[int, ...]) -> Lengths:
    """Lengths of a kind of map of these sizes (see `StructuredProblem`)."""
    if kind == "toeplitz":
        least = sum(sizes) - 1
        return Lengths(fast_length(least), _triton_length(least), fast_length(least, 5))
    n = sizes[-1]
    least = 2 * n - 1
    if kind == "toeplitz_product":
        return Lengths(fast_length(least), _triton_length(least), fast_length(least, 5))
    # torch's ring of a skew-circulant map is its own; the kernels know the cyclic one only.
    own = len(sizes) == 3 or largest_prime(n) in (1, *FFT_PRIMES)
    cyclic = kind == "circulant"
    return Lengths(
        n if own else fast_length(least),
        n if cyclic and fft_plan.direct(n) else _triton_length(least),
        n if cyclic and largest_prime(n) <= 5 else fast_length(least, 5),
    )


def _triton_length(least: int) -> int:
    """The kernels' length; what would be needed where they have none."""
    return fft_plan.next_length(least) if least <= fft_plan.MAX_LENGTH else least


@lru_cache(maxsize=4096)
def plan_structured(problem: StructuredProblem) -> StructuredPlan:
    """The method of a problem on the torch backend. ValueError for an unknown kind."""
    p = problem
    if p.kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {p.kind!r}")
    if p.kind == "kronecker":
        return StructuredPlan("gemm", 0)
    length = p.lengths.torch
    if p.kind in CONVOLUTIONS and not p.blocks and _dense_is_cheaper(p, length):
        return StructuredPlan("dense", length)
    return StructuredPlan("fft", length)


def _dense_is_cheaper(p: StructuredProblem, length: int) -> bool:
    if p.device == "cuda":
        return _dense_is_cheaper_on_a_gpu(p)
    # One training step: five transforms and three products along the rows, or three GEMMs and the matrix itself.
    elements = p.m * length
    fft = 5 * (FFT_CALL + FFT_ELEMENT * elements * math.log2(max(2, length))) + 6 * PASS_ELEMENT * elements
    dense = 3 * GEMM_ELEMENT * p.m * p.n * p.k + 4 * PASS_ELEMENT * p.n * p.k
    return dense < fft


def _dense_is_cheaper_on_a_gpu(p: StructuredProblem) -> bool:
    if p.dtype == "float32":
        return max(p.n, p.k) <= DENSE_MOST_CUDA_FP32
    if p.dtype == "float64" or p.lengths.triton > fft_plan.MAX_LENGTH:
        return False
    # Of one training step. The kernels make y in one pass, and dx and the gradient of the vectors in another, which
    # takes as long as one and a half; the dense form has a GEMM for y and for dx, and the gradient by a pass of one.
    passes = 1 + 1.5 - 1
    kernels = passes * GPU_TRANSFORM * p.m * fft_plan.cost_of(p.lengths.triton) + GPU_LAUNCHES
    dense = 2 * GPU_GEMM_ELEMENT * p.m * p.n * p.k + GPU_MATRIX_ELEMENT * p.n * p.k
    return dense < kernels
