"""The fields that the configurations of all our PEFT methods share, under PEFT's names, and their checks."""

import os
from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftConfig

from ...layers.checks import check_choice, check_flag
from .loading import checkpoint_keys, remember_checkpoint


@dataclass
class FusedConfig(PeftConfig):
    """Base class of our configurations. Subclasses set `fused_type`, their FusedPeftType."""

    fused_type: ClassVar

    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules to adapt: names, a regular expression or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules not to adapt: names or a regular expression."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save whole, such as a classifier."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers, with layers_to_transform."}
    )
    bias: str = field(
        default="none",
        metadata={"help": "Biases to train: 'none', 'all', or those of adapted layers ('surm_only', ...)."},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True: the adapter starts as a change of nothing. False: it starts random, for tests."},
    )
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "As in LoraConfig; how a weight is stored is seen from its layer."}
    )
    trainable_token_indices: list[int] | dict | None = field(
        default=None, metadata={"help": "Not supported: must be None."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = self.fused_type
        check_choice("bias", self.bias, ("none", "all", f"{self.fused_type.value.lower()}_only"))
        check_flag("init_weights", self.init_weights)
        check_flag("fan_in_fan_out", self.fan_in_fan_out)
        if self.trainable_token_indices is not None:
            raise ValueError("trainable_token_indices must be None: it is not supported; use modules_to_save")
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"{name} must be None when target_modules is a str")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform")
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        """As PeftConfig.from_pretrained; ValueError if the weights beside it are missing, cut short or damaged."""
        keys = checkpoint_keys(os.path.join(pretrained_model_name_or_path, subfolder or ""))
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        remember_checkpoint(config, keys)
        return config


def check_after(config, allowed: bool, where: str) -> None:
    """Makes config.after, of an adapter on the output, a list of names or None. TypeError or ValueError naming it."""
    after = [config.after] if isinstance(config.after, str) else config.after
    if after is None:
        return
    if not isinstance(after, list | tuple) or not after or not all(isinstance(name, str) and name for name in after):
        raise TypeError(f"after must be a name, a list of names or None, got {config.after!r}")
    if not allowed:
        raise ValueError(f"after is an option of {where}, got {config.after!r}")
    config.after = list(after)
