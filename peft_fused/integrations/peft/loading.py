"""Strict loading of adapter checkpoints: a file that does not fit is refused as a whole, before anything is copied.

PEFT by itself warns about missing keys, ignores unexpected ones, and copies what fits of a file whose shapes do not.
"""

import os

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, _filter_state_dict_by_key_prefixes
from peft.tuners.tuners_utils import _get_tuner_state_dict_key_prefixes as tuner_prefixes
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

WRAPPER = "base_model.model."
SHOWN = 5


def check_file(folder: str) -> None:
    """ValueError if a local folder holds an adapter file that is cut short or damaged. Other folders pass."""
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path):
        return
    try:
        with safe_open(path, framework="pt") as file:
            empty = not file.keys()
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); nothing was loaded") from error
    if empty:
        raise ValueError(f"{path} contains no tensors; nothing was loaded")


def check_state_dict(model: torch.nn.Module, prefix: str, adapter_name: str, state_dict: dict) -> None:
    """ValueError unless a state dict, keyed as the model is, has exactly the adapter's tensors, in the right shapes.

    Further tensors are let pass if the model has them: saved biases, embeddings and modules_to_save.
    """
    own = model.state_dict()
    given = {
        key if key in own or not key.startswith(WRAPPER) else key.removeprefix(WRAPPER): value
        for key, value in state_dict.items()
    }
    expected = _filter_state_dict_by_key_prefixes(own, tuner_prefixes(model, adapter_name=adapter_name))
    problems = []
    missing = [key for key in expected if key not in given]
    foreign = [key for key in given if key not in own]
    shapes = [
        f"{key}: {list(given[key].shape)} in the file, {list(own[key].shape)} in the model"
        for key in given
        if key in own and given[key].shape != own[key].shape
    ]
    for what, keys in (("missing", missing), ("unexpected", foreign), ("of another shape", shapes)):
        if keys:
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            problems.append(f"{len(keys)} {what}: {', '.join(keys[:SHOWN])}{more}")
    if problems:
        raise ValueError(
            f"the checkpoint does not fit adapter {adapter_name!r} ({prefix.rstrip('_')}); nothing was loaded. "
            + "; ".join(problems)
        )


def remember_checkpoint(config) -> None:
    """Marks a config read from a checkpoint, whose weights are about to be loaded into an adapter made for them."""
    config._weights_pending = True


def awaits_checkpoint(config) -> bool:
    """Whether the config was read from a checkpoint whose weights have not been loaded yet."""
    return getattr(config, "_weights_pending", False)


def forget_checkpoint(config) -> None:
    """The weights have been loaded: from now on a failing load leaves the adapter in place."""
    config.__dict__.pop("_weights_pending", None)


def undo_injection(model: torch.nn.Module, config, adapter_name: str) -> None:
    """Takes away an adapter that was made for a checkpoint which then did not fit.

    An adapter that could hold anything of value stays: one not made for a checkpoint, or changed since it was made.
    """
    if not awaits_checkpoint(config) or not isinstance(model, PeftModel):
        return
    if not all(layer.is_untouched(adapter_name) for layer in model.modules() if isinstance(layer, BaseTunerLayer)):
        return
    if len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
        return
    trainable = set(model.base_model.trainable_before)
    for name, parameter in model.base_model.unload().named_parameters():
        parameter.requires_grad_(name in trainable)
