"""Merging where it cannot be right, or not be taken back: into weights that are shared, computed, or written to."""

import copy
import warnings
from functools import partial

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import prune
from transformers import LlamaConfig, LlamaForCausalLM

import peft_fused
from peft_fused.layers import AfLoraLinear, LoraLinear

TARGETS = dict(target_modules=["first", "second"], init_weights=False)
METHODS = {
    "dylora": lambda: peft_fused.DyLoraConfig(r=4, **TARGETS),
    "surm": lambda: peft_fused.SurmConfig(**TARGETS),
    "adamix": lambda: peft_fused.AdaMixConfig(kind="lora", r=4, **TARGETS),
    "aflora": lambda: peft_fused.AfLoraConfig(r=4, frozen_modules=[], **TARGETS),
}
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


def adapted(method, base):
    torch.manual_seed(1)
    return get_peft_model(base, METHODS[method]()).eval()


def unchanged_by_refused_merges(model, match):
    expected, before = model(X), copy.deepcopy(model.state_dict())
    for merge in MERGES:
        with pytest.raises(ValueError, match=match):
            merge(model)
        assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
        assert torch.equal(model(X), expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_that_another_layer_shares_is_not_merged_into(method):
    base = Pair()
    base.second.weight = base.first.weight
    names = r"cannot merge into 'first', which shares its weight with 'second.base_layer'"
    unchanged_by_refused_merges(adapted(method, base), names)
    base = Pair()
    base.other.weight = nn.Parameter(base.second.weight.data.view(-1)[:256].view(16, 16))  # one memory, two parameters
    unchanged_by_refused_merges(
        adapted(method, base), "cannot merge into 'second', which shares its weight with 'other'"
    )


def test_a_layer_that_is_also_called_without_its_adapter_is_not_merged_into():
    base = Pair()
    base.other = base.second  # of which PEFT wraps the first
    unchanged_by_refused_merges(
        adapted("dylora", base), "cannot merge into 'second', which shares its weight with 'other'"
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
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
def test_a_computed_weight_is_not_merged_into(method, compute):
    base = Pair()
    compute(base.second)
    unchanged_by_refused_merges(
        adapted(method, base), "cannot merge into 'second': the weight of this .* is no parameter"
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_that_does_not_merge_finitely_keeps_the_others_unmerged(method):
    model = adapted(method, Pair())
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


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_written_to_while_merged_is_not_overwritten(method):
    model = adapted(method, Pair())
    model.add_adapter("more", METHODS[method]())
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


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_model_may_change_type_and_be_unmerged(method):
    for types in ([torch.bfloat16], [torch.float16, torch.float32]):
        model = adapted(method, Pair())
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
    model = get_peft_model(adapted("dylora", base).base_model.model, METHODS["surm"]()).eval()
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
