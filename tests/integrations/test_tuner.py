"""What every method is as a PEFT model: what trains, what it computes, dtypes, several adapters, copies, names."""

import copy
import pickle

import contract
import pytest
import torch
from contract import IDS, LABELS, adapted, layers, logits, midway, net, train, trainable
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch import nn

import peft_fused
from peft_fused.integrations.peft.registration import REGISTERED, register
from peft_fused.integrations.peft.tuner import FusedLayer
from peft_fused.methods import on_step
from peft_fused.ops.dispatch import explain

CHECKPOINTING = [{"use_reentrant": False}, {"use_reentrant": True}]
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}
X = torch.linspace(-1, 1, 4 * contract.WIDTH).view(4, contract.WIDTH)


def loss(model):
    return model(IDS, labels=LABELS)["loss"]


def gradients(model):
    return [p.grad for p in model.parameters() if p.requires_grad]


def one(variant, linear=nn.Linear, **options):
    """A layer and a norm alone; the adapter is on either."""
    torch.manual_seed(0)
    base = nn.Sequential(linear(12, 12), nn.LayerNorm(12))
    targets = ["1"] if "target_modules" in variant.options else ["0"]
    return get_peft_model(base, variant.config(**{"target_modules": targets, "init_weights": False} | options)).eval()


# -------------------------------------------------------------------------------------------- what trains, and computes


def test_only_the_adapter_trains_and_starts_as_nothing(variant):
    model = adapted(variant, init_weights=True)
    prefix = variant.method.tuner.prefix
    assert isinstance(model.base_model, variant.method.tuner)
    ends = tuple(variant.options.get("target_modules", contract.TARGETS))
    assert len(layers(model)) == 2 * len(ends) and all(name.endswith(ends) for name in layers(model))
    assert trainable(model) and all(f".{prefix}" in name for name in trainable(model))
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    assert model.get_nb_trainable_parameters()[0] == sum(sizes)
    # A method that writes the base weights may round them.
    torch.testing.assert_close(logits(model), logits(net()), rtol=0, atol=1e-6 * variant.method.writes_base)
    loss(model.train()).backward()
    for layer in layers(model).values():
        assert any(p.grad is not None and p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_an_input_that_is_no_tensor_is_named(variant, training):
    (layer,) = layers(one(variant).train(training)).values()
    for x in ([1.0], None):
        with pytest.raises(TypeError, match=f"x must be a torch.Tensor, got {type(x).__name__}"):
            layer(x)


# Whose op takes the base product too. Of the others the base layer is called first, and says what it takes.
ONE_OP = contract.only(lambda v: v.additive and v.method.tuner.tuner_layer_cls.linear_op)


@pytest.mark.parametrize("variant", ONE_OP, ids=str)
def test_an_input_of_a_wrong_type_is_named_by_the_op(variant):
    assert {"dylora", "adamix_lora", "aflora", "rosa"} <= {str(v) for v in ONE_OP}
    (layer,) = layers(one(variant)).values()
    with pytest.raises(TypeError, match="x must be floating point"):
        layer(torch.ones(2, 12, dtype=torch.int64))
    with pytest.raises(TypeError, match="x's dtype"):
        layer(torch.ones(2, 12, dtype=torch.float64))


def test_a_random_start_changes_the_model(variant):
    model = midway(variant) if variant.method.writes_base else adapted(variant)
    assert (logits(model) - logits(net())).abs().max() > 1e-2


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_computes_the_base_weights_with_its_delta(additive, transposed):
    model = midway(additive, net(transposed=transposed))
    expected = logits(contract.with_delta(net(transposed=transposed), model))
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert (expected - logits(net(transposed=transposed))).abs().max() > 1e-2


@pytest.mark.parametrize("checkpointing", CHECKPOINTING, ids=["", "reentrant"])
@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
def test_gradient_checkpointing_changes_no_gradient(variant, dropout, checkpointing):
    model = midway(variant, **variant.dropout if dropout else {}).train()
    model.enable_input_require_grads()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(checkpointing)
        model.zero_grad()
        torch.manual_seed(5)
        loss(model).backward()
        found.append([grad.clone() for grad in gradients(model)])
    assert any(grad.any() for grad in found[0])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_disabling_between_forward_and_backward_leaves_the_gradients(variant):
    """As preference training does, for the reference model's logits."""
    model, found = midway(variant).train(), []
    for disabled in (False, True):
        model.zero_grad()
        value = loss(model)
        if disabled:
            with model.disable_adapter(), torch.no_grad():
                model(IDS)
        value.backward()
        found.append([grad.clone() for grad in gradients(model)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_disabled_it_is_the_base_model(variant):
    model = midway(variant)
    expected, trains = logits(model), trainable(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(net())) and not trainable(model)
        assert contract.same(contract.base_weights(model), dict(net().named_parameters()))
    assert torch.equal(logits(model), expected) and trainable(model) == trains


# --------------------------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_base_keeps_fp32_adapters(variant, dtype):
    model, wide = midway(variant, net(dtype)), adapted(variant)
    assert {p.dtype for name, p in model.named_parameters() if p.requires_grad} == {torch.float32}
    loss(model.train()).backward()
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in gradients(model))
    model = adapted(variant, net(dtype))
    assert logits(model).dtype == dtype
    torch.testing.assert_close(logits(model).float(), logits(wide), rtol=0, atol=0.1)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(net(dtype)))


def test_adapters_in_the_base_dtype_if_asked(variant):
    torch.manual_seed(1)
    config = variant.config(init_weights=variant.method.writes_base)  # whose own start is no change of nothing
    model = get_peft_model(net(torch.bfloat16), config, autocast_adapter_dtype=False).eval()
    assert {p.dtype for name, p in model.named_parameters() if p.requires_grad} == {torch.bfloat16}
    torch.testing.assert_close(logits(model).float(), logits(copy.deepcopy(model).float()), rtol=0, atol=0.1)


def test_half_precision_adapters_behind_an_fp32_base(variant):
    model = adapted(variant)
    expected = logits(model)
    for layer in layers(model).values():
        for container in layer.adapter_layer_names:
            layer._modules[container].to(torch.bfloat16)
    assert logits(model).dtype == torch.float32
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0.05)


def test_moved_and_cast_it_keeps_its_base(variant):
    model = midway(variant).to(torch.bfloat16)
    assert logits(model).isfinite().all()
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(net(torch.bfloat16)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(variant, dtype):
    model = adapted(variant, net(dtype)).train()
    on_step(model, step=0, total_steps=contract.TOTAL, epoch=0, optimizer=contract.optimizer_of(model))
    with torch.autocast("cpu", torch.bfloat16):
        loss(model).backward()
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in gradients(model))
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model)
    torch.testing.assert_close(found.float(), logits(adapted(variant)), rtol=0, atol=0.1)


# ---------------------------------------------------------------------------------------------------------- base layers


class Doubled(nn.Linear):
    """Stands for a layer whose weight must not be read, such as a quantised one."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("variant", contract.only(lambda v: "target_modules" not in v.options), ids=str)
def test_opaque_base_layers_are_called_not_read(variant):
    model, plain = one(variant, Doubled), one(variant)
    layer, other = (each.base_model.model[0] for each in (model, plain))
    with torch.no_grad():
        if variant.additive:
            torch.testing.assert_close(layer(X) - layer.base_layer(X), other(X) - other.base_layer(X))
        else:
            for each in (other.base_layer.weight, other.base_layer.bias):
                each.mul_(2)
            torch.testing.assert_close(layer(X), other(X))
            assert not torch.equal(layer(X), layer.base_layer(X))
    why = str(explain(model))
    assert "base layer, then" in why and ("Doubled" in why or not variant.additive or layer.linear_op is None)


def test_hooks_and_replaced_forwards_of_a_base_layer_run(variant):
    model = one(variant)
    (layer,) = layers(model).values()
    base, calls, outer = layer.get_base_layer(), [], nn.Sequential(layer)
    expected = outer(X)
    handle = base.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(outer(X), expected)
    assert len(calls) == 1 + ("target_modules" in variant.options)  # a norm is run on two inputs
    why = str(explain(model))
    assert "base layer, then" in why and ("hooks" in why or not variant.additive or layer.linear_op is None)
    handle.remove()
    if variant.additive:
        plain = base.forward
        base.forward = lambda x: plain(x) + 1
        torch.testing.assert_close(outer(X), expected + 1)


def test_compiles_without_graph_breaks(variant):
    model = one(variant).train()
    on_step(model, step=0, total_steps=contract.TOTAL, epoch=0, optimizer=contract.optimizer_of(model))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model(X))


# ----------------------------------------------------------------------------------------------------- several adapters


def second(variant):
    """Options of another adapter, of fewer layers where there are several."""
    targets = variant.config().target_modules & {"first", "norm"}
    return variant.config(target_modules=targets, init_weights=False)


def test_adapters_take_turns(variant):
    model = midway(variant)
    first, base = logits(model), contract.base_weights(model)
    torch.manual_seed(3)
    model.add_adapter("other", second(variant))
    assert not any("other" in name for name in trainable(model))
    assert torch.equal(logits(model), first) and contract.same(contract.base_weights(model), base)
    model.set_adapter("other")
    assert trainable(model) and all(".other." in name for name in trainable(model))
    kept = contract.copied({name: p for name, p in model.named_parameters() if ".default." in name})
    train(model, 5)
    assert contract.same({name: p for name, p in model.named_parameters() if ".default." in name}, kept)
    other = logits(model)
    assert (other - first).abs().max() > 1e-3
    if variant.additive:
        expected = logits(contract.with_delta(net(), model, "other"))
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(net()))
    model.set_adapter("default")
    assert torch.equal(logits(model), first) and contract.same(contract.base_weights(model), base)
    model.delete_adapter("default")
    assert model.active_adapters == ["other"] and not any("default" in name for name, _ in model.named_modules())
    assert torch.equal(logits(model), other)
    model.delete_adapter("other")
    assert contract.same(contract.base_weights(model), dict(net().named_parameters()))


def test_several_adapters_at_once(additive):
    model = midway(additive)
    model.add_adapter("other", second(additive))
    if additive.method.writes_base:
        with contract.unchanged(model), pytest.raises(ValueError, match=r"only one .* adapter can be active or merged"):
            model.base_model.set_adapter(["default", "other"])
        return
    model.base_model.set_adapter(["default", "other"])
    both, weights = logits(model), contract.base_weights(model)
    expected = logits(contract.with_delta(net(), model, "default", "other"))
    torch.testing.assert_close(both, expected, rtol=0, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert contract.same(contract.base_weights(model), weights) and torch.equal(logits(model), both)


def test_an_adapter_added_later_is_in_the_mode_of_its_layer(variant):
    model = adapted(variant)
    model.add_adapter("other", variant.config())
    assert not any(module.training for module in model.modules())
    model.train().add_adapter("third", variant.config())
    assert all(m.training for name, m in model.named_modules() if ".third" in name)


@pytest.mark.parametrize("first", (True, False))
def test_a_name_that_would_lose_tensors_is_refused(variant, first):
    """PEFT leaves out of a saved adapter every key that has another adapter's name in it."""
    names = ("blocks", "default") if first else ("default", "blocks")
    model = get_peft_model(net(), variant.config(), adapter_name=names[0])
    refused = pytest.raises(ValueError, match="adapter_name: beside adapter 'default' none can be named 'blocks'")
    with contract.unchanged(model), refused:
        model.add_adapter(names[1], variant.config())


@pytest.mark.parametrize("variant", contract.only(lambda v: v.method.tuner.tuner_layer_cls.state_names), ids=str)
def test_the_name_of_extra_state_is_refused(variant):
    model = adapted(variant)
    with contract.unchanged(model), pytest.raises(ValueError, match="none can be named '_extra_state'"):
        model.add_adapter("_extra_state", variant.config())


def test_one_adapter_per_sample_is_refused_not_ignored(variant):
    with pytest.raises(NotImplementedError, match="adapter_names"):
        adapted(variant)(IDS, adapter_names=["default", "__base__"] * 2)


# --------------------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_equal_and_independent(variant, how):
    model = midway(variant)
    other, expected = COPIES[how](model), logits(model)
    assert contract.same(other.state_dict(), model.state_dict()) and trainable(other) == trainable(model)
    assert torch.equal(logits(other), expected)
    assert not {id(module) for module in other.modules()} & {id(module) for module in model.modules()}
    memory = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert not {tensor.data_ptr() for tensor in (*other.parameters(), *other.buffers())} & memory
    with contract.unchanged(model):
        train(other, 4, start=5)
        assert torch.equal(logits(model), expected) and not torch.equal(logits(other), expected)
        with other.disable_adapter():
            assert torch.equal(logits(other), logits(net()))
        assert torch.equal(logits(other.unload()), logits(net()))
        assert torch.equal(logits(model), expected)
    # And the same is in it from which the original goes on.
    assert torch.equal(logits(train(COPIES[how](model), 4, start=5)), logits(train(model, 4, start=5)))


def test_copies_made_in_inference_mode_compute_the_same(variant):
    model = midway(variant)
    expected = logits(model)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(model)(IDS)["logits"], expected)


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("module", "target"), [(nn.Sequential(nn.Embedding(4, 4)), "0"), (nn.MultiheadAttention(4, 2), "out_proj")]
)
def test_targets_without_effect_are_refused(variant, module, target):
    model = nn.ModuleDict({"m": module})
    with contract.unchanged(model), pytest.raises(TypeError, match=f"target module 'm.{target}'"):
        get_peft_model(model, variant.config(target_modules=[target]))


def test_a_failing_injection_leaves_the_model_as_it_was(variant):
    base, model = net(), midway(variant)
    targets = [*variant.config().target_modules, "embed"]
    for target, inject in (
        (base, lambda: get_peft_model(base, variant.config(target_modules=targets))),
        (model, lambda: model.add_adapter("second", variant.config(target_modules=targets))),
    ):
        with contract.unchanged(target), pytest.raises(TypeError, match="target module 'embed'"):
            inject()


@pytest.mark.parametrize("name", REGISTERED)
def test_registration_is_idempotent_and_yields_to_peft(name, monkeypatch):
    method, key = REGISTERED[name], name.upper()
    register(method)
    assert PEFT_TYPE_TO_TUNER_MAPPING[key] is method.tuner and PEFT_TYPE_TO_CONFIG_MAPPING[key] is method.config
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, key, PEFT_TYPE_TO_TUNER_MAPPING["LORA"])
    with pytest.raises(RuntimeError, match=f"has a method {key} of its own"):
        register(method)


# ------------------------------------------------------------------------------------------------------------- the head


def trained_head(variant):
    model = adapted(variant, modules_to_save=["head"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:  # as training leaves it
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def test_unloading_keeps_the_trained_head(variant):
    model = trained_head(variant)
    expected = logits(model)
    unload = type(model.base_model).merge_and_unload if variant.additive else type(model.base_model).unload
    unloaded = unload(model.base_model)
    assert type(unloaded.head) is contract.Head and not [m for m in unloaded.modules() if isinstance(m, FusedLayer)]
    if variant.additive:
        torch.testing.assert_close(logits(unloaded), expected, rtol=0, atol=1e-5)
    model = trained_head(variant)
    with model.disable_adapter():
        unloaded = unload(model.base_model)
    assert not torch.equal(unloaded.head.out.weight, net().head.out.weight)
    if variant.additive:
        torch.testing.assert_close(logits(unloaded), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("situation", ["as it is", "training with dropout", "half", "half of a huge scale", "autocast"])
def test_explain_describes_the_very_call_that_forward_makes(variant, situation, decided):
    half, autocast = situation.startswith("half"), situation == "autocast"
    options = variant.dropout if situation == "training with dropout" else {}
    if situation == "half of a huge scale" and variant.additive:
        options = {field: 1e6 for field in vars(variant.config()) if field.endswith("_alpha")}
    base = net(torch.float16 if half else torch.float32)
    model = get_peft_model(base, variant.config(init_weights=False, **options), autocast_adapter_dtype=not half)
    model.train(situation == "training with dropout")
    for layer in layers(model).values():
        x = layer.typical_input(4)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            first, *_ = decided(lambda layer=layer, x=x: layer(x))
            assert layer.explain_route(4)[-1] == first
        assert first.dtype == ("float16" if half else "bfloat16" if autocast else "float32")
        assert first.huge_scale == (1e6 in options.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_an_adapter_is_explained_on_the_input_that_it_runs_on(dtype):
    """An input of a type that the ops do not combine with the adapter's is cast, and told of as cast."""
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(12, 12)), peft_fused.SurmConfig(target_modules=["0"]))
    layer = model.base_model.model[0]
    layer.surm_block.to(dtype)
    assert layer(torch.ones(4, 12)).dtype == torch.float32
    problem = layer.explain_route(4)[-1]
    assert (problem.dtype, problem.adapter_dtype) == (str(dtype)[6:], str(dtype)[6:])
