"""DyLoRA as a PEFT method: `get_peft_model(model, DyLoraConfig(...))`."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from ...layers.checks import check_alpha, check_dropout, check_rank
from ...layers.dylora import DyLoraAdapter, DyLoraLinear, RankMember, RankPolicy, RankState, use_ranks
from ...layers.sharded import whole
from ...methods.schedule import members_of
from .config import FusedConfig, by_pattern, check_pattern
from .export import Exported, ExportedLayer
from .registration import Demo, FusedPeftType, Registration, register
from .tuner import FusedLayer, FusedTuner

__all__ = ["DyLoraConfig", "DyLoraModel"]


@dataclass
class DyLoraConfig(FusedConfig):
    """Configuration of DyLoRA (Valipour et al. 2023), eq. 5-7: y = x W^T + bias + (alpha / b) B[:, :b] A[:b] drop(x).

    The rank b is drawn per step by `peft_fused.PeftFusedCallback` or `peft_fused.on_step`, and set for evaluation,
    merging and export by `peft_fused.set_dylora_rank`. Fields beside those of LoraConfig: r_min, rank_distribution,
    geometric_p, resample, frozen, strict_frozen, seed, for which see `peft_fused.layers.RankPolicy`, and eval_rank.
    With rank_pattern a layer uses at most its own r. Raises TypeError or ValueError naming the field, the value and
    what is allowed.
    """

    fused_type: ClassVar = FusedPeftType.DYLORA
    set_later: ClassVar = frozenset({"eval_rank"})

    r: int = field(default=8, metadata={"help": "Largest rank, 1..256. Every rank from r_min to r is trained."})
    lora_alpha: float = field(
        default=16, metadata={"help": "Scale: lora_alpha / b at rank b, in training and in evaluation."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input, in [0, 1)."})
    rank_pattern: dict | None = field(default_factory=dict, metadata={"help": "Largest rank by module name."})
    alpha_pattern: dict | None = field(default_factory=dict, metadata={"help": "lora_alpha by module name."})
    r_min: int = field(default=1, metadata={"help": "Least rank drawn."})
    rank_distribution: str = field(
        default="uniform", metadata={"help": "Distribution of the rank: 'uniform' or 'geometric'."}
    )
    geometric_p: float = field(default=0.15, metadata={"help": "Of 'geometric': its probability, in (0, 1)."})
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
    eval_rank: int | None = field(
        default=None, metadata={"help": "Rank in evaluation, as `peft_fused.set_dylora_rank` sets it; None: all of r."}
    )

    def __post_init__(self):
        super().__post_init__()
        check_rank("r", self.r)
        check_alpha("lora_alpha", self.lora_alpha)
        check_dropout("lora_dropout", self.lora_dropout)
        self.rank_pattern = check_pattern("rank_pattern", self.rank_pattern, check_rank)
        self.alpha_pattern = check_pattern("alpha_pattern", self.alpha_pattern, check_alpha)
        if self.eval_rank is not None:
            check_rank("eval_rank", self.eval_rank, max([self.r, *self.rank_pattern.values()]))
        self.policy().check_r(min([self.r, *self.rank_pattern.values()]))

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


class DyLoraPeftLinear(FusedLayer):
    """A linear layer with DyLoRA adapters: dylora_A [r, K] and dylora_B [N, r], used up to the rank set from
    outside.
    """

    adapter_layer_names = ("dylora_A", "dylora_B")
    other_param_names = ("dylora_ranks", "dylora_dropout")
    linear_op = "lowrank_linear"

    def update_layer(self, adapter_name: str, config: DyLoraConfig, key: str, init_weights: bool) -> None:
        r = by_pattern(config.rank_pattern, key, config.r)
        alpha = by_pattern(config.alpha_pattern, key, config.lora_alpha)
        # torch.nn.Linear starts as kaiming_uniform(a=sqrt(5)), which is DyLoRA's choice for A.
        self.dylora_A[adapter_name] = nn.Linear(self.in_features, r, bias=False)
        self.dylora_B[adapter_name] = nn.Linear(r, self.out_features, bias=False)
        if init_weights:
            nn.init.zeros_(self.dylora_B[adapter_name].weight)
        self.dylora_ranks[adapter_name] = state = RankState(r, alpha, config.policy(), group=adapter_name)
        if config.eval_rank is not None:
            use_ranks([state], [min(config.eval_rank, r)])
        self.dylora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)

    def adapter(self, name: str) -> DyLoraAdapter:
        block = self.block
        return DyLoraAdapter(
            block("dylora_A", name).weight, block("dylora_B", name).weight, block("dylora_ranks", name),
            block("dylora_dropout", name),
        )  # fmt: skip

    def factor(self, name: str) -> torch.Tensor:
        return self.block("dylora_A", name).weight

    def schedule_members(self) -> list[RankMember]:
        return [self.adapter(name).member(name in self.merged_adapters) for name in self.dylora_ranks]


class DyLoraModel(FusedTuner):
    """The DyLoRA tuner, made by `get_peft_model` and PEFT's loaders."""

    prefix = "dylora_"
    tuner_layer_cls = DyLoraPeftLinear


def _export(config: DyLoraConfig, layers: dict[str, DyLoraPeftLinear], adapter_name: str, rank: int | None) -> Exported:
    """Equal to the adapter at a rank, 1..r, None for the one set for evaluation; a smaller r of a layer is kept.

    The factors are copied: with r = b and an unchanged lora_alpha, LoRA's scale alpha / r is DyLoRA's alpha / b.
    """
    states = [layer.dylora_ranks[adapter_name] for layer in layers.values()]
    rank = check_rank("rank", max(s.eval_value for s in states) if rank is None else rank, max(s.r for s in states))
    found = {}
    for name, layer in layers.items():
        state = layer.dylora_ranks[adapter_name]
        b = min(rank, state.r)
        A, B = whole(layer.dylora_A[adapter_name].weight), whole(layer.dylora_B[adapter_name].weight)
        found[name] = ExportedLayer(A[:b], B[:, :b], state.alpha)
    return Exported(found, min(rank, config.r), config.lora_alpha, config.lora_dropout)


def _factors(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    return [(member.A, member.B) for member in members_of(model).get("dylora", ())]


def _demo_config(settings, model: nn.Module, names: list[str], seed: int) -> DyLoraConfig:
    return DyLoraConfig(r=settings.rank, lora_alpha=settings.alpha, seed=seed, target_modules=names)


register(
    Registration(
        name="dylora",
        config=DyLoraConfig,
        tuner=DyLoraModel,
        layers=(DyLoraLinear,),
        export=_export,
        contract={"dylora": dict(r=4)},
        demo=Demo("DyLoRA", _demo_config, factors=_factors),
    )
)
