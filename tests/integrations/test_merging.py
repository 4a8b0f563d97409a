"""Merging and taking it back to the bit; and where it cannot be right: into weights shared, computed, written to."""

import copy
import warnings
from functools import partial

import contract
import pytest
import torch
from accelerate import cpu_offload
from contract import layers, logits, midway, net
from peft import LoraConfig, convert_to_lora, get_peft_model
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from torch.nn.utils import prune
from transformers import LlamaConfig, LlamaForCausalLM

import peft_fused
from peft_fused.integrations.peft import tuner
from peft_fused.layers import AfLoraLinear, LoraLinear

X = torch.linspace(-1, 1, 64).view(4, 16)
# Ways of merging all layers of a model.
MERGES = (lambda model: model.merge_adapter(), lambda model: model.merge_and_unload())


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.other = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        return self.other(self.second(self.first(x)))


# Of a method that writes base weights no layer may share its own in the first place.
KEEPS = pytest.mark.parametrize("variant", [v for v in contract.ADDITIVE if not v.method.writes_base], ids=str)
DYLORA, SURM = (next(v for v in contract.VARIANTS if v.name == name) for name in ("dylora", "surm"))


# ------------------------------------------------------------------------------------------------ what merges, and back


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merges_and_unmerges_exactly(additive, dtype, transposed):
    model = midway(additive, net(dtype, transposed=transposed))
    plain = net(dtype, transposed=transposed)
    before, state = logits(model), contract.copied(model.state_dict())
    room = dict(rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)
    for safe_merge in (True, False):
        model.merge_adapter(safe_merge=safe_merge)
        for path, layer in layers(model).items():
            weight = plain.get_submodule(path.removeprefix("base_model.model.")).weight
            exact = weight.double() + layer.get_delta_weight("default").double()
            found = layer.get_base_layer().weight
            torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
            if not additive.method.writes_base:  # whose own change is wider than what it reports
                assert torch.equal(found, (weight.float() + layer.get_delta_weight("default")).to(dtype))
        torch.testing.assert_close(logits(model), before, **room)
        merged = contract.base_weights(model)
        with model.disable_adapter():  # which unmerges
            assert torch.equal(logits(model), logits(plain))
        assert torch.equal(logits(model), before) and contract.same(model.state_dict(), state)
        model.merge_adapter()
        model.unmerge_adapter()
        assert contract.same(model.state_dict(), state) and torch.equal(logits(model), before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert torch.equal(logits(copy.deepcopy(model).unload()), logits(plain))
    other = copy.deepcopy(model)
    other.merge_adapter()  # which unloading leaves, as in PEFT; only what a method has written is given back
    expected = logits(plain) if additive.method.writes_base else logits(other)
    assert torch.equal(logits(other.unload()), expected)
    whole = model.merge_and_unload()
    assert not layers(whole) and contract.same(contract.base_weights(whole), merged)
    assert whole.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(logits(whole), before, **room)


def test_an_adapter_on_the_output_is_not_merged(on_output):
    model = midway(on_output)
    expected = logits(model)
    with contract.unchanged(model):
        for merge in (model.merge_adapter, model.merge_and_unload, next(iter(layers(model).values())).merge):
            with pytest.raises(ValueError, match="'default' is of kind 'adapter' and cannot be merged"):
                merge()
        with pytest.raises(TypeError, match="LoRA conversion"):
            convert_to_lora(model, 2)
    assert torch.equal(logits(model), expected) and torch.equal(logits(model.unload()), logits(net()))


def test_a_single_layer_does_not_merge_what_is_not_finite(additive):
    model = midway(additive)
    layer = next(iter(layers(model).values()))
    layer.factor("default").data.fill_(torch.inf)
    with contract.unchanged(model), pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert not layer.merged


class FakeInt8(nn.Linear):
    """A quantised layer: rounding its weight again does not give back the weight it had."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.store(self.weight.data)

    def store(self, weight):
        self.step = weight.abs().max() / 127
        self.weight = nn.Parameter((weight / self.step).round().to(torch.int8), requires_grad=False)

    def dense(self):
        return self.weight * self.step

    def forward(self, x):
        return nn.functional.linear(x, self.dense(), self.bias)


class FakeBackend(QuantizationBackend):
    layer_type = "linear"

    def get_base_weight(self, base_layer):
        return base_layer.dense()

    def set_base_weight(self, peft_layer, weight_data):
        peft_layer.get_base_layer().store(weight_data)


def test_quantised_bases_merge_and_unmerge_exactly(additive, monkeypatch):
    backend = lambda module, **_: FakeBackend() if isinstance(module, FakeInt8) else None  # noqa: E731
    monkeypatch.setattr(tuner, "resolve_quantization_backend", backend)
    model, x = nn.Sequential(FakeInt8(16, 12)), X[:, :16]
    base = model[0]
    weight, step = base.weight.clone(), base.step.clone()
    config = additive.config(target_modules=["0"], init_weights=False)
    if additive.method.writes_base:
        with contract.unchanged(model), pytest.raises(TypeError, match=r"'0'.*FakeInt8 is quantised.*in place"):
            get_peft_model(model, config)
        return
    model = get_peft_model(model, config).eval()
    layer = model.base_model.model[0]
    expected = model(x)
    torch.testing.assert_close(expected, base(x) + x @ layer.get_delta_weight("default").T)
    layer.merge()
    assert not torch.equal(layer.base_layer.dense(), base.dense())
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0.1)
    layer.unmerge()
    assert layer.base_layer is base and torch.equal(base.weight, weight) and torch.equal(base.step, step)
    assert torch.equal(model(x), expected)


# ---------------------------------------------------------------------------------------- what cannot be right, or back


def adapted(variant, base):
    torch.manual_seed(1)
    return get_peft_model(base, config_of(variant)).eval()


def config_of(variant):
    return variant.config(init_weights=False)


def unchanged_by_refused_merges(model, match):
    expected, before = model(X), copy.deepcopy(model.state_dict())
    for merge in MERGES:
        with pytest.raises(ValueError, match=match):
            merge(model)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        assert torch.equal(model(X), expected)


@KEEPS
def test_a_weight_that_another_layer_shares_is_not_merged_into(variant):
    base = Pair()
    base.second.weight = base.first.weight
    names = r"cannot merge into 'first', which shares its weight with 'second.base_layer'"
    unchanged_by_refused_merges(adapted(variant, base), names)
    base = Pair()
    base.other.weight = nn.Parameter(base.second.weight.data.view(-1)[:256].view(16, 16))  # one memory, two parameters
    unchanged_by_refused_merges(
        adapted(variant, base), "cannot merge into 'second', which shares its weight with 'other'"
    )


def test_a_layer_that_is_also_called_without_its_adapter_is_not_merged_into():
    base = Pair()
    base.other = base.second  # of which PEFT wraps the first
    unchanged_by_refused_merges(
        adapted(DYLORA, base), "cannot merge into 'second', which shares its weight with 'other'"
    )


def llama(tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("offload", [lambda model: None, partial(cpu_offload, execution_device=torch.device("cpu"))])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_a_tied_head_is_not_merged_into(offload, first):
    model = llama(tied=True)
    if first:
        offload(model)
    model = get_peft_model(model, peft_fused.DyLoraConfig(r=4, target_modules=["lm_head"], init_weights=False)).eval()
    if not first:
        offload(model)
    for merge in MERGES:
        with pytest.raises(
            ValueError, match=r"cannot merge into 'lm_head', which shares its weight with 'model\.embed"
        ):
            merge(model)
    assert not model.lm_head.merged


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_a_head_whose_other_half_is_saved_whole_is_merged_into():
    options = dict(target_modules=["lm_head"], modules_to_save=["embed_tokens"], init_weights=False)
    model = get_peft_model(llama(tied=True), peft_fused.DyLoraConfig(r=4, **options)).eval()
    ids = torch.arange(10).view(1, 10)
    expected = model(input_ids=ids).logits
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


@pytest.mark.parametrize(
    "compute",
    [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm, lambda m: prune.identity(m, "weight")],
)
@KEEPS
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_a_computed_weight_is_not_merged_into(variant, compute):
    base = Pair()
    compute(base.second)
    unchanged_by_refused_merges(
        adapted(variant, base), "cannot merge into 'second': the weight of this .* is no parameter"
    )


@KEEPS
def test_a_layer_that_does_not_merge_finitely_keeps_the_others_unmerged(variant):
    model = adapted(variant, Pair())
    with torch.no_grad():
        model.base_model.model.second.factor("default").fill_(torch.inf)
    before = copy.deepcopy(model.state_dict())
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"safe_merge: the weight of 'second' merged with .* is not finite"):
            merge(safe_merge=True)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        assert not model.base_model.model.first.merged


def test_layers_of_peft_within_are_merged_safely_too():
    base = get_peft_model(Pair(), LoraConfig(r=4, target_modules=["first"], init_lora_weights=False)).base_model.model
    model = get_peft_model(base, peft_fused.DyLoraConfig(r=4, target_modules=["second"], init_weights=False)).eval()
    with torch.no_grad():
        base.first.lora_A["default"].weight.fill_(torch.inf)
    before = base.first.get_base_layer().weight.clone()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
            merge(safe_merge=True)
        assert torch.equal(base.first.get_base_layer().weight, before)


def test_embeddings_that_are_tied_no_more_are_merged_into():
    net = llama(tied=True)
    net.lm_head.weight = nn.Parameter(net.lm_head.weight.detach().clone())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT goes by the model's config
        model = get_peft_model(net, peft_fused.DyLoraConfig(r=4, target_modules=["lm_head"], init_weights=False)).eval()
    ids = torch.arange(10).view(1, 10)
    expected = model(input_ids=ids).logits
    model.merge_adapter()
    torch.testing.assert_close(model(input_ids=ids).logits, expected)


@KEEPS
def test_a_weight_written_to_while_merged_is_not_overwritten(variant):
    model = adapted(variant, Pair())
    model.add_adapter("more", config_of(variant))
    expected = model(X)
    model.merge_adapter()
    model = copy.deepcopy(model)
    weight = model.base_model.model.second.get_base_layer().weight
    weight.data[3, 5] += 1
    changed = weight.clone()
    message = "unmerge: the weight of 'second' has changed since it was merged"
    with pytest.raises(RuntimeError, match=message):
        model.unmerge_adapter()
    assert torch.equal(weight, changed) and model.base_model.model.first.merged
    with pytest.raises(RuntimeError, match=message):
        model.base_model.model.second.merge(adapter_names=["more"])
    assert torch.equal(weight, changed)
    weight.data[3, 5] -= 1
    torch.testing.assert_close(model(X), expected)


@KEEPS
def test_a_merged_model_may_change_type_and_be_unmerged(variant):
    for types in ([torch.bfloat16], [torch.float16, torch.float32]):
        model = adapted(variant, Pair())
        plain = model.base_model.model.second.get_base_layer().weight.clone()
        model.merge_adapter()
        for dtype in types:
            model.to(dtype)
        model.unmerge_adapter()
        assert torch.equal(model.base_model.model.second.get_base_layer().weight, plain.to(dtype))


def test_adapters_around_adapters_are_unmerged_from_the_outside():
    base = Pair()
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    held = dict(base.named_parameters())
    model = get_peft_model(adapted(DYLORA, base).base_model.model, config_of(SURM)).eval()
    expected = model(X)
    model.merge_adapter()
    assert not torch.equal(held["first.weight"], before["first.weight"])
    torch.testing.assert_close(model(X), expected, atol=5e-6, rtol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(parameter, before[name]) for name, parameter in held.items())
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("cls", [LoraLinear, AfLoraLinear])
def test_layers_that_share_a_weight_are_unmerged_in_reverse(cls):
    torch.manual_seed(0)
    base = nn.Linear(16, 16)
    plain = base.weight.detach().clone()
    first, second = cls.from_linear(base, r=4), cls.from_linear(base, r=4)
    for layer in (first, second):
        nn.init.normal_(layer.lora_B)
        if cls is AfLoraLinear:
            nn.init.normal_(layer.lora_b)
        layer.merge()
    merged = base.weight.detach().clone()
    with pytest.raises(RuntimeError, match=f"the weight of this {cls.__name__} has changed since it was merged"):
        first.unmerge()
    assert first.merged and torch.equal(base.weight, merged)
    second.unmerge()
    first.unmerge()
    assert torch.equal(base.weight, plain)
