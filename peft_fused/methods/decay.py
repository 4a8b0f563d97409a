"""Weight decay for optimizers of adapted models: which parameters it is for, and which it would only pull to zero."""

from torch import nn

from ..layers.checks import check_alpha, check_module

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The model's trainable parameters as optimizer groups, decayed ones first, each with its "weight_decay".

    Not decayed are biases, the parameters of norms, and those that decay would harm, as their module says: of
    structured maps (SURM), and factors with pretrained content. Told apart by module, not by name.
    With Trainer: `optimizers=(AdamW(decay_groups(model, 0.1), lr=1e-3), None)`, whose weight_decay argument is then not
    used.

    model: may be wrapped. weight_decay: at least 0. Raises TypeError or ValueError naming the argument, ValueError for
    a model without trainable parameters.
    """
    check_module("model", model)
    check_alpha("weight_decay", weight_decay)
    if weight_decay < 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
    # Keyed by identity: a parameter shared by two modules is decayed only where no use of it speaks against it.
    decayed, spared = {}, {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                (spared if _spares(module, name) else decayed)[id(parameter)] = parameter
    groups = [
        {"params": [p for key, p in decayed.items() if key not in spared], "weight_decay": weight_decay},
        {"params": list(spared.values()), "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("decay_groups: the model has no trainable parameters")
    return groups


def _spares(module: nn.Module, name: str) -> bool:
    # Models bring norms of their own, named after the kind: LlamaRMSNorm, T5LayerNorm.
    norm = isinstance(module, NORMS) or type(module).__name__.endswith("Norm")
    # "bias", and what torch's own modules call theirs: in_proj_bias, bias_ih_l0.
    bias = name == "bias" or name.endswith("_bias") or name.startswith("bias_")
    # Asked of the type: PEFT's models forward unknown attributes of an instance to the model that they wrap.
    return norm or bias or getattr(type(module), "spared_from_decay", False)
