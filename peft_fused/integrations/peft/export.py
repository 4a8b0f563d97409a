"""Exports our adapters as plain LoRA checkpoints, which need nothing of ours to be loaded."""

import contextlib
import os
import tempfile

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file

from ...layers.checks import check_rank
from ...layers.sharded import is_sharded, whole
from ...layers.surm_adapter import NO_DELTA
from .adamix import AdaMixConfig, AdaMixLinear, warn_of_products
from .aflora import AfLoraConfig, AfLoraLinear
from .config import FusedConfig
from .dylora import DyLoraConfig, DyLoraLinear
from .loading import WRAPPER
from .rosa import RosaConfig, RosaPeftLinear
from .surm import SurmConfig, SurmLinear
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
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a str or os.PathLike, got {type(path).__name__}")
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
        factors, lora_config, error = _EXPORTS[type(config)](config, layers, adapter_name, rank)

    # Saved biases and modules_to_save go along as they are.
    others = get_peft_model_state_dict(model, adapter_name=adapter_name)
    others = {key: value for key, value in others.items() if containers.isdisjoint(key.split("."))}
    tensors = {}
    for key, value in (others | factors).items():
        key = key if key.startswith(WRAPPER) else WRAPPER + key
        tensors[key] = whole(value).detach().to("cpu", copy=True).contiguous()
    if any(map(is_sharded, model.parameters())) and torch.distributed.get_rank() != 0:
        return error
    os.makedirs(path, exist_ok=True)
    # Whole files only, and no config beside weights that are not its own: what is cut short here passes for no adapter.
    with tempfile.TemporaryDirectory(dir=path, prefix=".export-") as whole_files:
        lora_config.save_pretrained(whole_files)
        save_file(tensors, os.path.join(whole_files, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(path, CONFIG_NAME))
        for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
            os.replace(os.path.join(whole_files, name), os.path.join(path, name))
    return error


def _dylora(config: DyLoraConfig, layers: dict[str, DyLoraLinear], adapter_name: str, rank: int | None):
    """(factors by key, LoRA configuration, None) of a DyLoRA adapter cut to a rank."""
    states = [layer.dylora_ranks[adapter_name] for layer in layers.values()]
    rank = check_rank("rank", max(s.eval_value for s in states) if rank is None else rank, max(s.r for s in states))
    factors = {}
    for name, layer in layers.items():
        b = min(rank, layer.dylora_ranks[adapter_name].r)
        A, B = whole(layer.dylora_A[adapter_name].weight), whole(layer.dylora_B[adapter_name].weight)
        factors |= {f"{name}.lora_A.weight": A[:b], f"{name}.lora_B.weight": B[:, :b]}
    lora_config = _lora_config(
        config, layers, r=min(rank, config.r), lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
        rank_pattern={name: min(rank, r) for name, r in config.rank_pattern.items()},
        alpha_pattern=config.alpha_pattern,
    )  # fmt: skip
    return factors, lora_config, None


@torch.no_grad()
def _surm(config: SurmConfig, layers: dict[str, SurmLinear], adapter_name: str, rank: int | None):
    """(factors by key, LoRA configuration, largest relative error) of a SURM adapter's best approximation of a rank."""
    _check_additive(config, adapter_name)
    most = {name: min(layer.in_features, layer.out_features) for name, layer in layers.items()}
    if rank is None:
        raise ValueError(f"rank must be given for a SURM adapter, 1..{max(most.values())}")
    check_rank("rank", rank, max(most.values()))
    if any(is_sharded(layer.factor(adapter_name)) for layer in layers.values()):
        raise ValueError("export_lora: sharded parameters (FSDP2) are not supported for SURM; gather the model first")
    factors, errors = {}, []
    for name, layer in layers.items():
        delta = layer.dense_delta(adapter_name)
        U, S, V = torch.linalg.svd(delta, full_matrices=False)
        U, S, V = U[:, :rank], S[:rank].sqrt(), V[:rank]
        A, B = S[:, None] * V, U * S
        factors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        size = delta.norm()
        errors.append(((delta - B @ A).norm() / size).item() if size > 0 else 0.0)
    # alpha = rank makes LoRA's scale 1.
    less = {name.removeprefix(WRAPPER): least for name, least in most.items() if least < rank}
    lora_config = _lora_config(
        config, layers, r=rank, lora_alpha=rank, lora_dropout=config.surm_dropout, rank_pattern=less, alpha_pattern=less
    )
    return factors, lora_config, max(errors)


def _adamix(config: AdaMixConfig, layers: dict[str, AdaMixLinear], adapter_name: str, rank: int | None):
    """(factors by key, LoRA configuration, None) of the average of an AdaMix adapter's experts."""
    _check_additive(config, adapter_name)
    if rank is not None:
        raise ValueError(f"rank must be None for an AdaMix adapter, which is exported whole, got {rank!r}")
    if all(config.policy().stacks):
        warn_of_products(adapter_name)
    factors = {}
    for name, layer in layers.items():
        block = layer.adamix_block[adapter_name]
        factors[f"{name}.lora_A.weight"] = whole(block.down.averaged()[0])
        factors[f"{name}.lora_B.weight"] = whole(block.up.averaged()[0])
    options = dict(r=config.r, lora_alpha=config.lora_alpha, lora_dropout=config.adamix_dropout)
    return factors, _lora_config(config, layers, **options), None


def _check_additive(config: FusedConfig, adapter_name: str) -> None:
    if config.kind != "lora":
        raise ValueError(f"adapter {adapter_name!r} is of kind {config.kind!r}, which LoRA cannot express: {NO_DELTA}")


def _aflora(config: AfLoraConfig, layers: dict[str, AfLoraLinear], adapter_name: str, rank: int | None):
    """(factors by key, LoRA configuration, None) of an AFLoRA adapter."""
    if rank is not None:
        raise ValueError(f"rank must be None for an AFLoRA adapter, which is exported whole, got {rank!r}")
    factors, ranks, alphas = {}, {}, {}
    for name, layer in layers.items():
        vectors = layer.aflora_vectors[adapter_name]
        A, B = whole(layer.aflora_A[adapter_name].weight), whole(layer.aflora_B[adapter_name].weight)
        d, b = whole(vectors.d), whole(vectors.b)
        factors |= {f"{name}.lora_A.weight": d.unsqueeze(1) * A, f"{name}.lora_B.weight": b.unsqueeze(1) * B}
        key, r = name.removeprefix(WRAPPER), len(d)
        ranks[key], alphas[key] = r, vectors.scale * r
    alpha = config.r if config.lora_alpha is None else config.lora_alpha
    lora_config = _lora_config(
        config, layers, r=config.r, lora_alpha=alpha, lora_dropout=config.lora_dropout,
        rank_pattern={key: r for key, r in ranks.items() if r != config.r},
        alpha_pattern={key: each for key, each in alphas.items() if each != alpha},
    )  # fmt: skip
    return factors, lora_config, None


@torch.no_grad()
def _rosa(config: RosaConfig, layers: dict[str, RosaPeftLinear], adapter_name: str, rank: int | None):
    """(factors by key, LoRA configuration, None) of all that a ROSA adapter has changed."""
    if rank is not None:
        raise ValueError(f"rank must be None for a ROSA adapter, which is exported whole, got {rank!r}")
    factors, ranks = {}, {}
    for name, layer in layers.items():
        B, A = layer.learned(adapter_name)
        factors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        ranks[name.removeprefix(WRAPPER)] = len(A)
    # alpha = rank makes LoRA's scale 1.
    most = max(ranks.values())
    less = {key: r for key, r in ranks.items() if r < most}
    lora_config = _lora_config(config, layers, r=most, lora_alpha=most, rank_pattern=less, alpha_pattern=less)
    return factors, lora_config, None


_EXPORTS = {AdaMixConfig: _adamix, AfLoraConfig: _aflora, DyLoraConfig: _dylora, SurmConfig: _surm, RosaConfig: _rosa}


def _lora_config(config: FusedConfig, layers: dict[str, FusedLayer], **options) -> LoraConfig:
    method = config.fused_type.value.lower()
    return LoraConfig(
        bias=config.bias.replace(method, "lora"),
        fan_in_fan_out=any(layer.transposed for layer in layers.values()),
        inference_mode=True,
        **{name: getattr(config, name) for name in SHARED_FIELDS},
        **options,
    )
