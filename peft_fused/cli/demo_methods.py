"""The demo's methods: how each adapts a model, what a step of it minimises, and at which learning rate."""

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_fused
from peft_fused.integrations.peft.registration import REGISTERED, Registration

from .demo_extra import Extra

BASELINE = "peft"
ALL = "all"


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


@dataclass(frozen=True)
class Method:
    """adapt(model, settings, names of query and value, seed): makes an adapted model of one of its own.

    rate: learning rate over that of LoRA. loss(model, batch): (what a step minimises, the loss of the task in it).
    lora: whether it trains LoRA's factors, so that its start and its gradients can be set beside those of PEFT.
    """

    title: str
    adapt: Callable[[nn.Module, Settings, list[str], int], nn.Module]
    rate: float = 1.0
    loss: Callable[[nn.Module, dict], tuple[torch.Tensor, torch.Tensor]] | None = None
    lora: bool = False
    note: str | None = None
    extra: type[Extra] = Extra


def _peft(model, settings, names, seed):
    config = LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=names, task_type="SEQ_CLS")
    return get_peft_model(model, config)


def _lora(model, settings, names, seed):
    model = _peft(model, settings, names, seed)
    peft_fused.accelerate(model)
    return model


def _registered(method: Registration) -> Method:
    def adapt(model, settings, names, seed):
        config = method.demo.config(settings, model, names, seed)
        config.task_type = "SEQ_CLS"
        return get_peft_model(model, config)

    demo, home = method.demo, f"{__package__}.demo_{method.name}"
    extra = importlib.import_module(home).Extra if importlib.util.find_spec(home) else Extra
    return Method(demo.title, adapt, demo.rate, demo.loss, demo.factors is not None, demo.note, extra)


# LoRA does better at 3e-3 than at 1e-3 on SST-2, which is the demo's rate.
METHODS: dict[str, Method] = {
    BASELINE: Method("PEFT LoRA", _peft, lora=True),
    "lora": Method("accelerated LoRA", _lora, lora=True),
}
METHODS |= {name: _registered(method) for name, method in REGISTERED.items()}
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
