"""The singular directions that ROSA trains: which, and as which factors."""

import math
from dataclasses import dataclass

import torch

from ...draws import draw_int
from ..checks import MAX_RANK, check_choice, check_int, check_rank

SPLITS = ("us_v", "sqrt")
SAMPLES = ("random", "window", "top", "bottom")
EPOCH = "epoch"
# Of the randomised decomposition: worth it while the rank is this much smaller than the matrix.
RANDOMISED_BELOW = 1 / 8
OVERSAMPLING, POWER_ITERATIONS = 16, 6
# And right if its residuals are at most this much of the last singular value that is used.
RESIDUAL = 1e-4
# Of a fraction of a size, which may come out below the whole number that it is meant to be (0.29 * 100).
FRACTION_ROUNDING = 1e-9


@dataclass(frozen=True)
class SubspacePolicy:
    """Which singular directions are trained, as which factors, and for how long.

    split: "us_v", as in the authors' code, puts the singular values on A and leaves B orthonormal; "sqrt", as in the
    workshop paper, puts their roots on both. sample: "random" directions without replacement, a "window" of consecutive
    ones (what the authors' code draws), the "top" or the "bottom" ones. resample_every: "epoch", or a number of
    optimizer steps. seed: of the draws. Raises TypeError or ValueError naming the field.
    """

    split: str = "us_v"
    sample: str = "random"
    resample_every: str | int = EPOCH
    seed: int = 0

    def __post_init__(self):
        check_choice("split", self.split, SPLITS)
        check_choice("sample", self.sample, SAMPLES)
        if isinstance(self.resample_every, str):
            if self.resample_every != EPOCH:
                raise ValueError(f"resample_every must be 'epoch' or a number of steps, got {self.resample_every!r}")
        else:
            check_int("resample_every", self.resample_every, 1)
        check_int("seed", self.seed)


def check_subspace_rank(name: str, value) -> int | float:
    """The value, if it is an int in 1..256 or a float in (0, 1). TypeError or ValueError naming it otherwise."""
    if not isinstance(value, float):
        return check_rank(name, value)
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} must be an int, or a fraction in (0, 1), got {value}")
    return value


def subspace_rank(value: int | float, in_features: int, out_features: int) -> int:
    """The rank that an int, or a fraction of the smaller size, is for a layer. ValueError if it is too large for it."""
    least = min(in_features, out_features)
    r = max(1, math.floor(value * least + FRACTION_ROUNDING)) if isinstance(value, float) else value
    most = min(least, MAX_RANK)
    if r > most:
        fraction = f" (r={value} of {least})" if isinstance(value, float) else ""
        raise ValueError(f"r must be in 1..{most} for a weight of [{out_features}, {in_features}], got {r}{fraction}")
    return r


def draw_directions(policy: SubspacePolicy, r: int, most: int, phase: int, layer: int | str = 0) -> list[int]:
    """The r of the singular directions 0..most-1, largest first, that a layer trains in a phase.

    A pure function of its arguments; ascending. layer: number or name, so that layers with one seed draw differently.
    """
    key = dict(seed=policy.seed, step=phase, purpose="rosa subspace", layer=layer)
    if policy.sample == "random":
        found = list(range(most))
        for i in range(r):
            j = draw_int(i, most - 1, index=i, **key)
            found[i], found[j] = found[j], found[i]
        return sorted(found[:r])
    start = {"top": 0, "bottom": most - r}.get(policy.sample)
    if start is None:
        start = draw_int(0, most - r, **key)
    return list(range(start, start + r))


def split_weight(
    W: torch.Tensor, r: int, policy: SubspacePolicy, phase: int, layer: int | str = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(A [r, K], B [N, r]) with B A the part of W [N, K] that lies in the directions drawn. fp32 or fp64, as W.

    A few of the top directions are found without the whole decomposition where W's singular values fall off enough.
    """
    most = min(W.shape)
    directions = draw_directions(policy, r, most, phase, layer)
    few = policy.sample == "top" and r <= most * RANDOMISED_BELOW
    found = _top_directions(W, r, min(most, r + OVERSAMPLING)) if few else None
    U, S, V = torch.linalg.svd(W, full_matrices=False) if found is None else found
    index = torch.tensor(directions, device=W.device)
    U, S, V = U[:, index], S[index], V[index]
    if policy.split == "us_v":
        return S[:, None] * V, U
    root = S.sqrt()
    return root[:, None] * V, U * root


def _top_directions(W: torch.Tensor, r: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """U, S, V of W's largest singular values, the first r of them accurate. (Halko et al. 2011, algorithms 4.4, 5.1.)

    count: of those iterated on. None if they have not converged, as happens where singular values lie close together.
    Always of the same random start, which is no torch generator's.
    """
    start = torch.randn(W.shape[1], count, generator=torch.Generator().manual_seed(0), dtype=W.dtype)
    basis = torch.linalg.qr(W @ start.to(W.device)).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(W @ torch.linalg.qr(W.t() @ basis).Q).Q
    U, S, V = torch.linalg.svd(basis.t() @ W, full_matrices=False)
    U, S, V = (basis @ U)[:, :r], S[:r], V[:r]
    residuals = (W @ V.t() - U * S).norm(dim=0), (W.t() @ U - V.t() * S).norm(dim=0)
    return (U, S, V) if (torch.cat(residuals) <= RESIDUAL * S[-1]).all() else None
