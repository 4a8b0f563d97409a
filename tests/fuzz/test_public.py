"""Malformed calls of the public functions, layers and configurations: right, or refused by the name of an argument.

PEFT_FUSED_FUZZ multiplies the number of calls; -s shows what became of them.
"""

import collections
import inspect
import math
import random
from dataclasses import asdict, is_dataclass

import pytest
import torch
from peft import get_peft_model
from torch import nn
from unchanged import MULTIPLIER, differences, state

import peft_fused
from peft_fused import layers
from peft_fused.integrations.peft.registration import REGISTERED

pytestmark = pytest.mark.filterwarnings("ignore")
CALLS = int(40 * MULTIPLIER)
ODD = (
    None, True, False, 0, 1, 2, 3, 8, 257, -1, 10**30, 10**400, -(10**400), 0.0, 0.5, 1.0, -0.5, 1e39, 1e308,
    float("nan"), float("inf"), 2j, "", "q", "(", "x" * 99, "none", "all", "epoch", "lora", "adapter", b"q", [], [0],
    ["q"], [None], [[]], (), ("q",), {}, {"q": 2}, {"q": "2"}, {"(": 1}, {3: 3}, {"q"}, range(3), object(), int, len,
    nn.Linear, torch.float16, torch.float32, torch.int8, torch.tensor(2), torch.tensor(0.5), torch.ones(2, 2),
    torch.ones(0), torch.ones(2, 2, device="meta"), torch.ones(2).to_sparse(),
)  # fmt: skip


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(torch.tanh(self.q(x)))


def adapted(config):
    torch.manual_seed(0)
    return get_peft_model(Net(), config).eval()


def two_adapters():
    model = get_peft_model(Net(), DYLORA, adapter_name="one")
    model.add_adapter("two", DYLORA)
    return model.eval()


class Classifier(Net):
    """With a loss of its own, as transformers' heads have."""

    def forward(self, x, labels=None):
        logits = super().forward(x)
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}


def batch():
    return {"x": torch.ones(2, 8), "labels": torch.tensor([1, 2])}


# ------------------------------------------------------------------------------------------------------ what is called


def configuration(cls):
    """A configuration's fields, whose defaults are right, and what it must be once it is accepted."""

    def check(config, arguments):
        again = cls(**{name: value for name, value in asdict(config).items() if name in names})
        assert asdict(again) == asdict(config)

    names = [name for name in inspect.signature(cls).parameters if name not in ("peft_type", "peft_version")]
    return cls, lambda: dict(target_modules=["q"]), names, check


def layer(cls):
    """A layer's `from_linear`, of one base for all calls, which no refusal may change."""

    def check(made, arguments):
        base = arguments["base"]
        assert made.weight is base.weight and not any(p.requires_grad for p in base.parameters())
        assert made.eval()(torch.ones(2, 8, dtype=made.weight.dtype)).shape == (2, 8)
        restore = getattr(made, "restore", None)
        if restore is not None:
            restore()
        for parameter in base.parameters():
            parameter.requires_grad_(True)

    base = nn.Linear(8, 8)
    names = list(inspect.signature(cls.from_linear).parameters)
    if "options" in names:
        names = [name for name in names if name != "options"] + ["alpha", "dropout", "activation", "q", "r", "product"]
    return cls.from_linear, lambda: dict(base=base), names, check


def policy(cls):
    return cls, dict, list(inspect.signature(cls).parameters), lambda made, arguments: hash(made)


def structured(cls):
    def check(made, arguments):
        assert made(torch.ones(2, made.in_features, dtype=made.operands()[0].dtype)).shape == (2, made.out_features)

    names = [name for name in inspect.signature(cls).parameters if name not in ("dtype", "device")]
    return cls, lambda: dict(in_features=8, out_features=8), names, check


def sound(model):
    assert torch.isfinite(model(torch.ones(2, 8))).all()


def finite_loss(loss, arguments):
    assert math.isfinite(loss.item())


def function(called, model, **given):
    """A function of a model, one for all calls."""

    def check(result, arguments):
        if isinstance(arguments["model"], Net | peft_model):
            sound(arguments["model"])

    peft_model = type(model)
    # What a function that is given raises is its own.
    names = [name for name in inspect.signature(called).parameters if name != "fn"]
    return called, lambda: dict(model=model, **given), names, check


def export(folder):
    def called(**arguments):
        if isinstance(arguments.get("path"), str | bytes):
            arguments["path"] = folder / "named"  # not wherever a name leads to
        return peft_fused.export_lora(**arguments)

    called, make, names, check = (called, *function(peft_fused.export_lora, adapted(DYLORA), path=folder)[1:])
    return called, make, names, check


DYLORA = peft_fused.DyLoraConfig(r=4, target_modules=["q"], init_weights=False)
ADAMIX = peft_fused.AdaMixConfig(r=4, target_modules=["q"], init_weights=False)
AFLORA = peft_fused.AfLoraConfig(r=4, target_modules=["q"], init_weights=False)
ROSA = peft_fused.RosaConfig(r=4, target_modules=["q"])
CLASSIFIER = get_peft_model(Classifier(), ADAMIX).train()
CONFIGS = [method.config.__name__ for method in REGISTERED.values()]
LAYERS = ["LoraLinear", *(layer.__name__ for method in REGISTERED.values() for layer in method.layers)]
POLICIES = [name for name in layers.__all__ if is_dataclass(getattr(layers, name))]
MAPS = ("CirculantMap", "KroneckerMap", "LdrMap", "SymmetricToeplitzMap", "ToeplitzMap")

TARGETS = {
    **{name: lambda folder, name=name: configuration(getattr(peft_fused, name)) for name in CONFIGS},
    **{name: lambda folder, name=name: layer(getattr(layers, name)) for name in LAYERS},
    **{name: lambda folder, name=name: policy(getattr(layers, name)) for name in POLICIES},
    **{name: lambda folder, name=name: structured(getattr(layers, name)) for name in MAPS},
    "set_dylora_rank": lambda folder: function(peft_fused.set_dylora_rank, adapted(DYLORA), rank=2),
    "evaluate_dylora_ranks": lambda folder: function(peft_fused.evaluate_dylora_ranks, adapted(DYLORA), fn=str),
    "set_adamix_routing": lambda folder: function(peft_fused.set_adamix_routing, adapted(ADAMIX), routing="merged"),
    "set_adamix_pass": lambda folder: function(peft_fused.set_adamix_pass, adapted(ADAMIX), index=0),
    "freezing_history": lambda folder: function(peft_fused.freezing_history, adapted(AFLORA)),
    "on_step": lambda folder: function(peft_fused.on_step, adapted(ROSA), step=0, epoch=0),
    "check_sync": lambda folder: function(peft_fused.check_sync, adapted(DYLORA)),
    "decay_groups": lambda folder: function(peft_fused.decay_groups, adapted(DYLORA), weight_decay=0.1),
    "accelerate": lambda folder: function(peft_fused.accelerate, adapted(DYLORA)),
    "restore": lambda folder: function(peft_fused.restore, adapted(DYLORA)),
    "explain": lambda folder: (
        peft_fused.explain, lambda: dict(target=adapted(DYLORA)), ["target", "rows"], lambda said, arguments: str(said),
    ),
    "merge_experts": lambda folder: (
        peft_fused.merge_experts, lambda: dict(model=adapted(ADAMIX)), ["model", "adapter_name"],
        lambda nothing, arguments: sound(arguments["model"]),
    ),
    "copy_adapter": lambda folder: function(peft_fused.copy_adapter, two_adapters(), source="one", target="two"),
    "adamix_loss": lambda folder: (
        peft_fused.adamix_loss, lambda: dict(model=CLASSIFIER, inputs=batch()),
        list(inspect.signature(peft_fused.adamix_loss).parameters), lambda losses, arguments: losses[0].backward(),
    ),
    "consistency_loss": lambda folder: (
        peft_fused.consistency_loss, lambda: dict(first=torch.randn(4, 3), second=torch.randn(4, 3)),
        ["first", "second", "mask", "detach", "num_items"], finite_loss,
    ),
    "use_backend": lambda folder: (
        peft_fused.use_backend, lambda: dict(name=None), ["name", "native"], lambda block, arguments: block.__exit__(),
    ),
    "export_lora": export,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- calls


def shown(arguments):
    return {
        name: type(value).__name__ if isinstance(value, nn.Module) else repr(value)[:40]
        for name, value in arguments.items()
    }


@pytest.mark.parametrize("name", TARGETS)
def test_malformed_calls(name, tmp_path):
    torch.manual_seed(0)
    called, make, names, check = TARGETS[name](tmp_path)
    rng, outcomes = random.Random(f"public {name}"), collections.Counter()
    for number in range(CALLS):
        arguments = make()
        kept = [value for value in arguments.values() if isinstance(value, nn.Module)]
        chosen = [] if number == 0 else rng.sample(names, min(len(names), rng.choice((1, 1, 1, 2))))
        arguments |= {each: rng.choice(ODD) for each in chosen}
        before = [state(module) for module in kept]
        try:
            result = called(**arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            assert any(each in str(error).replace(" ", "_") for each in chosen), (
                f"{name}({shown(arguments)}): {error!r}"
            )
            assert not isinstance(error, RecursionError)
            changed = [differences(old, state(module)) for old, module in zip(before, kept, strict=True)]
            assert not any(changed), f"{name}({shown(arguments)}): {error!r} changed {changed}"
            outcomes["refused by name"] += 1
            continue
        except Exception as error:
            raise AssertionError(f"{name}({shown(arguments)}): {error!r}") from error
        try:
            check(result, arguments)
        except Exception as error:
            raise AssertionError(f"{name}({shown(arguments)}) was accepted, but {error!r}") from error
        outcomes["accepted"] += 1
    print(f"\n{name}: {CALLS} calls: {dict(outcomes)}", end="")
    assert outcomes["accepted"]
