"""Accelerated LoRA computes what PEFT's does: types, adapters that come, go and are switched, merging."""

import copy

import pytest
import torch
from accelerated import (
    FP32,
    Net,
    assert_same,
    config,
    error,
    explained,
    first,
    llama,
    logits,
    names,
    pair,
    randomise,
    results,
    same,
    several,
)  # fmt: skip
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import peft_fused
from peft_fused.integrations.peft.acceleration import accelerate, lora, restore


def assert_as_accurate(ours, theirs, truth):
    for name in truth:
        assert ours[name].dtype == theirs[name].dtype, name
        assert error(ours[name], truth[name]) <= 2 * error(theirs[name], truth[name]) + 1e-6, name


OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "r1": {"lora_dropout": 0.0, "r": 1},
    "modules_to_save": {"modules_to_save": ["head"]},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@every_option
def test_small_model_matches_peft(options, calls):
    reference, fused = pair(**options)
    for shape in ((24,), (7, 24), (2, 3, 24)):
        same(fused, reference, torch.randn(shape))
    assert calls == ["lowrank_linear"] * 6


@every_option
def test_an_empty_batch(options, calls):
    reference, fused = pair(**options)
    x = torch.randn(0, 24)
    assert fused(x).shape == reference(x).shape
    assert calls == ["lowrank_linear"] * 2


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


@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
def test_a_half_precision_base_is_as_accurate_as_peft(dtype, adapter, calls):
    reference, fused = pair(Net(dtype), autocast_adapter_dtype=adapter == torch.float32)
    assert first(fused).lora_A["default"].weight.dtype == adapter
    x = torch.randn(64, 24).to(dtype)
    truth = results(copy.deepcopy(reference).double(), x.double())
    assert_as_accurate(results(fused, x), results(reference, x), truth)
    assert calls == ["lowrank_linear"] * 2


def test_float64(calls):
    reference, fused = pair(Net(torch.float64))
    same(fused, reference, torch.randn(5, 24, dtype=torch.float64), tolerance=1e-13)
    assert calls == ["lowrank_linear"] * 2


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast(weights, calls):
    reference, fused = pair(Net(weights))
    x = torch.randn(64, 24).to(torch.float64 if weights == torch.float64 else torch.float32)
    truth = results(copy.deepcopy(reference).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = results(fused, x), results(reference, x)
    assert ours["output"].dtype == (torch.float64 if weights == torch.float64 else torch.bfloat16)
    assert_as_accurate(ours, theirs, truth)
    assert calls == ["lowrank_linear"] * 2


def bert():
    size = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    return BertForSequenceClassification(BertConfig(**size, max_position_embeddings=16, num_labels=3)).eval()


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=16)).eval()


TRANSFORMERS = {
    "bert": (bert, {"target_modules": ["query", "value", "dense"], "modules_to_save": ["classifier"]}),
    "llama": (llama, {"target_modules": "all-linear"}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
}


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


def test_deleting_the_active_adapter():
    reference, fused = several()
    for model in (reference, fused):
        with pytest.warns(UserWarning, match="Adapter a was active"):
            model.delete_adapter("a")
    same(fused, reference)


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
def test_merging(safe, calls):
    reference, fused = pair(lora_bias=True, target_modules=["first"])
    x = torch.randn(3, 24)
    before = fused(x)
    calls.clear()
    for model in (reference, fused):
        model.merge_adapter(safe_merge=safe)
    assert explained(first(fused)) == ("base layer alone: default merged into it", [])
    assert torch.equal(first(fused).base_layer.weight, first(reference).base_layer.weight)
    assert torch.equal(fused(x), reference(x))
    assert error(fused(x), before) <= FP32
    assert not calls


@pytest.mark.parametrize("safe", [False, True])
def test_unmerging(safe, calls):
    reference, fused = pair(lora_bias=True, target_modules=["first"])
    fused.merge_adapter(safe_merge=safe)
    fused.unmerge_adapter()
    same(fused, reference)
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
    mixed = fused(x, adapter_names=chosen)
    assert torch.equal(mixed, reference(x, adapter_names=chosen))
    assert not calls
    assert not torch.equal(mixed, fused(x))
    assert calls == ["lowrank_linear"] * 2


def test_a_wrong_mixed_batch_raises_as_in_peft():
    _, fused = several()
    with pytest.raises(ValueError, match="adapter_names"):
        first(fused.eval())(torch.randn(4, 24), adapter_names=["a"])


def test_arguments_beside_x_go_to_peft():
    _, fused = pair()
    route = first(fused).route(torch.randn(4, 24), kwargs={"adapter_names": ["default"] * 4})
    assert route.path == "PEFT's own forward" and route.reasons == [
        "lowrank, lowrank_linear: it is called with more than x"
    ]


def hotswapped(layer):
    layer.scaling["default"] = torch.tensor(0.7)  # what PEFT's preparation for hotswapping makes of it


@pytest.mark.parametrize("change", [lambda layer: layer.set_scale("default", 3.0), hotswapped], ids=["set", "hotswap"])
def test_scale_changes_are_seen(change, calls):
    reference, fused = pair()
    before = results(reference, torch.ones(2, 24))["output"]
    for model in (reference, fused):
        change(first(model))
    assert error(results(reference, torch.ones(2, 24))["output"], before) > 0.01
    same(fused, reference)
    assert calls == ["lowrank_linear"] * 2


def test_replaced_parameters_are_seen(calls):
    reference, fused = pair()
    for model in (reference, fused):
        torch.manual_seed(2)
        first(model).lora_A["default"].weight = nn.Parameter(torch.randn(6, 24))
        first(model).lora_B["default"].weight = nn.Parameter(torch.randn(40, 6))
        first(model).base_layer.weight = nn.Parameter(torch.randn(40, 24), requires_grad=False)
    same(fused, reference)
    assert calls == ["lowrank_linear"] * 2


def with_dora():
    """(PEFT model, accelerated copy) that have got an adapter "dora" since, which is active."""
    models = pair(target_modules=["first"])
    for model in models:
        torch.manual_seed(1)
        model.add_adapter("dora", config(target_modules=["first"], use_dora=True))
        randomise(model)
        model.set_adapter("dora")
    return models


def test_dora_added_later_goes_to_peft(calls):
    reference, fused = with_dora()
    same(fused, reference, tolerance=0)
    assert not calls
    assert "it is a variant (DoraLinearVariant)" in explained(first(fused))[1][0]


def test_lora_beside_dora_stays_fused(calls):
    reference, fused = with_dora()
    for model in (reference, fused):
        model.set_adapter("default")
    same(fused, reference)
    assert calls == ["lowrank_linear"]


class ScaledStep(lora.LoraStep):
    """Twice what LoRA adds, for a variant that stands in for one that is still to come."""

    __slots__ = ()


def twice(layer, name, x):
    factors = (layer.lora_A[name].weight, layer.lora_B[name].weight)
    return ScaledStep(*factors, None, 2 * layer.scaling[name], 0.0)


def test_a_variant_runs_fused_once_it_is_registered(monkeypatch, calls):
    monkeypatch.setitem(lora.VARIANTS, DoraLinearVariant, twice)
    reference, _ = with_dora()
    report = accelerate(reference)
    assert not report.skipped and not report.slower
    layer, x = first(reference), torch.randn(3, 24)
    A, B = layer.lora_A["dora"].weight, layer.lora_B["dora"].weight
    expected = layer.base_layer(x) + 2 * layer.scaling["dora"] * (x @ A.t() @ B.t())
    assert error(layer(x), expected) <= FP32
    assert calls == ["lowrank_linear"] and explained(layer) == ("lowrank_linear", [])


def test_second_derivatives_raise():
    _, fused = pair()
    x = torch.randn(4, 24, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"second derivative|differentiate twice"):
        (gradient,) = torch.autograd.grad(fused(x).square().sum(), x, create_graph=True)
        gradient.sum().backward()


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
