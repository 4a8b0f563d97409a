import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_fused.layers import DyLoraLinear, LoraLinear

LAYERS = [LoraLinear, DyLoraLinear]


def random_b(layer):
    nn.init.normal_(layer.lora_B)
    return layer


def linear(dtype=torch.float32, bias=True):
    torch.manual_seed(0)
    return nn.Linear(12, 9, bias=bias).to(dtype)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_forward_is_the_formula(bias, rslora):
    base = linear(bias=bias)
    layer = random_b(LoraLinear.from_linear(base, r=4, alpha=6, use_rslora=rslora))
    x = torch.randn(2, 5, 12)
    scale = 6 / math.sqrt(4) if rslora else 6 / 4
    expected = base(x) + scale * (x @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.delta(), scale * layer.lora_B @ layer.lora_A)


@pytest.mark.parametrize("cls", LAYERS)
def test_initially_the_base_layer_and_its_own_parameters(cls):
    base = linear()
    layer = cls.from_linear(base, r=3)
    x = torch.randn(5, 12)
    assert layer.weight is base.weight and layer.bias is base.bias
    torch.testing.assert_close(layer(x), base(x))
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    assert layer.lora_A.std() > 0 and not layer.lora_B.any()
    # kaiming_uniform(a=sqrt(5)) is uniform within 1 / sqrt(fan_in).
    assert layer.lora_A.abs().max() <= 1 / math.sqrt(12)


@pytest.mark.parametrize("cls", LAYERS)
def test_conv1d_is_a_transposed_linear(cls):
    base = Conv1D(9, 12)
    layer = random_b(cls.from_linear(base, r=3, alpha=3))
    x = torch.randn(5, 12)
    expected = base(x) + (x @ layer.lora_A.T) @ layer.lora_B.T
    torch.testing.assert_close(layer(x), expected)
    layer.merge()
    torch.testing.assert_close(base(x), expected)


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merge_rounds_once_and_unmerge_is_exact(cls, dtype):
    base = linear(dtype)
    layer = random_b(cls.from_linear(base, r=4))
    before = base.weight.clone()
    expected = (before.to(layer.delta().dtype) + layer.delta()).to(dtype)
    layer.merge()
    assert layer.merged and torch.equal(base.weight, expected) and not torch.equal(base.weight, before)
    x = torch.randn(5, 12, dtype=dtype)
    assert torch.equal(layer(x), base(x))
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    nn.init.zeros_(layer.lora_B)  # what is put back does not depend on the adapter
    layer.unmerge()
    assert torch.equal(base.weight, before)
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()


@pytest.mark.parametrize("cls", LAYERS)
def test_adapters_of_a_half_precision_base_are_fp32(cls):
    layer = random_b(cls.from_linear(linear(torch.bfloat16), r=4))
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    out = layer(torch.randn(5, 12, dtype=torch.bfloat16))
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and layer.lora_A.grad.dtype == torch.float32
    assert cls.from_linear(linear(torch.bfloat16), dtype=torch.bfloat16).lora_A.dtype == torch.bfloat16


@pytest.mark.parametrize("cls", LAYERS)
def test_dropout_acts_on_the_adapter_in_training_only(cls):
    layer = random_b(cls.from_linear(linear(), r=4, dropout=0.5))
    x = torch.randn(64, 12)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), x @ (layer.weight + layer.delta()).T + layer.bias)
    layer.train()
    nn.init.zeros_(layer.lora_B)
    torch.testing.assert_close(layer(x), x @ layer.weight.T + layer.bias)


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"r": 0}, ValueError, r"r must be in 1\.\.256, got 0"),
        ({"r": 257}, ValueError, "r must be in"),
        ({"r": 2.0}, TypeError, "r must be an int"),
        ({"alpha": math.inf}, ValueError, "alpha must be finite"),
        ({"alpha": "16"}, TypeError, "alpha must be a number"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, ValueError, "dropout must be in"),
        ({"use_rslora": 1}, TypeError, "use_rslora must be True or False"),
    ],
)
def test_bad_arguments_are_named(cls, arguments, error, message):
    with pytest.raises(error, match=message):
        cls.from_linear(linear(), **arguments)


@pytest.mark.parametrize("base", [nn.Conv2d(3, 3, 1), nn.Embedding(4, 4), "layer", LoraLinear.from_linear(linear())])
def test_other_bases_are_refused(base):
    with pytest.raises(TypeError, match=r"base must be a torch\.nn\.Linear"):
        LoraLinear.from_linear(base)


def test_quantised_weight_is_refused():
    base = linear()
    base.weight = nn.Parameter(torch.zeros(9, 12, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"int8.*PEFT integration"):
        LoraLinear.from_linear(base)


def test_the_route_follows_the_state():
    layer = LoraLinear.from_linear(linear())
    assert layer.explain_route()[:2] == ("lowrank_linear", [])
    layer.merge()
    path, reasons, _ = layer.explain_route()
    assert path == "F.linear" and "merged" in reasons[0]
