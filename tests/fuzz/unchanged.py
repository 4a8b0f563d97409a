"""What a refusal must not have changed of a module, and how many random cases to try."""

import copy
import os
from dataclasses import asdict

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

MULTIPLIER = float(os.environ.get("PEFT_FUSED_FUZZ", "1"))


def bits(tensor):
    return tensor.dtype, tensor.shape, tensor.detach().contiguous().flatten().view(torch.uint8).clone()


def state(model):
    """Everything of a module that a refusal must not change."""
    modules = list(model.named_modules(remove_duplicate=False))
    tuned = [(n, m) for n, m in modules if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    configs = getattr(model, "peft_config", None)
    return dict(
        tree=[(name, type(module), id(module)) for name, module in modules],
        attributes=[(name, sorted(vars(module))) for name, module in modules],
        training=[(name, module.training) for name, module in modules],
        hooks=[(name, len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in modules],
        parameters=[(name, id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)],
        tensors={name: bits(tensor) for name, tensor in model.state_dict().items()},
        configs=configs and {name: asdict(config) for name, config in configs.items()},
        active=getattr(model, "active_adapters", None),
        adapters=[(n, copy.copy(m.active_adapters), copy.copy(getattr(m, "_adapters", None))) for n, m in tuned],
        targeted=copy.copy(getattr(getattr(model, "base_model", None), "targeted_module_names", None)),
    )


def differences(before, after):
    """What of two states differs."""
    found = [key for key in before if key != "tensors" and before[key] != after[key]]
    tensors = before["tensors"], after["tensors"]
    if tensors[0].keys() != tensors[1].keys():
        return [*found, "names of tensors"]
    return found + [
        name for name, (*kind, data) in tensors[0].items()
        if kind != list(tensors[1][name][:2]) or not torch.equal(data, tensors[1][name][2])
    ]  # fmt: skip
