import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import peft_fused
from peft_fused.layers import AdaMixLinear, RoutePolicy
from peft_fused.methods import adamix_loss, consistency_loss, draw_route, on_step, set_adamix_pass, set_adamix_routing
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
    z = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"mask must have shape \[2\]"):
        consistency_loss(z, z, mask=torch.ones(3).bool())
    with pytest.raises(TypeError, match=r"mask must be a bool tensor or None, got torch\.int64"):
        consistency_loss(z, z, mask=torch.ones(2).long())
    with pytest.raises(ValueError, match="num_items must be positive, got 0"):
        consistency_loss(z, z, num_items=0)


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
    set_adamix_pass(model, 1)
    second = model(**plain).logits
    set_adamix_pass(model, 0)
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


def check_next_tokens(model, inputs, labels, doubled):
    """The loss of a causal model, and the divergence, are those of the predictions of what has a label."""
    on_step(model, step=1)
    first = model(**inputs).logits
    set_adamix_pass(model, 1)
    second = model(**inputs).logits
    set_adamix_pass(model, 0)
    kept = labels[:, 1:] != -100
    expected = F.cross_entropy(first[:, :-1][kept], labels[:, 1:][kept])
    expected = expected + 100 * consistency_loss(first[:, :-1][kept], second[:, :-1][kept])
    loss, outputs = adamix_loss(model, {**inputs, "labels": labels}, weight=100, doubled=doubled)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(outputs.logits, first)


@pytest.mark.parametrize("doubled", [False, True])
def test_a_causal_model_compares_the_predictions_of_real_tokens(doubled):
    model = llama()
    inputs = batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    check_next_tokens(model, inputs, labels, doubled)


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
def test_activation_checkpointing_changes_nothing(reentrant):
    found = []
    for checkpointing in (False, True):
        model = bert()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        on_step(model, step=3)
        torch.manual_seed(2)
        loss, _ = adamix_loss(model, {**batch(), "labels": torch.tensor([0, 2, 1, 1])}, doubled=True)
        found.append(gradients(model, loss))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_passes_under_activation_checkpointing_are_refused(reentrant):
    model = bert()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    on_step(model, step=3)
    loss, _ = adamix_loss(model, {**batch(), "labels": torch.tensor([0, 2, 1, 1])})
    with pytest.raises(RuntimeError, match=r"adamix_loss\(doubled=True\)"):
        loss.backward()


# ------------------------------------------------------------------------------------------------------------ functions


def test_only_models_with_adamix_layers_are_taken():
    plain = nn.Linear(2, 2)
    for call in (lambda: set_adamix_pass(plain, 0), lambda: set_adamix_routing(plain, "merged")):
        with pytest.raises(ValueError, match="no AdaMix layers"):
            call()
    layer = AdaMixLinear.from_linear(nn.Linear(4, 4))
    for call, message in (
        (lambda: set_adamix_pass(layer, 2), r"index must be in 0\.\.1 or None, got 2"),
        (lambda: set_adamix_routing(layer, "mixed"), "routing must be one of 'merged', 'random', got 'mixed'"),
        (lambda: set_adamix_routing(layer, "random", index=-1), "index must be at least 0"),
        (
            lambda: set_adamix_pass(layer, 0, adapter_name="other"),
            r"adapter_name must be one of \['default'\], got 'other'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ------------------------------------------------------------------------------------------------- other kinds of model


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_doubled_lora_batch_is_repeated_with_both_routes(reentrant):
    found = []
    for checkpointing in (False, True):
        model = bert(kind="lora", target_modules=["query", "value"])
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        on_step(model, step=3)
        loss, _ = adamix_loss(model, {**batch(), "labels": torch.tensor([0, 2, 1, 1])}, doubled=True)
        found.append(gradients(model, loss))
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_nested_checkpoints_are_repeated_with_their_own_routes(outer, inner):
    from torch.utils.checkpoint import checkpoint

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = AdaMixLinear.from_linear(nn.Linear(6, 6), r=4, share_up=False)
            self.second = AdaMixLinear.from_linear(nn.Linear(6, 6), r=4, share_up=False)
            for layer in (self.first, self.second):
                layer.block.randomize()
            self.nested = False

        def body(self, x):
            x = torch.tanh(self.first(torch.sin(x)))
            if self.nested:
                return checkpoint(lambda x: torch.tanh(self.second(torch.cos(x))), x, use_reentrant=inner)
            return torch.tanh(self.second(torch.cos(x)))

        def forward(self, x):
            return checkpoint(self.body, x, use_reentrant=outer) if self.nested else self.body(x)

    torch.manual_seed(0)
    net, x = Nested(), torch.randn(3, 6, requires_grad=True)
    found = []
    for net.nested in (False, True):
        on_step(net, step=1)
        set_adamix_pass(net, 1)
        loss = net(x).sin().sum()
        set_adamix_pass(net, 0)
        found.append(gradients(net, loss))
    values = net.first.block.routes.values
    assert values[0][0] != values[0][1]
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


def test_an_encoder_decoder_has_the_same_decoder_input_in_both_passes():
    from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

    shared = dict(vocab_size=40, decoder_start_token_id=2, pad_token_id=0)
    bart = BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=24, decoder_ffn_dim=24, dropout=0.0, **shared,
    )  # fmt: skip
    t5 = T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0, **shared)
    for base in (BartForConditionalGeneration(bart), T5ForConditionalGeneration(t5)):
        name = "wo" if isinstance(base, T5ForConditionalGeneration) else "fc2"
        for experts in (1, 4):
            model = adapt(base, num_experts=experts, target_modules=[name])
            on_step(model, step=1)
            inputs = {**batch(), "labels": torch.randint(3, 30, (4, 5))}
            loss, outputs = adamix_loss(model, inputs, weight=100)
            assert (loss - outputs.loss > 1e-6) == (experts > 1)  # without experts and dropout the passes are one
            torch.testing.assert_close(adamix_loss(model, inputs, weight=100, doubled=True)[0], loss)
            base = model.unload()


@pytest.mark.parametrize("doubled", [False, True])
def test_gpt2_predicts_the_next_token_too(doubled):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0,
        initializer_range=0.5,
    )  # fmt: skip
    model = adapt(GPT2LMHeadModel(config))
    inputs = batch()
    labels = inputs["input_ids"].clone()
    labels[:, :3] = -100
    check_next_tokens(model, inputs, labels, doubled)


def test_a_regression_with_whole_numbers_is_not_doubled():
    model = bert(labels=1)
    on_step(model, step=0)
    inputs = {**batch(), "labels": torch.tensor([0, 3, 1, 2])}
    torch.testing.assert_close(adamix_loss(model, inputs, doubled=True)[0], adamix_loss(model, inputs)[0])


def test_a_class_that_is_ruled_out_in_both_passes_adds_nothing():
    z1, z2 = torch.randn(4, 3), torch.randn(4, 3)
    expected = consistency_loss(z1, z2)
    out = torch.full((4, 1), -math.inf)
    wide1, wide2 = (torch.cat([z, out], 1).requires_grad_() for z in (z1, z2))
    for detach in (True, False):
        loss = consistency_loss(wide1, wide2, detach=detach)
        torch.testing.assert_close(loss, expected)
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(loss, (wide1, wide2)))


def test_what_is_masked_gets_no_gradient_whatever_it_holds():
    z1, z2 = torch.randn(2, 3, requires_grad=True), torch.tensor([[0.1, 0.2, 0.3], [math.inf, math.nan, 0.0]])
    loss = consistency_loss(z1, z2, mask=torch.tensor([True, False]))
    loss.backward()
    assert loss.isfinite() and not z1.grad[1].any() and z1.grad[0].any()


def test_a_first_dimension_that_is_not_the_batch_is_not_halved():
    layer = AdaMixLinear.from_linear(nn.Linear(4, 4), share_up=False)
    set_adamix_pass(layer, None, sequences=8)
    layer(torch.randn(8, 6, 4))
    with pytest.raises(ValueError, match=r"have 8 sequences in the first dimension .* got 6"):
        layer(torch.randn(6, 8, 4))


def test_two_strict_methods_on_one_optimizer():
    from peft_fused.layers import DyLoraLinear

    torch.manual_seed(0)
    net = nn.Sequential(
        DyLoraLinear.from_linear(nn.Linear(6, 6), r=4, frozen=True, strict_frozen=True),
        AdaMixLinear.from_linear(nn.Linear(6, 6), r=2, strict_experts=True),
    )
    nn.init.normal_(net[0].lora_B)
    net[1].block.randomize()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    for step in range(8):
        on_step(net, step=step, optimizer=optimizer)
        before = net[0].lora_A.detach().clone(), net[1].block.down.weight.detach().clone()
        net(torch.randn(3, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        rows = (net[0].lora_A != before[0]).any(1).nonzero().flatten().tolist()
        experts = (net[1].block.down.weight != before[1]).flatten(1).any(1).nonzero().flatten().tolist()
        assert rows == [net[0].ranks.train_value - 1]
        assert experts == [net[1].block.routes.values[0][0]]


def test_a_negative_weight_is_refused():
    with pytest.raises(ValueError, match="weight must be at least 0, got -1"):
        adamix_loss(bert(), {**batch(), "labels": torch.zeros(4).long()}, weight=-1)


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (nn.Linear(2, 2), 3, "inputs must be a mapping of the model's arguments, got int"),
        (None, {}, r"model must be a torch\.nn\.Module, got NoneType"),
    ],
)
def test_the_arguments_of_the_loss_are_named(model, inputs, message):
    with pytest.raises(TypeError, match=message):
        adamix_loss(model, inputs)
