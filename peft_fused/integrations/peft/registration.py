"""What a method tells everything else of itself: one `Registration`, made in the method's own module here.

PEFT's loaders, `export_lora`, the demo and the tests of all methods read it; nothing else names a method.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

from ...methods.schedule import SCHEDULES, Schedule
from ...registry import METHODS

if TYPE_CHECKING:
    from .export import Exported

# Our members of PEFT's mappings. PEFT compares types as strings, so its own closed enum need not be changed.
FusedPeftType = Enum("FusedPeftType", {name.upper(): name.upper() for name in METHODS}, type=str, module=__name__)


@dataclass(frozen=True)
class Demo:
    """A method's row in `peft-fused demo`. What more there is to find out and to say of it: `cli/demo_<method>.py`.

    config(settings, model, names, seed): of the adapter, where names are the query and value layers. rate: learning
    rate over LoRA's, that of the least loss after 120 steps on SST-2. loss(model, batch): (what a step minimises, the
    loss of the task in it); None for the model's own. factors(model): the pairs (A, B) of all layers, of a method that
    trains LoRA's factors, so that its start and its gradients can be set beside those of PEFT. note: what is to be
    said of it beside the table.
    """

    title: str
    config: Callable[[Any, nn.Module, list[str], int], Any]
    rate: float = 1.0
    loss: Callable[[nn.Module, dict], tuple[torch.Tensor, torch.Tensor]] | None = None
    factors: Callable[[nn.Module], list[tuple[nn.Parameter, nn.Parameter]]] | None = None
    note: str | None = None


@dataclass(frozen=True)
class Registration:
    """name: as in `registry.METHODS`. config, tuner: the method's PEFT classes. layers: its plain ones.

    export(config, layers, adapter_name, rank): of `export_lora`, an `Exported` of the tuner's layers by name. contract:
    options of the configuration, for small layers, with which the tests of all methods run it, by the variant's name;
    the model is that of tests/contract.py, and unless they say target_modules those are two linear layers.
    writes_base: the method changes the base weights themselves, which so have to be dense, at hand and its own.

    Weight decay is a matter of the layers: a module whose parameters it would harm has `spared_from_decay = True`.
    """

    name: str
    config: type
    tuner: type
    layers: tuple[type, ...]
    export: Callable[[Any, dict[str, nn.Module], str, int | None], "Exported"]
    contract: Mapping[str, Mapping[str, Any]]
    demo: Demo
    writes_base: bool = False

    @property
    def schedule(self) -> Schedule | None:
        """What `on_step` calls; None for a method whose layers do not change in training."""
        return SCHEDULES.get(self.name)


REGISTERED: dict[str, Registration] = {}


def register(method: Registration) -> None:
    """Makes a method known. Repeated calls change nothing; RuntimeError if PEFT has one of that name of its own."""
    peft_type = FusedPeftType(method.name.upper())
    entries = (
        (PEFT_TYPE_TO_CONFIG_MAPPING, method.config),
        (PEFT_TYPE_TO_TUNER_MAPPING, method.tuner),
        (PEFT_TYPE_TO_PREFIX_MAPPING, method.tuner.prefix),
    )
    for mapping, value in entries:
        present = mapping.get(peft_type, value)
        # A reloaded module defines its classes anew; those may take the place of the old ones.
        if getattr(present, "__module__", present) != getattr(value, "__module__", value):
            raise RuntimeError(
                f"this version of peft has a method {peft_type.value} of its own ({present}); "
                "peft_fused does not replace it. Use that method, or a version of peft without it."
            )
    for mapping, value in entries:
        mapping[peft_type] = value
    REGISTERED[method.name] = method


def registration_of(config) -> Registration | None:
    """That of a config's method; None for a config of PEFT's own methods."""
    return next((method for method in REGISTERED.values() if method.config is type(config)), None)
