"""AFLoRA as a plain PyTorch layer, and the state by which a schedule freezes its projection matrices."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from .checks import check_adapter_dtype, check_alpha, check_choice, check_flag, check_int, check_linear
from .lowrank import LowRankLinear, LowRankStep
from .scheduled import Member, SavedState, check_saved_with
from .sharded import is_sharded, local, shard, whole

__all__ = ["AfLoraLinear", "FreezingPolicy"]

MATRICES = ("A", "B")
RAMPS = ("cubic", "quadratic")
RULES = ("paper", "code")
# What frozen_at holds of a matrix that is trained, and of one that never was; others hold the steps done until then.
NOT_FROZEN, FROM_THE_START = -1, 0
# Per matrix: the running sum of |gradient| in the window, and the two averages that it goes into.
STATISTICS = ("window", "mean", "change")
# Numbers in a saved state before the marks of what statistics follow.
MARKS = 3
# t_i and t_f in steps are products of a fraction and the number of steps.
ROUNDING = 1e-9


@dataclass(frozen=True)
class FreezingPolicy:
    """When the projection matrices are frozen, and which. (AFLoRA, Liu et al. 2024, sec. 3.)

    t_i: nothing is frozen before. t_f: everything is frozen for that long at the end. Both are a fraction of the run
    (float) or a number of steps (int). ramp: how the frozen share grows in between, "cubic", fast at first, as the
    paper's, or "quadratic", slow at first, as the authors' on LLaMA; see `peft_fused.methods.freezing_fraction`. rule:
    "paper" freezes that share, least scores first; "code" what the authors' program freezes, every matrix whose mean
    score is below that quantile of all elements' scores. beta1, beta2: of the averages of |gradient| and of its change.
    window: steps whose |gradient| is averaged before it enters those, and between decisions in the ramp. Raises
    TypeError or ValueError naming the field.
    """

    t_i: float | int = 0.05
    t_f: float | int = 0.7
    ramp: str = "cubic"
    rule: str = "paper"
    beta1: float = 0.85
    beta2: float = 0.95
    window: int = 10

    def __post_init__(self):
        for name in ("t_i", "t_f"):
            value = check_alpha(name, getattr(self, name))
            if isinstance(value, float) and not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} must be a fraction in [0, 1] (float) or a number of steps (int), got {value}")
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if isinstance(self.t_i, float) and isinstance(self.t_f, float) and self.t_i + self.t_f > 1.0:
            raise ValueError(f"t_i + t_f must be at most 1, got {self.t_i} + {self.t_f}")
        check_choice("ramp", self.ramp, RAMPS)
        check_choice("rule", self.rule, RULES)
        for name in ("beta1", "beta2"):
            if not 0.0 <= check_alpha(name, getattr(self, name)) < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        check_int("window", self.window, 1)

    def bounds(self, total_steps: int) -> tuple[float, float]:
        """(last step of the start, last step of the ramp). ValueError if t_i and t_f exceed the run."""
        start, final = (t * total_steps if isinstance(t, float) else t for t in (self.t_i, self.t_f))
        if start + final > total_steps * (1 + ROUNDING):
            raise ValueError(
                f"t_i + t_f must be at most total_steps = {total_steps}, got t_i={self.t_i} ({start:g} steps) and "
                f"t_f={self.t_f} ({final:g} steps)"
            )
        return start, max(start, total_steps - final)


class AfLoraState(SavedState):
    """Which matrices of one adapter of one layer are frozen, and the statistics of those that are not.

    frozen_at: {"A", "B"} -> optimizer steps done when it was frozen, 0 for one that never was trained, -1 for one that
    is. gradients: how many have entered the window. The statistics of a matrix are three tensors of its shape in fp32,
    sharded as it is; they are there from its first gradient until it is frozen.

    They are no buffers: DistributedDataParallel would send those to every process in every forward pass.
    """

    HEADER = MARKS + len(MATRICES)
    WITHOUT = "matrices that are frozen would train again"

    def __init__(self, r: int, features: tuple[int, int], policy: FreezingPolicy, frozen: bool, group: str = "default"):
        """features: (input, output) of the layer. frozen: both matrices from the start."""
        super().__init__(group)
        self.policy = policy
        self.shapes = {"A": (r, features[0]), "B": (features[1], r)}
        self.frozen_at = dict.fromkeys(MATRICES, FROM_THE_START if frozen else NOT_FROZEN)
        self.gradients = 0
        self.kept: dict[str, list[torch.Tensor]] = {}

    def is_frozen(self, matrix: str) -> bool:
        return self.frozen_at[matrix] != NOT_FROZEN

    def statistics(self, matrix: str, parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(window, mean, change) of a matrix that is not frozen, made on its first gradient; of its local shard."""
        kept = self.kept.get(matrix)
        if kept is None:
            kept = [torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False) for _ in STATISTICS]
        elif is_sharded(parameter) and not is_sharded(kept[0]):  # loaded before the parameters were sharded
            kept = [shard(tensor.to(parameter.device), parameter) for tensor in kept]
        elif kept[0].device != parameter.device:
            kept = [tensor.to(parameter.device) for tensor in kept]
        self.kept[matrix] = kept
        return tuple(map(local, kept))

    def freeze(self, matrix: str, steps: int) -> None:
        """Notes that a matrix was frozen after that many steps, for good, and drops its statistics."""
        self.frozen_at[matrix] = steps
        self.kept.pop(matrix, None)

    def unscheduled(self) -> str:
        return "AFLoRA has trained without freezing anything"

    # ----------------------------------------------------------------------------------------------- saving and loading

    def get_extra_state(self) -> torch.Tensor:
        """All of it as one vector, the form in which it is part of state dicts: of frozen_at, gradients, which matrices
        have statistics, those statistics, and zeros up to a length that is always the same, as distributed checkpoints
        need it. Collective for sharded statistics.
        """
        numbers = [*self.frozen_at.values(), self.gradients, *(matrix in self.kept for matrix in MATRICES)]
        state = torch.zeros(self._length(MATRICES), device="cpu")
        state[: self.HEADER] = torch.tensor(numbers, dtype=torch.float32)
        kept = [whole(tensor).flatten().cpu() for matrix in MATRICES for tensor in self.kept.get(matrix, ())]
        if kept:
            kept = torch.cat(kept)
            state[self.HEADER : self.HEADER + len(kept)] = kept
        return state

    def take_over(self, state: torch.Tensor) -> None:
        *frozen_at, gradients = map(int, state[:MARKS].tolist())
        self.frozen_at, self.gradients = dict(zip(MATRICES, frozen_at, strict=True)), gradients
        self.kept, start = {}, self.HEADER
        for matrix in _marked(state):
            shape = self.shapes[matrix]
            size = len(STATISTICS) * math.prod(shape)
            self.kept[matrix] = list(state[start : start + size].float().clone().view(-1, *shape))
            start += size

    def unpadded(self, state: torch.Tensor) -> torch.Tensor:
        """What `get_extra_state` returned without the zeros at the end."""
        return state[: self._length(_marked(state))].clone()

    def _length(self, matrices: Iterable[str]) -> int:
        return self.HEADER + sum(len(STATISTICS) * math.prod(self.shapes[matrix]) for matrix in matrices)

    def why_not(self, state: torch.Tensor) -> str | None:
        header = state[: self.HEADER].tolist()
        whole_numbers = all(number == int(number) for number in header)
        if not whole_numbers or min(header[:2]) < NOT_FROZEN or min(header[2:]) < 0 or max(header[MARKS:]) > 1:
            return f"starts with {header}, which is no frozen_at of A and B, number of gradients, and two marks"
        for matrix, frozen_at in zip(MATRICES, header, strict=False):
            if frozen_at != NOT_FROZEN and matrix in _marked(state):
                return f"has statistics of {matrix}, which it says is frozen"
        wanted = [self._length(_marked(state)), self._length(MATRICES)]
        if len(state) not in wanted:
            return f"must have {wanted[0]} or {wanted[1]} numbers for matrices {self.shapes}, got {len(state)}"
        return None

    def chosen(self) -> tuple:
        return tuple(self.frozen_at.values())

    def extra_repr(self) -> str:
        names = {NOT_FROZEN: "trained", FROM_THE_START: "frozen from the start"}
        return ", ".join(f"{m} {names.get(at, f'frozen after step {at}')}" for m, at in self.frozen_at.items())


def _marked(state: torch.Tensor) -> list[str]:
    """The matrices whose statistics a saved state says it has."""
    return [matrix for matrix, mark in zip(MATRICES, state[MARKS : AfLoraState.HEADER].tolist(), strict=True) if mark]


@dataclass(frozen=True)
class AfLoraMember(Member):
    """b: the vector on the output, trained while the adapter is."""

    method = "aflora"
    A: nn.Parameter
    B: nn.Parameter
    b: nn.Parameter

    @property
    def trains(self) -> bool:
        """Whether the adapter is being trained at all, rather than inactive or loaded for inference."""
        return self.b.requires_grad


def keep_frozen(state: AfLoraState, A: nn.Parameter, B: nn.Parameter, trains: bool) -> None:
    """Sets whether the matrices get gradients: they do if the adapter trains and the schedule has not frozen them."""
    for matrix, parameter in zip(MATRICES, (A, B), strict=True):
        wanted = trains and not state.is_frozen(matrix)
        if parameter.requires_grad != wanted and parameter.is_leaf:
            parameter.requires_grad_(wanted)


def draw_factors(A: torch.Tensor, B: torch.Tensor) -> None:
    """Fills A [r, K] and B [N, r] uniformly within sqrt(6 / fan_in), as the authors' program does."""
    nn.init.kaiming_uniform_(A)
    nn.init.kaiming_uniform_(B)


class AfLoraAdapter(NamedTuple):
    """scale * b . (B (d . (A drop(x)))), with A [r, K], B [N, r], d [r] and b [N], wherever a layer keeps them."""

    A: nn.Parameter
    B: nn.Parameter
    d: nn.Parameter
    b: nn.Parameter
    state: AfLoraState
    scale: float
    dropout: nn.Dropout

    on_output = False

    def step(self, x: torch.Tensor) -> LowRankStep:
        state, dropout = self.state, self.dropout
        options = {
            "u": self.d, "v": self.b, "scale": self.scale, "dropout_p": dropout.p if dropout.training else 0.0
        }  # fmt: skip
        return LowRankStep(self.A, self.B, options, state if state.training and self.b.requires_grad else None)

    def delta(self) -> torch.Tensor:
        """scale * diag(b) B diag(d) A, [N, K], in fp32 (fp64 for fp64 factors)."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        A, B, d, b = (t.to(dtype) for t in self[:4])
        return self.scale * ((b.unsqueeze(1) * B * d) @ A)

    def is_zero(self) -> bool:
        """Whether the adapter is as it was made, and so changes nothing."""
        return self.b.is_meta or not self.b.any()

    def member(self) -> AfLoraMember:
        return AfLoraMember(self.state, self.A, self.B, self.b)

    def keep_frozen(self) -> None:
        """Sets whether the matrices get gradients: if the adapter trains and the schedule has not frozen them."""
        keep_frozen(self.state, self.A, self.B, self.b.requires_grad)


class AfLoraLinear(LowRankLinear):
    """y = x W^T + bias + scale * b . (B (d . (A drop(x)))) in one fused op.

    Source: AFLoRA, Liu et al. 2024. The vectors lora_d [r] and lora_b [N] always train; lora_A [r, K] and lora_B [N, r]
    until `peft_fused.on_step` freezes them, after which no kernel computes their gradients and, for A, the input is not
    kept for backward. Made by `from_linear`; a state dict holds what a resumed run needs.
    """

    def __init__(self, base, r, alpha, dropout, dtype, policy: FreezingPolicy, d_initial: float, frozen: bool):
        check_linear("base", base)
        most = torch.finfo(check_adapter_dtype("dtype", dtype, base.weight.dtype)).max
        if not abs(d_initial) <= most:
            raise ValueError(f"d_initial must be at most {most:g} in the adapter's dtype, got {d_initial}")
        super().__init__(base, r, r if alpha is None else alpha, dropout, False, dtype)
        self.lora_d = nn.Parameter(self.lora_A.new_full((r,), d_initial))
        self.lora_b = nn.Parameter(self.lora_A.new_zeros(self.out_features))
        features = (self.in_features, self.out_features)
        self.freezing = AfLoraState(r, features, policy, frozen)
        self.adapter().keep_frozen()
        self.register_load_state_dict_post_hook(_after_load)

    @classmethod
    def from_linear(
        cls,
        base: nn.Module,
        *,
        r: int = 4,
        alpha: float | None = None,
        dropout: float = 0.0,
        dtype=None,
        d_initial: float = 0.1,
        frozen: bool = False,
        t_i: float | int = 0.05,
        t_f: float | int = 0.7,
        ramp: str = "cubic",
        rule: str = "paper",
        beta1: float = 0.85,
        beta2: float = 0.95,
        window: int = 10,
    ) -> "AfLoraLinear":
        """An adapted layer that shares, and freezes, the weight and bias Parameters of `base`.

        base: torch.nn.Linear or transformers' Conv1D, weight in fp32, fp16, bf16 or fp64. r: 1..256. alpha: the scale
        is alpha / r, or 1 for None. dropout: in [0, 1), on the adapter's input, in training only. dtype: of the
        adapter, by default fp32. d_initial: start of lora_d. frozen: A and B stay as drawn, as the paper has it in the
        attention. The rest: see `FreezingPolicy`; the layers with equal policies share one schedule. Raises TypeError
        or ValueError naming the argument, the value and what is allowed.
        """
        d_initial = float(check_alpha("d_initial", d_initial))
        check_flag("frozen", frozen)
        policy = FreezingPolicy(t_i, t_f, ramp, rule, beta1, beta2, window)
        return cls(base, r, alpha, dropout, dtype, policy, d_initial, frozen)

    def reset_parameters(self) -> None:
        """Draws A and B; neither is zero, the adapter starts as a change of nothing because lora_b does."""
        draw_factors(self.lora_A, self.lora_B)

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def adapter(self) -> AfLoraAdapter:
        d, b, modules = self.lora_d, self.lora_b, self._modules
        return AfLoraAdapter(*self.factors(), d, b, modules["freezing"], self.scale, modules["dropout"])

    def schedule_members(self) -> list[AfLoraMember]:
        return [self.adapter().member()]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        own = [prefix + name for name in ("lora_A", "lora_B", "lora_d", "lora_b")]
        check_saved_with(own, self.freezing, f"{prefix}freezing", state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _after_load(layer: AfLoraLinear, incompatible_keys) -> None:
    layer.adapter().keep_frozen()
