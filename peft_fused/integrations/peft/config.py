"""The fields that the configurations of all our PEFT methods share, under PEFT's names, and their checks."""

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from peft import PeftConfig
from peft.utils import CONFIG_NAME
from peft.utils.other import get_pattern_key

from ...layers.checks import check_choice, check_flag, check_int
from .card import describe_method
from .files import whole_files
from .loading import checkpoint_keys, remember_checkpoint

PATTERNS = ("rank_pattern", "alpha_pattern")


def check_regex(name: str, value: str, part: bool = False) -> None:
    """ValueError naming it if a str is no regular expression. part: or if it can be no part of one."""
    try:
        re.compile(value)
        if part:
            re.compile(f"({value})")
    except (re.error, OverflowError) as error:
        raise ValueError(f"{name} must be a regular expression, got {value!r}: {error}") from error


def check_names(name: str, value, collection: type, regex: bool = True):
    """Names of modules as that collection, or None. regex: a str passes as well, if it is a regular expression.

    TypeError or ValueError naming the field otherwise.
    """
    if value is None:
        return None
    if isinstance(value, str) and regex:
        check_regex(name, value)
        return value
    if not isinstance(value, list | set | tuple) or not all(isinstance(each, str) and each for each in value):
        also = ", a str or None" if regex else " or None"
        raise TypeError(f"{name} must be a list of str{also}, got {value!r}")
    for each in value:
        check_regex(name, each, part=True)
    return collection(value)


def check_pattern(name: str, value, check: Callable) -> dict:
    """A dict from names of modules, read as regular expressions, to what `check` lets pass; empty for None.

    TypeError or ValueError naming the field and key otherwise.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise TypeError(f"{name} must be a dict or None, got {type(value).__name__}")
    for key, each in value.items():
        if not isinstance(key, str):
            raise TypeError(f"{name} must have keys of str, got {key!r}")
        check_regex(f"{name}[{key!r}]", key, part=True)
        check(f"{name}[{key!r}]", each)
    return value


def by_pattern(pattern: dict, key: str, default):
    """What a pattern has for the layer named key."""
    return pattern.get(get_pattern_key(pattern, key), default)


@dataclass
class FusedConfig(PeftConfig):
    """Base class of our configurations. Subclasses set `fused_type`, their FusedPeftType.

    set_later: fields that say what was set after the adapter was made, and go with it into a copy.
    """

    fused_type: ClassVar
    set_later: ClassVar[frozenset[str]] = frozenset()

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
        check_flag("inference_mode", self.inference_mode)
        for name, kind in (("base_model_name_or_path", str), ("revision", str), ("auto_mapping", dict)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__} or None, got {value!r}")
        if self.trainable_token_indices is not None:
            raise ValueError("trainable_token_indices must be None: it is not supported; use modules_to_save")
        self.target_modules = check_names("target_modules", self.target_modules, set)
        self.exclude_modules = check_names("exclude_modules", self.exclude_modules, set)
        # A copy, as PEFT adds a classifier to it. Not a str, whose letters PEFT would take for names.
        self.modules_to_save = check_names("modules_to_save", self.modules_to_save, list, regex=False)
        self.layers_pattern = check_names("layers_pattern", self.layers_pattern, list)
        layers = self.layers_to_transform
        if layers is not None:
            for index in layers if isinstance(layers, list | tuple) else [layers]:
                check_int("layers_to_transform", index)
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) is not None:
                raise ValueError(f"{name} must be None when target_modules is a str")
        if self.layers_pattern and layers is None:
            raise ValueError(
                f"layers_pattern must have layers_to_transform beside it, got {self.layers_pattern!r} alone"
            )

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """As PeftConfig.save_pretrained, but the file is whole or as before, and has patterns in the order in which
        they are tried: PEFT sorts them, and with "q_proj" before "self_attn.q_proj" other layers would be meant.
        The model card beside it, which PEFT has written by then, says the method.
        """
        with whole_files(save_directory, CONFIG_NAME) as folder:
            super().save_pretrained(folder, **kwargs)
            path = os.path.join(folder, CONFIG_NAME)
            with open(path) as file:
                stored = json.load(file)
            stored |= {name: getattr(self, name) for name in PATTERNS if name in stored}
            with open(path, "w") as file:
                json.dump(stored, file, indent=2)
        describe_method(save_directory, self)

    @classmethod
    def from_json_file(cls, path_json_file, **kwargs):
        """As PeftConfig.from_json_file; ValueError naming the file if it is cut short, damaged or no configuration."""
        try:
            loaded = super().from_json_file(path_json_file, **kwargs)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path_json_file} is not a complete JSON object ({error}); nothing was loaded") from error
        if not isinstance(loaded, dict):
            raise ValueError(f"{path_json_file} must be a JSON object, got {loaded!r}; nothing was loaded")
        return loaded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        """As PeftConfig.from_pretrained; ValueError if the weights beside it are missing, cut short or damaged."""
        keys = checkpoint_keys(os.path.join(pretrained_model_name_or_path, subfolder or ""))
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        remember_checkpoint(config, keys)
        return config


def check_after(config, allowed: bool, where: str) -> None:
    """Makes config.after, of an adapter on the output, a list of names or None. TypeError or ValueError naming it."""
    after = check_names("after", [config.after] if isinstance(config.after, str) else config.after, list, regex=False)
    if after is not None and not allowed:
        raise ValueError(f"after is an option of {where}, got {config.after!r}")
    config.after = after or None
