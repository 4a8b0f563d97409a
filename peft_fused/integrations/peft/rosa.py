"""ROSA as a PEFT method: `get_peft_model(model, RosaConfig(...))`."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import torch
from peft.tuners.tuners_utils import onload_layer
from torch import nn
from torch.autograd.graph import increment_version

from ...layers.rosa import RosaLinear, SubspacePolicy
from ...layers.rosa.host import SubspaceHost
from ...layers.rosa.pretrained import check_finite, check_writable
from ...layers.rosa.state import RosaAdapter, RosaMember, RosaState, SubspaceFactor, draw_factors
from ...layers.rosa.subspace import check_subspace_rank, subspace_rank
from ...layers.sharded import is_sharded, whole
from ...ops.arguments import FLOATING
from .base import has_accelerate_hook
from .config import FusedConfig, by_pattern, check_pattern
from .export import Exported, ExportedLayer, refuse_rank
from .loading import Snapshot, awaits_checkpoint
from .registration import Demo, FusedPeftType, Registration, register
from .sharing import HeldMemory
from .tuner import FusedLayer, FusedTuner

__all__ = ["RosaConfig", "RosaModel"]


@dataclass
class RosaConfig(FusedConfig):
    """Configuration of ROSA (Gamboa et al. 2024), random subspace adaptation: y = x W_f^T + bias + B (A x).

    Not the "robust adaptation" of the same name, which adds a sparse matrix. A and B start as r singular directions of
    the weight, W_f as the rest of it, so that the function is the pretrained one; during training the directions are
    drawn anew by `peft_fused.PeftFusedCallback` or `peft_fused.on_step`, and over time all of the weight is trained.

    The base weight is changed in place, and rounded once to its dtype; the pretrained one is kept on the host, and is
    back, bit for bit, under `disable_adapter` and after `unload` or `delete_adapter`. So one ROSA adapter at a time is
    active in a layer, and quantised weights, parametrized or pruned ones, and weights that another module shares, are
    refused. The adapter is saved with all it has changed so far: at first its two factors, twice; then 2 r (N + K)
    numbers more for every draw, up to the N K of the weight.

    Entering and leaving `disable_adapter` each rewrite the base weights of all adapted layers, from the copies on the
    host: ask at once for all that is needed of the pretrained model, rather than once per token. What was computed with
    gradients under it must be differentiated under it. A backward pass through weights that merging, a change of the
    adapter or a draw has replaced raises an error that a parameter was changed in place.

    Weight decay pulls A and B, which have pretrained content, to zero: `peft_fused.decay_groups` spares them. With
    split="sqrt" a direction of singular value 0 has zeros in both factors, and so no gradient: it never learns; "us_v"
    has no such points. The scale alpha / r of the authors' `use_scale` is not offered, as it would change the function
    at the start. Fields beside PEFT's: r, split, sample, resample_every, seed; see `peft_fused.layers.SubspacePolicy`.
    Raises TypeError or ValueError naming the field, the value and what is allowed.
    """

    fused_type: ClassVar = FusedPeftType.ROSA

    r: int | float = field(
        default=8, metadata={"help": "Rank, 1..256; or in (0, 1), a fraction of a weight's smaller size."}
    )
    rank_pattern: dict | None = field(default_factory=dict, metadata={"help": "Rank by module name."})
    split: str = field(
        default="us_v",
        metadata={"help": "Where the singular values are: on A ('us_v'), or their roots on both ('sqrt')."},
    )
    sample: str = field(
        default="random", metadata={"help": "Which directions: 'random', a random 'window', 'top' or 'bottom'."}
    )
    resample_every: str | int = field(
        default="epoch", metadata={"help": "When to draw anew: every 'epoch', or a number of optimizer steps."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the directions drawn."})

    def __post_init__(self):
        super().__post_init__()
        check_subspace_rank("r", self.r)
        self.rank_pattern = check_pattern("rank_pattern", self.rank_pattern, check_subspace_rank)
        self.policy()

    def policy(self) -> SubspacePolicy:
        return SubspacePolicy(self.split, self.sample, self.resample_every, self.seed)


class RosaPeftLinear(SubspaceHost, FusedLayer):
    """A linear layer with ROSA adapters: rosa_A [r, K] and rosa_B [N, r], taken out of the base weight.

    What the base weight holds follows from which adapter is active, merged or disabled; see `wanted`.
    """

    adapter_layer_names = ("rosa_A", "rosa_B")
    other_param_names = ("rosa_state",)
    state_names = ("rosa_state",)
    linear_op = "lowrank_linear"
    WEIGHT = "base_layer.weight"

    def update_layer(self, adapter_name: str, config: RosaConfig, key: str, init_weights: bool) -> None:
        r = subspace_rank(by_pattern(config.rank_pattern, key, config.r), self.in_features, self.out_features)
        weight = self.base_weight()
        if "_pretrained" not in self.__dict__:
            self.keep_pretrained()
        wide = torch.promote_types(weight.dtype, torch.float32)
        # A change of nothing, until `start` or a checkpoint.
        where = dict(dtype=wide, device=self._get_base_layer_device_and_dtype(self.get_base_layer())[0])
        self.rosa_A[adapter_name] = SubspaceFactor(r, self.in_features, **where)
        self.rosa_B[adapter_name] = SubspaceFactor(self.out_features, r, **where)
        self.rosa_state[adapter_name] = RosaState(
            r, self.in_features, self.out_features, config.policy(), wide, adapter_name, key
        )  # fmt: skip
        self.rosa_state[adapter_name].on_load = self.state_loaded

    def base_weight(self) -> torch.Tensor:
        return self.get_base_layer().weight

    def factors(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A [r, K] and B [N, r] of an adapter."""
        return self.block("rosa_A", name).weight, self.block("rosa_B", name).weight

    # -------------------------------------------------------------------------------------------------- the base weight

    def refresh(self, force: bool = False) -> None:
        """As the base class's; a base weight that accelerate's hooks hold elsewhere is fetched, and put there again."""
        if self.base_weight().is_meta and has_accelerate_hook(self.get_base_layer()):
            with onload_layer(self):
                super().refresh(force)
        else:
            super().refresh(force)

    def wanted(self) -> tuple[str, str | None]:
        """What the base weight must hold: W0, all of an adapter's, or what an adapter's factors leave of it."""
        if self.merged:
            return "merged", self.merged_adapters[0]
        names = [] if self.disable_adapters else self.adapters_in_use()
        return ("frozen", names[0]) if names else ("pretrained", None)

    def wanted_change(self) -> torch.Tensor | None:
        kind, name = self.wanted()
        if kind == "pretrained":
            return None
        return (
            self.adapter(name).change()
            if kind == "merged"
            else self.rosa_state[name].frozen_change(self.base_weight().device)
        )

    def other_changes(self) -> Iterator[torch.Tensor | None]:
        yield None
        for name, state in self.rosa_state.items():
            if not self.factor(name).is_meta:
                yield self.adapter(name).change()
                yield state.frozen_change(self.base_weight().device)

    def suspended(self) -> bool:
        return self.disable_adapters and not self.merged

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.check_single(names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.refresh()

    def check_single(self, names: list[str]) -> None:
        """ValueError if several of the adapters are this layer's."""
        here = [name for name in names if name in self.rosa_A]
        if len(here) > 1:
            raise ValueError(
                f"only one ROSA adapter can be active or merged in a layer, as it owns the weight; got {here}"
            )

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)
        self.refresh()

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.refresh()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Sets the base weight to round(W0 + everything learned), whether or not the adapter is the active one.

        safe_merge: ValueError, and an unchanged weight, if that is not finite. ValueError for more than one adapter.
        """
        names = self.to_merge(adapter_names)
        if not names:
            return
        self.check_single([*self.merged_adapters, *names])
        if safe_merge:
            self.check_finite(self.merged_weight(names), names)
        self.merged_adapters.extend(names)
        self.refresh()

    @torch.no_grad()
    def merged_weight(self, names: list[str]) -> torch.Tensor:
        return self._pretrained.plus(self.base_weight(), self._in_layout(self.adapter(names[0]).change()))

    def unmerge(self) -> None:
        """Puts back, bit for bit, what `merge` replaced; the pretrained weight if the adapter is not the active one."""
        if not self.merged:
            super().unmerge()  # which warns
            return
        self.merged_adapters = []
        self.refresh()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with the adapter merged, or as it was pretrained."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if not (merge and self.merged):
            self.release()
        return self.get_base_layer()

    def release(self) -> None:
        """Puts back W0, for the base layer to be used without this one."""
        weight = self.base_weight()
        self._pretrained.write(weight, None)
        increment_version(weight)
        self._holds = self._held_in_use = self._written = None

    @torch.no_grad()
    def learned(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """B [N, n], A [n, K] with B A everything the adapter has changed. ValueError once that is kept dense."""
        state = self.rosa_state[name]
        if len(state.dense):
            raise ValueError(f"what adapter {name!r} has changed is no longer of low rank in module {state.layer!r}")
        left, right = state.moved(*map(whole, self.factors(name)))
        left, right = torch.cat([state.Q.to(left), left], 1), torch.cat([state.P.to(right), right])
        return left.to(state.dtype), right.to(state.dtype)

    # ---------------------------------------------------------------------------------------------------- the subspace

    def start(self, name: str, perturb: bool = False) -> None:
        """Draws a new adapter's first factors. perturb: and changes them, without the base weight."""
        self._draw(name, 0)
        if perturb:
            for factor in self.factors(name):
                factor.data.add_(torch.randn_like(factor) * factor.std() / 4)

    def _draw(self, name: str, phase: int, agree=None) -> None:
        if self.base_weight().is_meta or self.factor(name).is_meta:
            raise RuntimeError(
                f"ROSA cannot draw new factors of {self.module_name!r}: accelerate's hooks hold its weights elsewhere "
                "(offloading); train without, as with accelerate.hooks.remove_hook_from_submodules"
            )
        draw_factors(self.rosa_state[name], self.pretrained_nk(), *self.factors(name), phase, agree)
        self.refresh(force=True)

    @torch.no_grad()
    def narrow(self, name: str, dtype: torch.dtype) -> None:
        """Casts a new adapter's factors; the base weight takes up what they lose."""
        state = self.rosa_state[name]
        if self.factor(name).dtype == dtype or not self.adapter(name).is_zero():
            return
        for factor in (self.rosa_A[name], self.rosa_B[name]):
            factor.weight = nn.Parameter(factor.weight.to(dtype), requires_grad=factor.weight.requires_grad)
        if not self.rosa_A[name].weight.is_meta:
            state.anchor(*self.factors(name))
            self.refresh(force=True)

    def schedule_members(self) -> list[RosaMember]:
        if self.disable_adapters:
            return []
        return [
            RosaMember(self.rosa_state[name], partial(self.factors, name), self.merged, partial(self._draw, name))
            for name in self.adapters_in_use()
        ]

    # ----------------------------------------------------------------------------------------------- for the base class

    def keeps_dtype(self, adapter_name: str) -> bool:
        return True  # factors with pretrained content would lose digits that the base weight does not have

    def adapter(self, name: str) -> RosaAdapter:
        return RosaAdapter(*self.factors(name), self.block("rosa_state", name), self.check_held)

    def factor(self, name: str) -> torch.Tensor:
        return self.block("rosa_A", name).weight


class RosaModel(FusedTuner):
    """The ROSA tuner, made by `get_peft_model` and PEFT's loaders."""

    prefix = "rosa_"
    tuner_layer_cls = RosaPeftLinear
    # While an adapter is added.
    _memory: HeldMemory | None = None

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        """As the base class's; no weight is changed before all layers have their factors, or if one cannot."""
        before = Snapshot(model)
        self._memory = HeldMemory(model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            self._memory = None
        config = self.peft_config[adapter_name]
        if not awaits_checkpoint(config):
            self._start(model, adapter_name, config, before)

    def _start(self, model: nn.Module, adapter_name: str, config: RosaConfig, before: Snapshot) -> None:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, RosaPeftLinear) and adapter_name in m.rosa_A}
        try:
            for name, layer in layers.items():
                check_finite(f"target module {name!r}", layer._pretrained.values)
            for layer in layers.values():
                if not layer.factor(adapter_name).is_meta:  # low_cpu_mem_usage: weights come later
                    layer.start(adapter_name, perturb=not config.init_weights)
        except Exception:
            self.before_load = None
            before.restore()
            for layer in layers.values():
                # A layer that was there before has lost the adapter by now, one made for it has not.
                if adapter_name in layer.rosa_A:
                    layer.release()
                else:
                    layer.refresh(force=True)
            raise

    def layer_cls_for(self, base: nn.Module, config: RosaConfig, key: str) -> type:
        cls = super().layer_cls_for(base, config, key)
        weight = getattr(base, "weight", None)
        plain = isinstance(weight, torch.Tensor) and weight.dtype in FLOATING
        if not plain or (type(weight) not in (nn.Parameter, torch.Tensor) and not is_sharded(weight)):
            found = f"{type(weight).__name__} of {weight.dtype}" if isinstance(weight, torch.Tensor) else "not a tensor"
            raise TypeError(
                f"target module {key!r}: the weight of this {type(base).__name__} is quantised or otherwise not plain "
                f"({found}); ROSA changes the base weight in place, which only fp32, fp16, bf16 or fp64 can hold"
            )
        check_writable(f"target module {key!r}", base)
        if others := self._memory.other_holders(base, key):
            raise ValueError(
                f"target module {key!r} shares its weight with {', '.join(map(repr, others))}: ROSA changes the weight "
                "in place, which would change both. Exclude it with exclude_modules, or untie the weights first."
            )
        return cls

    def _check_single(self, names: str | list[str]) -> None:
        for layer in self._layers():
            layer.check_single([names] if isinstance(names, str) else names)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        self._check_single(adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_single(self.active_adapters if adapter_names is None else adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        if merge:
            self._check_single(self.active_adapters if adapter_names is None else adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:  # factors are made in fp32
            for layer in self._layers():
                if adapter_name in layer.rosa_A:
                    layer.narrow(adapter_name, layer.base_weight().dtype)


@torch.no_grad()
def _export(config: RosaConfig, layers: dict[str, RosaPeftLinear], adapter_name: str, rank: int | None) -> Exported:
    """Equal to all that the adapter has changed of the weights, of a rank 2 r larger with every draw. ValueError once a
    layer's change is kept dense, which `peft.convert_to_lora` can approximate.
    """
    refuse_rank("a ROSA", rank)
    found = {}
    for name, layer in layers.items():
        B, A = layer.learned(adapter_name)
        found[name] = ExportedLayer(A, B, len(A))  # alpha = rank makes LoRA's scale 1
    most = max(len(layer.A) for layer in found.values())
    return Exported(found, most, most)


# A run of the demo draws subspaces so often, whatever its length.
DEMO_DRAWS = 4


def _demo_config(settings, model: nn.Module, names: list[str], seed: int) -> RosaConfig:
    every = max(1, settings.steps // DEMO_DRAWS)
    return RosaConfig(r=settings.rank, resample_every=every, seed=seed, target_modules=names)


register(
    Registration(
        name="rosa",
        config=RosaConfig,
        tuner=RosaModel,
        layers=(RosaLinear,),
        export=_export,
        contract={"rosa": dict(r=3, resample_every=2)},
        demo=Demo("ROSA", _demo_config),
        writes_base=True,
    )
)
