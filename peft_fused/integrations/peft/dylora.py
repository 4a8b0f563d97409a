"""DyLoRA as a PEFT method: `get_peft_model(model, DyLoraConfig(...))`."""

import os
from dataclasses import dataclass, field

import torch
from peft import PeftConfig
from peft.utils.other import get_pattern_key
from torch import nn

from ...layers.checks import check_alpha, check_choice, check_dropout, check_flag, check_rank
from ...layers.dylora import RankMember, RankPolicy, RankState
from ...ops import lowrank, lowrank_linear
from ...ops.dispatch import Problem, problem_of
from .loading import awaits_checkpoint, checkpoint_keys, remember_checkpoint
from .tuner import FusedLayer, FusedPeftType, FusedTuner, register


@dataclass
class DyLoraConfig(PeftConfig):
    """Configuration of DyLoRA (Valipour et al. 2023), eq. 5-7: y = x W^T + bias + (alpha / b) B[:, :b] A[:b] drop(x).

    The rank b is drawn per step by `peft_fused.PeftFusedCallback` or `peft_fused.on_step`, and set for evaluation,
    merging and export by `peft_fused.set_rank`. Fields beside those of LoraConfig: r_min, rank_distribution,
    geometric_p, resample, frozen, strict_frozen, seed; see `peft_fused.layers.RankPolicy`. With rank_pattern a layer
    uses at most its own r. Raises TypeError or ValueError naming the field, the value and what is allowed.
    """

    r: int = field(default=8, metadata={"help": "Largest rank, 1..256. Every rank from r_min to r is trained."})
    lora_alpha: float = field(
        default=16, metadata={"help": "Scale: lora_alpha / b at rank b, in training and in evaluation."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input, in [0, 1)."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt: names, a regular expression or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules not to adapt: names or a regular expression."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save whole, such as a classifier."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, with layers_to_transform."}
    )
    bias: str = field(default="none", metadata={"help": "Biases to train: 'none', 'all' or 'dylora_only'."})
    rank_pattern: dict | None = field(default_factory=dict, metadata={"help": "Largest rank by module name."})
    alpha_pattern: dict | None = field(default_factory=dict, metadata={"help": "lora_alpha by module name."})
    init_weights: bool = field(default=True, metadata={"help": "True: B is zero. False: B is random too, for tests."})
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "As in LoraConfig; how a weight is stored is seen from its layer."}
    )
    trainable_token_indices: list[int] | dict | None = field(
        default=None, metadata={"help": "Not supported: must be None."}
    )
    r_min: int = field(default=1, metadata={"help": "Least rank drawn."})
    rank_distribution: str = field(
        default="uniform", metadata={"help": "Distribution of the rank: 'uniform' or 'geometric'."}
    )
    geometric_p: float = field(default=0.15, metadata={"help": "Probability of the geometric distribution, in (0, 1)."})
    resample: str = field(
        default="step", metadata={"help": "Draw per optimizer step ('step') or per micro-batch ('micro')."}
    )
    frozen: bool = field(
        default=False, metadata={"help": "Train only row b of A and column b of B, not the rows before."}
    )
    strict_frozen: bool = field(
        default=False, metadata={"help": "Keep untrained rows from moving by momentum or weight decay."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the ranks drawn."})

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = FusedPeftType.DYLORA
        check_rank("r", self.r)
        check_alpha("lora_alpha", self.lora_alpha)
        check_dropout("lora_dropout", self.lora_dropout)
        check_choice("bias", self.bias, ("none", "all", "dylora_only"))
        check_flag("init_weights", self.init_weights)
        check_flag("fan_in_fan_out", self.fan_in_fan_out)
        if self.trainable_token_indices is not None:
            raise ValueError("trainable_token_indices must be None: DyLoRA does not support it; use modules_to_save")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"{name} must be None when target_modules is a str")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform")
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name) or {}, dict):
                raise TypeError(f"{name} must be a dict or None, got {type(getattr(self, name)).__name__}")
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        for name, rank in self.rank_pattern.items():
            check_rank(f"rank_pattern[{name!r}]", rank)
        for name, alpha in self.alpha_pattern.items():
            check_alpha(f"alpha_pattern[{name!r}]", alpha)
        self.policy().check_r(min([self.r, *self.rank_pattern.values()]))
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))

    def policy(self) -> RankPolicy:
        return RankPolicy(
            self.r_min,
            self.rank_distribution,
            self.geometric_p,
            self.resample,
            self.frozen,
            self.strict_frozen,
            self.seed,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        """As PeftConfig.from_pretrained; ValueError if the weights beside it are missing, cut short or damaged."""
        keys = checkpoint_keys(os.path.join(pretrained_model_name_or_path, subfolder or ""))
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        remember_checkpoint(config, keys)
        return config


class DyLoraLinear(FusedLayer):
    """A linear layer with DyLoRA adapters: dylora_A [r, K] and dylora_B [N, r], used up to the rank set from
    outside.
    """

    adapter_layer_names = ("dylora_A", "dylora_B")
    other_param_names = ("dylora_ranks", "dylora_dropout")

    def update_layer(
        self,
        adapter_name: str,
        *,
        r: int,
        alpha: float,
        dropout: float,
        init_weights: bool,
        policy: RankPolicy,
        inference_mode: bool,
    ) -> None:
        # torch.nn.Linear starts as kaiming_uniform(a=sqrt(5)), which is DyLoRA's choice for A.
        self.dylora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        self.dylora_B[adapter_name] = nn.Linear(r, self.out_features, bias=False)
        if init_weights:
            nn.init.zeros_(self.dylora_B[adapter_name].weight)
        self.dylora_ranks[adapter_name] = RankState(r, alpha, policy, group=adapter_name)
        self.dylora_dropout[adapter_name] = nn.Dropout(dropout)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def schedule_members(self) -> list[RankMember]:
        return [
            RankMember(state, self.dylora_A[name].weight, self.dylora_B[name].weight, name in self.merged_adapters)
            for name, state in self.dylora_ranks.items()
        ]

    def is_untouched(self, adapter_name: str) -> bool:
        """Whether the adapter is as it was made, and so changes nothing."""
        if adapter_name not in self.dylora_B:
            return True
        weight = self.dylora_B[adapter_name].weight
        return weight.is_meta or not weight.any()

    def _arguments(self, name: str, x: torch.Tensor) -> dict:
        state = self.dylora_ranks[name]
        if self.training:
            state.count_forward()
        rank, scale = state.controls(self.training)
        dropout = self.dylora_dropout[name]
        return dict(
            scale=scale, rank=rank, dropout_p=dropout.p if dropout.training else 0.0, frozen=state.policy.frozen
        )  # fmt: skip

    def fused_linear(self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        A, B = self.dylora_A[name].weight, self.dylora_B[name].weight
        return lowrank_linear(x, weight, bias, A, B, **self._arguments(name, x))

    def add_delta(self, name: str, x: torch.Tensor, result: torch.Tensor | None) -> torch.Tensor:
        A, B = self.dylora_A[name].weight, self.dylora_B[name].weight
        return lowrank(x, A, B, add=result, **self._arguments(name, x))

    def problem(self, name: str, x: torch.Tensor, has_weight: bool) -> Problem:
        dropout = self.dylora_dropout[name]
        dropped = dropout.training and dropout.p > 0
        return problem_of(
            x, self.dylora_A[name].weight, self.dylora_B[name].weight, has_weight=has_weight, dropout=dropped
        )

    def dense_delta(self, name: str) -> torch.Tensor:
        A, B, state = self.dylora_A[name].weight, self.dylora_B[name].weight, self.dylora_ranks[name]
        b, dtype = state.eval_value, torch.promote_types(A.dtype, torch.float32)
        return state.scale_at(b) * (B[:, :b].to(dtype) @ A[:b].to(dtype))


class DyLoraModel(FusedTuner):
    """The DyLoRA tuner, made by `get_peft_model` and PEFT's loaders."""

    prefix = "dylora_"
    tuner_layer_cls = DyLoraLinear

    def layer_options(self, config: DyLoraConfig, key: str) -> dict:
        return dict(
            r=config.rank_pattern.get(get_pattern_key(config.rank_pattern, key), config.r),
            alpha=config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, key), config.lora_alpha),
            dropout=config.lora_dropout,
            # Weights about to be loaded need no random start; if they then do not fit, it is seen that none were lost.
            init_weights=config.init_weights or awaits_checkpoint(config),
            policy=config.policy(),
            inference_mode=config.inference_mode,
        )


register(FusedPeftType.DYLORA, DyLoraConfig, DyLoraModel)
