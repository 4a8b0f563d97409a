"""Strict loading of adapter checkpoints: a file that does not fit is refused as a whole, before anything is copied.

PEFT by itself warns about missing keys, ignores unexpected ones, and copies what fits of a file whose shapes do not.
"""

import copy
import os
from collections import OrderedDict

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer, _filter_state_dict_by_key_prefixes
from peft.tuners.tuners_utils import _get_tuner_state_dict_key_prefixes as tuner_prefixes
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open

from ...layers.sharded import local
from ...ops.arguments import FLOATING

WRAPPER = "base_model.model."
SHOWN = 5
# Adapters are of FLOATING; a module saved whole may count, or hold indices and masks.
DTYPES = (*FLOATING, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
SAFETENSORS_DTYPES = ("F16", "BF16", "F32", "F64", "I64", "I32", "I16", "I8", "U8", "BOOL")


def checkpoint_keys(folder: str) -> list[str] | None:
    """Names of the tensors in a local adapter checkpoint, None if the folder is not a local one.

    ValueError if its weights are missing, cut short, damaged, or anything but dense tensors by name.
    """
    if not os.path.isdir(folder):
        return None
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    pickled = os.path.join(folder, WEIGHTS_NAME)
    if os.path.exists(path):
        try:
            with safe_open(path, framework="pt") as file:
                dtypes = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is not a complete safetensors file ({error}); nothing was loaded") from error
        for key, dtype in dtypes.items():
            if dtype not in SAFETENSORS_DTYPES:
                raise ValueError(f"{path}: {key} is {dtype}, which no adapter holds; nothing was loaded")
        keys = list(dtypes)
    elif os.path.exists(pickled):
        path = pickled
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged zip file or pickle makes torch raise
            raise ValueError(f"{path} cannot be read ({error}); nothing was loaded") from error
        check_tensors(path, tensors)
        keys = list(tensors)
    else:
        raise ValueError(f"{folder} has neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}; nothing was loaded")
    if not keys:
        raise ValueError(f"{path} contains no tensors; nothing was loaded")
    return keys


def check_tensors(source: str, tensors) -> None:
    """ValueError, naming the source, if it is anything but a dict from names to dense tensors with values."""
    if not isinstance(tensors, dict):
        raise ValueError(f"{source} must be a dict of tensors, got {type(tensors).__name__}; nothing was loaded")
    for key, tensor in tensors.items():
        if not isinstance(key, str):
            found = f"has the key {key!r}, which is no name"
        elif not isinstance(tensor, torch.Tensor):
            found = f"{key} is a {type(tensor).__name__}"
        elif tensor.is_nested or tensor.layout != torch.strided:
            found = f"{key} is {'nested' if tensor.is_nested else tensor.layout}"
        elif tensor.is_meta:
            found = f"{key} has no values (meta device)"
        elif tensor.dtype not in DTYPES:
            found = f"{key} is {tensor.dtype}"
        else:
            continue
        raise ValueError(f"{source} must hold dense tensors by name, but {found}; nothing was loaded")


def check_checkpoint(model: torch.nn.Module, config, adapter_name: str) -> None:
    """ValueError if PEFT, which reads them first, would stop with a KeyError at the names of a checkpoint's tensors.

    config: what `remember_checkpoint` has marked, or nothing is checked. model: what the adapter was added to, whose
    modules in modules_to_save must have their tensors; under their names, which a key_mapping cannot change.
    """
    keys = set(config.__dict__.get("_checkpoint_keys") or ())
    if not keys:
        return
    for key in sorted(keys):
        if not key.startswith("base_model."):
            raise ValueError(f"the checkpoint has {key}, which is no name that PEFT saves under; nothing was loaded")
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            for stored, key in module.adapter_state_dict_load_map(adapter_name).items():
                if f"{WRAPPER}{name}.{stored}" not in keys:
                    raise ValueError(f"the checkpoint has no {WRAPPER}{name}.{stored}; nothing was loaded")
                # With bias="all" PEFT saves the biases of a module saved whole under both names, and loads the first.
                again = config.bias == "all" and "bias" in stored
                if f"{WRAPPER}{name}.{key}" in keys and not again:
                    raise ValueError(f"the checkpoint has {WRAPPER}{name}.{stored} twice; nothing was loaded")


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
    """All that modules hold, by reference, and the trainability of their parameters: to be put back if an adapter
    cannot be added or loaded.
    """

    COPIED = (dict, OrderedDict, set, list)

    def __init__(self, model: torch.nn.Module):
        self._attributes = []
        for module in model.modules():
            held = vars(module)
            contents = [(value, copy.copy(value)) for value in held.values() if type(value) in self.COPIED]
            self._attributes.append((held, dict(held), contents))
        self._trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        for held, attributes, contents in self._attributes:
            held.clear()
            held.update(attributes)
            # In place, as hooks are removed by a reference to what holds them.
            for value, content in contents:
                value.clear()
                value.extend(content) if isinstance(value, list) else value.update(content)
        for parameter, trainable in self._trainable:
            parameter.requires_grad_(trainable)


def check_state_dict(model: torch.nn.Module, prefix: str, adapter_name: str, state_dict: dict) -> list[tuple]:
    """ValueError unless a state dict, keyed as the model is, has exactly the adapter's tensors, of the right shapes and
    kinds of type, and finite.

    Further tensors are let pass if PEFT saves them with this adapter: modules_to_save, the biases that its config
    names, and embeddings. Those of a schedule's state, whose shapes are not checked, are returned, as (layer,
    {"<container>.<name>": tensor}) of every layer with any.
    """
    own = model.state_dict()
    given = {
        key if key in own or not key.startswith(WRAPPER) else key.removeprefix(WRAPPER): value
        for key, value in state_dict.items()
    }
    expected = set(_filter_state_dict_by_key_prefixes(own, tuner_prefixes(model, adapter_name=adapter_name)))
    saved = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    expected |= own.keys() & saved.keys()  # biases, whose names are the same in a file
    states, of_states = [], set()
    for layer_name, layer in model.named_modules():
        # Those of layers that only other adapters have would be saved too; a file from elsewhere is without.
        if isinstance(layer, BaseTunerLayer) and adapter_name not in layer._get_available_adapters():
            expected.discard(f"{layer_name}.base_layer.bias")
        for container in getattr(type(layer), "state_names", ()):
            start = f"{layer_name}.{container}.{adapter_name}."
            found = {f"{container}.{key.removeprefix(start)}": t for key, t in given.items() if key.startswith(start)}
            states.append((layer, found))
            of_states.update(key for key in own.keys() | given.keys() if key.startswith(start))
    # A buffer of a module saved whole may be a mask of infinities.
    numbers = of_states.union(expected, (name for name, _ in model.named_parameters(remove_duplicate=False)))
    odd = {
        "missing": [key for key in own if key in expected and key not in given and key not in of_states],
        "unexpected": _foreign(model, adapter_name, given.keys() - expected - of_states, saved),
        "of another shape": [
            f"{key}: {list(t.shape)} in the file, {list(own[key].shape)} in the model"
            for key, t in given.items()
            if key in own and key not in of_states and t.shape != own[key].shape
        ],
        "of another type": [
            f"{key}: {t.dtype} in the file, {own[key].dtype} in the model"
            for key, t in given.items()
            if key in own and t.dtype != own[key].dtype and not t.is_floating_point() & own[key].is_floating_point()
        ],
        "not finite": [
            key
            for key, t in given.items()
            if key in numbers and t.is_floating_point() and not torch.isfinite(local(t)).all()
        ],
    }
    problems = []
    for what, keys in odd.items():
        if keys:
            more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
            problems.append(f"{len(keys)} {what}: {', '.join(keys[:SHOWN])}{more}")
    if problems:
        raise ValueError(
            f"the checkpoint does not fit adapter {adapter_name!r} ({prefix.rstrip('_')}); nothing was loaded. "
            + "; ".join(problems)
        )
    return states


def _foreign(model: torch.nn.Module, adapter_name: str, keys: set[str], saved: dict) -> list[str]:
    """Those of some keys, of tensors beside an adapter's own, that PEFT does not save with it.

    saved: what it saves without embeddings, which it does not always save, and of which the config tells nothing.
    """
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            keys = keys - {f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter_name).values()}
    # With bias="all" PEFT saves the biases of modules_to_save a second time, under names that no model has.
    known = {key.removeprefix(WRAPPER) for key in saved}
    keys = {key for key in keys if key.removeprefix(WRAPPER) not in known}
    if keys and hasattr(model, "get_input_embeddings"):
        keys = keys - get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=True).keys()
    return sorted(keys)


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
    before.restore()
    model.peft_config.pop(adapter_name)
    kept = set(model.modules())
    for layer in layers:
        if layer not in kept:
            layer.release()
