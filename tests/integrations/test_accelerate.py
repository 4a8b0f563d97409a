"""An accelerated PEFT model against an untouched copy of it: same results, same abilities, nothing silent."""

import copy
import logging
import pickle
import warnings

import peft
import pytest
import torch
import torch.utils.checkpoint
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn
from torch.nn.utils import parametrize
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import peft_fused
from peft_fused.integrations.peft.acceleration import accelerate, layer, lora, restore
from peft_fused.integrations.peft.acceleration.layer import AcceleratedLayer
from peft_fused.layers import LoraLinear
from peft_fused.ops import dispatch, lowrank_linear_reference, native

FP32 = 1e-5


@pytest.fixture(autouse=True)
def fixed_seed(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(layer, "_said", set())


@pytest.fixture
def calls(monkeypatch):
    """Names of the fused operations called by accelerated layers, in order."""
    made = []

    def spy(name, op):
        def wrapper(*args, **kwargs):
            made.append(name)
            return op(*args, **kwargs)

        monkeypatch.setattr(lora, name, wrapper)

    spy("lowrank_linear", lora.lowrank_linear)
    spy("lowrank_adapter", lora.lowrank_adapter)
    return made


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


def results(model, x, weight=None, forward=None):
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


# ------------------------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"lora_bias": True}, {"lora_dropout": 0.0, "r": 1}, {"modules_to_save": ["head"]}],
    ids=["plain", "rslora", "lora_bias", "r1", "modules_to_save"],
)
def test_small_model_matches_peft(options, calls):
    reference, fused = pair(**options)
    for shape in ((24,), (7, 24), (2, 3, 24), (0, 24)):
        if 0 in shape:
            assert fused(torch.randn(shape)).shape == reference(torch.randn(shape)).shape
        else:
            same(fused, reference, torch.randn(shape))
    assert calls == ["lowrank_linear"] * 8


def test_a_wrong_scale_is_noticed(monkeypatch):
    reference, fused = pair()
    op = lora.lowrank_linear
    monkeypatch.setattr(lora, "lowrank_linear", lambda *a, scale, **k: op(*a, scale=scale * 1.02, **k))
    x = torch.randn(5, 24)
    ours, truth = results(fused, x), results(reference, x)
    assert all(error(ours[name], truth[name]) > 100 * FP32 for name in truth)


def test_a_trained_base_gets_its_gradients(calls):
    reference, fused = pair(bias="all")
    for model in (reference, fused):
        model.get_parameter("base_model.model.first.base_layer.weight").requires_grad_()
    same(fused, reference)
    assert "base_model.model.first.base_layer.bias" in results(fused, torch.randn(2, 24))
    assert calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_base_with_fp32_adapters_is_as_accurate_as_peft(dtype, calls):
    reference, fused = pair(Net(dtype))
    assert first(fused).lora_A["default"].weight.dtype == torch.float32
    truth_model = copy.deepcopy(reference).double()
    x = torch.randn(64, 24).to(dtype)
    truth, peft_run, ours = results(truth_model, x.double()), results(reference, x), results(fused, x)
    for name in truth:
        assert ours[name].dtype == peft_run[name].dtype, name
        assert error(ours[name], truth[name]) <= 2 * error(peft_run[name], truth[name]) + 1e-6, name
    assert calls == ["lowrank_linear"] * 2


def test_half_base_with_half_adapters(calls):
    reference, fused = pair(Net(torch.bfloat16), autocast_adapter_dtype=False)
    assert first(fused).lora_A["default"].weight.dtype == torch.bfloat16
    truth_model = copy.deepcopy(reference).double()
    x = torch.randn(64, 24).bfloat16()
    truth, peft_run, ours = results(truth_model, x.double()), results(reference, x), results(fused, x)
    for name in truth:
        assert error(ours[name], truth[name]) <= 2 * error(peft_run[name], truth[name]) + 1e-6, name
    assert calls == ["lowrank_linear"] * 2


def test_float64(calls):
    reference, fused = pair(Net(torch.float64))
    same(fused, reference, torch.randn(5, 24, dtype=torch.float64), tolerance=1e-13)
    assert calls == ["lowrank_linear"] * 2


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast(weights, calls):
    reference, fused = pair(Net(weights))
    truth_model = copy.deepcopy(reference).double()
    x = torch.randn(64, 24).to(torch.float64 if weights == torch.float64 else torch.float32)
    truth = results(truth_model, x.double())
    with torch.autocast("cpu", torch.bfloat16):
        peft_run, ours = results(reference, x), results(fused, x)
    assert ours["output"].dtype == (torch.float64 if weights == torch.float64 else torch.bfloat16)
    for name in truth:
        assert ours[name].dtype == peft_run[name].dtype, name
        assert error(ours[name], truth[name]) <= 2 * error(peft_run[name], truth[name]) + 1e-6, name
    assert calls == ["lowrank_linear"] * 2


def bert():
    size = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    return BertForSequenceClassification(BertConfig(**size, max_position_embeddings=16, num_labels=3)).eval()


def llama():
    size = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    return LlamaForCausalLM(LlamaConfig(**size, num_key_value_heads=2, max_position_embeddings=16))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=16)).eval()


TRANSFORMERS = {
    "bert": (bert, {"target_modules": ["query", "value", "dense"], "modules_to_save": ["classifier"]}),
    "llama": (llama, {"target_modules": "all-linear"}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
}


def logits(model, x):
    return model(inputs_embeds=x).logits


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_model_matches_peft(name, calls):
    build, options = TRANSFORMERS[name]
    reference, fused = pair(build(), **options)
    assert not accelerate(fused).skipped
    x = torch.randn(2, 6, 32)
    ours, truth = results(fused, x, forward=logits), results(reference, x, forward=logits)
    assert_same(ours, truth)
    assert sum("lora_" in key for key in truth) == 2 * len(names(fused))
    # Each layer once, GPT-2's transposed weights among them, and none through a base layer called as a module.
    assert calls == ["lowrank_linear"] * len(names(fused))


def test_optimizer_steps_match_peft():
    reference, fused = pair(modules_to_save=["head"])
    x, target = torch.randn(16, 24), torch.randn(16, 3)
    losses = {}
    for key, model in (("peft", reference), ("fused", fused)):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses[key] = []
        for _ in range(8):
            optimizer.zero_grad()
            loss = (model(x) - target).square().mean()
            loss.backward()
            optimizer.step()
            losses[key].append(loss.item())
    assert losses["fused"] == pytest.approx(losses["peft"], rel=1e-4)
    assert losses["fused"][-1] < 0.9 * losses["fused"][0]


# ------------------------------------------------------------------------------------------------------------ dropout


def test_dropout_is_the_operations_dropout(monkeypatch):
    """With the seed fixed the layer is the reference operation on its own weights, gradients included."""
    _, fused = pair(lora_dropout=0.4)
    layer = first(fused.train())
    op = lora.lowrank_linear
    monkeypatch.setattr(lora, "lowrank_linear", lambda *args, **kwargs: op(*args, **kwargs, seed=11))
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(9, 24, requires_grad=True)
    g = torch.randn(9, 40)
    ours = torch.autograd.grad(layer(x), (x, A, B), g)
    base = layer.base_layer
    for p, agrees in ((0.4, True), (0.3, False)):
        y = lowrank_linear_reference(x, base.weight, base.bias, A, B, scale=2.0, dropout_p=p, seed=11)
        truth = torch.autograd.grad(y, (x, A, B), g)
        assert all((error(o, t) <= FP32) == agrees for o, t in zip(ours, truth, strict=True))


def test_dropout_mean_and_evaluation():
    reference, fused = pair(lora_dropout=0.4)
    same(fused.eval(), reference.eval())
    layer = first(fused.train())
    x = torch.randn(1, 24).expand(8192, 24)
    with torch.no_grad():
        sample = layer(x)
        expected = first(reference)(x[:1])
    assert not torch.equal(sample[0], sample[1])
    assert not torch.equal(sample, layer(x).detach())
    deviation = (sample.mean(0) - expected[0]).abs() / (sample.std(0) / 8192**0.5)
    assert deviation.max() < 5
    spread = first(reference.train())(x).detach().std(0)
    assert torch.allclose(sample.std(0), spread, rtol=0.06)


def test_dropout_follows_its_own_module_and_manual_seed():
    _, fused = pair(lora_dropout=0.4)
    layer = first(fused.train())
    x = torch.randn(6, 24)
    torch.manual_seed(3)
    one = layer(x)
    torch.manual_seed(3)
    assert torch.equal(one, layer(x))
    assert not torch.equal(one, layer(x))
    layer.lora_dropout["default"].eval()
    assert torch.equal(layer(x), layer(x))


def test_each_adapter_has_its_own_dropout(monkeypatch):
    reference = get_peft_model(Net(), config(lora_dropout=0.3), adapter_name="a")
    reference.add_adapter("b", config())
    reference.add_adapter("c", config(lora_dropout=0.5))
    accelerate(reference)
    reference.base_model.set_adapter(["a", "b", "c"])
    seen = []
    for name in ("lowrank_linear", "lowrank_adapter"):
        op = getattr(lora, name)
        monkeypatch.setattr(
            lora,
            name,
            lambda *a, op=op, dropout_p, **k: (seen.append(dropout_p), op(*a, dropout_p=dropout_p, **k))[1],
        )
    first(reference.train())(torch.randn(2, 24))
    first(reference.eval())(torch.randn(2, 24))
    assert seen == [0.3, 0.0, 0.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_replays_dropout(use_reentrant):
    _, fused = pair(lora_dropout=0.5)
    fused.train()

    def checkpointed(model, x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant)

    x = torch.randn(16, 24)
    torch.manual_seed(5)
    plain = results(fused, x)
    torch.manual_seed(5)
    assert_same(results(fused, x, forward=checkpointed), plain, tolerance=0)
    torch.manual_seed(6)
    assert error(results(fused, x)["output"], plain["output"]) > 0.01


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_transformers_gradient_checkpointing(use_reentrant, calls):
    reference, fused = pair(llama(), target_modules=["q_proj", "v_proj", "down_proj"])
    for model in (reference, fused):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()
    x = torch.randn(2, 6, 32)
    assert_same(results(fused, x, forward=logits), results(reference, x, forward=logits))
    assert len(calls) == 2 * len(names(fused))  # forward and recomputation


# ---------------------------------------------------------------------------------------------------- adapter switches


def several():
    """(PEFT model with adapters a, b and c, accelerated copy); b has another rank, c targets the first layer only."""
    reference = get_peft_model(Net(), config(), adapter_name="a")
    reference.add_adapter("b", config(r=2, lora_alpha=3, lora_bias=True))
    reference.add_adapter("c", config(r=6, target_modules=["first"]))
    randomise(reference)
    fused = copy.deepcopy(reference)
    assert len(accelerate(fused).swapped) == 2
    return reference, fused


def test_several_active_adapters(calls):
    reference, fused = several()
    for model in (reference, fused):
        model.base_model.set_adapter(["c", "a", "b"])
    same(fused, reference)
    assert calls == ["lowrank_linear", "lowrank_adapter", "lowrank_adapter", "lowrank_linear", "lowrank_adapter"]
    assert explained(first(fused)) == ("lowrank_linear + lowrank + lowrank", [])


def test_switching_adapters(calls):
    reference, fused = several()
    for name in ("a", "b", "c"):
        reference.set_adapter(name)
        fused.set_adapter(name)
        same(fused, reference)
    # c has no weights on the second layer, which then is its base layer alone.
    assert calls == ["lowrank_linear"] * 5
    second = fused.get_submodule("base_model.model.second")
    assert explained(second) == ("base layer alone: no active adapter has weights here", [])


def test_deleting_and_adding_adapters(calls):
    reference, fused = several()
    for model in (reference, fused):
        torch.manual_seed(1)
        model.delete_adapter("b")
        model.add_adapter("d", config(r=3))
        randomise(model)
        model.set_adapter("d")
    same(fused, reference)
    assert calls == ["lowrank_linear"] * 2
    with pytest.warns(UserWarning, match="Adapter d was active"):
        fused.delete_adapter("d")
    with pytest.warns(UserWarning, match="Adapter d was active"):
        reference.delete_adapter("d")
    same(fused, reference)


def test_layers_that_come_later_need_another_call():
    _, fused = pair(target_modules=["first"])
    fused.add_adapter("wide", config(target_modules=["first", "second"]))
    second = fused.get_submodule("base_model.model.second")
    assert type(second) is PeftLinear
    report = accelerate(fused)
    assert report.swapped == ["base_model.model.second"]
    assert report.already == ["base_model.model.first"]
    assert layer.is_accelerated(second)


def test_disabled_adapters(calls):
    reference, fused = pair()
    x = torch.randn(3, 24)
    enabled = fused(x)
    with fused.disable_adapter(), reference.disable_adapter():
        assert torch.equal(fused(x), reference(x))
        assert explained(first(fused)) == ("base layer alone: the adapters are disabled", [])
    assert calls == ["lowrank_linear"] * 2
    assert torch.equal(fused(x), enabled)


def test_disabling_unmerges_first():
    reference, fused = pair()
    x = torch.randn(3, 24)
    bare = first(fused).base_layer(x)
    for model in (reference, fused):
        model.merge_adapter()
    with fused.disable_adapter():
        assert error(first(fused)(x), bare) <= FP32
    assert not first(fused).merged
    assert first(reference).merged


@pytest.mark.parametrize("safe", [False, True])
def test_merging_and_unmerging(safe, calls):
    reference, fused = pair(lora_bias=True, target_modules=["first"])
    x = torch.randn(3, 24)
    before = fused(x)
    calls.clear()
    fused.merge_adapter(safe_merge=safe)
    reference.merge_adapter(safe_merge=safe)
    assert explained(first(fused)) == ("base layer alone: default merged into it", [])
    assert torch.equal(first(fused).base_layer.weight, first(reference).base_layer.weight)
    assert torch.equal(fused(x), reference(x))
    assert error(fused(x), before) <= FP32
    assert not calls
    fused.unmerge_adapter()
    assert error(fused(x), before) <= FP32
    assert calls == ["lowrank_linear"]


def test_merge_and_unload():
    reference, fused = pair()
    x = torch.randn(3, 24)
    adapted = reference(x)
    merged = fused.merge_and_unload()
    assert not any(isinstance(child, PeftLinear) for child in merged.modules())
    assert error(merged(x), adapted) <= FP32


def test_mixed_batches_go_to_peft(calls):
    reference, fused = several()
    reference.eval(), fused.eval()
    x, chosen = torch.randn(4, 24), ["a", "__base__", "b", "c"]
    assert torch.equal(fused(x, adapter_names=chosen), reference(x, adapter_names=chosen))
    assert not torch.equal(fused(x, adapter_names=chosen), fused(x))
    with pytest.raises(ValueError, match="adapter_names"):
        first(fused)(x, adapter_names=["a"])
    assert calls == ["lowrank_linear"] * 2


def test_scale_changes_are_seen(calls):
    reference, fused = pair()
    for model in (reference, fused):
        first(model).set_scale("default", 3.0)
    same(fused, reference)
    for model in (reference, fused):
        first(model).scaling["default"] = torch.tensor(0.7)  # what PEFT's hotswap preparation does
    same(fused, reference)
    assert calls == ["lowrank_linear"] * 4


def test_replaced_parameters_are_seen(calls):
    reference, fused = pair()
    for model in (reference, fused):
        torch.manual_seed(2)
        first(model).lora_A["default"].weight = nn.Parameter(torch.randn(6, 24))
        first(model).lora_B["default"].weight = nn.Parameter(torch.randn(40, 6))
        first(model).base_layer.weight = nn.Parameter(torch.randn(40, 24), requires_grad=False)
    same(fused, reference)
    assert calls == ["lowrank_linear"] * 2


# ---------------------------------------------------------------------------------------- base layers called as modules


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Tagged(torch.Tensor):
    """A weight with a dispatch of its own."""


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class CountCalls(ModelHook):
    seen = 0

    def pre_forward(self, module, *args, **kwargs):
        CountCalls.seen += 1
        return args, kwargs


def hook(layer):
    layer.base_layer.register_forward_hook(lambda module, args, output: output * 1.5)


def accelerate_hook(layer):
    add_hook_to_module(layer.base_layer, CountCalls())


def subclass(layer):
    layer.base_layer.__class__ = Shifted


def tensor_subclass(layer):
    weight = layer.base_layer.weight.detach().as_subclass(Tagged)
    layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)


def parametrization(layer):
    parametrize.register_parametrization(layer.base_layer, "weight", Doubled())


@pytest.mark.parametrize("change", [hook, accelerate_hook, subclass, tensor_subclass, parametrization])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_an_unusual_base_is_called_as_a_module(change, when, lora_bias, calls):
    reference = randomise(get_peft_model(Net(), config(lora_bias=lora_bias, target_modules=["first"])))
    fused = copy.deepcopy(reference)
    bare = reference(torch.ones(1, 24))
    if when == "after":
        accelerate(fused)
    CountCalls.seen = 0
    for model in (reference, fused):
        change(first(model))
    report = accelerate(fused)
    same(fused, reference)
    assert calls == ["lowrank_adapter"]
    assert CountCalls.seen == (2 if change is accelerate_hook else 0)
    if change not in (accelerate_hook, tensor_subclass):
        assert error(reference(torch.ones(1, 24)), bare) > 0.01  # the change matters
    path, reasons = explained(first(fused))
    assert path == "base layer called as a module, then lowrank"
    assert len(reasons) == 1 and reasons[0].startswith("lowrank_linear: the base ")
    assert report.slower == {"base_model.model.first": reasons[0]}
    assert reasons[0] in str(report)


def test_a_base_that_answers_in_its_own_type():
    """Quantised layers may; PEFT then gives the sum in that type."""

    class Upcast(nn.Linear):
        def forward(self, x):
            return super().forward(x).double()

    reference, fused = pair(target_modules=["first"])
    for model in (reference, fused):
        first(model).base_layer.__class__ = Upcast
    x = torch.randn(3, 24)
    ours, truth = first(fused)(x), first(reference)(x)
    assert ours.dtype == truth.dtype == torch.float64
    assert error(ours, truth) <= FP32


def test_a_base_under_autocast_keeps_its_type():
    class Fp32(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x)

    reference, fused = pair(target_modules=["first"])
    for model in (reference, fused):
        first(model).base_layer.__class__ = Fp32
    x = torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        ours, truth = first(fused)(x), first(reference)(x)
    assert ours.dtype == truth.dtype == torch.float32
    assert error(ours, truth) < 0.01


class QuantisedStandIn(nn.Module):
    """What a GPTQ layer shows to PEFT: sizes and a forward, no weight."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 24, 40
        self.register_buffer("qweight", torch.randint(-8, 8, (40, 24), dtype=torch.int8))

    def forward(self, x):
        return x @ self.qweight.to(x.dtype).t() * 0.05


def test_a_quantised_base(calls):
    reference = nn.Sequential(GPTQLoraLinear(QuantisedStandIn(), "default", LoraConfig(lora_dropout=0.2), r=4)).eval()
    randomise(reference)
    fused = copy.deepcopy(reference)
    report = accelerate(fused)
    assert report.swapped == ["0"] and "QuantisedStandIn" in report.slower["0"]
    assert isinstance(fused[0], GPTQLoraLinear) and type(fused[0]).__name__ == "FusedGPTQLoraLinear"
    x = torch.randn(5, 24)
    same(fused, reference, x)
    assert calls == ["lowrank_adapter"]
    loaded = pickle.loads(pickle.dumps(fused))
    assert type(loaded[0]) is type(fused[0]) and torch.equal(loaded(x), fused(x))
    fused[0].enable_adapters(False)
    assert torch.equal(fused(x), fused[0].base_layer(x))
    assert restore(fused) == ["0"]
    assert type(fused[0]) is GPTQLoraLinear


# --------------------------------------------------------------------------------------------------- PEFT's own forward


def on_lora_A(layer):
    layer.lora_A["default"].register_forward_hook(lambda module, args, output: output * 1.5)
    return "carries hooks"


def on_lora_B(layer):
    layer.lora_B["default"].register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    return "carries hooks"


def on_dropout(layer):
    layer.lora_dropout["default"].register_forward_hook(lambda module, args, output: output * 1.5)
    return "carries hooks"


def backward_hook(layer):
    layer.lora_B["default"].register_full_backward_hook(lambda module, grads, outputs: (grads[0] * 1.5,))
    return "carries hooks"


def backward_pre_hook(layer):
    layer.lora_B["default"].register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 1.5,))
    return "carries hooks"


def replaced_forward(layer):
    inner = layer.lora_A["default"]
    inner.forward = lambda x: nn.functional.linear(x, inner.weight) * 1.5
    return "replaced forward"


def parametrized_A(layer):
    parametrize.register_parametrization(layer.lora_A["default"], "weight", Doubled())
    return "ParametrizedLinear"


def other_dropout(layer):
    layer.lora_dropout["default"] = nn.Hardtanh()
    return "lora_dropout is Hardtanh"


def inplace_dropout(layer):
    layer.lora_dropout["default"] = nn.Dropout(0.0, inplace=True)
    return "inplace=True"


def full_dropout(layer):
    layer.lora_dropout["default"] = nn.Dropout(1.0)
    return "Dropout(p=1.0"


def tagged_A(layer):
    weight = 1.5 * layer.lora_A["default"].weight.detach()
    layer.lora_A["default"].weight = nn.Parameter(weight.as_subclass(Tagged))
    return "its weights are Tagged and Parameter"


def biased_A(layer):
    layer.lora_A["default"] = nn.Linear(24, 4)
    return "lora_A has a bias"


def half_adapter(layer):
    layer.lora_A.bfloat16()
    layer.lora_B.bfloat16()
    return "it is torch.bfloat16, x torch.float32"


def high_rank(layer):
    layer.lora_A["default"].weight = nn.Parameter(torch.randn(257, 24) / 16)
    layer.lora_B["default"].weight = nn.Parameter(torch.randn(40, 257) / 16)
    return "rank is 257"


def trained_scale(layer):
    layer.scaling["default"] = torch.tensor(1.5, requires_grad=True)
    return "neither a number nor a constant"


CHANGES = [
    on_lora_A, on_lora_B, on_dropout, backward_hook, backward_pre_hook, replaced_forward, parametrized_A,
    other_dropout, inplace_dropout, full_dropout, tagged_A, biased_A, half_adapter, high_rank, trained_scale,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_peft_computes_what_the_operations_do_not(change, calls, caplog):
    reference, fused = pair(target_modules=["first"])
    x = torch.randn(4, 24)
    before = results(reference, x)
    for model in (reference, fused):
        torch.manual_seed(4)
        reason = change(first(model))
    with caplog.at_level(logging.WARNING, "peft_fused"):
        ours, truth = results(fused, x), results(reference, x)
        results(fused, x)
    assert_same(ours, truth, tolerance=0)
    assert not calls
    if change is not inplace_dropout:
        assert any(truth[key].shape != before[key].shape or error(truth[key], before[key]) > 1e-3 for key in before)
    path, reasons = explained(first(fused))
    assert path == "PEFT's own forward" and reason in reasons[0]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and reason in said[0]


def test_global_hooks_see_every_module(calls):
    reference, fused = pair(target_modules=["first"])
    x = torch.randn(2, 24)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda child, args, output: seen.append(child))
    try:
        assert torch.equal(fused(x), reference(x))
        assert first(fused).lora_A["default"] in seen and first(fused).base_layer in seen
        assert "global module hooks" in explained(first(fused))[1][0]
    finally:
        handle.remove()
    assert not calls
    same(fused, reference)
    assert calls == ["lowrank_linear"]


def test_mismatched_types_raise_as_in_peft(calls):
    reference, fused = pair(Net(torch.bfloat16))
    x = torch.randn(2, 24)
    for model in (reference, fused):
        with pytest.raises(RuntimeError, match="dtype"):
            first(model)(x)
    for model in (reference, fused):
        with peft.helpers.disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
            first(model)(x.bfloat16())
    assert not calls


def test_a_bias_of_another_type_raises_as_in_peft(calls):
    for model in pair(target_modules=["first"]):
        first(model).base_layer.bias.data = first(model).base_layer.bias.data.double()
        with pytest.raises(RuntimeError, match="dtype"):
            first(model)(torch.randn(2, 24))
    assert calls == []


def test_factors_of_two_types_raise_as_in_peft(calls):
    for model in pair(target_modules=["first"]):
        first(model).lora_B.double()
        with pytest.raises(RuntimeError, match="dtype"):
            first(model)(torch.randn(2, 24))
    assert calls == []


def test_float64_adapters_under_autocast_go_to_peft(calls):
    reference, fused = pair(target_modules=["first"])
    x = torch.randn(4, 24)
    outputs = []
    for model in (reference, fused):
        first(model).lora_A.double()
        first(model).lora_B.double()
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(first(model)(x))
    assert torch.equal(*outputs)
    assert not calls


def test_integer_and_subclass_inputs_go_to_peft():
    _, fused = pair()
    layer = first(fused)
    assert "x is torch.int64; the fused" in explained(layer, torch.ones(1, 24, dtype=torch.int64))[1][0]
    assert "Tagged" in explained(layer, torch.ones(1, 24).as_subclass(Tagged))[1][0]
    assert "meta" in explained(layer, torch.ones(1, 24, device="meta"))[1][0]
    assert explained(layer, torch.ones(1, 24)) == ("lowrank_linear", [])


def test_torch_func_transforms_go_to_peft(calls):
    reference, fused = pair()
    x = torch.randn(3, 24)

    def gradients(model):
        parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        return torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)

    assert_same(gradients(fused), gradients(reference), tolerance=0)
    assert not calls
    parameters = {name: p.detach() * 2 for name, p in fused.named_parameters()}
    ours, truth = (torch.func.functional_call(model, parameters, (x,)) for model in (fused, reference))
    assert error(ours, truth) <= FP32
    assert calls == ["lowrank_linear"] * 2


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torch_jit_traces_peft(calls):
    reference, fused = pair()
    traced = torch.jit.trace(fused, torch.randn(4, 24), check_trace=False)
    x = torch.randn(7, 24)
    assert torch.equal(traced(x), reference(x))
    assert not calls


def test_second_derivatives_raise():
    _, fused = pair()
    x = torch.randn(4, 24, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"second derivative|differentiate twice"):
        (gradient,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
        gradient.sum().backward()


def test_dora_added_later_goes_to_peft(calls):
    reference, fused = pair(target_modules=["first"])
    for model in (reference, fused):
        torch.manual_seed(1)
        model.add_adapter("dora", config(target_modules=["first"], use_dora=True))
        randomise(model)
        model.set_adapter("dora")
    same(fused, reference, tolerance=0)
    assert not calls
    assert "it is a variant (DoraLinearVariant)" in explained(first(fused))[1][0]
    fused.set_adapter("default")
    fused(torch.randn(2, 24))
    assert calls == ["lowrank_linear"]


# -------------------------------------------------------------------------------------- copies, files, compilers, ranks


def test_state_dict_and_restore():
    reference, fused = pair(modules_to_save=["head"])
    assert fused.state_dict().keys() == reference.state_dict().keys()
    attributes = {name: set(vars(child)) for name, child in reference.named_modules()}
    assert {name: set(vars(child)) for name, child in fused.named_modules()} == attributes
    assert sorted(restore(fused)) == ["base_model.model.first", "base_model.model.second"]
    assert [type(child) for child in fused.modules()] == [type(child) for child in reference.modules()]
    same(fused, reference, tolerance=0)
    assert restore(fused) == []


def test_copies_and_pickles_stay_fused(calls):
    _, fused = pair()
    x = torch.randn(3, 24)
    expected = fused(x)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert names(twin) == names(fused)
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            first(twin).lora_B["default"].weight.zero_()
        assert torch.equal(fused(x), expected)
    assert len(calls) == 10


def test_saving_and_loading(tmp_path, calls):
    reference, fused = pair(modules_to_save=["head"])
    fused.save_pretrained(tmp_path / "fused")
    reference.save_pretrained(tmp_path / "peft")
    saved, expected = (
        peft.utils.load_peft_weights(str(tmp_path / name), device="cpu") for name in ("fused", "peft")
    )  # fmt: skip
    assert saved.keys() == expected.keys() and all(torch.equal(saved[key], expected[key]) for key in expected)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path / "fused").eval()
    assert len(accelerate(loaded).swapped) == 2
    x = torch.randn(3, 24)
    assert error(loaded(x), reference(x)) <= FP32
    assert loaded.load_adapter(tmp_path / "peft", "again").missing_keys is not None
    loaded.set_adapter("again")
    assert error(loaded(x), reference(x)) <= FP32
    assert calls == ["lowrank_linear"] * 4


def test_all_linear_finds_accelerated_layers():
    reference, fused = pair(target_modules="all-linear")
    fused.add_adapter("more", LoraConfig(r=2, target_modules="all-linear"))
    reference.add_adapter("more", LoraConfig(r=2, target_modules="all-linear"))
    assert fused.peft_config["more"].target_modules == reference.peft_config["more"].target_modules
    assert set(first(fused).lora_A) == {"default", "more"}


@pytest.mark.parametrize(
    "options", [{}, {"lora_dropout": 0.5}, {"lora_bias": True}], ids=["plain", "dropout", "lora_bias"]
)
def test_compiles_without_graph_breaks(options):
    torch._dynamo.reset()
    reference, fused = pair(**options)
    dropout = "lora_dropout" in options
    fused.train(), reference.train()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 24)
    ours = results(fused, x, forward=lambda _, x: compiled(x))
    if not dropout:
        assert_same(ours, results(reference, x))
        return
    again = results(fused, x, forward=lambda _, x: compiled(x))
    assert not torch.equal(ours["output"], again["output"])
    fused.eval(), reference.eval()
    assert_same(results(fused, x, forward=lambda _, x: compiled(x)), results(reference, x))


def test_compiled_model_notices_switches():
    torch._dynamo.reset()
    reference, fused = several()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 24)
    for active in (["a"], ["b", "c"], ["a"]):
        fused.base_model.set_adapter(active)
        reference.base_model.set_adapter(active)
        assert error(compiled(x), reference(x)) <= FP32
    with fused.disable_adapter(), reference.disable_adapter():
        assert error(compiled(x), reference(x)) <= FP32


def test_compiled_model_takes_hotswapped_scales():
    torch._dynamo.reset()
    reference, fused = pair(target_modules=["first"])
    scale = first(reference).scaling["default"] = first(fused).scaling["default"] = torch.tensor(0.7)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 24)
    before = compiled(x)
    assert error(before, reference(x)) <= FP32
    scale.fill_(2.0)
    with torch.compiler.set_stance("fail_on_recompile"):
        after = compiled(x)
    assert error(after, reference(x)) <= FP32
    assert error(after, before) > 0.01


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("leaves", [False, True], ids=["whole", "leaves"])
def test_fsdp2(one_rank, leaves, calls):
    from torch.distributed.fsdp import fully_shard

    reference, fused = pair(target_modules=["first"])
    if leaves:
        for leaf in (first(fused).lora_A["default"], first(fused).lora_B["default"]):
            fully_shard(leaf, mesh=one_rank)
    fully_shard(fused, mesh=one_rank)
    x = torch.randn(3, 24)
    fused(x).sum().backward()
    reference(x).sum().backward()
    for name in ("lora_A", "lora_B"):
        ours, truth = (getattr(first(model), name)["default"].weight.grad for model in (fused, reference))
        assert error(ours.full_tensor(), truth) <= FP32
    assert calls == ([] if leaves else ["lowrank_linear"])
    if leaves:
        assert "FSDPLinear" in explained(first(fused), x)[1][0]


def test_fsdp2_on_the_layer_itself(one_rank):
    from torch.distributed.fsdp import fully_shard

    _, fused = pair(target_modules=["first"])
    fully_shard(first(fused), mesh=one_rank)
    assert "accelerate before sharding" in accelerate(fused).skipped["base_model.model.first"]
    with pytest.raises(RuntimeError, match="FSDPFusedLoraLinear"):
        restore(fused)
    assert isinstance(first(fused), AcceleratedLayer)


def test_sharded_parameters_go_to_peft(one_rank, calls):
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

    _, fused = pair(target_modules=["first"])
    distribute_module(first(fused), one_rank)
    layer = first(fused)
    x = distribute_tensor(torch.randn(3, 24), one_rank, [Replicate()])
    assert layer(x).full_tensor().shape == (3, 40)
    assert "DTensor" in explained(layer, x)[1][0]
    assert not calls


# ------------------------------------------------------------------------------------------------------------- reports


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(8, 8)
        self.dora = nn.Linear(8, 8)
        self.embed = nn.Embedding(5, 8)
        self.conv = nn.Conv2d(3, 4, 1)
        self.attention = nn.MultiheadAttention(8, 2)
        self.parallel = nn.Linear(8, 8)
        self.replaced = nn.Linear(8, 8)
        self.parallel._hf_tp_plan = "colwise"


def test_report_lists_every_layer():
    targets = ["plain", "embed", "conv", "attention", "replaced", "dora"]
    model = get_peft_model(Zoo(), LoraConfig(r=2, target_modules=targets, exclude_modules=["dora"]))
    inner = model.base_model.model
    for name in ("parallel", "dora"):
        layer = PeftLinear(getattr(inner, name), "default", LoraConfig(use_dora=name == "dora"), r=2, lora_alpha=2)
        setattr(inner, name, layer)
    add_hook_to_module(inner.replaced, CountCalls())
    report = accelerate(inner)
    assert report.swapped == ["plain"]
    assert not report.already and not report.slower
    expected = {
        "dora": "LoRA variant: DoraLinearVariant",
        "embed": "lora.layer.Embedding has no fused form",
        "conv": "lora.layer.Conv2d has no fused form",
        "attention": "lora.layer.MultiheadAttention has no fused form",
        "attention.base_layer.out_proj": "output projection",
        "parallel": "tensor parallel",
        "replaced": "its forward was replaced",
    }
    assert report.skipped.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in report.skipped[name]
        assert reason in str(report) and name in str(report)
    assert "1 of 8 LoRA layers swapped" in str(report)
    assert "left to PEFT: 7" in str(report)
    assert type(inner.dora) is PeftLinear and type(inner.replaced) is PeftLinear


def test_accelerating_twice_changes_nothing():
    reference, fused = pair()
    report = accelerate(fused)
    assert report.swapped == [] and report.skipped == {}
    assert report.already == ["base_model.model.first", "base_model.model.second"]
    assert "0 of 2 LoRA layers swapped" in str(report) and "accelerated before: 2" in str(report)
    same(fused, reference)
    restore(fused)
    assert len(accelerate(fused).swapped) == 2


def test_nothing_to_swap_warns():
    with pytest.warns(UserWarning, match="the model has no LoRA layers, nothing to swap"):
        report = accelerate(Net())
    assert (report.swapped, report.already, report.skipped, report.slower) == ([], [], {}, {})
    assert "the model has no LoRA layers" in str(report)
    assert restore(Net()) == []
    dora = get_peft_model(Net(), LoraConfig(r=4, target_modules=["first"], use_dora=True))
    with pytest.warns(UserWarning, match="0 of 1 LoRA layers swapped"):
        accelerate(dora)


def test_layers_of_our_own_are_already_fused():
    own = get_peft_model(Net(), peft_fused.DyLoraConfig(r=4, target_modules=["first", "second"]))
    with pytest.warns(UserWarning) as caught:
        report = accelerate(own)
    assert report.own == ["base_model.model.first", "base_model.model.second"]
    (warning,) = caught
    names = "base_model.model.first, base_model.model.second"
    assert str(warning.message) == str(report)
    assert str(report) == (
        f"peft_fused.accelerate: 2 layers of peft_fused's own methods [{names}] are already fused, there is nothing to "
        "swap"
    )
    assert warning.filename == __file__
    plain = torch.nn.Sequential(LoraLinear.from_linear(torch.nn.Linear(4, 4)), pair()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "1 layers of peft_fused's own methods [0] are already fused" in str(accelerate(plain))
        assert not accelerate(plain).swapped  # a second call has nothing to do, which is no fault


def test_the_report_says_what_the_lack_of_the_extension_costs(monkeypatch):
    _, fused = pair()
    monkeypatch.setattr(native, "module", native.module or object())
    assert "C++ extension" not in str(accelerate(fused))
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "why_missing", "not built")
    monkeypatch.setattr(native, "not_built", True)
    report = str(accelerate(fused))
    assert f"without the C++ extension (not built), which means {native.COST}" in report
    assert "pip install --no-build-isolation ." in report


@pytest.mark.parametrize("function", [accelerate, restore])
@pytest.mark.parametrize("wrong", [None, "model", {"first": 1}])
def test_only_modules_are_accepted(function, wrong):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        function(wrong)


def test_restore_refuses_a_replaced_forward():
    _, fused = pair()
    add_hook_to_module(fused.get_submodule("base_model.model.second"), CountCalls())
    with pytest.raises(RuntimeError, match=r"second.*replaced"):
        restore(fused)
    assert len(names(fused)) == 2


def test_explain_names_every_layer(every_backend):
    reference, fused = pair()
    lines = dispatch.explain(fused, rows=64).lines
    assert [name for name, _, _ in lines] == names(fused)
    for _, path, against in lines:
        assert path.startswith("lowrank_linear -> torch: ") and any(why.startswith("triton: ") for why in against)
    assert str(dispatch.explain(fused)).count("not triton") == 1  # once for all layers that it is true of
    with dispatch.use_backend("triton"):
        assert "triton is forced and cannot run it" in str(dispatch.explain(fused))
    lines = dispatch.explain(reference).lines
    assert [(name, path) for name, path, _ in lines] == [(name, "PEFT's own forward") for name in names(fused)]
    assert "accelerate has not been called" in lines[0][2][0]


def test_the_layer_itself_can_be_the_model(calls):
    reference, _ = pair()
    layer = first(reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert accelerate(layer).swapped == [""]
        layer(torch.randn(1, 24))
        assert restore(layer) == [""]
    assert calls == ["lowrank_linear"]


class ChangesItsInput(nn.Module):
    """As models with a residual stream updated in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        h = self.a(x).tanh() * 1
        y = self.b(h)
        h += y
        return h


@pytest.mark.parametrize("cpp", [True, False])
def test_an_input_changed_in_place_is_an_error_that_says_what_to_do(cpp):
    model = get_peft_model(ChangesItsInput().bfloat16(), LoraConfig(r=4, target_modules=["b"]))
    accelerate(model)
    with peft_fused.use_backend("torch", native=cpp):
        out = model(torch.randn(4, 16, dtype=torch.bfloat16)).float().sum()
        with pytest.raises(RuntimeError, match=r"peft_fused: a tensor that backward reads.*h = h \+ y in place"):
            out.backward()
        assert restore(model)
        model(torch.randn(4, 16, dtype=torch.bfloat16)).float().sum().backward()


@pytest.mark.parametrize("cpp", [True, False])
def test_an_input_changed_in_place_is_fine_where_no_gradient_reads_it(cpp):
    torch.manual_seed(3)
    plain = get_peft_model(ChangesItsInput().bfloat16(), LoraConfig(r=4, target_modules=["b"], init_lora_weights=False))
    layer = plain.base_model.model.b
    layer.lora_A["default"].weight.requires_grad_(False)
    fused = copy.deepcopy(plain)
    accelerate(fused)
    x = torch.randn(4, 16, dtype=torch.bfloat16)
    with peft_fused.use_backend("torch", native=cpp):
        for model in (plain, fused):
            model(x).float().square().sum().backward()
    want, got = (m.base_model.model.b.lora_B["default"].weight.grad for m in (plain, fused))
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
