"""The demo's methods: how each adapts a model, what a step of it minimises, and at which learning rate."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_fused
from peft_fused.integrations.peft.aflora import TARGETS as AFLORA_TARGETS
from peft_fused.integrations.peft.positions import POSITIONS

BASELINE = "peft"
ALL = "all"
# A run draws ROSA's subspaces so often, whatever its length.
ROSA_DRAWS = 4
# AFLoRA's windows are of ten steps, in runs of thousands; in a run of a hundred that leaves it three decisions.
AFLORA_WINDOW, AFLORA_WINDOWS = 10, 50


@dataclass(frozen=True)
class Settings:
    model: str | None = None
    methods: tuple[str, ...] = (ALL,)
    steps: int = 100
    rank: int = 8
    alpha: float = 16.0
    seeds: int = 1
    batch_size: int = 32
    max_length: int = 64
    lr: float = 3e-3
    eval_rows: int = 1000
    target_modules: list[str] | None = None
    device: str = "cpu"


def _task_loss(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    loss = model(**batch).loss
    return loss, loss


def _adamix_loss(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    loss, outputs = peft_fused.adamix_loss(model, batch)
    return loss, outputs.loss


@dataclass(frozen=True)
class Method:
    """adapt(model, settings, names of query and value, seed): makes an adapted model of one of its own.

    rate: learning rate over that of LoRA. loss(model, batch): (what a step minimises, the loss of the task in it).
    lora: whether it trains LoRA's factors, so that its start and its gradients can be set beside those of PEFT.
    """

    title: str
    adapt: Callable[[nn.Module, Settings, list[str], int], nn.Module]
    rate: float = 1.0
    loss: Callable[[nn.Module, dict], tuple[torch.Tensor, torch.Tensor]] = _task_loss
    lora: bool = False


def _lora_config(settings: Settings, names: list[str]) -> LoraConfig:
    return LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=names, task_type="SEQ_CLS")


def _peft(model, settings, names, seed):
    return get_peft_model(model, _lora_config(settings, names))


def _lora(model, settings, names, seed):
    model = _peft(model, settings, names, seed)
    peft_fused.accelerate(model)
    return model


def _dylora(model, settings, names, seed):
    config = peft_fused.DyLoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, seed=seed, target_modules=names, task_type="SEQ_CLS"
    )
    return get_peft_model(model, config)


def _surm(model, settings, names, seed):
    config = peft_fused.SurmConfig(structure="circulant", target_modules=names, task_type="SEQ_CLS")
    return get_peft_model(model, config)


def _adamix(model, settings, names, seed):
    known = settings.target_modules is None and model.config.model_type in POSITIONS["adamix"]
    config = peft_fused.AdaMixConfig(seed=seed, target_modules=None if known else names, task_type="SEQ_CLS")
    return get_peft_model(model, config)


def _aflora(model, settings, names, seed):
    # The paper's matrices lie in the feed-forward blocks. Where they are not known, or others are asked for, these are
    # what is frozen by and by, rather than from the start as the attention's.
    known = settings.target_modules is None and model.config.model_type in AFLORA_TARGETS
    where = {} if known else dict(target_modules=names, frozen_modules=[])
    window = max(1, min(AFLORA_WINDOW, settings.steps // AFLORA_WINDOWS))
    return get_peft_model(model, peft_fused.AfLoraConfig(window=window, task_type="SEQ_CLS", **where))


def _rosa(model, settings, names, seed):
    config = peft_fused.RosaConfig(
        r=settings.rank, resample_every=resample_every(settings), seed=seed, target_modules=names, task_type="SEQ_CLS"
    )
    return get_peft_model(model, config)


def resample_every(settings: Settings) -> int:
    """Steps that ROSA trains one subspace for."""
    return max(1, settings.steps // ROSA_DRAWS)


# The rates are those of the least loss after 120 steps on SST-2: LoRA and AdaMix do better at 3e-3 than at 1e-3, and
# ROSA, which learns nothing in so few steps at 3e-4, too; its authors and AdaMix's take less, over many epochs. AFLoRA
# prefers its paper's 1e-2 to 3e-3 and 3e-2.
METHODS: dict[str, Method] = {
    BASELINE: Method("PEFT LoRA", _peft, lora=True),
    "lora": Method("accelerated LoRA", _lora, lora=True),
    "dylora": Method("DyLoRA", _dylora, lora=True),
    "surm": Method("SURM, circulant", _surm),
    "adamix": Method("AdaMix", _adamix, loss=_adamix_loss),
    "aflora": Method("AFLoRA", _aflora, rate=3.0),
    "rosa": Method("ROSA", _rosa),
}
CHOICES = tuple(name for name in METHODS if name != BASELINE)
# Of a model that the table does not have.
PLAIN = Method("", lambda model, *_: model)


def choose(names: Iterable[str]) -> tuple[str, ...]:
    """The baseline, then the methods named, in the table's order; "all" names all. ValueError for an unknown one."""
    names = list(names)
    for name in names:
        if name not in (ALL, *CHOICES):
            raise ValueError(f"must be {ALL} or one of {', '.join(CHOICES)}, got {name!r}")
    return (BASELINE, *(name for name in CHOICES if ALL in names or name in names))
