"""Exports a DyLoRA adapter, cut to one rank, as a plain LoRA checkpoint that needs nothing of ours to be loaded."""

import os
import re

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ...layers.checks import check_rank
from .dylora import DyLoraConfig, DyLoraLinear
from .loading import WRAPPER

FACTOR = re.compile(r"^(?P<layer>.*)\.dylora_(?P<factor>[AB])\.weight$")
SHARED_FIELDS = (
    "base_model_name_or_path", "revision", "task_type", "auto_mapping", "target_modules", "exclude_modules",
    "modules_to_save", "layers_to_transform", "layers_pattern", "lora_alpha", "lora_dropout", "alpha_pattern",
)  # fmt: skip


def export_lora(
    model: torch.nn.Module, path: str | os.PathLike, *, rank: int | None = None, adapter_name: str | None = None
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors of a LoRA adapter equal to the DyLoRA one at a rank.

    model: a PeftModel, or a model with an adapter loaded by transformers. path: folder, made if needed. rank: 1..r,
    None means the rank set for evaluation; a layer with a smaller r keeps all of it. adapter_name: None means the
    active one. With parameters sharded by FSDP2 all processes call it, and the first of them writes.

    The factors are copied, not approximated; with r = b and an unchanged lora_alpha, LoRA's scale alpha / r is DyLoRA's
    alpha / b. Raises TypeError or ValueError naming the argument.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a str or os.PathLike, got {type(path).__name__}")
    if adapter_name is not None and not isinstance(adapter_name, str):
        raise TypeError(f"adapter_name must be a str or None, got {type(adapter_name).__name__}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, DyLoraLinear)}
    if not layers:
        raise ValueError("export_lora: the model has no DyLoRA adapter")
    if adapter_name is None:
        active = next(iter(layers.values())).active_adapters
        if len(active) != 1:
            raise ValueError(f"adapter_name must be given, as {len(active)} adapters are active: {list(active)}")
        adapter_name = active[0]
    if not isinstance(model.peft_config.get(adapter_name), DyLoraConfig):
        raise ValueError(f"adapter_name must be one of {sorted(model.peft_config)}, got {adapter_name!r}")
    layers = {name: layer for name, layer in layers.items() if adapter_name in layer.dylora_ranks}
    states = [layer.dylora_ranks[adapter_name] for layer in layers.values()]
    rank = check_rank("rank", max(s.eval_value for s in states) if rank is None else rank, max(s.r for s in states))

    tensors, sharded = {}, False
    for key, value in get_peft_model_state_dict(model, adapter_name=adapter_name).items():
        if hasattr(value, "full_tensor"):
            sharded, value = True, value.full_tensor()
        match = FACTOR.match(key)
        if match:
            b = min(rank, layers[match["layer"]].dylora_ranks[adapter_name].r)
            key = f"{match['layer']}.lora_{match['factor']}.weight"
            value = value[:b] if match["factor"] == "A" else value[:, :b]
        key = key if key.startswith(WRAPPER) else WRAPPER + key
        tensors[key] = value.detach().to("cpu", copy=True).contiguous()
    if sharded and torch.distributed.get_rank() != 0:
        return
    os.makedirs(path, exist_ok=True)
    transposed = any(layer.transposed for layer in layers.values())
    _lora_config(model.peft_config[adapter_name], rank, transposed).save_pretrained(path)
    save_file(tensors, os.path.join(path, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})


def _lora_config(config: DyLoraConfig, rank: int, fan_in_fan_out: bool) -> LoraConfig:
    return LoraConfig(
        r=min(rank, config.r),
        rank_pattern={name: min(rank, r) for name, r in config.rank_pattern.items()},
        bias=config.bias.replace("dylora", "lora"),
        fan_in_fan_out=fan_in_fan_out,
        inference_mode=True,
        **{name: getattr(config, name) for name in SHARED_FIELDS},
    )
