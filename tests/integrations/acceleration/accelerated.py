"""A PEFT model and an accelerated copy of it, and what both compute: what the tests here share."""

import copy

import torch
from accelerate.hooks import ModelHook
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_fused.integrations.peft.acceleration import accelerate
from peft_fused.integrations.peft.acceleration.kinds import KINDS
from peft_fused.integrations.peft.acceleration.layer import AcceleratedLayer

FP32 = 1e-5


def known() -> str:
    """The kinds of adapter that are registered, as reports name them."""
    return " or ".join(kind.name for kind in KINDS.values())


class Net(nn.Module):
    """Two targets, one of them without bias, and a head for modules_to_save."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first = nn.Linear(24, 40, dtype=dtype)
        self.second = nn.Linear(40, 24, bias=False, dtype=dtype)
        self.head = nn.Linear(24, 3, dtype=dtype)

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.first(x))))


def randomise(model):
    """Non-zero B (and bias of B), large enough for the adapter to matter as much as the base layer does."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def config(**kwargs):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["first", "second"], **kwargs})


def pair(base=None, *, autocast_adapter_dtype=True, **kwargs):
    """(PEFT model, accelerated copy)."""
    ours = config(**kwargs)
    reference = get_peft_model(base or Net(), ours, autocast_adapter_dtype=autocast_adapter_dtype)
    randomise(reference)
    fused = copy.deepcopy(reference)
    assert accelerate(fused).swapped
    return reference, fused


def several():
    """(PEFT model with adapters a, b and c, accelerated copy); b has another rank, c targets the first layer only."""
    reference = get_peft_model(Net(), config(), adapter_name="a")
    reference.add_adapter("b", config(r=2, lora_alpha=3, lora_bias=True))
    reference.add_adapter("c", config(r=6, target_modules=["first"]))
    randomise(reference)
    fused = copy.deepcopy(reference)
    assert len(accelerate(fused).swapped) == 2
    return reference, fused


def first(model):
    return model.get_submodule("base_model.model.first")


def names(model):
    return [name for name, child in model.named_modules() if isinstance(child, AcceleratedLayer)]


def explained(adapted, x=None):
    """(what the layer runs on x, or on an input such as it is meant for; reasons against each faster way)."""
    route = adapted.route(adapted.typical_input() if x is None else x)
    return route.path, route.reasons


def error(ours, truth):
    return ((ours.double() - truth.double()).abs().max() / truth.double().abs().max().clamp_min(1e-30)).item()


def results(model, x, forward=None):
    """{name: tensor} of the output and of the gradients of x and of all trained parameters."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    y = forward(model, x) if forward else model(x)
    torch.manual_seed(7)
    (y * torch.randn(y.shape, dtype=torch.float64).to(y.dtype)).sum().backward()
    found = {"output": y.detach(), "x": x.grad}
    found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def assert_same(ours, reference, tolerance=FP32):
    assert ours.keys() == reference.keys()
    for name, truth in reference.items():
        assert ours[name].dtype == truth.dtype, name
        assert ours[name].shape == truth.shape, name
        assert error(ours[name], truth) <= tolerance, f"{name}: {error(ours[name], truth):.2e}"


def same(fused, reference, x=None, tolerance=FP32):
    x = torch.randn(2, 5, 24) if x is None else x
    assert_same(results(fused, x), results(reference, x), tolerance)


class CountCalls(ModelHook):
    seen = 0

    def pre_forward(self, module, *args, **kwargs):
        CountCalls.seen += 1
        return args, kwargs


class Tagged(torch.Tensor):
    """A weight with a dispatch of its own."""


def llama():
    size = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    return LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=2, max_position_embeddings=16))


def logits(model, x):
    return model(inputs_embeds=x).logits
