"""ROSA as a plain PyTorch layer, and what any ROSA layer is made of: the split of a weight, and where its parts are.

ROSA, random subspace adaptation (Gamboa et al. 2024), moves a few singular directions of a weight into trainable
factors and leaves the rest frozen; the factors are drawn anew in the course of training. With the values A0, B0 that
the factors had when drawn, and the change `delta` learned before, what a layer computes with at any time is

    W = W0 + delta + B A - B0 A0

of which the base weight holds round(W0 + delta - B0 A0), computed in fp64 and rounded once, and the factors the rest.
W0 and the state that the change is made of are kept on the host: they are read when the factors are drawn and when the
base weight changes, and cost neither device memory nor, as buffers would, a broadcast per forward pass in DDP.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import increment_version

from ..draws import draw_int
from ..ops import lowrank_linear
from ..ops.dispatch import Problem, problem_of
from .adapted import AdaptedLinear
from .checks import (
    COMPUTED,
    MAKE_PERMANENT,
    MAX_RANK,
    check_adapter_dtype,
    check_choice,
    check_int,
    check_linear,
    check_rank,
    features,
    span,
)
from .scheduled import SavedState, check_saved_with
from .sharded import is_sharded, local, part_of, whole

__all__ = ["RosaLinear", "SubspacePolicy"]

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
# How far apart two devices' fp64 sums may be, in terms of the largest pretrained value.
SUM_ROUNDING = 64 * torch.finfo(torch.float64).eps


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


# ----------------------------------------------------------------------------------------------------- the base weight


def check_writable(name: str, base: nn.Module) -> None:
    """TypeError or ValueError if a module's weight cannot be split now."""
    if not isinstance(base._parameters.get("weight"), nn.Parameter):
        raise TypeError(
            f"{name}: the weight of this {type(base).__name__} {COMPUTED}; ROSA changes the weight in place, which "
            f"that would undo. {MAKE_PERMANENT}"
        )
    weight = base.weight
    if is_sharded(weight):
        raise ValueError(f"{name}: the weight is sharded already; ROSA has to be added before fully_shard")
    if weight.is_meta or isinstance(weight, FakeTensor):
        raise ValueError(
            f"{name}: the weight has no values (meta device, fake, or offloaded); ROSA splits and changes it"
        )
    if span(weight) < weight.numel():
        raise ValueError(
            f"{name}: elements of the weight share memory (shape {list(weight.shape)}, strides {weight.stride()}, as "
            "expand makes them); ROSA changes each by itself: give the layer a contiguous weight"
        )


def check_finite(name: str, weight: torch.Tensor) -> None:
    """ValueError if a weight has no singular directions."""
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}: the weight has values that are not finite, so that it has no singular directions")


class PretrainedWeight:
    """W0 on the host, in its own dtype and layout: this process's part of it if the weight is sharded."""

    def __init__(self, weight: torch.Tensor):
        self.values = local(weight).to("cpu", copy=True)

    def part(self, weight: torch.Tensor) -> torch.Tensor:
        """This process's part of W0, on the weight's device. The weight may have been sharded since W0 was taken."""
        held = local(weight)
        if self.values.shape != held.shape:
            self.values = part_of(self.values.to(held.device), weight).to("cpu", copy=True)
        return self.values.to(held.device)

    def whole(self, weight: torch.Tensor) -> torch.Tensor:
        """W0 on the weight's device; collective for a sharded one."""
        part = self.part(weight)
        if not is_sharded(weight):
            return part
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            part, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        ).full_tensor()

    def plus(self, weight: torch.Tensor, change: torch.Tensor | None) -> torch.Tensor:
        """This process's part of round(W0 + change), or of W0; change in the layout of the weight, whole."""
        part = self.part(weight)
        return (part if change is None else part + part_of(change, weight)).to(weight.dtype)

    def write(self, weight: torch.Tensor, change: torch.Tensor | None) -> None:
        """Sets the weight to that, in place."""
        local(weight).copy_(self.plus(weight, change))

    def is_in(self, weight: torch.Tensor, change: torch.Tensor | None) -> bool:
        """Whether this process's part of a weight is W0 + change, up to one rounding, as another device computes it."""
        expected, W0 = self.plus(weight, change), self.part(weight)
        if expected.numel() == 0:
            return True
        info = torch.finfo(weight.dtype)
        room = info.eps * expected.abs().double() + min(info.eps, SUM_ROUNDING) * W0.abs().max() + info.tiny
        return bool(((local(weight).double() - expected).abs() <= room).all())

    def adopt(
        self, weight: torch.Tensor, change: torch.Tensor | None, others: Iterable[torch.Tensor | None] = ()
    ) -> None:
        """Takes W0 from a weight that was loaded and should hold W0 + change: if it does not, it is of another W0.

        others: further changes with which it may have been saved; where it holds W0 plus one of them, W0 stays as well.
        """
        held = (self.is_in(weight, each) for each in chain([change], others))
        # Changes may be collective, so that for sharded weights all processes have to ask for all of them.
        if not any(list(held) if is_sharded(weight) else held):
            given = local(weight)
            found = given if change is None else (given - part_of(change, weight)).to(given.dtype)
            self.values = found.to("cpu", copy=True)


# ------------------------------------------------------------------------------------------------------------ the state


def _nothing() -> None:
    pass


class RosaState(SavedState):
    """What an adapter of one layer needs beside its factors to be trained further, or put on another copy of the model.

    Tensors on the host in fp32, fp64 for an fp64 layer; they are saved with the adapter:
    A0 [r, K], B0 [N, r]: the factors as they were drawn. P [n, K], Q [N, n], or dense [N, K] as soon as that is no
    larger: the change from before, delta = Q P or dense; those not in use are of size 0. phase: of the draw, the number
    of resamples done unless some were skipped. start: what is added to a phase counted from the beginning of the run
    under way; negative if a run on a new adapter counts from more than 0. on_load: called when all that was replaced by
    what was saved.
    """

    # phase, start, n, and whether the change is dense.
    HEADER = 4
    TENSORS = ("A0", "B0", "P", "Q", "dense")

    def __init__(
        self, r: int, in_features: int, out_features: int, policy: SubspacePolicy, dtype: torch.dtype,
        group: str = "default", layer: int | str = 0,
    ):  # fmt: skip
        super().__init__(group)
        self.r, self.in_features, self.out_features = r, in_features, out_features
        self.policy, self.dtype, self.layer = policy, dtype, layer
        self.phase = self.start = 0
        self.on_load: Callable[[], None] = _nothing
        self.A0, self.B0 = self._zeros(r, in_features), self._zeros(out_features, r)
        self._forget_delta()

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=self.dtype, device="cpu")

    def _forget_delta(self) -> None:
        self.P, self.Q = self._zeros(0, self.in_features), self._zeros(self.out_features, 0)
        self.dense = self._zeros(0, self.in_features)

    def unscheduled(self) -> str:
        return "ROSA has trained in the subspace it started with"

    def _delta(self, device: torch.device) -> torch.Tensor | None:
        """Change from before the factors were drawn, [N, K] in fp64; None if there is none."""
        if len(self.dense):
            return self.dense.to(device, torch.float64)
        return self.Q.to(device, torch.float64) @ self.P.to(device, torch.float64) if len(self.P) else None

    def frozen_change(self, device: torch.device) -> torch.Tensor:
        """delta - B0 A0, what the base weight has beside W0: [N, K] in fp64."""
        taken = self.B0.to(device, torch.float64) @ self.A0.to(device, torch.float64)
        delta = self._delta(device)
        return -taken if delta is None else delta - taken

    def total_change(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        """delta + B A - B0 A0, what layer and factors have beside W0: [N, K] in fp64. Nothing but zeros while the
        factors are as they were drawn.
        """
        left, right = self.moved(A, B)
        change = left @ right
        delta = self._delta(A.device)
        return change if delta is None else change + delta

    def moved(self, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """B A - B0 A0 as factors [N, 2 r], [2 r, K] in fp64, whose product has nothing to cancel."""
        A, B = A.double(), B.double()
        A0, B0 = self.A0.to(A), self.B0.to(B)
        return torch.cat([B, B - B0], 1), torch.cat([A - A0, A0])

    def absorb(self, A: torch.Tensor, B: torch.Tensor) -> None:
        """Counts what the factors learned since they were drawn as part of delta; `anchor` has to follow."""
        if torch.equal(A.to(self.A0), self.A0) and torch.equal(B.to(self.B0), self.B0):
            return
        left, right = self.moved(A, B)
        rank = len(self.P) + len(right)
        if len(self.dense) or rank * (self.in_features + self.out_features) >= self.in_features * self.out_features:
            dense = self.total_change(A, B).to("cpu", self.dtype)
            self._forget_delta()
            self.dense = dense
        else:
            self.P = torch.cat([self.P, right.to("cpu", self.dtype)])
            self.Q = torch.cat([self.Q, left.to("cpu", self.dtype)], 1)

    def anchor(self, A: torch.Tensor, B: torch.Tensor) -> None:
        """Notes the factors as drawn."""
        self.A0, self.B0 = (t.detach().to("cpu", self.dtype, copy=True) for t in (A, B))

    def is_untouched(self, A: torch.Tensor, B: torch.Tensor) -> bool:
        """Whether the adapter changes nothing, as when it was made."""
        if A.is_meta or B.is_meta:
            return True
        return not self.total_change(whole(A), whole(B)).any()

    def digest(self) -> str:
        """Of the factors as drawn, which all processes must have alike."""
        found = hashlib.blake2b(digest_size=8)
        for tensor in (self.A0, self.B0):
            found.update(tensor.contiguous().numpy().tobytes())
        return found.hexdigest()

    # ----------------------------------------------------------------------------------------------- saving and loading

    def get_extra_state(self) -> torch.Tensor:
        """All of it as one vector, the form in which it is part of state dicts: of phase, start, n, whether the change
        is dense, and the tensors that are in use. As buffers they would have to keep their shapes.
        """
        header = torch.tensor(
            [self.phase, self.start, len(self.P), len(self.dense) > 0], dtype=self.dtype, device="cpu"
        )
        return torch.cat([header, *(getattr(self, name).flatten() for name in self.TENSORS)])

    def take_over(self, state: torch.Tensor) -> None:
        state = state.to(self.dtype)
        phase, start, n, dense = map(int, state[: self.HEADER])
        parts = state[self.HEADER :].split([math.prod(shape) for shape in self._shapes(n, dense)])
        for name, shape, part in zip(self.TENSORS, self._shapes(n, dense), parts, strict=True):
            setattr(self, name, part.view(shape).clone())
        self.phase, self.start = phase, start
        self.on_load()

    def _shapes(self, n: int, dense: int) -> list[tuple[int, int]]:
        """Of TENSORS, for a change in n components or a dense one."""
        r, N, K = self.r, self.out_features, self.in_features
        return [(r, K), (N, r), (n, K), (N, n), (N * dense, K)]

    def why_not(self, state: torch.Tensor) -> str | None:
        header = state[: self.HEADER].tolist()
        phase, _, n, dense = header
        if any(value != int(value) for value in header) or min(phase, n, dense) < 0 or dense > 1 or (n and dense):
            return f"starts with {header}, which is no phase, start, and form of a change"
        wanted = self.HEADER + sum(math.prod(shape) for shape in self._shapes(int(header[2]), int(header[3])))
        if len(state) != wanted:
            sizes = f"r = {self.r} on [{self.out_features}, {self.in_features}]"
            return f"must have {wanted} numbers for {sizes}, got {len(state)}"
        return None

    def _apply(self, fn, recurse=True):
        # The state is on the host, and wide: neither a move nor a cast of the model is any of its business.
        return self

    def extra_repr(self) -> str:
        return f"r={self.r}, phase={self.phase}"


Maker = Callable[[], tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def draw_factors(
    state: RosaState, pretrained: torch.Tensor, A: nn.Parameter, B: nn.Parameter, phase: int,
    agree: Callable[[Maker, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]] | None = None,
) -> None:  # fmt: skip
    """Counts what A and B learned as part of delta, and draws them anew, in place: the function stays the same once the
    base weight is written again.

    pretrained: W0 as [N, K]. agree: called with what computes the factors, the weight and r, and returns what all
    processes are to use. ValueError, before anything has changed, if the weight is not finite.
    """
    with torch.autocast(A.device.type, enabled=False):
        all_A, all_B = whole(A), whole(B)
        W = (pretrained + state.total_change(all_A, all_B)).to(state.dtype)
        if not torch.isfinite(W).all():
            raise ValueError("the weight has values that are not finite, so that it has no singular directions")

        def make():
            return split_weight(W, state.r, state.policy, phase, state.layer)

        new = make() if agree is None else agree(make, W, state.r)
        new_A, new_B = (factor.to(p.dtype) for factor, p in zip(new, (A, B), strict=True))
        state.absorb(all_A, all_B)
        state.anchor(new_A, new_B)
        for parameter, factor in ((A, new_A), (B, new_B)):
            local(parameter).copy_(part_of(factor, parameter))
            increment_version(parameter)
        state.phase = phase


@dataclass(frozen=True)
class RosaMember:
    """One adapter of one layer as the ROSA schedule sees it.

    factors(): its two Parameters, which FSDP2 exchanges for others. resample(phase, agree): draws them anew.
    """

    method = "rosa"
    state: RosaState
    factors: Callable[[], tuple[nn.Parameter, nn.Parameter]]
    merged: bool
    resample: Callable

    def choices(self) -> tuple:
        """What all processes have to agree on."""
        state = self.state
        return (state.group, state.policy, state.layer, state.phase, state.start, state.digest())


class SubspaceHost:
    """A module whose base weight holds W0 without what its factors have. Mixin before nn.Module; subclasses define:

    base_weight(): the Parameter. transposed: whether it is [K, N]. WEIGHT: its name in this module's state dict.
    wanted(): a key for what the weight must hold now. wanted_change(): that as a change of W0, [N, K], or None.
    other_changes(): those with which the weight may have been saved elsewhere. suspended(): whether what the weight
    holds is only for a while, after which it will hold again what it did.
    """

    WEIGHT: str

    def keep_pretrained(self) -> None:
        """Takes the weight as it is for W0."""
        self._pretrained = PretrainedWeight(self.base_weight())
        self._holds = self._held_in_use = None
        self._written: tuple[torch.Tensor, int] | None = None  # the weight and its version, as left by `refresh`
        self._loading = self._weight_loaded = False
        self.register_load_state_dict_post_hook(_after_load)

    def _in_layout(self, change: torch.Tensor | None) -> torch.Tensor | None:
        return change.t() if change is not None and self.transposed else change

    def pretrained_nk(self) -> torch.Tensor:
        """W0 as [N, K] on the weight's device; collective if it is sharded."""
        values = self._pretrained.whole(self.base_weight())
        return values.t() if self.transposed else values

    def suspended(self) -> bool:
        return False

    @torch.no_grad()
    def refresh(self, force: bool = False) -> None:
        """Sets the base weight, in place, to what it must hold now. force: even if it should hold that already.

        A backward pass that needs the values from before raises autograd's error, except after `suspended` changes:
        those are undone by the time of the backward pass (`disable_adapter` between forward and backward).
        """
        wanted, suspended = self.wanted(), self.suspended()
        if force or wanted != self._holds:
            weight = self.base_weight()
            with torch.autocast(weight.device.type, enabled=False):
                self._pretrained.write(weight, self._in_layout(self.wanted_change()))
            self._holds = wanted
        if force or not (suspended or wanted == self._held_in_use):
            increment_version(self.base_weight())
        if not suspended:
            self._held_in_use = wanted
        self._note_written()

    def _note_written(self) -> None:
        weight = self.base_weight()
        self._written = None if weight.is_inference() else (weight, weight._version)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._note_written()  # which may be another tensor now
        return self

    def check_held(self) -> None:
        """RuntimeError if something else has written to the base weight what does not go with the factors, as averages
        of models over draws do (EMA). Where nothing has, it costs two comparisons.
        """
        if torch.compiler.is_compiling() or self._written is None:
            return
        weight, version = self._written
        # Another tensor is what FSDP gathers for the forward. A copy made in inference mode has no version.
        if weight is not self.base_weight() or weight.is_inference() or weight._version == version:
            return
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            if not self._pretrained.is_in(weight, self._in_layout(self.wanted_change())):
                raise RuntimeError(
                    "ROSA: the base weight was changed by something else than the adapter, and no longer goes with its "
                    "factors, as when a model is averaged over draws (EMA, AveragedModel), or loaded in part. Average "
                    "what evaluation uses after merging, or exported adapters; copy an adapter with "
                    "peft_fused.copy_adapter; load with load_state_dict or PEFT"
                )
        self._note_written()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self._loading, self._weight_loaded = True, prefix + self.WEIGHT in state_dict
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def loaded(self) -> None:
        """Makes the base weight follow state, or a W0, that was loaded."""
        weight = self.base_weight()
        if self._weight_loaded and not weight.is_meta:
            others = map(self._in_layout, self.other_changes())
            self._pretrained.adopt(weight, self._in_layout(self.wanted_change()), others)
        self._loading = self._weight_loaded = False
        self.refresh(force=True)

    def state_loaded(self) -> None:
        """For states loaded one by one, as transformers' models do: without a hook for when all is loaded."""
        if not self._loading:
            self.refresh(force=True)


def _after_load(module: SubspaceHost, incompatible_keys) -> None:
    module.loaded()


class SubspaceFactor(nn.Module):
    """weight: one of the two factors. Its content is pretrained: decay would pull that to zero, not the change."""

    spared_from_decay = True

    def __init__(self, *shape: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))

    def extra_repr(self) -> str:
        return str(list(self.weight.shape))


# ------------------------------------------------------------------------------------------------------------ the layer


class RosaLinear(SubspaceHost, AdaptedLinear):
    """y = x W_f^T + bias + B (A x) in one fused op, where B A are singular directions of the weight and W_f the rest.

    Source: ROSA, Gamboa et al. 2024. `peft_fused.on_step` draws A and B anew as resample_every says, or `resample`
    does. Made by `from_linear`. The Parameter `weight` is the base layer's, which it freezes but also changes, in
    place: it holds W_f, once merged the whole changed weight, and after `restore` the pretrained one.

    rosa_A.weight: [r, K], rosa_B.weight: [N, r].
    """

    op_name = "lowrank_linear"
    WEIGHT = "weight"

    def __init__(self, base: nn.Module, r: int | float, policy: SubspacePolicy, dtype, layer: int | str):
        check_linear("base", base)
        check_subspace_rank("r", r)
        dtype = check_adapter_dtype("dtype", dtype, base.weight.dtype)
        check_writable("base", base)
        check_finite("base", base.weight)
        if isinstance(layer, bool) or not isinstance(layer, int | str):
            raise TypeError(f"layer must be an int or a str, got {layer!r}")
        r = subspace_rank(r, *features(base))
        super().__init__(base)
        device = self.weight.device
        self.rosa_A = SubspaceFactor(r, self.in_features, dtype=dtype, device=device)
        self.rosa_B = SubspaceFactor(self.out_features, r, dtype=dtype, device=device)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        self.rosa_state = RosaState(r, self.in_features, self.out_features, policy, wide, layer=layer)
        self._merged = self._restored = False
        self.keep_pretrained()
        self._draw(0)

    @classmethod
    def from_linear(
        cls,
        base: nn.Module,
        *,
        r: int | float = 8,
        split: str = "us_v",
        sample: str = "random",
        resample_every: str | int = EPOCH,
        seed: int = 0,
        layer: int | str = 0,
        dtype=None,
    ) -> "RosaLinear":
        """An adapted layer that shares the weight and bias Parameters of `base`, freezes them, and changes the weight.

        base: torch.nn.Linear or transformers' Conv1D, weight in fp32, fp16, bf16 or fp64. r: 1..256, at most the
        smaller size of the weight; or in (0, 1), a fraction of that. layer: number or name, so that layers with the
        same seed draw differently. dtype: of A and B, by default fp32. The rest: see `SubspacePolicy`. Raises TypeError
        or ValueError naming the argument, the value and what is allowed.
        """
        return cls(base, r, SubspacePolicy(split, sample, resample_every, seed), dtype, layer)

    @property
    def merged(self) -> bool:
        return self._merged

    def base_weight(self) -> torch.Tensor:
        return self.weight

    def wanted(self) -> str:
        return "restored" if self._restored else "merged" if self._merged else "frozen"

    def wanted_change(self) -> torch.Tensor | None:
        if self._restored:
            return None
        if self._merged:
            return self.rosa_state.total_change(*map(whole, self.factors()))
        return self.rosa_state.frozen_change(self.weight.device)

    def other_changes(self) -> Iterator[torch.Tensor | None]:
        yield None
        yield self.rosa_state.total_change(*map(whole, self.factors()))
        yield self.rosa_state.frozen_change(self.weight.device)

    def _draw(self, phase: int, agree=None) -> None:
        draw_factors(self.rosa_state, self.pretrained_nk(), *self.factors(), phase, agree)
        self.refresh(force=True)

    def resample(self, phase: int, agree=None) -> None:
        """Draws A and B anew, the draw being a function of seed, layer and phase; the layer computes what it did.

        What an optimizer keeps of the old A and B is not reset; `peft_fused.on_step` does so. RuntimeError if merged.
        """
        check_int("phase", phase)
        self._check_in_use("resample")
        if self._merged:
            raise RuntimeError("resample: this layer is merged; call unmerge() first")
        self._draw(phase, agree)

    def _check_in_use(self, caller: str) -> None:
        if self._restored:
            raise RuntimeError(f"{caller}: the pretrained weight was put back by restore(), which ends the layer's use")

    def schedule_members(self) -> list[RosaMember]:
        if self._restored:
            return []
        return [RosaMember(self.rosa_state, self.factors, self._merged, self.resample)]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        factors = (f"{prefix}rosa_A.weight", f"{prefix}rosa_B.weight")
        check_saved_with(factors, self.rosa_state, f"{prefix}rosa_state", state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A [r, K] and B [N, r]."""
        return self.rosa_A.weight, self.rosa_B.weight

    def delta(self) -> torch.Tensor:
        """The dense change of the pretrained weight so far, [N, K] in fp32 (fp64 for an fp64 layer)."""
        with torch.no_grad():
            change = self.rosa_state.total_change(*map(whole, self.factors()))
        return change.to(self.rosa_state.dtype)

    def merge(self) -> None:
        """Sets the base weight to round(W0 + delta()), which the forward pass then uses alone.

        Raises RuntimeError if the layer is merged already.
        """
        self._check_in_use("merge")
        if self._merged:
            raise RuntimeError("merge: this layer is merged already; call unmerge() first")
        self._merged = True
        self.refresh()

    def unmerge(self) -> None:
        """Puts back, bit for bit, the weight that `merge` replaced. Raises RuntimeError if the layer is not merged."""
        if not self._merged:
            raise RuntimeError("unmerge: this layer is not merged")
        self._merged = False
        self.refresh()

    def restore(self) -> None:
        """Puts back the pretrained weight, bit for bit, for the base layer to be used without this one."""
        self._merged, self._restored = False, True
        self.refresh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., K] in the base weight's dtype. Returns [..., N]."""
        return self.base(x) if self._merged or self._restored else self.adapted(x)

    def adapted(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.rosa_state.count_forward()
        self.check_held()
        return lowrank_linear(x, self.weight_nk(), self.bias, *self.factors())

    def op_problem(self, rows: int) -> Problem | None:
        """What a forward pass on x [rows, K] gives lowrank_linear; None if it does not call it."""
        if self._merged or self._restored:
            return None
        x = self.weight.new_empty(1, self.in_features).expand(rows, -1)
        return problem_of(x, *self.factors(), has_weight=True, dropout=False)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.rosa_state.r}"
