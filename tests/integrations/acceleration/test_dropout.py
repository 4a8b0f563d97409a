"""Dropout of accelerated layers: the operations' own, of each adapter for itself, replayed by checkpointing."""

import pytest
import torch
import torch.utils.checkpoint
from accelerated import (
    FP32,
    Net,
    assert_same,
    config,
    error,
    first,
    llama,
    logits,
    names,
    pair,
    results,
    same,
)  # fmt: skip
from peft import get_peft_model

from peft_fused.integrations.peft.acceleration import accelerate, lora
from peft_fused.ops import lowrank_linear_reference


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


def test_evaluation_drops_nothing():
    reference, fused = pair(lora_dropout=0.4)
    same(fused.eval(), reference.eval())


def test_dropout_draws_anew_for_every_row_and_call():
    _, fused = pair(lora_dropout=0.4)
    layer = first(fused.train())
    x = torch.randn(1, 24).expand(8, 24)
    sample = layer(x)
    assert not torch.equal(sample[0], sample[1])
    assert not torch.equal(sample, layer(x))


def test_dropout_has_the_mean_and_the_spread_of_peft():
    reference, fused = pair(lora_dropout=0.4)
    x = torch.randn(1, 24).expand(8192, 24)
    with torch.no_grad():
        sample, spread = first(fused.train())(x), first(reference.train())(x).std(0)
        expected = first(reference.eval())(x[:1])
    deviation = (sample.mean(0) - expected[0]).abs() / (sample.std(0) / 8192**0.5)
    assert deviation.max() < 5
    assert torch.allclose(sample.std(0), spread, rtol=0.06)


def test_dropout_follows_the_seed():
    _, fused = pair(lora_dropout=0.4)
    layer = first(fused.train())
    x = torch.randn(6, 24)
    torch.manual_seed(3)
    one = layer(x)
    torch.manual_seed(3)
    assert torch.equal(one, layer(x))
    assert not torch.equal(one, layer(x))


def test_dropout_follows_its_own_module():
    _, fused = pair(lora_dropout=0.4)
    layer = first(fused.train())
    layer.lora_dropout["default"].eval()
    x = torch.randn(6, 24)
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
