"""AdaMix as a PEFT method: `get_peft_model(model, AdaMixConfig(...))`."""

import copy
import warnings
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from ...layers.adamix import AdaMixAdapter, AdaMixDelta, AdaMixLinear, RoutePolicy
from ...layers.adamix.blocks import RoutedBlock
from ...layers.adamix.routes import EXPERT_INITS, RouteMember
from ...layers.checks import check_alpha, check_choice, check_dropout, check_module, check_rank
from ...layers.lowrank import LowRankStep
from ...layers.route import Route
from ...layers.sharded import whole
from ...methods.adamix import adamix_loss
from ...methods.schedule import unwrap_model
from ...ops.bottleneck import BOTTLENECK_ACTIVATIONS, BottleneckProblem
from .config import FusedConfig, check_after
from .export import Exported, ExportedLayer, check_additive, refuse_rank
from .positions import POSITIONS, default_targets
from .registration import Demo, FusedPeftType, Registration, register
from .tuner import BaseLayer, FusedLayer, FusedTuner, mixes

__all__ = ["AdaMixConfig", "AdaMixModel", "merge_experts"]

KINDS = ("adapter", "lora")


@dataclass
class AdaMixConfig(FusedConfig):
    """Configuration of AdaMix (Wang et al. 2022): num_experts down and up projections, one of which works per pass.

    kind="adapter": h + U_j act(D_i h + b_i) + c_j on the output h of a target. kind="lora": y = W x + bias +
    (lora_alpha / r) B_j A_i drop(x), with A the down side and B the up side. i and j are drawn per layer and forward
    pass by `peft_fused.PeftFusedCallback` or `peft_fused.on_step`, for every micro-batch anew. Evaluation, merging and
    export use the average of the experts of each side, computed whenever it is needed; `peft_fused.set_adamix_routing`
    makes evaluation draw. The average of factors is that of their products if one side is shared and nothing
    non-linear is between them: exact for kind="lora" with share_down or share_up, otherwise the approximation that
    the paper makes.

    position, of kind="adapter", gives target_modules where the model type is known: "adamix", after the output of the
    feed-forward block; "houlsby", also after that of the attention; "pfeiffer", on the norm that ends the feed-forward
    block: y = norm(z + block(norm(z))). Where the model drops that output, the authors' adapters stand after its
    dropout: after="dropout", the name it has beside the target, puts them there. By default they stand before it, where
    any layer can be adapted without knowing the model; in evaluation both are the same.

    Train with `peft_fused.AdaMixTrainerMixin` or `peft_fused.adamix_loss` for the consistency loss. Raises TypeError or
    ValueError naming the field, the value and what is allowed.
    """

    fused_type: ClassVar = FusedPeftType.ADAMIX

    num_experts: int = field(default=4, metadata={"help": "Experts of a side that is not shared, 1..1024."})
    share_down: bool = field(default=False, metadata={"help": "One down projection (A) instead of num_experts."})
    share_up: bool = field(default=True, metadata={"help": "One up projection (B) instead of num_experts."})
    kind: str = field(default="adapter", metadata={"help": "'adapter': on a layer's output. 'lora': beside a weight."})
    r: int = field(default=16, metadata={"help": "Units of the bottleneck, or rank of the LoRA factors, 1..256."})
    activation: str = field(
        default="gelu", metadata={"help": "Of the adapter kind: 'gelu', 'relu', 'silu', 'swish', 'tanh', ..."}
    )
    position: str = field(
        default="adamix", metadata={"help": "Of the adapter kind: 'adamix', 'houlsby' or 'pfeiffer'."}
    )
    after: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Of the adapter kind: name of the torch.nn.Dropout beside a target that the adapter stands after."
        },
    )
    lora_alpha: float = field(default=16, metadata={"help": "Of the LoRA kind: its scale is lora_alpha / r."})
    adamix_dropout: float = field(default=0.0, metadata={"help": "Dropout on the block's input, in [0, 1)."})
    routing: str = field(
        default="batch", metadata={"help": "One expert for the whole 'batch', as the paper, or one per 'sequence'."}
    )
    expert_init: str = field(
        default="independent", metadata={"help": "Experts start 'independent', or 'identical' copies of one."}
    )
    strict_experts: bool = field(
        default=False,
        metadata={"help": "Keep experts that were not drawn from moving by momentum or weight decay."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the routes drawn."})

    def __post_init__(self):
        super().__post_init__()
        check_choice("kind", self.kind, KINDS)
        self.policy()
        check_rank("r", self.r)
        check_choice("activation", self.activation, BOTTLENECK_ACTIVATIONS)
        check_choice("position", self.position, tuple(POSITIONS))
        check_alpha("lora_alpha", self.lora_alpha)
        check_dropout("adamix_dropout", self.adamix_dropout)
        check_choice("expert_init", self.expert_init, EXPERT_INITS)
        other = {"adapter": ("lora_alpha",), "lora": ("activation", "position")}[self.kind]
        for name in other:
            if getattr(self, name) != getattr(AdaMixConfig, name):
                kind = next(kind for kind in KINDS if kind != self.kind)
                raise ValueError(f"{name} is an option of kind={kind!r}, got {getattr(self, name)!r}")

        kept = self.kind == "adapter" and self.position != "pfeiffer"
        check_after(self, kept, "kind='adapter' in position 'adamix' or 'houlsby'")

    def policy(self) -> RoutePolicy:
        return RoutePolicy(
            self.num_experts, self.share_down, self.share_up, self.routing, self.strict_experts, self.seed
        )


ON_OUTPUT = "the adapter works on the output of the base layer"


class AdaMixPeftLinear(FusedLayer):
    """A linear layer with AdaMix adapters of either kind, applied in the order in which they are active."""

    adapter_layer_names = ("adamix_block",)
    linear_op = "lowrank_linear"

    def update_layer(self, adapter_name: str, config: AdaMixConfig, key: str, init_weights: bool) -> None:
        shared = dict(expert_init=config.expert_init, dropout=config.adamix_dropout, group=adapter_name)
        r, policy = config.r, config.policy()
        if config.kind == "adapter":
            block = AdaMixAdapter(self.out_features, r, policy, activation=config.activation, **shared)
        else:
            block = AdaMixDelta(self.in_features, self.out_features, r, policy, alpha=config.lora_alpha, **shared)
        if not init_weights:
            block.randomize()
        self.adamix_block[adapter_name] = block

    def adapter(self, name: str) -> RoutedBlock:
        return self.block("adamix_block", name)

    def linear_step(self, name: str, x: torch.Tensor) -> LowRankStep:
        return self.adapter(name).linear_step(x)

    def schedule_members(self) -> list[RouteMember]:
        return [block.member() for block in self.adamix_block.values()]

    def typical_input(self, rows: int = 1) -> torch.Tensor:
        names = self._names_to_run()
        shape = self.adamix_block[names[0]].typical_shape(rows) if names else (rows,)
        return super().typical_input().expand(*shape, -1)

    def linear_operands(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None] | str:
        if self.on_output(name):
            return ON_OUTPUT
        return self.adapter(name).against_linear() or super().linear_operands(name)

    def reason_against_weight(self, name: str) -> str | None:
        if self.adamix_block[name].routes.grouped and self.training:
            return "sends the rows of one batch to different experts"
        return super().reason_against_weight(name)


class PfeifferSteps(BaseLayer):
    """The forward pass of a norm with adapters in Pfeiffer's position."""

    __slots__ = ("layer", "names")
    name = "base layer, then bottleneck on its output, added to its input, and base layer"

    def __init__(self, layer: "AdaMixPeftNorm", names: list[str], args: tuple, kwargs: dict):
        super().__init__(layer.base_layer, args, kwargs)
        self.layer, self.names = layer, names

    def run(self, z: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        for name in self.names:
            h = super().run(z, None)
            block, dtype = self.layer.adapter(name), h.dtype
            wide = block.factor().dtype
            if mixes(wide, dtype) or torch.is_autocast_enabled(z.device.type):
                z = block(h, z.to(dtype))
            else:
                z = block(h.to(wide), z.to(wide)).to(dtype)
        return super().run(z, None)

    def problem(self, x: torch.Tensor) -> BottleneckProblem:
        return self.layer.adapter(self.names[0]).problem(x)


class AdaMixPeftNorm(AdaMixPeftLinear):
    """A norm with AdaMix adapters in Pfeiffer's position: y = norm(z + block(norm(z))), several one after the other."""

    @staticmethod
    def sizes(base: nn.Module) -> tuple[int, int]:
        return base.normalized_shape[-1], base.normalized_shape[-1]

    def _route(self, names: list[str], x: torch.Tensor, args: tuple, kwargs: dict) -> Route:
        if not names:
            return super()._route(names, x, args, kwargs)
        return Route((PfeifferSteps(self, names, args, kwargs),), [(self.linear_op, ON_OUTPUT)])


class AdaMixModel(FusedTuner):
    """The AdaMix tuner, made by `get_peft_model` and PEFT's loaders."""

    prefix = "adamix_"
    tuner_layer_cls = AdaMixPeftLinear

    def layer_cls_for(self, base: nn.Module, config: AdaMixConfig, key: str) -> type:
        if config.kind != "adapter" or config.position != "pfeiffer":
            return super().layer_cls_for(base, config, key)
        if not isinstance(base, nn.LayerNorm):
            raise TypeError(
                f"target module {key!r} is a {type(base).__name__}; position='pfeiffer' adapts a torch.nn.LayerNorm"
            )
        return AdaMixPeftNorm

    def _prepare_adapter_config(self, peft_config: AdaMixConfig, model_config: dict) -> AdaMixConfig:
        if peft_config.kind == "adapter" and peft_config.target_modules is None:
            peft_config.target_modules = default_targets(peft_config.position, model_config.get("model_type"))
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._warn_of_products(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        if merge:
            self._warn_of_products(adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _warn_of_products(self, adapter_names: list[str] | None) -> None:
        for name in self.active_adapters if adapter_names is None else adapter_names:
            config = self.peft_config.get(name)
            if isinstance(config, AdaMixConfig) and config.kind == "lora" and all(config.policy().stacks):
                warn_of_products(name)


def warn_of_products(adapter_name: str) -> None:
    warnings.warn(
        f"adapter {adapter_name!r} routes both sides: the average of its A times that of its B, which evaluation uses "
        "too, approximates the average of its experts' products",
        stacklevel=3,
    )


@torch.no_grad()
def merge_experts(model: nn.Module, *, adapter_name: str | None = None) -> None:
    """Turns AdaMix adapters, in place, into one expert each: the average of each side, for which num_experts is 1.

    What is then saved has the size of a plain adapter. Parameters are replaced, so it is for the end of training.
    adapter_name: None means all. The function that evaluation computes does not change. TypeError if model is not a
    module, ValueError if it has no such adapter.
    """
    check_module("model", model)
    model = unwrap_model(model, "peft_config")
    layers = [module for module in model.modules() if isinstance(module, AdaMixPeftLinear)]
    names = sorted({name for layer in layers for name in layer.adamix_block})
    if not names:
        raise ValueError("merge_experts: the model has no AdaMix adapter")
    if adapter_name is not None and adapter_name not in names:
        raise ValueError(f"adapter_name must be one of {names}, got {adapter_name!r}")
    chosen = set(names if adapter_name is None else [adapter_name])
    if any(chosen.intersection(layer.merged_adapters) for layer in layers):
        raise ValueError("merge_experts: the adapter is merged into the base weights; unmerge it first")
    for layer in layers:
        for name in chosen.intersection(layer.adamix_block):
            layer.adamix_block[name].average_()
    for name in chosen:
        # The config itself may be the user's, for other adapters and models as well.
        model.peft_config[name] = config = copy.copy(model.peft_config[name])
        config.num_experts, config.routing, config.strict_experts = 1, "batch", False


def _export(config: AdaMixConfig, layers: dict[str, AdaMixPeftLinear], adapter_name: str, rank: int | None) -> Exported:
    """The average of the experts, which is what is evaluated with."""
    check_additive(config, adapter_name)
    refuse_rank("an AdaMix", rank)
    if all(config.policy().stacks):
        warn_of_products(adapter_name)
    found = {}
    for name, layer in layers.items():
        block = layer.adamix_block[adapter_name]
        found[name] = ExportedLayer(whole(block.down.averaged()[0]), whole(block.up.averaged()[0]), block.alpha)
    return Exported(found, config.r, config.lora_alpha, config.adamix_dropout)


def _demo_config(settings, model: nn.Module, names: list[str], seed: int) -> AdaMixConfig:
    known = settings.target_modules is None and model.config.model_type in POSITIONS["adamix"]
    return AdaMixConfig(seed=seed, target_modules=None if known else names)


def _demo_loss(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    loss, outputs = adamix_loss(model, batch)
    return loss, outputs.loss


register(
    Registration(
        name="adamix",
        config=AdaMixConfig,
        tuner=AdaMixModel,
        layers=(AdaMixLinear,),
        export=_export,
        contract={
            "adamix": dict(r=3, share_up=False, num_experts=3),
            "adamix_lora": dict(kind="lora", r=3, num_experts=3),
            "adamix_sequence": dict(r=3, routing="sequence", num_experts=3),
            "adamix_norm": dict(r=3, position="pfeiffer", target_modules=["norm"]),
        },
        demo=Demo(
            "AdaMix",
            _demo_config,
            loss=_demo_loss,
            note="AdaMix makes two passes a step, by different experts, and so takes about twice the time and memory; "
            "its final loss is that of the task, without the divergence of the two",
        ),
    )
)
