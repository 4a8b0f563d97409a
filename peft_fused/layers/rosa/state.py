"""What a ROSA adapter needs beside its factors to be trained further, and the drawing of those anew."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.graph import increment_version

from ..lowrank import LowRankStep
from ..scheduled import Member, SavedState
from ..sharded import local, part_of, whole
from .subspace import SubspacePolicy, split_weight


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

    def chosen(self) -> tuple:
        return (self.layer, self.phase, self.start, self.digest())

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
class RosaMember(Member):
    """factors(): its two Parameters, which FSDP2 exchanges for others. resample(phase, agree): draws them anew."""

    method = "rosa"
    factors: Callable[[], tuple[nn.Parameter, nn.Parameter]]
    merged: bool
    resample: Callable


class SubspaceFactor(nn.Module):
    """weight: one of the two factors. Its content is pretrained: decay would pull that to zero, not the change."""

    spared_from_decay = True

    def __init__(self, *shape: int, dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))

    def extra_repr(self) -> str:
        return str(list(self.weight.shape))


class RosaStep(LowRankStep):
    """Raises RuntimeError where the base weight no longer goes with the factors, see `SubspaceHost.check_held`."""

    __slots__ = ("check_held",)

    def run(self, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        self.check_held()
        return LowRankStep.run(self, x, y)


class RosaAdapter(NamedTuple):
    """B (A x), with A [r, K] and B [N, r], wherever a layer keeps them, beside a weight without their part.

    check_held: of the layer.
    """

    A: nn.Parameter
    B: nn.Parameter
    state: RosaState
    check_held: Callable[[], None]

    on_output = False

    def step(self, x: torch.Tensor) -> LowRankStep:
        step = RosaStep(self.A, self.B, {}, self.state if self.state.training else None)
        step.check_held = self.check_held
        return step

    @torch.no_grad()
    def change(self) -> torch.Tensor:
        """All that the adapter has changed of the pretrained weight, [N, K] in fp64; collective if it is sharded."""
        return self.state.total_change(whole(self.A), whole(self.B))

    def delta(self) -> torch.Tensor:
        """The same in fp32 (fp64 for an fp64 layer)."""
        return self.change().to(self.state.dtype)

    def is_zero(self) -> bool:
        """Whether the adapter is as it was made, and so changes nothing."""
        return self.A.is_meta or self.B.is_meta or not self.change().any()
