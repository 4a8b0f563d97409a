"""Exports our adapters as plain LoRA checkpoints, which need nothing of ours to be loaded."""

import contextlib
import os
import re
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ...layers.adapted import NO_DELTA
from ...layers.checks import check_module
from ...layers.sharded import is_sharded, whole
from .config import FusedConfig
from .files import whole_files
from .loading import WRAPPER
from .registration import registration_of
from .tuner import FusedLayer

SHARED_FIELDS = (
    "base_model_name_or_path", "revision", "task_type", "auto_mapping", "target_modules", "exclude_modules",
    "modules_to_save", "layers_to_transform", "layers_pattern",
)  # fmt: skip


def export_lora(
    model: torch.nn.Module, path: str | os.PathLike, *, rank: int | None = None, adapter_name: str | None = None
) -> float | None:
    """Writes adapter_config.json and adapter_model.safetensors of a LoRA adapter of a rank, made of one of ours.

    model: a PeftModel, or a model with an adapter loaded by transformers. path: folder, made if needed. adapter_name:
    None means the active one. Raises TypeError or ValueError naming the argument, before anything is written.

    rank: 1..r for a method that can be cut to a rank or has to be approximated by one, None for one that is exported
    whole, at its own. What is equal and what approximate, the method's page says. With parameters sharded by FSDP2 all
    processes call it, and the first of them writes; what has to be decomposed must not be sharded. Returns None where
    the export is equal to the adapter, and otherwise the largest relative error of a layer, ||delta - B A|| / ||delta||
    in the Frobenius norm, 0 for a layer without change.
    """
    check_module("model", model)
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a str or os.PathLike, got {type(path).__name__}")
    if not os.fspath(path):
        raise ValueError("path must name a folder, got ''")
    if adapter_name is not None and not isinstance(adapter_name, str):
        raise TypeError(f"adapter_name must be a str or None, got {type(adapter_name).__name__}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, FusedLayer)}
    if not layers:
        raise ValueError("export_lora: the model has no peft_fused adapter")
    if adapter_name is None:
        active = next(iter(layers.values())).active_adapters
        if len(active) != 1:
            raise ValueError(f"adapter_name must be given, as {len(active)} adapters are active: {list(active)}")
        adapter_name = active[0]
    config = model.peft_config.get(adapter_name)
    method = registration_of(config)
    if method is None:
        raise ValueError(f"adapter_name must be one of {sorted(model.peft_config)}, got {adapter_name!r}")
    containers = {name for layer in layers.values() for name in layer.adapter_layer_names + layer.state_names}
    layers = {name: layer for name, layer in layers.items() if adapter_name in layer.adapters_here()}
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        exported = method.export(config, layers, adapter_name, rank)
    lora_config = _lora_config(config, layers, exported)
    factors = {f"{name}.lora_A.weight": layer.A for name, layer in exported.layers.items()}
    factors |= {f"{name}.lora_B.weight": layer.B for name, layer in exported.layers.items()}

    # Saved biases and modules_to_save go along as they are.
    others = get_peft_model_state_dict(model, adapter_name=adapter_name)
    others = {key: value for key, value in others.items() if containers.isdisjoint(key.split("."))}
    tensors = {}
    for key, value in (others | factors).items():
        key = key if key.startswith(WRAPPER) else WRAPPER + key
        tensors[key] = whole(value).detach().to("cpu", copy=True).contiguous()
    if any(map(is_sharded, model.parameters())) and torch.distributed.get_rank() != 0:
        return exported.error
    with whole_files(path, SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME) as folder:
        lora_config.save_pretrained(folder)
        save_file(tensors, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        # No config beside weights that are not its own: what is cut short from here on passes for no adapter.
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(path, CONFIG_NAME))
    return exported.error


class ExportedLayer(NamedTuple):
    """Factors A [r, K] and B [N, r] of a layer, whose scale is alpha / r."""

    A: torch.Tensor
    B: torch.Tensor
    alpha: float


class Exported(NamedTuple):
    """What a LoRA checkpoint is made of: its layers by name, and the rank, alpha and dropout that most of them have.

    error: the largest relative one of a layer, None where they are equal to the adapter's.
    """

    layers: dict[str, ExportedLayer]
    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    error: float | None = None


def check_additive(config: FusedConfig, adapter_name: str) -> None:
    """ValueError if the adapter works on a layer's output."""
    if config.kind != "lora":
        raise ValueError(f"adapter {adapter_name!r} is of kind {config.kind!r}, which LoRA cannot express: {NO_DELTA}")


def refuse_rank(method: str, rank: int | None) -> None:
    """ValueError if a rank is asked for."""
    if rank is not None:
        raise ValueError(f"rank must be None for {method} adapter, which is exported whole, got {rank!r}")


def _lora_config(config: FusedConfig, layers: dict[str, FusedLayer], exported: Exported) -> LoraConfig:
    method = config.fused_type.value.lower()
    found = exported.layers
    return LoraConfig(
        r=exported.r,
        lora_alpha=exported.lora_alpha,
        lora_dropout=exported.lora_dropout,
        rank_pattern=_pattern({name: len(layer.A) for name, layer in found.items()}, exported.r),
        alpha_pattern=_pattern({name: layer.alpha for name, layer in found.items()}, exported.lora_alpha),
        bias=config.bias.replace(method, "lora"),
        fan_in_fan_out=any(layer.transposed for layer in layers.values()),
        inference_mode=True,
        **{name: getattr(config, name) for name in SHARED_FIELDS},
    )


def _pattern(values: dict[str, float], usual: float) -> dict[str, float]:
    """What layers have instead of the usual value, keyed by regular expressions of which one fits a layer.

    PEFT takes the first key that fits, but sorts them when it saves: so each has whole names, from the start.
    """
    names: dict[float, list[str]] = {}
    for name, value in values.items():
        if value != usual:
            names.setdefault(value, []).append(re.escape(name.removeprefix(WRAPPER)))
    return {f"^({'|'.join(each)})": value for value, each in names.items()}
