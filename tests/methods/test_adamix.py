import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import peft_fused
from peft_fused.layers import AdaMixLinear, RoutePolicy
from peft_fused.methods import adamix_loss, consistency_loss, draw_route, on_step, set_pass, set_routing
from peft_fused.methods.adamix import double, members_of

E = 4


def bert(labels=3, **options):
    torch.manual_seed(0)
    config = BertConfig(
        initializer_range=0.5, vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, num_labels=labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return adapt(BertForSequenceClassification(config), **options)


def llama(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    return adapt(LlamaForCausalLM(config), **options)


def adapt(model, **options):
    from peft import get_peft_model

    torch.manual_seed(1)
    config = peft_fused.AdaMixConfig(r=4, init_weights=False, share_up=False, **options)
    return get_peft_model(model, config).train()


def batch(rows=4, length=6):
    ids = torch.randint(1, 32, (rows, length))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


# ------------------------------------------------------------------------------------------------------------- routes


def test_a_route_is_a_function_of_seed_step_layer_side_batch_and_pass():
    policy = RoutePolicy(E, share_up=False, seed=3)
    base = dict(policy=policy, layer=2, side="down", step=7, micro=1, index=0)
    assert draw_route(**base) == draw_route(**base)
    for change in (
        {"policy": RoutePolicy(E, share_up=False, seed=4)}, {"layer": 3}, {"side": "up"}, {"step": 8}, {"micro": 2},
        {"index": 1},
    ):  # fmt: skip
        draws = [
            (draw_route(**{**base, "step": 100 + s}), draw_route(**{**base, "step": 100 + s, **change}))
            for s in range(60)
            if "step" not in change
        ] or [(draw_route(**{**base, "step": s}), draw_route(**{**base, "step": s + 1})) for s in range(60)]
        assert 5 <= sum(a == b for a, b in draws) <= 30, change  # a quarter of 60, of independent draws


def test_routes_are_uniform_and_shared_sides_are_not_drawn():
    policy = RoutePolicy(E, share_up=True)
    counts = Counter(draw_route(policy, 0, "down", step) for step in range(2000))
    chi2 = sum((counts[e] - 500) ** 2 / 500 for e in range(E))
    assert chi2 < 16.3  # p = 0.001 with three degrees of freedom
    assert {draw_route(policy, 0, "up", step) for step in range(50)} == {0}


def test_on_step_sets_what_draw_route_says_for_every_micro_batch():
    model = bert(seed=5)
    for step, micro in ((0, 0), (0, 1), (9, 0)):
        assert on_step(model, step=step, micro=micro) == 2
        for layer, member in enumerate(members_of(model)["adamix"]):
            policy = member.state.policy
            expected = tuple(
                tuple(draw_route(policy, layer, side, step, micro, index) for index in (0, 1))
                for side in ("down", "up")
            )
            assert member.state.values == expected
            assert torch.equal(member.state.routes, torch.tensor(expected))


# --------------------------------------------------------------------------------------------------- consistency loss


def kl(p, q):
    return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)


def test_the_loss_is_the_symmetric_divergence_and_its_gradient_the_papers():
    z1, z2 = (torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    loss = consistency_loss(z1, z2)
    torch.testing.assert_close(loss, 0.5 * (kl(z1, z2) + kl(z2, z1)).mean())
    g1, g2 = torch.autograd.grad(loss, (z1, z2))
    difference = (z1.softmax(-1) - z2.softmax(-1)) / 10  # (p1 - p2) / (2 B)
    torch.testing.assert_close(g1, difference)
    torch.testing.assert_close(g2, -difference)
    attached = consistency_loss(z1, z2, detach=False)
    torch.testing.assert_close(attached, loss)
    assert not torch.allclose(torch.autograd.grad(attached, z1)[0], g1)
    torch.autograd.gradcheck(lambda a, b: consistency_loss(a, b, detach=False), (z1, z2))


def test_the_loss_over_tokens_leaves_padding_out():
    z1, z2 = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    expected = 0.5 * (kl(z1, z2) + kl(z2, z1))[mask]
    torch.testing.assert_close(consistency_loss(z1, z2, mask=mask), expected.mean())
    torch.testing.assert_close(consistency_loss(z1, z2, mask=mask, num_items=6), expected.sum() / 6)
    assert consistency_loss(z1, z2, mask=torch.zeros_like(mask)) == 0
    z1[1, 3] = math.inf
    z1.requires_grad_()
    loss = consistency_loss(z1, z2, mask=mask)
    loss.backward()
    assert loss.isfinite()


def test_the_loss_of_a_regression_is_zero_and_half_precision_is_computed_in_fp32():
    assert consistency_loss(torch.randn(4, 1), torch.randn(4, 1)) == 0
    z1, z2 = torch.randn(64, 3).bfloat16(), torch.randn(64, 3).bfloat16()
    loss = consistency_loss(z1, z2)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, consistency_loss(z1.float(), z2.float()))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, torch.ones(2)), TypeError, "first must be a floating-point tensor"),
        ((torch.ones(2), torch.ones(2).long()), TypeError, "second must be"),
        ((torch.ones(2, 3), torch.ones(2, 4)), ValueError, r"second must have first's shape \[2, 3\], got \[2, 4\]"),
    ],
)
def test_bad_logits_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        consistency_loss(*arguments)
    with pytest.raises(ValueError, match=r"mask must have shape \[2\]"):
        consistency_loss(torch.ones(2, 3), torch.ones(2, 3), mask=torch.ones(3))


# ----------------------------------------------------------------------------------------------------------- two passes


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["adapter", "lora"])
@pytest.mark.parametrize("routing", ["batch", "sequence"])
def test_two_passes_and_a_doubled_batch_are_the_formula(kind, routing):
    where = {} if kind == "adapter" else {"target_modules": ["query", "value"]}
    model = bert(kind=kind, routing=routing, **where)
    inputs = {**batch(), "labels": torch.tensor([0, 2, 1, 1])}
    on_step(model, step=1)
    plain = {name: value for name, value in inputs.items() if name != "labels"}
    first = model(**plain).logits
    set_pass(model, 1)
    second = model(**plain).logits
    set_pass(model, 0)
    divergence = consistency_loss(first, second)
    assert divergence > 1e-6
    expected = F.cross_entropy(first, inputs["labels"]) + 3.0 * divergence
    truth = gradients(model, expected)
    for doubled in (False, True):
        loss, outputs = adamix_loss(model, inputs, weight=3.0, doubled=doubled)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(outputs.logits, first)
        for name, grad in gradients(model, loss).items():
            torch.testing.assert_close(grad, truth[name], atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("doubled", [False, True])
def test_a_causal_model_compares_the_predictions_of_real_tokens(doubled):
    model = llama()
    inputs = batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    on_step(model, step=1)
    first = model(**inputs).logits
    set_pass(model, 1)
    second = model(**inputs).logits
    set_pass(model, 0)
    kept = labels[:, 1:] != -100
    expected = F.cross_entropy(first[:, :-1][kept], labels[:, 1:][kept])
    expected = expected + 100 * consistency_loss(first[:, :-1][kept], second[:, :-1][kept])
    loss, outputs = adamix_loss(model, {**inputs, "labels": labels}, weight=100, doubled=doubled)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(outputs.logits, first)


def test_a_regression_takes_one_pass():
    model = bert(labels=1)
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    for doubled in (False, True):
        loss, outputs = adamix_loss(model, {**batch(), "labels": torch.rand(4)}, doubled=doubled)
        torch.testing.assert_close(loss, outputs.loss)
    assert len(calls) == 2


def test_the_passes_are_put_back_when_a_forward_fails():
    model = bert()
    state = members_of(model)["adamix"][0].state
    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)):
        adamix_loss(model, {"input_ids": None, "labels": torch.zeros(4).long()}, doubled=True)
    assert state.pass_index == 0
    with pytest.raises(ValueError, match="inputs must have a tensor 'labels', got NoneType"):
        adamix_loss(model, batch())


def test_double_repeats_what_belongs_to_the_batch():
    twice = double({"a": torch.arange(3), "labels": torch.arange(3), "other": torch.arange(2), "flag": True}, 3)
    assert twice["a"].tolist() == [0, 1, 2, 0, 1, 2] and twice["labels"].tolist() == [0, 1, 2, -100, -100, -100]
    assert twice["other"].tolist() == [0, 1] and twice["flag"] is True


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("doubled", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant, doubled):
    found = []
    for checkpointing in (False, True):
        model = bert()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        on_step(model, step=3)
        torch.manual_seed(2)
        loss, _ = adamix_loss(model, {**batch(), "labels": torch.tensor([0, 2, 1, 1])}, doubled=doubled)
        found.append(gradients(model, loss))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


# ------------------------------------------------------------------------------------------------------------ functions


def test_only_models_with_adamix_layers_are_taken():
    plain = nn.Linear(2, 2)
    for call in (lambda: set_pass(plain, 0), lambda: set_routing(plain, "merged")):
        with pytest.raises(ValueError, match="no AdaMix layers"):
            call()
    layer = AdaMixLinear.from_linear(nn.Linear(4, 4))
    for call, message in (
        (lambda: set_pass(layer, 2), r"index must be in 0\.\.1 or None, got 2"),
        (lambda: set_routing(layer, "mixed"), "routing must be one of 'merged', 'random', got 'mixed'"),
        (lambda: set_routing(layer, "random", index=-1), "index must be at least 0"),
        (lambda: set_pass(layer, 0, adapter_name="other"), r"adapter_name must be one of \['default'\], got 'other'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
