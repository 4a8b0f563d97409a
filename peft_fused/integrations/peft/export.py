"""Exports our adapters as plain LoRA checkpoints, which need nothing of ours to be loaded."""

import contextlib
import os
import re
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ...layers.checks import check_module, check_rank
from ...layers.sharded import is_sharded, whole
from ...layers.surm_adapter import NO_DELTA
from .adamix import AdaMixConfig, AdaMixLinear, warn_of_products
from .aflora import AfLoraConfig, AfLoraPeftLinear
from .config import FusedConfig
from .dylora import DyLoraConfig, DyLoraPeftLinear
from .files import whole_files
from .loading import WRAPPER
from .rosa import RosaConfig, RosaPeftLinear
from .surm import SurmConfig, SurmPeftLinear
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

    DyLoRA: equal to the adapter at that rank. rank: 1..r, None means the rank set for evaluation; a layer with a
    smaller r keeps all of it. The factors are copied, not approximated; with r = b and an unchanged lora_alpha, LoRA's
    scale alpha / r is DyLoRA's alpha / b. With parameters sharded by FSDP2 all processes call it, and the first of them
    writes. Returns None.

    SURM, kind "lora": the closest of that rank, by singular value decomposition of each layer's scaled dense matrix.
    Those matrices are of full rank as a rule, so that the rank, which must be given, decides on the error; a layer
    whose smaller size is less than rank gets that one and is exact. Returns the largest relative error of a layer,
    ||delta - B A|| / ||delta|| in the Frobenius norm, 0 for a layer without change. Parameters must not be sharded.

    ROSA: equal to all that the adapter has changed of the weights, of a rank 2 r larger with every draw; ValueError
    once a layer's change is kept dense, which `peft.convert_to_lora` can approximate. Sharded parameters as for DyLoRA.

    AFLoRA: equal to the adapter, at its own rank; A and B take in the vectors. Sharded parameters as for DyLoRA.

    AdaMix, kind "lora": the average of its experts, which is what it evaluates with. Sharded parameters as for DyLoRA.
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
    if type(config) not in _EXPORTS:
        raise ValueError(f"adapter_name must be one of {sorted(model.peft_config)}, got {adapter_name!r}")
    containers = {name for layer in layers.values() for name in layer.adapter_layer_names + layer.state_names}
    layers = {name: layer for name, layer in layers.items() if adapter_name in layer.adapters_here()}
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        exported, error = _EXPORTS[type(config)](config, layers, adapter_name, rank)
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
        return error
    with whole_files(path, SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME) as folder:
        lora_config.save_pretrained(folder)
        save_file(tensors, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        # No config beside weights that are not its own: what is cut short from here on passes for no adapter.
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(path, CONFIG_NAME))
    return error


class _Layer(NamedTuple):
    """Factors A [r, K] and B [N, r] of a layer, whose scale is alpha / r."""

    A: torch.Tensor
    B: torch.Tensor
    alpha: float


class _Exported(NamedTuple):
    """What a LoRA checkpoint is made of: its layers by name, and the rank, alpha and dropout that most of them have."""

    layers: dict[str, _Layer]
    r: int
    lora_alpha: float
    lora_dropout: float = 0.0


def _dylora(config: DyLoraConfig, layers: dict[str, DyLoraPeftLinear], adapter_name: str, rank: int | None):
    """A DyLoRA adapter cut to a rank, and None."""
    states = [layer.dylora_ranks[adapter_name] for layer in layers.values()]
    rank = check_rank("rank", max(s.eval_value for s in states) if rank is None else rank, max(s.r for s in states))
    found = {}
    for name, layer in layers.items():
        state = layer.dylora_ranks[adapter_name]
        b = min(rank, state.r)
        A, B = whole(layer.dylora_A[adapter_name].weight), whole(layer.dylora_B[adapter_name].weight)
        found[name] = _Layer(A[:b], B[:, :b], state.alpha)
    return _Exported(found, min(rank, config.r), config.lora_alpha, config.lora_dropout), None


@torch.no_grad()
def _surm(config: SurmConfig, layers: dict[str, SurmPeftLinear], adapter_name: str, rank: int | None):
    """A SURM adapter's best approximation of a rank, and its largest relative error."""
    _check_additive(config, adapter_name)
    most = max(min(layer.in_features, layer.out_features) for layer in layers.values())
    if rank is None:
        raise ValueError(f"rank must be given for a SURM adapter, 1..{most}")
    check_rank("rank", rank, most)
    if any(is_sharded(layer.factor(adapter_name)) for layer in layers.values()):
        raise ValueError("export_lora: sharded parameters (FSDP2) are not supported for SURM; gather the model first")
    found, errors = {}, []
    for name, layer in layers.items():
        delta = layer.dense_delta(adapter_name)
        U, S, V = torch.linalg.svd(delta, full_matrices=False)
        U, S, V = U[:, :rank], S[:rank].sqrt(), V[:rank]
        A, B = S[:, None] * V, U * S
        found[name] = _Layer(A, B, len(A))  # alpha = rank makes LoRA's scale 1
        size = delta.norm()
        errors.append(((delta - B @ A).norm() / size).item() if size > 0 else 0.0)
    return _Exported(found, rank, rank, config.surm_dropout), max(errors)


def _adamix(config: AdaMixConfig, layers: dict[str, AdaMixLinear], adapter_name: str, rank: int | None):
    """The average of an AdaMix adapter's experts, and None."""
    _check_additive(config, adapter_name)
    if rank is not None:
        raise ValueError(f"rank must be None for an AdaMix adapter, which is exported whole, got {rank!r}")
    if all(config.policy().stacks):
        warn_of_products(adapter_name)
    found = {}
    for name, layer in layers.items():
        block = layer.adamix_block[adapter_name]
        found[name] = _Layer(whole(block.down.averaged()[0]), whole(block.up.averaged()[0]), block.alpha)
    return _Exported(found, config.r, config.lora_alpha, config.adamix_dropout), None


def _check_additive(config: FusedConfig, adapter_name: str) -> None:
    if config.kind != "lora":
        raise ValueError(f"adapter {adapter_name!r} is of kind {config.kind!r}, which LoRA cannot express: {NO_DELTA}")


def _aflora(config: AfLoraConfig, layers: dict[str, AfLoraPeftLinear], adapter_name: str, rank: int | None):
    """An AFLoRA adapter, and None."""
    if rank is not None:
        raise ValueError(f"rank must be None for an AFLoRA adapter, which is exported whole, got {rank!r}")
    found = {}
    for name, layer in layers.items():
        vectors = layer.aflora_vectors[adapter_name]
        A, B = whole(layer.aflora_A[adapter_name].weight), whole(layer.aflora_B[adapter_name].weight)
        d, b = whole(vectors.d), whole(vectors.b)
        found[name] = _Layer(d.unsqueeze(1) * A, b.unsqueeze(1) * B, vectors.scale * len(d))
    alpha = config.r if config.lora_alpha is None else config.lora_alpha
    return _Exported(found, config.r, alpha, config.lora_dropout), None


@torch.no_grad()
def _rosa(config: RosaConfig, layers: dict[str, RosaPeftLinear], adapter_name: str, rank: int | None):
    """All that a ROSA adapter has changed, and None."""
    if rank is not None:
        raise ValueError(f"rank must be None for a ROSA adapter, which is exported whole, got {rank!r}")
    found = {}
    for name, layer in layers.items():
        B, A = layer.learned(adapter_name)
        found[name] = _Layer(A, B, len(A))  # alpha = rank makes LoRA's scale 1
    most = max(len(layer.A) for layer in found.values())
    return _Exported(found, most, most), None


_EXPORTS = {AdaMixConfig: _adamix, AfLoraConfig: _aflora, DyLoraConfig: _dylora, SurmConfig: _surm, RosaConfig: _rosa}


def _lora_config(config: FusedConfig, layers: dict[str, FusedLayer], exported: _Exported) -> LoraConfig:
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
