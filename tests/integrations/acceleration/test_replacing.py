"""The exchange of classes and its reversal: what stays, copies and files, other libraries that exchange classes."""

import copy
import io
import pickle
import warnings

import peft
import pytest
import torch
from accelerate.hooks import add_hook_to_module
from accelerated import FP32, CountCalls, Net, config, error, first, names, pair, randomise, same
from peft import LoraConfig, PeftModel
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

from peft_fused.integrations.peft.acceleration import accelerate, restore
from peft_fused.integrations.peft.acceleration.layer import AcceleratedLayer, is_accelerated
from peft_fused.integrations.peft.acceleration.lora import LORA


class QuantisedStandIn(nn.Module):
    """What a GPTQ layer shows to PEFT: sizes and a forward, no weight."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 24, 40
        self.register_buffer("qweight", torch.randint(-8, 8, (40, 24), dtype=torch.int8))

    def forward(self, x):
        return x @ self.qweight.to(x.dtype).t() * 0.05


def quantised():
    """(PEFT model, accelerated copy, report) with a layer whose class is one of those for quantised bases."""
    reference = nn.Sequential(GPTQLoraLinear(QuantisedStandIn(), "default", LoraConfig(lora_dropout=0.2), r=4)).eval()
    fused = copy.deepcopy(randomise(reference))
    return reference, fused, accelerate(fused)


def test_a_quantised_layer_keeps_the_class_that_peft_has_for_it():
    _, fused, report = quantised()
    assert report.swapped == ["0"] and "QuantisedStandIn" in report.slower["0"]
    assert isinstance(fused[0], GPTQLoraLinear) and type(fused[0]).__name__ == "FusedGPTQLoraLinear"
    assert restore(fused) == ["0"]
    assert type(fused[0]) is GPTQLoraLinear


def test_a_quantised_layer_matches_peft(calls):
    reference, fused, _ = quantised()
    same(fused, reference, torch.randn(5, 24))
    assert calls == ["lowrank_adapter"]


def test_a_quantised_layer_is_pickled():
    _, fused, _ = quantised()
    loaded = pickle.loads(pickle.dumps(fused))
    x = torch.randn(5, 24)
    assert type(loaded[0]) is type(fused[0]) and torch.equal(loaded(x), fused(x))


def test_a_quantised_layer_without_its_adapters():
    _, fused, _ = quantised()
    x = torch.randn(5, 24)
    fused[0].enable_adapters(False)
    assert torch.equal(fused(x), fused[0].base_layer(x))


def test_layers_that_come_later_need_another_call():
    _, fused = pair(target_modules=["first"])
    fused.add_adapter("wide", config(target_modules=["first", "second"]))
    second = fused.get_submodule("base_model.model.second")
    assert type(second) is PeftLinear
    report = accelerate(fused)
    assert report.swapped == ["base_model.model.second"]
    assert report.already == ["base_model.model.first"]
    assert is_accelerated(second)


def test_nothing_but_the_class_changes():
    reference, fused = pair(modules_to_save=["head"])
    assert fused.state_dict().keys() == reference.state_dict().keys()
    attributes = {name: set(vars(child)) for name, child in reference.named_modules()}
    assert {name: set(vars(child)) for name, child in fused.named_modules()} == attributes


def test_restore():
    reference, fused = pair(modules_to_save=["head"])
    assert sorted(restore(fused)) == ["base_model.model.first", "base_model.model.second"]
    assert [type(child) for child in fused.modules()] == [type(child) for child in reference.modules()]
    same(fused, reference, tolerance=0)
    assert restore(fused) == []


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_a_file],
    ids=["deepcopy", "pickle", "torch.save"],
)  # fmt: skip
def test_copies_stay_fused(duplicate, calls):
    _, fused = pair()
    x = torch.randn(3, 24)
    expected = fused(x)
    twin = duplicate(fused)
    assert names(twin) == names(fused)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        first(twin).lora_B["default"].weight.zero_()
    assert torch.equal(fused(x), expected)
    assert len(calls) == 6


def test_a_pickle_needs_no_class_that_is_there_already(monkeypatch):
    """As in another process: the fused class is made when it is first asked for."""
    pickled = pickle.dumps(pair()[1])
    monkeypatch.delitem(LORA._made, PeftLinear)
    loaded = pickle.loads(pickled)
    assert type(first(loaded)).__name__ == "FusedLoraLinear" and is_accelerated(first(loaded))


def test_an_accelerated_model_saves_what_peft_does(tmp_path):
    reference, fused = pair(modules_to_save=["head"])
    saved = []
    for name, model in (("fused", fused), ("peft", reference)):
        model.save_pretrained(tmp_path / name)
        saved.append(peft.utils.load_peft_weights(str(tmp_path / name), device="cpu"))
    ours, theirs = saved
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


def loaded_anew(path, model):
    """An accelerated model with what `model` saves."""
    model.save_pretrained(path)
    torch.manual_seed(0)  # of the base, as in `seeded`
    loaded = PeftModel.from_pretrained(Net(), path).eval()
    assert len(accelerate(loaded).swapped) == 2
    return loaded


def test_a_saved_model_is_accelerated(tmp_path, calls):
    reference, fused = pair(modules_to_save=["head"])
    x = torch.randn(3, 24)
    assert error(loaded_anew(tmp_path, fused)(x), reference(x)) <= FP32
    assert calls == ["lowrank_linear"] * 2


def test_an_accelerated_model_loads_another_adapter(tmp_path, calls):
    reference, fused = pair(modules_to_save=["head"])
    loaded = loaded_anew(tmp_path, fused)
    x = torch.randn(3, 24)
    with torch.no_grad():
        first(reference).lora_B["default"].weight.neg_()
    reference.save_pretrained(tmp_path / "peft")
    loaded.load_adapter(tmp_path / "peft", "again")
    loaded.set_adapter("again")
    assert error(loaded(x), reference(x)) <= FP32
    assert error(loaded(x), fused(x)) > 0.01
    assert calls == ["lowrank_linear"] * 6


def test_all_linear_finds_accelerated_layers():
    reference, fused = pair(target_modules="all-linear")
    fused.add_adapter("more", LoraConfig(r=2, target_modules="all-linear"))
    reference.add_adapter("more", LoraConfig(r=2, target_modules="all-linear"))
    assert fused.peft_config["more"].target_modules == reference.peft_config["more"].target_modules
    assert set(first(fused).lora_A) == {"default", "more"}


def test_fsdp2_on_the_layer_itself(one_rank):
    from torch.distributed.fsdp import fully_shard

    _, fused = pair(target_modules=["first"])
    fully_shard(first(fused), mesh=one_rank)
    assert "accelerate before sharding" in accelerate(fused).skipped["base_model.model.first"]
    with pytest.raises(RuntimeError, match="FSDPFusedLoraLinear"):
        restore(fused)
    assert isinstance(first(fused), AcceleratedLayer)


def test_accelerating_twice_changes_nothing():
    reference, fused = pair()
    report = accelerate(fused)
    assert report.swapped == [] and report.skipped == {}
    assert report.already == ["base_model.model.first", "base_model.model.second"]
    assert "0 of 2 LoRA layers swapped" in str(report) and "accelerated before: 2" in str(report)
    same(fused, reference)
    restore(fused)
    assert len(accelerate(fused).swapped) == 2


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


def test_the_layer_itself_can_be_the_model(calls):
    reference, _ = pair()
    layer = first(reference)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert accelerate(layer).swapped == [""]
        layer(torch.randn(1, 24))
        assert restore(layer) == [""]
    assert calls == ["lowrank_linear"]
