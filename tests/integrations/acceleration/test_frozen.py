"""Frozen linear layers beside adapters: which of them run in oneDNN, and that nothing else about them changes."""

import copy
import pickle
import warnings

import pytest
import torch
from accelerate.hooks import add_hook_to_module
from accelerated import CountCalls, assert_same, config, first, pair, randomise, results, same
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import peft_fused
from peft_fused.integrations.peft.acceleration import accelerate, restore
from peft_fused.integrations.peft.acceleration.frozen import FrozenConv1D, FrozenLinear
from peft_fused.layers import LoraLinear
from peft_fused.ops import dispatch

pytestmark = pytest.mark.usefixtures("onednn_is_faster")


class Wide(nn.Module):
    """Two targets, a frozen layer between them, a head."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first = nn.Linear(24, 40, dtype=dtype)
        self.between = nn.Linear(40, 40, dtype=dtype)
        self.second = nn.Linear(40, 24, bias=False, dtype=dtype)
        self.head = nn.Linear(24, 32, dtype=dtype)

    def forward(self, x):
        return self.head(self.second(torch.tanh(self.between(self.first(x)))))


def in_onednn(model) -> set[str]:
    return {name for name, module in model.named_modules() if type(module) in (FrozenLinear, FrozenConv1D)}


def named(*names):
    return {f"base_model.model.{name}" for name in names}


ALL = named("first.base_layer", "between", "second.base_layer", "head")


def products(model, x):
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        model(x)
    return [e.name for e in recorded.events()].count("mkldnn::_linear_pointwise")


def test_frozen_layers_of_an_accelerated_model():
    reference, fused = pair(Wide())
    assert in_onednn(fused) == ALL
    x = torch.randn(2, 50, 24)
    same(fused, reference, x)
    assert products(fused, x) >= 2 and not products(reference, x)
    assert fused.state_dict().keys() == reference.state_dict().keys()
    report = accelerate(fused)  # once more
    assert set(report.frozen) == ALL and "frozen linear layers in fp32 by oneDNN: 4 [" in str(report)
    assert set(restore(fused)) == ALL | named("first", "second")
    assert not in_onednn(fused)
    restored, expected = results(fused, x), results(reference, x)
    assert all(torch.equal(restored[name], value) for name, value in expected.items())


def test_it_can_be_turned_off():
    _, fused = pair(Wide())
    report = accelerate(fused, frozen=False)
    assert not in_onednn(fused) and not report.frozen and len(report.already) == 2
    with pytest.raises(TypeError, match="accelerate: frozen must be True or False"):
        accelerate(fused, frozen=1)


def test_which_layers_keep_their_class(monkeypatch):
    model = get_peft_model(Wide(), config(modules_to_save=["head"]))
    model.base_model.model.between.weight.requires_grad_(True)
    accelerate(model)
    assert in_onednn(model) == named("first.base_layer", "second.base_layer", "head.original_module")
    hooked = get_peft_model(Wide(), config())
    add_hook_to_module(hooked.base_model.model.between, CountCalls())
    accelerate(hooked)
    assert ALL - in_onednn(hooked) == named("between")
    half = get_peft_model(Wide(torch.bfloat16), config())
    accelerate(half)
    assert not in_onednn(half)
    monkeypatch.setattr(dispatch, "_onednn_beats_blas", lambda: False)
    model = get_peft_model(Wide(), config())
    accelerate(model)
    assert not in_onednn(model)


@pytest.mark.parametrize("around", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_what_surrounds_accelerate_does_not_matter(around):
    model = get_peft_model(Wide(), config())
    model.base_model.model.between.weight.requires_grad_(True)
    with around():
        accelerate(model)
    assert in_onednn(model) == ALL - named("between")


class Packed(torch.Tensor):
    """A quantised weight, which has few operations."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(function)


WEIGHTS = {
    "packed": lambda weight: torch.Tensor._make_wrapper_subclass(Packed, weight.shape, dtype=weight.dtype),
    "sparse": lambda weight: nn.Parameter(weight.detach().to_sparse_csr(), requires_grad=False),
    "meta": lambda weight: nn.Parameter(weight.detach().to("meta"), requires_grad=False),
    "none": lambda weight: None,
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_layers_whose_weight_is_of_another_kind(weight):
    model = get_peft_model(Wide(), config())
    parameters = model.base_model.model.between._parameters
    parameters["weight"] = weight(parameters["weight"])
    accelerate(model)
    assert in_onednn(model) == ALL - named("between")


def test_adapters_keep_their_class_when_they_are_frozen():
    """As those are that PeftModel.from_pretrained has loaded, and those that are not active."""
    reference = randomise(get_peft_model(Wide(), config(r=64))).requires_grad_(False)
    fused = copy.deepcopy(reference)
    report = accelerate(fused)
    assert set(report.frozen) == in_onednn(fused) == ALL and not report.slower
    x = torch.randn(2, 50, 24)
    torch.testing.assert_close(fused(x), reference(x))


def test_a_model_without_adapters_is_left_alone():
    model = Wide().requires_grad_(False)
    with pytest.warns(UserWarning, match="nothing to swap"):
        assert not accelerate(model).frozen
    assert not in_onednn(model)


@pytest.mark.parametrize("method", [peft_fused.DyLoraConfig, peft_fused.RosaConfig])
def test_models_of_our_own_methods(method):
    reference = get_peft_model(Wide(), method(r=4, target_modules=["first", "second"])).eval()
    fused = copy.deepcopy(reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = accelerate(fused)
    assert set(report.frozen) == in_onednn(fused) == ALL
    assert "nothing to swap\n  frozen linear layers in fp32 by oneDNN: 4" in str(report)
    x = torch.randn(2, 50, 24)
    torch.testing.assert_close(fused(x), reference(x))


def test_layers_of_our_own_without_peft():
    model = nn.Sequential(LoraLinear.from_linear(nn.Linear(24, 40), r=4), nn.Linear(40, 40).requires_grad_(False))
    assert accelerate(model).frozen == ["1"]


def test_base_layers_that_run_alone():
    """Beside adapters that are disabled, merged, or left to PEFT."""
    reference, fused = pair(Wide())
    x = torch.randn(2, 50, 24)
    with fused.disable_adapter(), reference.disable_adapter():
        assert products(fused, x) == 4
        assert_same(results(fused, x), results(reference, x))
    fused.merge_adapter(), reference.merge_adapter()
    assert products(fused, x) == 4
    torch.testing.assert_close(fused(x), reference(x))
    dora = get_peft_model(Wide(), LoraConfig(r=4, target_modules=["first"], use_dora=True))
    plain = copy.deepcopy(dora)
    with pytest.warns(UserWarning, match="0 of 1 LoRA layers swapped"):
        accelerate(dora)
    assert in_onednn(dora) == named("first.base_layer", "between", "second", "head")
    same(dora, plain, x)


def test_merged_and_unloaded():
    reference, fused = pair(Wide())
    x = torch.randn(2, 50, 24)
    merged, expected = fused.merge_and_unload(), reference.merge_and_unload()
    torch.testing.assert_close(merged(x), expected(x))
    assert in_onednn(merged) == {"first", "between", "second", "head"}
    with pytest.warns(UserWarning, match="nothing to swap"):
        assert len(accelerate(merged).frozen) == 4  # it has no adapter; what is there stays
    again = randomise(get_peft_model(merged, config()))
    assert not accelerate(again).slower  # the base layers are known for what they are
    restore(again)
    assert not in_onednn(again)


def test_a_layer_that_is_trained_later():
    reference, fused = pair(Wide())
    for model in (reference, fused):
        model.base_model.model.between.requires_grad_(True)
    x = torch.randn(2, 50, 24)
    same(fused, reference, x)
    assert "base_model.model.between.weight" in results(fused, x)


def test_copies_and_pickles():
    _, fused = pair(Wide())
    x = torch.randn(2, 50, 24)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert in_onednn(copied) == ALL and torch.equal(copied(x), fused(x))


def test_conv1d():
    size = dict(n_embd=64, n_layer=2, n_head=4, vocab_size=128, n_positions=32)
    reference = randomise(get_peft_model(GPT2LMHeadModel(GPT2Config(**size)), LoraConfig(target_modules=["c_attn"])))
    fused = copy.deepcopy(reference.eval())
    report = accelerate(fused)
    assert sum(isinstance(fused.get_submodule(name), Conv1D) for name in report.frozen) == 8
    ids = torch.randint(128, (4, 32))
    losses = [model(ids, labels=ids).loss for model in (fused, reference)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(fused.parameters(), reference.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_another_library_derives_a_class():
    _, fused = pair(Wide())
    between = fused.base_model.model.between
    between.__class__ = type("Sharded", (FrozenLinear,), {})
    assert torch.isfinite(fused(torch.randn(2, 50, 24))).all()
    with pytest.raises(RuntimeError, match="is now a Sharded; undo that change first"):
        restore(fused)
    assert in_onednn(fused) == ALL - named("between")  # nothing was changed


def test_a_forward_that_was_replaced_since():
    """By accelerate, whose hook keeps the forward that it found."""
    _, fused = pair(Wide())
    add_hook_to_module(fused.base_model.model.between, CountCalls())
    x = torch.randn(2, 50, 24)
    expected = fused(x)
    with pytest.raises(RuntimeError, match=r"accelerate: frozen=False: the forward of .* was replaced on the instance"):
        accelerate(fused, frozen=False)
    assert in_onednn(fused) == ALL and torch.equal(fused(x), expected)


def test_explain():
    _, fused = pair(Wide())
    lines = {name: (path, reasons) for name, path, reasons in dispatch.explain(fused, rows=100).lines}
    assert lines.keys() == named("first", "between", "second", "head")  # base layers are parts of theirs
    assert lines["base_model.model.between"] == ("frozen_linear: oneDNN base GEMM", ())
    few = {name: (path, reasons) for name, path, reasons in dispatch.explain(fused, rows=1).lines}
    path, reasons = few["base_model.model.between"]
    assert path == "Linear's own forward" and reasons == ("frozen_linear: oneDNN is not the faster library for it",)


def test_compiled():
    reference, fused = pair(Wide())
    x = torch.randn(2, 50, 24)
    compiled = torch.compile(fused, fullgraph=True)
    torch.testing.assert_close(compiled(x), reference(x))
    torch.testing.assert_close(compiled(torch.cat([x, x])), reference(torch.cat([x, x])))
    assert type(first(fused).base_layer) is FrozenLinear
