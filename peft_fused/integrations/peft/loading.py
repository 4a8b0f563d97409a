"""Strict loading of adapter checkpoints: a file that does not fit is refused as a whole, before anything is copied.

PEFT by itself warns about missing keys, ignores unexpected ones, and copies what fits of a file whose shapes do not.
"""

import os

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer, _filter_state_dict_by_key_prefixes
from peft.tuners.tuners_utils import _get_tuner_state_dict_key_prefixes as tuner_prefixes
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open

WRAPPER = "base_model.model."
SHOWN = 5


def checkpoint_keys(folder: str) -> list[str] | None:
    """Names of the tensors in a local adapter checkpoint, None if the folder is not a local one.

    ValueError if its weights are missing, cut short, damaged, or no floating-point numbers.
    """
    if not os.path.isdir(folder):
        return None
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    pickled = os.path.join(folder, WEIGHTS_NAME)
    if os.path.isfile(path):
        try:
            with safe_open(path, framework="pt") as file:
                dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a complete safetensors file ({error}); nothing was loaded") from error
        wrong = [f"{key} is {dtype}" for key, dtype in dtypes.items() if not dtype.startswith(("F", "BF"))]
    elif os.path.isfile(pickled):
        path = pickled
        try:
            tensors = torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:  # whatever a damaged zip file or pickle makes torch raise
            raise ValueError(f"{path} cannot be read ({error}); nothing was loaded") from error
        dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
        wrong = [f"{key} is {dtype}" for key, dtype in dtypes.items() if not dtype.is_floating_point]
    else:
        raise ValueError(f"{folder} has neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}; nothing was loaded")
    if not dtypes:
        raise ValueError(f"{path} contains no tensors; nothing was loaded")
    if wrong:
        raise ValueError(f"{path} must hold floating-point tensors, but {wrong[0]}; nothing was loaded")
    return list(dtypes)


def check_wrapped_modules(model: torch.nn.Module, config, adapter_name: str) -> None:
    """ValueError if the checkpoint that the config was read from lacks a tensor of a module in modules_to_save.

    PEFT, which reads those tensors first, would stop there with a KeyError and the adapter in place.
    """
    keys = getattr(config, "_checkpoint_keys", None)
    if keys is None:
        return
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for key in module.adapter_state_dict_load_map(adapter_name):
                # The last names only: what comes before them may be renamed on the way (key_mapping).
                end = f"{name.rpartition('.')[2]}.{key}"
                if not any(given.endswith(end) for given in keys):
                    raise ValueError(f"the checkpoint has no {name}.{key}; nothing was loaded")


def check_adapter_names(model: torch.nn.Module) -> None:
    """ValueError if the name of an adapter in one of our layers also stands elsewhere in the keys of another.

    PEFT saves an adapter without every key that has another one's name in it, anywhere: beside an adapter named "q" or
    "map", tensors of a module "q" or a leaf "map" would be left out without a word.
    """
    for name, layer in model.named_modules():
        if not hasattr(type(layer), "state_names") or len(layer.adapters_here()) < 2:
            continue
        containers = layer.adapter_layer_names + layer.state_names
        for adapter in layer.adapters_here():
            blocks = [layer._modules[container][adapter] for container in containers]
            keys = [WRAPPER + name, *containers, *(key for block in blocks for key in block.state_dict())]
            parts = {part for key in keys for part in key.split(".")}
            clash = sorted(parts.intersection(layer.adapters_here()) - {adapter})
            if clash:
                raise ValueError(
                    f"adapter_name: beside adapter {adapter!r} none can be named {clash[0]!r}, which is part of the "
                    f"names of its tensors in {name!r}: PEFT would leave those out when it saves; choose another name"
                )


class Snapshot:
    """The module tree and the trainability of parameters, to be put back if an adapter cannot be added or loaded."""

    def __init__(self, model: torch.nn.Module):
        self._children = [(module, dict(module._modules)) for module in model.modules()]
        self._trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        for module, children in self._children:
            module._modules.clear()
            module._modules.update(children)
        for parameter, trainable in self._trainable:
            parameter.requires_grad_(trainable)


def check_state_dict(model: torch.nn.Module, prefix: str, adapter_name: str, state_dict: dict) -> list[tuple]:
    """ValueError unless a state dict, keyed as the model is, has exactly the adapter's tensors, in the right shapes.

    Further tensors are let pass if the model has them: saved biases, embeddings and modules_to_save. Those of a
    schedule's state are not checked but returned, as (layer, {"<container>.<name>": tensor}) of every layer with any.
    """
    own = model.state_dict()
    given = {
        key if key in own or not key.startswith(WRAPPER) else key.removeprefix(WRAPPER): value
        for key, value in state_dict.items()
    }
    states = []
    for layer_name, layer in model.named_modules():
        for container in getattr(type(layer), "state_names", ()):
            start = f"{layer_name}.{container}.{adapter_name}."
            found = {f"{container}.{key.removeprefix(start)}": t for key, t in given.items() if key.startswith(start)}
            states.append((layer, found))
            given = {key: t for key, t in given.items() if not key.startswith(start)}
            own = {key: t for key, t in own.items() if not key.startswith(start)}
    expected = _filter_state_dict_by_key_prefixes(own, tuner_prefixes(model, adapter_name=adapter_name))
    problems = []
    missing = [key for key in expected if key not in given]
    # With bias="all" PEFT saves the biases of modules_to_save a second time, under names that it does not read.
    unread = (".modules_to_save.", f".modules_to_save.{adapter_name}.")
    copies = {own_key.removeprefix(WRAPPER) for own_key in own}
    foreign = [key for key in given if key not in own and key.removeprefix(WRAPPER).replace(*unread) not in copies]
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
    return states


def remember_checkpoint(config, keys: list[str] | None) -> None:
    """Marks a config read from a checkpoint, whose weights are about to be loaded into an adapter made for them."""
    config._checkpoint_keys = keys


def awaits_checkpoint(config) -> bool:
    """Whether the config was read from a checkpoint whose weights have not been loaded yet."""
    return hasattr(config, "_checkpoint_keys")


def forget_checkpoint(model: torch.nn.Module, config) -> None:
    """The weights have been loaded: from now on a failing load leaves the adapter in place."""
    config.__dict__.pop("_checkpoint_keys", None)
    if isinstance(model, PeftModel):
        model.base_model.before_load = None


def undo_injection(model: torch.nn.Module, adapter_name: str) -> None:
    """Takes away an adapter that was made for a checkpoint which then did not fit.

    An adapter that could hold anything of value stays: one not made for a checkpoint, or changed since it was made.
    """
    if not isinstance(model, PeftModel) or model.base_model.before_load is None:
        return
    made_for, before = model.base_model.before_load
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    if made_for != adapter_name or not all(layer.is_untouched(adapter_name) for layer in layers):
        return
    if len(model.peft_config) > 1:
        model.delete_adapter(adapter_name)
    else:
        model.base_model.unload()
    before.restore()
