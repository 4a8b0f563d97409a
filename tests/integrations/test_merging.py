"""Merging where it cannot be right, or not be taken back: into weights that are shared, computed, or written to."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

import peft_fused
from peft_fused.layers import AFLoRALinear, LoRALinear

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


@pytest.mark.parametrize("method", METHODS)
def test_a_computed_weight_is_not_merged_into(method):
    base = Pair()
    nn.utils.parametrizations.weight_norm(base.second)
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


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_written_to_while_merged_is_not_overwritten(method):
    model = adapted(method, Pair())
    expected = model(X)
    model.merge_adapter()
    model = copy.deepcopy(model)
    weight = model.base_model.model.second.get_base_layer().weight
    weight.data[3, 5] += 1
    changed = weight.clone()
    with pytest.raises(RuntimeError, match="unmerge: the weight of 'second' has changed since it was merged"):
        model.unmerge_adapter()
    assert torch.equal(weight, changed)
    weight.data[3, 5] -= 1
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_model_may_change_type_and_be_unmerged(method):
    model = adapted(method, Pair())
    plain = model.base_model.model.second.get_base_layer().weight.clone()
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert torch.equal(model.base_model.model.second.get_base_layer().weight, plain.to(torch.bfloat16))


@pytest.mark.parametrize("cls", [LoRALinear, AFLoRALinear])
def test_layers_that_share_a_weight_are_unmerged_in_reverse(cls):
    torch.manual_seed(0)
    base = nn.Linear(16, 16)
    plain = base.weight.detach().clone()
    first, second = cls.from_linear(base, r=4), cls.from_linear(base, r=4)
    for layer in (first, second):
        nn.init.normal_(layer.lora_B)
        nn.init.normal_(layer.lora_b) if cls is AFLoRALinear else None
        layer.merge()
    merged = base.weight.detach().clone()
    with pytest.raises(RuntimeError, match=f"the weight of this {cls.__name__} has changed since it was merged"):
        first.unmerge()
    assert first.merged and torch.equal(base.weight, merged)
    second.unmerge()
    first.unmerge()
    assert torch.equal(base.weight, plain)
