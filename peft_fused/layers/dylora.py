"""DyLoRA as a plain PyTorch layer, and the state by which a schedule tells any DyLoRA layer its rank."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from .checks import check_alpha, check_choice, check_flag, check_int, check_rank
from .lowrank import LowRankLinear, LowRankStep
from .scheduled import Member, PlacedState

__all__ = ["DyLoraLinear", "RankPolicy"]

DISTRIBUTIONS = ("uniform", "geometric")
RESAMPLE = ("step", "micro")


@dataclass(frozen=True)
class RankPolicy:
    """How the rank b of a step is drawn and what it trains. (DyLoRA, Valipour et al. 2023, eq. 5-7.)

    r_min: least rank drawn. rank_distribution: uniform, or geometric with probability geometric_p, both over r_min..r.
    resample: draw per optimizer step, or per micro-batch of an accumulated step. frozen: only row b of A and column b
    of B are trained. strict_frozen: what gets no gradient is kept from moving by momentum or weight decay too. seed:
    of the draws. Raises TypeError or ValueError naming the field.
    """

    r_min: int = 1
    rank_distribution: str = "uniform"
    geometric_p: float = 0.15
    resample: str = "step"
    frozen: bool = False
    strict_frozen: bool = False
    seed: int = 0

    def __post_init__(self):
        check_rank("r_min", self.r_min)
        check_choice("rank_distribution", self.rank_distribution, DISTRIBUTIONS)
        check_alpha("geometric_p", self.geometric_p)
        if not 0.0 < self.geometric_p < 1.0:
            raise ValueError(f"geometric_p must be in (0, 1), got {self.geometric_p}")
        if self.rank_distribution != "geometric" and self.geometric_p != RankPolicy.geometric_p:
            raise ValueError(
                f"geometric_p is an option of rank_distribution='geometric', got {self.geometric_p} with "
                f"{self.rank_distribution!r}"
            )
        check_choice("resample", self.resample, RESAMPLE)
        check_flag("frozen", self.frozen)
        check_flag("strict_frozen", self.strict_frozen)
        check_int("seed", self.seed)

    def check_r(self, r: int) -> None:
        """ValueError if r_min does not leave a rank to draw."""
        if self.r_min > r:
            raise ValueError(f"r_min must be in 1..r = 1..{r}, got {self.r_min}")


class RankState(PlacedState):
    """The rank and scale of one adapter of one layer, for training and for evaluation, as 0-d tensors on its device.

    They are written in place, so that neither a compiled nor a captured forward pass has to be made anew when the rank
    changes. A schedule derives them from its seed and the step.
    """

    def __init__(self, r: int, alpha: float, policy: RankPolicy, group: str = "default", use_rslora: bool = False):
        super().__init__(group)
        policy.check_r(r)
        self.r, self.alpha, self.policy, self.use_rslora = r, alpha, policy, use_rslora
        self.train_value = self.eval_value = r
        # Ranks that contributed gradients to the optimizer step under way, and what strict_frozen keeps of the others
        # during its update.
        self.used = {r}
        self.kept: list = []
        self.scale_dtype = torch.float32
        self.place(torch.empty(0).device)  # where modules are made now

    def scale_at(self, rank: int) -> float:
        """alpha / b of eq. 5, or alpha / sqrt(b)."""
        return self.alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def controls(self, training: bool, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(rank, scale) of a forward pass in training or evaluation mode, on the device of its input x.

        The scale is kept in fp64 for fp64 inputs, in fp32 for all others.
        """
        before, self.scale_dtype = self.scale_dtype, torch.float64 if x.dtype == torch.float64 else torch.float32
        self.follow(x.device, anew=self.scale_dtype != before)
        return (self.train_rank, self.train_scale) if training else (self.eval_rank, self.eval_scale)

    def unscheduled(self) -> str:
        return f"DyLoRA has trained at the fixed rank {self.train_value}"

    def follow_state(self, other: "RankState") -> None:
        super().follow_state(other)
        write_ranks([self], train=[other.train_value], evaluation=[other.eval_value])
        self.used = set(other.used)

    @property
    def device(self) -> torch.device:
        return self.train_rank.device

    def place(self, device: torch.device) -> None:
        for name in ("train", "eval"):
            setattr(self, f"{name}_rank", torch.empty((), dtype=torch.int64, device=device))
            setattr(self, f"{name}_scale", torch.empty((), dtype=self.scale_dtype, device=device))
        write_ranks([self], train=[self.train_value], evaluation=[self.eval_value])

    def chosen(self) -> tuple:
        return (self.train_value,)

    def extra_repr(self) -> str:
        return f"r={self.r}, train={self.train_value}, eval={self.eval_value}"


@torch.no_grad()
def write_ranks(
    states: list[RankState], *, train: list[int] | None = None, evaluation: list[int] | None = None
) -> None:
    """Sets the ranks of all states, and their scales, by a few fused in-place kernels and without a sync."""
    for name, values in (("train", train), ("eval", evaluation)):
        if values is None or not states:
            continue
        for state, value in zip(states, values, strict=True):
            setattr(state, f"{name}_value", value)
        scales = [state.scale_at(value) for state, value in zip(states, values, strict=True)]
        for field, numbers in (("rank", values), ("scale", scales)):
            tensors = [getattr(state, f"{name}_{field}") for state in states]
            torch._foreach_zero_(tensors)
            torch._foreach_add_(tensors, numbers)


def use_ranks(states: list[RankState], ranks: list[int]) -> None:
    """Sets the ranks of evaluation, and of training until the schedule's next step."""
    write_ranks(states, train=ranks, evaluation=ranks)
    for state, rank in zip(states, ranks, strict=True):
        state.used = state.used | {rank}


@dataclass(frozen=True)
class RankMember(Member):
    method = "dylora"
    A: nn.Parameter
    B: nn.Parameter
    merged: bool


class DyLoraAdapter(NamedTuple):
    """(alpha / b) B[:, :b] A[:b] drop(x), with A [r, K] and B [N, r], wherever a layer keeps them; b is in `ranks`."""

    A: nn.Parameter
    B: nn.Parameter
    ranks: RankState
    dropout: nn.Dropout

    on_output = False

    def step(self, x: torch.Tensor) -> LowRankStep:
        ranks, dropout = self.ranks, self.dropout
        training = ranks.training
        rank, scale = ranks.controls(training, x)
        options = {
            "scale": scale, "rank": rank, "dropout_p": dropout.p if dropout.training else 0.0,
            "frozen": ranks.policy.frozen,
        }  # fmt: skip
        return LowRankStep(self.A, self.B, options, ranks if training else None)

    def delta(self) -> torch.Tensor:
        """The dense change of the weight at the evaluation rank, [N, K], in fp32 (fp64 for fp64 factors)."""
        b, dtype = self.ranks.eval_value, torch.promote_types(self.A.dtype, torch.float32)
        return self.ranks.scale_at(b) * (self.B[:, :b].to(dtype) @ self.A[:b].to(dtype))

    def is_zero(self) -> bool:
        """Whether the adapter is as it was made, and so changes nothing."""
        return self.B.is_meta or not self.B.any()

    def member(self, merged: bool) -> RankMember:
        return RankMember(self.ranks, self.A, self.B, merged)


class DyLoraLinear(LowRankLinear):
    """y = x W^T + bias + (alpha / b) B[:, :b] A[:b] drop(x) in one fused op, with b set from outside.

    Source: DyLoRA, Valipour et al. 2023, eq. 5-7. In training mode b is what `peft_fused.on_step` drew for this step (r
    until it is called), in evaluation mode what `peft_fused.set_dylora_rank` asked for (r by default). Made by
    `from_linear`; `merge`, `unmerge` and `delta` work at the evaluation rank.
    """

    def __init__(self, base, r, alpha, dropout, use_rslora, dtype, policy: RankPolicy):
        policy.check_r(check_rank("r", r))
        super().__init__(base, r, alpha, dropout, use_rslora, dtype)
        self.ranks = RankState(r, alpha, policy, use_rslora=use_rslora).to(self.weight.device)

    @classmethod
    def from_linear(
        cls,
        base: nn.Module,
        *,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        use_rslora: bool = False,
        dtype=None,
        r_min: int = 1,
        rank_distribution: str = "uniform",
        geometric_p: float = 0.15,
        resample: str = "step",
        frozen: bool = False,
        strict_frozen: bool = False,
        seed: int = 0,
    ) -> "DyLoraLinear":
        """An adapted layer that shares, and freezes, the weight and bias Parameters of `base`.

        base: torch.nn.Linear or transformers' Conv1D, weight in fp32, fp16, bf16 or fp64. r: 1..256, the largest rank.
        dropout: in [0, 1), on the adapter's input, in training only. use_rslora: scale alpha / sqrt(b). dtype: of A
        and B, by default fp32. The rest: see `RankPolicy`; layers with equal policies share one draw, over r_min to the
        largest r. Raises TypeError or ValueError naming the argument, the value and what is allowed.
        """
        check_flag("use_rslora", use_rslora)
        policy = RankPolicy(r_min, rank_distribution, geometric_p, resample, frozen, strict_frozen, seed)
        return cls(base, r, alpha, dropout, use_rslora, dtype, policy)

    def adapter(self) -> DyLoraAdapter:
        return DyLoraAdapter(*self.factors(), self._modules["ranks"], self._modules["dropout"])

    def schedule_members(self) -> list[RankMember]:
        return [self.adapter().member(self.merged)]
