"""AFLoRA as a plain PyTorch layer, and the state by which a schedule freezes its projection matrices."""

from dataclasses import dataclass

import torch
from torch import nn

from ..ops import lowrank_linear
from .checks import check_alpha, check_choice, check_flag, check_int
from .lowrank import LowRankLinear
from .scheduled import ScheduleState
from .sharded import is_sharded, local, shard

MATRICES = ("A", "B")
RAMPS = ("cubic", "quadratic")
RULES = ("paper", "code")
# What frozen_at holds of a matrix that is trained, and of one that never was; others hold the steps done until then.
NOT_FROZEN, FROM_THE_START = -1, 0
# Per matrix: the running sum of |gradient| in the window, and the two averages that it goes into.
STATISTICS = ("window", "mean", "change")
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


class AfLoraState(ScheduleState):
    """Which matrices of one adapter of one layer are frozen, and the statistics of those that are not.

    frozen_at: {"A", "B"} -> optimizer steps done when it was frozen, 0 for one that never was trained, -1 for one that
    is. gradients: how many have entered the window. Those numbers live on the host and are written to the buffer
    `progress` [3] when it is saved. The statistics `A_window`, `A_mean`, `A_change` and those of B have the shape of
    the matrix in fp32, sharded as it is, or are empty: before the first gradient and once it is frozen.
    """

    def __init__(self, r: int, features: tuple[int, int], policy: FreezingPolicy, frozen: bool, group: str = "default"):
        """features: (input, output) of the layer. frozen: both matrices from the start."""
        super().__init__(group)
        self.policy = policy
        self.shapes = {"A": (r, features[0]), "B": (features[1], r)}
        self.frozen_at = dict.fromkeys(MATRICES, FROM_THE_START if frozen else NOT_FROZEN)
        self.gradients = 0
        self.register_buffer("progress", torch.tensor(self._progress()))
        for matrix in MATRICES:
            for name in STATISTICS:
                self.register_buffer(f"{matrix}_{name}", torch.empty(0))

    def is_frozen(self, matrix: str) -> bool:
        return self.frozen_at[matrix] != NOT_FROZEN

    def statistics(self, matrix: str, parameter: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(window, mean, change) of a matrix that is not frozen, made on its first gradient; of its local shard."""
        found = []
        for name in (f"{matrix}_{name}" for name in STATISTICS):
            buffer = getattr(self, name)
            if buffer.shape != parameter.shape:
                buffer = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            elif is_sharded(parameter) and not is_sharded(buffer):  # loaded before the parameters were sharded
                buffer = shard(buffer, parameter)
            if buffer is not getattr(self, name):
                setattr(self, name, buffer)
            found.append(local(buffer))
        return tuple(found)

    def freeze(self, matrix: str, steps: int) -> None:
        """Notes that a matrix was frozen after that many steps, for good, and drops its statistics."""
        self.frozen_at[matrix] = steps
        for name in STATISTICS:
            setattr(self, f"{matrix}_{name}", self.progress.new_empty(0))

    def unscheduled(self) -> str:
        return "AFLoRA has trained without freezing anything"

    def _progress(self) -> list[float]:
        return [float(self.frozen_at[matrix]) for matrix in MATRICES] + [float(self.gradients)]

    def check(self, tensors: dict[str, torch.Tensor]) -> None:
        """ValueError, naming it, if a tensor is none that this state could hold. None at all are fine."""
        if not tensors:
            return
        if tensors.keys() != self._buffers.keys():
            odd = sorted(tensors.keys() ^ self._buffers.keys())
            raise ValueError(f"AFLoRA's state must be {sorted(self._buffers)}; missing or unexpected: {odd}")
        progress = tensors["progress"]
        numbers = progress.tolist() if progress.shape == (3,) else None
        if numbers is None or not all(n == int(n) and n >= -1 for n in map(_finite, numbers)) or numbers[2] < 0:
            raise ValueError(f"AFLoRA's progress must be 3 whole numbers of at least -1, -1 and 0, got {progress}")
        if not all(torch.isfinite(local(tensor)).all() for tensor in tensors.values()):
            raise ValueError("AFLoRA's statistics must be finite, got some that are not")
        for matrix, frozen_at in zip(MATRICES, numbers, strict=False):
            shapes = {tuple(tensors[f"{matrix}_{name}"].shape) for name in STATISTICS}
            allowed = [{(0,)}] if frozen_at != NOT_FROZEN else [{(0,)}, {self.shapes[matrix]}]
            if shapes not in allowed:
                raise ValueError(
                    f"AFLoRA's statistics of {matrix} must be empty or, while it is trained, "
                    f"{list(self.shapes[matrix])}, got {sorted(map(list, shapes))}"
                )

    def fit(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over which matrices are frozen, and the shapes of statistics that `check` let pass."""
        if not tensors:
            return
        *frozen_at, gradients = map(int, tensors["progress"].tolist())
        self.frozen_at, self.gradients = dict(zip(MATRICES, frozen_at, strict=True)), gradients
        for name, tensor in tensors.items():
            if tensor.shape != getattr(self, name).shape:
                like = tensor if is_sharded(tensor) else self.progress
                setattr(self, name, like.new_zeros(tensor.shape, dtype=torch.float32))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        with torch.no_grad():
            self.progress.copy_(torch.tensor(self._progress()))
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        tensors = {name: state_dict[prefix + name] for name in self._buffers if prefix + name in state_dict}
        try:
            self.check(tensors)
        except ValueError as error:
            errors.append(f"{prefix}: {error}")
            return
        self.fit(tensors)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            if buffer.dtype != torch.float32:  # from the old one, which the cast has rounded
                self._buffers[name] = before[name].to(buffer.device)
        return self

    def extra_repr(self) -> str:
        names = {NOT_FROZEN: "trained", FROM_THE_START: "frozen from the start"}
        return ", ".join(f"{m} {names.get(at, f'frozen after step {at}')}" for m, at in self.frozen_at.items())


def _finite(number: float) -> float:
    return number if abs(number) < float("inf") else -2.0


@dataclass(frozen=True)
class AfLoraMember:
    """One adapter of one layer as the AFLoRA schedule sees it. b: the vector on the output, trained while it is."""

    method = "aflora"
    state: AfLoraState
    A: nn.Parameter
    B: nn.Parameter
    b: nn.Parameter

    @property
    def trains(self) -> bool:
        """Whether the adapter is being trained at all, rather than inactive or loaded for inference."""
        return self.b.requires_grad

    def choices(self) -> tuple:
        """What all processes have to agree on."""
        return (self.state.group, self.state.policy, *self.state.frozen_at.values())


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


def dense_delta(A, B, d, b, scale: float) -> torch.Tensor:
    """scale * diag(b) B diag(d) A, [N, K], in fp32 (fp64 for fp64 factors)."""
    dtype = torch.promote_types(A.dtype, torch.float32)
    A, B, d, b = (t.to(dtype) for t in (A, B, d, b))
    return scale * ((b.unsqueeze(1) * B * d) @ A)


class AFLoRALinear(LowRankLinear):
    """y = x W^T + bias + scale * b . (B (d . (A drop(x)))) in one fused op.

    Source: AFLoRA, Liu et al. 2024. The vectors lora_d [r] and lora_b [N] always train; lora_A [r, K] and lora_B [N, r]
    until `peft_fused.on_step` freezes them, after which no kernel computes their gradients and, for A, the input is not
    kept for backward. Made by `from_linear`; a state dict holds what a resumed run needs.
    """

    def __init__(self, base, r, alpha, dropout, dtype, policy: FreezingPolicy, d_initial: float, frozen: bool):
        super().__init__(base, r, r if alpha is None else alpha, dropout, False, dtype)
        self.lora_d = nn.Parameter(self.lora_A.new_full((r,), d_initial))
        self.lora_b = nn.Parameter(self.lora_A.new_zeros(self.out_features))
        features = (self.in_features, self.out_features)
        self.freezing = AfLoraState(r, features, policy, frozen).to(self.weight.device)
        keep_frozen(self.freezing, self.lora_A, self.lora_B, True)
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
    ) -> "AFLoRALinear":
        """An adapted layer that shares, and freezes, the weight and bias Parameters of `base`.

        base: torch.nn.Linear or transformers' Conv1D, weight in fp32, fp16, bf16 or fp64. r: 1..256. alpha: the scale
        is alpha / r, or 1 for None. dropout: in [0, 1), on the adapter's input, in training only. dtype: of the
        adapter, by default fp32. d_initial: start of lora_d. frozen: A and B stay as drawn, as the paper has it in the
        attention. The rest: see `FreezingPolicy`; the layers with equal policies share one schedule. Raises TypeError
        or ValueError naming the argument, the value and what is allowed.
        """
        check_alpha("d_initial", d_initial)
        check_flag("frozen", frozen)
        policy = FreezingPolicy(t_i, t_f, ramp, rule, beta1, beta2, window)
        return cls(base, r, alpha, dropout, dtype, policy, d_initial, frozen)

    def reset_parameters(self) -> None:
        """Draws A and B; neither is zero, the adapter starts as a change of nothing because lora_b does."""
        draw_factors(self.lora_A, self.lora_B)

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def schedule_members(self) -> list[AfLoraMember]:
        return [AfLoraMember(self.freezing, self.lora_A, self.lora_B, self.lora_b)]

    def delta(self) -> torch.Tensor:
        """The dense change of the weight, [N, K], in fp32 (fp64 for fp64 factors)."""
        return dense_delta(self.lora_A, self.lora_B, self.lora_d, self.lora_b, self.scale)

    def adapted(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.lora_b.requires_grad:
            self.freezing.count_forward()
        return lowrank_linear(
            x, self.weight_nk(), self.bias, self.lora_A, self.lora_B, u=self.lora_d, v=self.lora_b, scale=self.scale,
            dropout_p=self.dropout_p,
        )  # fmt: skip


def _after_load(layer: AFLoRALinear, incompatible_keys) -> None:
    keep_frozen(layer.freezing, layer.lora_A, layer.lora_B, layer.lora_b.requires_grad)
