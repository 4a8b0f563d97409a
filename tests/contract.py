"""What the contract tests of all methods run with: every variant that a registration names, on the smallest model."""

from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.pytorch_utils import Conv1D

import peft_fused
from peft_fused.integrations.peft.registration import REGISTERED, Registration
from peft_fused.integrations.peft.tuner import FusedLayer

WIDTH, INNER, VOCAB, CLASSES = 12, 48, 20, 4
TARGETS = ["first", "second"]
TOTAL = 12  # steps of a run
IDS = torch.arange(20).view(4, 5)
LABELS = torch.arange(4)


@dataclass(frozen=True)
class Variant:
    """A method with the options that its registration names for one variant of it."""

    name: str
    method: Registration
    options: dict[str, Any]

    def config(self, **more):
        return self.method.config(**{"target_modules": TARGETS, **self.options, **more})

    @property
    def additive(self) -> bool:
        """Whether the adapter is a change of a weight, which can be merged and exported."""
        return getattr(self.config(), "kind", "lora") == "lora"

    @property
    def dropout(self) -> dict[str, float]:
        """The option of dropout on the adapter's input, if the method has one."""
        return {field.name: 0.2 for field in fields(self.method.config) if field.name.endswith("_dropout")}

    def __str__(self) -> str:
        return self.name


VARIANTS = [Variant(name, m, dict(options)) for m in REGISTERED.values() for name, options in m.contract.items()]


def only(keep) -> list[Variant]:
    return [variant for variant in VARIANTS if keep(variant)]


ADDITIVE = only(lambda v: v.additive)
ON_OUTPUT = only(lambda v: not v.additive)


class NetConfig(PretrainedConfig):
    model_type = "peft_fused_tests"

    def __init__(self, transposed: bool = False, **options):
        self.transposed = transposed
        super().__init__(**options)


class Block(GradientCheckpointingLayer):
    """first is square, second is wide: two draws of ROSA leave a dense change in the one, factors in the other."""

    def __init__(self, transposed: bool):
        super().__init__()
        linear = (lambda k, n: Conv1D(n, k)) if transposed else nn.Linear
        self.first, self.second = linear(WIDTH, WIDTH), linear(WIDTH, INNER)
        self.last, self.drop, self.norm = nn.Linear(INNER, WIDTH), nn.Dropout(0.0), nn.LayerNorm(WIDTH)

    def forward(self, x):
        return self.norm(x + self.drop(self.last(torch.tanh(self.second(self.first(x))))))


class Head(nn.Module):
    """A head of several modules, as RoBERTa's is."""

    def __init__(self):
        super().__init__()
        self.dense, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        return self.out(torch.tanh(self.dense(x)))


class Net(PreTrainedModel):
    """Two blocks and a head on tokens [B, T], or on vectors [B, T, WIDTH]."""

    config_class = NetConfig
    supports_gradient_checkpointing = True

    def __init__(self, config: NetConfig | None = None):
        super().__init__(config or NetConfig())
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block(self.config.transposed) for _ in range(2)])
        self.head = Head()
        self.post_init()

    def _init_weights(self, module):
        """Nothing: torch has made them."""
        if isinstance(module, Conv1D):
            nn.init.normal_(module.weight, std=0.3)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, x, labels=None):
        x = x if x.is_floating_point() else self.embed(x)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x.mean(1))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def net(dtype: torch.dtype = torch.float32, **options) -> Net:
    """The same every time."""
    torch.manual_seed(7)
    return Net(NetConfig(**options)).to(dtype).eval()


def adapted(variant: Variant, base: nn.Module | None = None, **options) -> nn.Module:
    """With an adapter that starts random. The same every time."""
    base = net() if base is None else base
    torch.manual_seed(1)
    return get_peft_model(base, variant.config(**{"init_weights": False, **options})).eval()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, VOCAB, (4, 5), generator=generator), torch.randint(0, CLASSES, (4,), generator=generator)


def train(model: nn.Module, steps: int, start: int = 0, optimizer=None, after=lambda: None) -> nn.Module:
    """Some steps of a run of TOTAL, scheduled."""
    optimizer = optimizer or optimizer_of(model)
    model.train()
    for step in range(start, start + steps):
        peft_fused.on_step(model, step=step, total_steps=TOTAL, epoch=step, optimizer=optimizer)
        x, labels = batch(step)
        model(x, labels=labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        after()
    return model.eval()


def midway(variant: Variant, base: nn.Module | None = None, **options) -> nn.Module:
    """In the middle of its run: where a schedule freezes, some is frozen, where it draws, it has drawn."""
    return train(adapted(variant, base, **options), 5)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS)["logits"]


def layers(model: nn.Module) -> dict[str, FusedLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FusedLayer)}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def tree(model: nn.Module) -> tuple[dict, set]:
    """Its modules and what trains."""
    return {name: type(module) for name, module in model.named_modules()}, trainable(model)


def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def base_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights that are none of an adapter's, by the base model's own names."""
    held = {id(p) for layer in layers(model).values() for each in layer.adapter_layer_names
            for p in layer._modules[each].parameters()}  # fmt: skip
    return {
        name.removeprefix("base_model.model.").replace("base_layer.", ""): p.detach().clone()
        for name, p in model.named_parameters()
        if id(p) not in held
    }


def with_delta(base: nn.Module, model: nn.Module, *names: str) -> nn.Module:
    """The base model with the dense changes of adapters added to its weights in double precision."""
    for path, layer in layers(model).items():
        weight = base.get_submodule(path.removeprefix("base_model.model.")).weight
        for name in names or ("default",):
            if name in layer.adapters_here():
                weight.data = (weight.data.double() + layer.get_delta_weight(name).double()).to(weight.dtype)
    return base


@contextmanager
def unchanged(model: nn.Module):
    """Whatever happens within leaves modules, tensors, what trains and the adapters' names as they were."""
    state, names, modules = copied(model.state_dict()), list(getattr(model, "peft_config", {})), tree(model)
    yield
    assert same(model.state_dict(), state) and tree(model) == modules
    assert list(getattr(model, "peft_config", {})) == names
