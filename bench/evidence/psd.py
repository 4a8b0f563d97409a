"""How well each family approximates random positive semidefinite matrices with the same number of parameters.

SURM (Sehanobish et al. 2024, Fig. 1 left) reports the order: low rank worst, then Kronecker, circulant, and Toeplitz
best. That does not follow from the matrix being positive semidefinite but from which matrices are drawn, and which the
paper drew is not known here:

- "shifted": A + n I for a symmetric A of uniform entries, the textbook recipe for a random matrix of this kind.
- "stationary": sample covariances of stationary autoregressive series.
- "wishart": G G^T / n of normal entries, which has no structure beside its diagonal. Low rank is the worst here too,
  but the others differ in the third digit, and circulant is the worst of them.

Every approximation is the best one of its family in the Frobenius norm, in closed form. The budget is 2 n numbers: two
vectors for low rank, two matrices for Kronecker. Circulant and Toeplitz matrices, whose best approximations to a
symmetric matrix are symmetric, have no more than n numbers to spend.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from . import files

N = 256
TRIALS = 10
CORRELATION = 0.9  # of neighbours in a stationary series


def low_rank(M: torch.Tensor) -> torch.Tensor:
    """Rank 1, two vectors: the largest eigenvalue's part."""
    values, vectors = torch.linalg.eigh(M)
    return values[-1] * torch.outer(vectors[:, -1], vectors[:, -1])


def kronecker(M: torch.Tensor) -> torch.Tensor:
    """B (x) A of two square factors: the best rank 1 of M with its blocks as rows (Van Loan and Pitsianis 1993)."""
    side = math.isqrt(M.shape[0])
    rows = M.view(side, side, side, side).transpose(1, 2).reshape(M.shape)
    U, S, V = torch.linalg.svd(rows)
    best = S[0] * torch.outer(U[:, 0], V[0])
    return best.view(side, side, side, side).transpose(1, 2).reshape(M.shape)


def _averaged(M: torch.Tensor, lags: torch.Tensor) -> torch.Tensor:
    """M with every entry replaced by the mean over its lag."""
    sums = torch.zeros(int(lags.max()) + 1, dtype=M.dtype).index_add_(0, lags.flatten(), M.flatten())
    return (sums / lags.flatten().bincount())[lags]


def _lags(n: int) -> torch.Tensor:
    return torch.arange(n).unsqueeze(1) - torch.arange(n)


def circulant(M: torch.Tensor) -> torch.Tensor:
    return _averaged(M, _lags(M.shape[0]) % M.shape[0])


def toeplitz(M: torch.Tensor) -> torch.Tensor:
    return _averaged(M, _lags(M.shape[0]).abs())


# In the order of the claim, the worst first, with the numbers that each has to spend.
FAMILIES: dict[str, tuple[Callable, Callable[[int], int]]] = {
    "low rank": (low_rank, lambda n: 2 * n),
    "Kronecker": (kronecker, lambda n: 2 * n),
    "circulant": (circulant, lambda n: n),
    "Toeplitz": (toeplitz, lambda n: n),
}


def shifted(n: int, generator: torch.Generator) -> torch.Tensor:
    A = torch.rand(n, n, generator=generator, dtype=torch.float64)
    return (A + A.T) / 2 + n * torch.eye(n, dtype=torch.float64)


def stationary(n: int, generator: torch.Generator) -> torch.Tensor:
    series = torch.randn(n, 4 * n, generator=generator, dtype=torch.float64)
    for i in range(1, n):
        series[i] = CORRELATION * series[i - 1] + math.sqrt(1 - CORRELATION**2) * series[i]
    return series @ series.T / series.shape[1]


def wishart(n: int, generator: torch.Generator) -> torch.Tensor:
    G = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return G @ G.T / n


ENSEMBLES = {"shifted": shifted, "stationary": stationary, "wishart": wishart}


def run(folder: Path = files.FOLDER, n: int = N, trials: int = TRIALS) -> dict:
    """Relative errors of every family on `trials` matrices of each ensemble; seeds 0 to trials - 1. n: a square."""
    result = {"n": n, "seeds": list(range(trials)), "parameters": {f: count(n) for f, (_, count) in FAMILIES.items()}}
    result["ensembles"] = {name: _ensemble(draw, n, trials) for name, draw in ENSEMBLES.items()}
    files.write("psd", result, folder)
    _plot(result, folder)
    return result


def _ensemble(draw: Callable, n: int, trials: int) -> dict:
    errors = {family: [] for family in FAMILIES}
    for seed in range(trials):
        M = draw(n, torch.Generator().manual_seed(seed))
        for family, (approximate, _) in FAMILIES.items():
            errors[family].append(((M - approximate(M)).norm() / M.norm()).item())
    ordered = sum(list(each) == sorted(each, reverse=True) for each in zip(*errors.values(), strict=True))
    means = {family: files.spread(values) for family, values in errors.items()}
    return {
        "relative_error": means,
        "worst_to_best": sorted(means, key=lambda family: -means[family]["mean"]),
        "trials_in_the_papers_order": ordered,
        "errors": errors,
    }


def _plot(result: dict, folder: Path) -> None:
    figure, axes = files.axes(len(result["ensembles"]), 11, 3.2)
    for axis, (name, found) in zip(axes, result["ensembles"].items(), strict=True):
        means = found["relative_error"]
        bars = axis.bar(list(means), [m["mean"] for m in means.values()], yerr=[m["std"] for m in means.values()])
        axis.bar_label(bars, fmt="{:.4f}", fontsize="small")
        axis.set(title=f"{name}, n = {result['n']}", ylabel="relative error", ylim=(0, 1.1))
        axis.tick_params(axis="x", labelsize="small")
    files.picture("psd", figure, folder)


def report(result: dict) -> str:
    """Lines for people."""
    lines = []
    for name, found in result["ensembles"].items():
        means = ", ".join(f"{family} {m['mean']:.4f}" for family, m in found["relative_error"].items())
        trials = f"{found['trials_in_the_papers_order']} of {len(result['seeds'])}"
        lines.append(f"psd, {name}: {means}; in the paper's order in {trials} trials")
    return "\n".join(lines)
