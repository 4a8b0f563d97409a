"""Making one adapter of a model what another is, with the state that its parameters alone do not have."""

import copy

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...layers.checks import check_module
from ...methods.schedule import unwrap_model
from .tuner import FusedLayer


@torch.no_grad()
def copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """Makes the adapter `target` of a PEFT model compute what `source` does, in all layers and modules_to_save.

    For a trainer's reference adapter, as in DPO and GRPO, or to keep and put back an adapter: copies of the trainable
    parameters alone lack what a schedule has set: a rank, routes, frozen matrices, a subspace. Parameters are
    written in place, so that optimizers keep them. Both adapters must be there, of one of peft_fused's methods, and of
    the same configuration; whether they train may differ.

    Raises TypeError if model is not a module or a name no str, and ValueError, before anything has changed, if an
    adapter is missing, merged, of another method, or configured differently.
    """
    model = unwrap_model(check_module("model", model), "peft_config")
    configs = getattr(model, "peft_config", {})
    for argument, name in (("source", source), ("target", target)):
        if not isinstance(name, str):
            raise TypeError(f"{argument} must be a str, got {type(name).__name__}")
        if name not in configs:
            raise ValueError(f"{argument} must be one of the model's adapters {sorted(configs)}, got {name!r}")
    ours, theirs = (configs[name].to_dict() for name in (source, target))
    follows = getattr(configs[source], "set_later", frozenset())
    may_differ = _MAY_DIFFER | follows
    different = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k) and k not in may_differ)
    if different:
        raise ValueError(f"target {target!r} must be configured as {source!r} is, but {', '.join(different)} differs")
    layers = [module for module in model.modules() if isinstance(module, FusedLayer)]
    layers = [layer for layer in layers if source in layer.adapters_here()]
    if not layers:
        raise ValueError(
            f"source must be an adapter of one of peft_fused's methods, got {source!r}, {ours['peft_type']}"
        )
    for layer in layers:
        if merged := {source, target}.intersection(layer.merged_adapters):
            raise ValueError(f"copy_adapter: unmerge {sorted(merged)} first")
    for layer in layers:
        layer.copy_adapter(source, target)
    if follows:
        configs[target] = copy.copy(configs[target])
        for name in follows:
            setattr(configs[target], name, ours[name])
    for module in model.modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and source in getattr(module, "modules_to_save", ()):
            module.modules_to_save[target].load_state_dict(module.modules_to_save[source].state_dict())


# Where an adapter comes from, and whether it trains.
_MAY_DIFFER = {"inference_mode", "base_model_name_or_path", "revision", "peft_version", "auto_mapping"}
