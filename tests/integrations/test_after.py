"""Adapters on a layer's output, before or after the dropout that the model has there."""

import contract
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

import peft_fused
from peft_fused.integrations.peft.tuner import FusedLayer

METHODS = {v.name: v.config for v in contract.ON_OUTPUT if hasattr(v.config(), "after") and "position" not in v.options}
IDS = torch.arange(2, 18).reshape(2, 8)


def base(dtype=torch.float32):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        hidden_dropout_prob=0.4, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config).to(dtype)


def adapted(method, after, **options):
    torch.manual_seed(1)
    options = {"target_modules": ["output.dense"], "init_weights": False, **options}
    return get_peft_model(base(options.pop("dtype", torch.float32)), METHODS[method](after=after, **options))


def hidden(model, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad():
        return model(IDS).last_hidden_state


def blocks(model):
    return [m.adapters_here() for m in model.modules() if isinstance(m, FusedLayer)]


@pytest.mark.parametrize("method", METHODS)
def test_stands_between_the_dropout_and_the_sum(method):
    model = adapted(method, "dropout").train()
    layer = model.base_model.model.encoder.layer[0].output
    assert isinstance(layer.dropout, FusedLayer) and type(layer.dense) is nn.Linear
    h, x = torch.randn(2, 8, 24), torch.randn(2, 8, 16)
    torch.manual_seed(3)
    found = layer(h, x)
    torch.manual_seed(3)
    dropped = layer.dropout.base_layer(layer.dense(h))
    assert (dropped == 0).float().mean() > 0.2
    (block,) = blocks(layer)[0].values()
    expected = layer.LayerNorm(block(dropped) + x)
    torch.testing.assert_close(found, expected)
    # The default stands before it.
    layer = adapted(method, None).train().base_model.model.encoder.layer[0].output
    torch.manual_seed(3)
    found = layer(h, x)
    torch.manual_seed(3)
    (block,) = blocks(layer)[0].values()
    torch.testing.assert_close(found, layer.LayerNorm(layer.dropout(block(layer.dense.base_layer(h))) + x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_evaluates_as_before_the_dropout_and_trains(method, dtype):
    after, before = (adapted(method, name, dtype=dtype) for name in ("dropout", None))
    assert len(blocks(after)) == len(blocks(before)) == 4
    for mine, other in zip(blocks(after), blocks(before), strict=True):
        mine.load_state_dict(other.state_dict())
        assert {p.dtype for p in mine.parameters()} == {torch.float32}
    torch.testing.assert_close(hidden(after.eval()), hidden(before.eval()))
    assert not torch.equal(hidden(after.train(), 5), hidden(before.train(), 5))
    after(IDS).last_hidden_state.float().square().sum().backward()
    assert all(p.grad is not None for name, p in after.named_parameters() if p.requires_grad)
    with after.eval().disable_adapter():
        torch.testing.assert_close(hidden(after), hidden(base(dtype).eval()))


@pytest.mark.parametrize("method", METHODS)
def test_saves_loads_adds_deletes_and_unloads(method, tmp_path):
    model = adapted(method, ["nothing", "dropout"]).eval()
    expected = hidden(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(hidden(loaded), expected)
    assert loaded.peft_config["default"].after == ["nothing", "dropout"]
    model.add_adapter("second", METHODS[method](after="dropout", target_modules=["output.dense"], init_weights=False))
    model.set_adapter("second")
    second = hidden(model)
    assert not torch.equal(second, expected)
    model.set_adapter("default")
    assert torch.equal(hidden(model), expected)
    assert "4 equal" in str(peft_fused.explain(model)) and "on its output" in str(peft_fused.explain(model))
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(hidden(model), second)
    plain = model.unload()
    assert not [m for m in plain.modules() if isinstance(m, FusedLayer)]
    torch.testing.assert_close(hidden(plain.eval()), hidden(base().eval()))
    other = base().eval()
    other.load_adapter(str(tmp_path))
    torch.testing.assert_close(hidden(other.eval()), expected)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(after="drop"), ValueError, r"module 'encoder.layer.0.*' no .*Dropout is named 'drop'; .*\['dropout'\]"),
        (dict(after="LayerNorm"), ValueError, "no torch.nn.Dropout is named 'LayerNorm'"),
        (dict(after="dropout", target_modules=["intermediate.dense"]), ValueError, "its parent has none"),
        (dict(after=3), TypeError, "after must be a list of str or None, got 3"),
        (dict(after=["dropout", ""]), TypeError, "after must be a list of str or None"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_be_is_named_and_changes_nothing(method, options, error, message):
    model = base()
    names = str(model)
    with pytest.raises(error, match=message):
        get_peft_model(model, METHODS[method](**{"target_modules": ["output.dense"], **options}))
    assert str(model) == names


def test_only_adapters_on_the_output_have_the_option():
    with pytest.raises(ValueError, match="after is an option of kind='adapter', got"):
        peft_fused.SurmConfig(after="dropout")
    with pytest.raises(ValueError, match="after is an option of kind='adapter' in position"):
        peft_fused.AdaMixConfig(after="dropout", kind="lora")
    with pytest.raises(ValueError, match="after is an option of kind='adapter' in position"):
        peft_fused.AdaMixConfig(after="dropout", position="pfeiffer")
