import copy
import pickle

import pytest
import torch
from peft import (
    PeftModel,
    TaskType,
    convert_to_lora,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.quantization_utils import QuantizationBackend
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from peft_fused import copy_adapter
from peft_fused.integrations.peft import DyLoraConfig, tuner
from peft_fused.integrations.peft.dylora import DyLoraModel, DyLoraPeftLinear
from peft_fused.integrations.peft.registration import REGISTERED, register
from peft_fused.methods import evaluate_dylora_ranks, on_step, set_dylora_rank
from peft_fused.ops.dispatch import explain

R, ALPHA = 4, 6.0
IDS = torch.arange(20).reshape(2, 10)
LLAMA = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, pad_token_id=0,
)  # fmt: skip


def llama(cls=LlamaForCausalLM, dtype=torch.float32):
    torch.manual_seed(0)
    return cls(LLAMA).to(dtype).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def config(**options):
    defaults = dict(r=R, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"], init_weights=False)
    return DyLoraConfig(**{**defaults, **options})


def adapted(base=None, **options):
    model = get_peft_model(llama() if base is None else base, config(**options))
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, DyLoraPeftLinear)}


def by_hand(base, model, b, adapter="default"):
    """The base model with alpha / b * B A added to its weights."""
    for name, layer in layers(model).items():
        if adapter in layer.dylora_A:
            A, B = layer.dylora_A[adapter].weight[:b], layer.dylora_B[adapter].weight[:, :b]
            weight = base.get_submodule(name.removeprefix("base_model.model.")).weight
            delta = ALPHA / b * B @ A
            weight.data += delta.T if layer.transposed else delta
    return base


@pytest.mark.parametrize("b", range(1, R + 1))
@pytest.mark.parametrize("make", [llama, gpt2])
def test_forward_equals_the_dense_formula(make, b):
    model = adapted(make(), target_modules=["c_attn", "c_proj"] if make is gpt2 else ["q_proj", "down_proj"])
    set_dylora_rank(model, b)
    expected = by_hand(make(), model, b)
    torch.testing.assert_close(logits(model), logits(expected))
    assert (logits(model) - logits(make())).abs().max() > 1e-2


def test_only_the_adapter_is_trainable_and_starts_as_nothing():
    model = adapted(init_weights=True)
    trainable = {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"dylora_A", "dylora_B"}
    assert torch.equal(logits(model), logits(llama()))
    assert model.get_nb_trainable_parameters()[0] == 2 * R * (16 + 16 + 24 + 16)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_training_gradients_follow_the_drawn_rank(checkpointing):
    model = adapted().train()
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    step = next(s for s in range(100) if on_step(model, step=s) and 1 < drawn(model) < R)
    on_step(model, step=step)
    model(IDS, labels=IDS).loss.backward()
    reference = llama()
    weights = {name: p for name, p in reference.named_parameters() if p.dim() == 2}
    by_hand(reference, model, drawn(model))(IDS, labels=IDS).loss.backward()
    for name, layer in layers(model).items():
        grad = weights[name.removeprefix("base_model.model.") + ".weight"].grad
        A, B, b = layer.dylora_A["default"].weight, layer.dylora_B["default"].weight, drawn(model)
        torch.testing.assert_close(A.grad[:b], ALPHA / b * B[:, :b].T @ grad)
        torch.testing.assert_close(B.grad[:, :b], ALPHA / b * grad @ A[:b].T)
        assert not A.grad[b:].any() and not B.grad[:, b:].any()


def drawn(model):
    (rank,) = {layer.dylora_ranks["default"].train_rank.item() for layer in layers(model).values()}
    return rank


def test_frozen_trains_one_row():
    model = adapted(frozen=True).train()
    set_dylora_rank(model, 3)
    model(IDS, labels=IDS).loss.backward()
    for layer in layers(model).values():
        assert layer.dylora_A["default"].weight.grad.any(dim=1).tolist() == [False, False, True, False]
        assert layer.dylora_B["default"].weight.grad.any(dim=0).tolist() == [False, False, True, False]


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_at_the_evaluation_rank_and_exact_unmerge(make, dtype):
    targets = ["c_attn"] if make is gpt2 else ["q_proj", "down_proj"]
    model = adapted(make().to(dtype), target_modules=targets)
    assert all(layer.dylora_A["default"].weight.dtype == torch.float32 for layer in layers(model).values())
    set_dylora_rank(model, 2)
    before, weights = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter(safe_merge=True)
    for name, layer in layers(model).items():
        base = weights[f"{name}.base_layer.weight"]
        assert torch.equal(layer.weight, (base.float() + layer.get_delta_weight("default")).to(dtype))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)
    with pytest.raises(ValueError, match="unmerge it first"):
        set_dylora_rank(model, 1)
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(make().to(dtype)))
    unloaded = model.merge_and_unload()
    assert not layers(unloaded)
    torch.testing.assert_close(logits(unloaded), before, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)


def test_safe_merge_refuses_what_is_not_finite():
    model = adapted()
    layer = next(iter(layers(model).values()))
    layer.dylora_B["default"].weight.data[0, 0] = torch.inf
    before = layer.weight.clone()
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.weight, before) and not layer.merged


def test_a_saved_adapter_evaluates_at_the_rank_that_was_set(tmp_path):
    model = adapted()
    full = logits(model)
    set_dylora_rank(model, 2)
    expected = logits(model)
    assert (full - expected).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    evaluate_dylora_ranks(model, logits)
    assert model.peft_config["default"].eval_rank == 2
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected)
    set_dylora_rank(loaded, None)
    torch.testing.assert_close(logits(loaded), full)
    loaded.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path).eval()), full)


def test_the_rank_in_a_config_is_each_adapters_own(tmp_path):
    shared = config(r=4)
    model = get_peft_model(llama(), shared)
    model.add_adapter("same", shared)
    model.add_adapter("less", config(r=2))
    set_dylora_rank(nn.Sequential(model), 3)
    assert [model.peft_config[name].eval_rank for name in ("default", "same", "less")] == [3, 3, 2]
    set_dylora_rank(model, 1, adapter_name="default")
    assert [model.peft_config[name].eval_rank for name in ("default", "same", "less")] == [1, 3, 2]
    assert shared.eval_rank is None
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "less")
    assert {state.dylora_ranks["default"].eval_value for state in layers(loaded).values()} == {2}
    copy_adapter(model, "default", "same")
    assert model.peft_config["same"].eval_rank == 1 and shared.eval_rank is None
    with pytest.raises(ValueError, match=r"eval_rank must be in 1\.\.4, got 5"):
        config(r=4, eval_rank=5)


def test_ranks_are_not_evaluated_of_what_was_merged_meanwhile():
    model = adapted()
    with pytest.raises(ValueError, match="evaluate_dylora_ranks: the adapter is merged"):
        evaluate_dylora_ranks(model, lambda model: model.merge_adapter())
    assert {state.dylora_ranks["default"].eval_value for state in layers(model).values()} == {R}


def test_several_adapters():
    model = adapted()
    first = logits(model)
    model.add_adapter("second", config(target_modules=["q_proj", "v_proj"], r=2, lora_alpha=ALPHA))
    assert not any(p.requires_grad for name, p in model.named_parameters() if "second" in name)
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    expected = by_hand(by_hand(llama(), model, R), model, 2, "second")
    torch.testing.assert_close(both, logits(expected))
    weights = {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    set_dylora_rank(model, 1, adapter_name="second")
    ranks = {(n, s.eval_value) for layer in layers(model).values() for n, s in layer.dylora_ranks.items()}
    assert ranks == {("default", R), ("second", 1)}
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("default")
    assert model.active_adapters == ["second"] and not any("default" in name for name, _ in model.named_modules())
    set_dylora_rank(model, None)
    torch.testing.assert_close(logits(model), second)


def test_convert_to_lora_takes_the_evaluation_rank():
    model = adapted()
    set_dylora_rank(model, 2)
    lora_config, state = convert_to_lora(model, 2)
    lora = get_peft_model(llama(), lora_config).eval()
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(logits(lora), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_independent(copied):
    model = adapted()
    set_dylora_rank(model, 2)
    other = copied(model)
    assert torch.equal(logits(other), logits(model))
    set_dylora_rank(other, 1)
    assert not torch.equal(logits(other), logits(model))


class Doubled(nn.Linear):
    """Stands for a layer whose weight must not be read, such as a quantised one."""

    def forward(self, x):
        return 2 * super().forward(x)


class FakeInt8(nn.Linear):
    """A quantised layer: rounding its weight again does not give back the weight it had."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.store(self.weight.data)

    def store(self, weight):
        self.step = weight.abs().max() / 127
        self.weight = nn.Parameter((weight / self.step).round().to(torch.int8), requires_grad=False)

    def dense(self):
        return self.weight * self.step

    def forward(self, x):
        return nn.functional.linear(x, self.dense(), self.bias)


class FakeBackend(QuantizationBackend):
    layer_type = "linear"

    def get_base_weight(self, base_layer):
        return base_layer.dense()

    def set_base_weight(self, peft_layer, weight_data):
        peft_layer.get_base_layer().store(weight_data)


def test_quantised_bases_merge_and_unmerge_exactly(monkeypatch):
    backend = lambda module, **_: FakeBackend() if isinstance(module, FakeInt8) else None  # noqa: E731
    monkeypatch.setattr(tuner, "resolve_quantization_backend", backend)
    model = nn.Sequential(FakeInt8(6, 5))
    base, x = model[0], torch.randn(3, 6)
    weight, step = base.weight.clone(), base.step.clone()
    peft_model = get_peft_model(model, DyLoraConfig(target_modules=["0"], r=2, init_weights=False)).eval()
    layer = peft_model.base_model.model[0]
    expected = peft_model(x)
    torch.testing.assert_close(expected, base(x) + x @ layer.get_delta_weight("default").T)
    layer.merge()
    assert not torch.equal(layer.base_layer.dense(), base.dense())
    torch.testing.assert_close(peft_model(x), expected, rtol=0, atol=0.1)
    layer.unmerge()
    assert layer.base_layer is base and torch.equal(base.weight, weight) and torch.equal(base.step, step)
    assert torch.equal(peft_model(x), expected)


def test_a_replaced_forward_of_the_base_is_called():
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), DyLoraConfig(target_modules=["0"], r=2, init_weights=False))
    base = model.base_model.model[0].base_layer
    x, plain = torch.randn(3, 6), base.forward
    before = model(x)
    base.forward = lambda x: plain(x) + 1
    torch.testing.assert_close(model(x), before + 1)


def test_opaque_bases_are_called_not_read():
    model = nn.Sequential(Doubled(6, 5), nn.Linear(5, 4), nn.Linear(4, 4))
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 6)
    h = 2 * nn.functional.linear(x, model[0].weight, model[0].bias)
    peft_model = get_peft_model(model, DyLoraConfig(target_modules=["0", "1", "2"], r=2, init_weights=False)).eval()
    delta = lambda i: peft_model.base_model.model[i].get_delta_weight("default")  # noqa: E731
    h = h + x @ delta(0).T
    h = model[1].base_layer(h) + h @ delta(1).T
    calls.clear()
    torch.testing.assert_close(peft_model(x), model[2].base_layer(h) + h @ delta(2).T)
    assert len(calls) == 1
    paths = [path for _, path, _ in explain(peft_model).lines]
    ops = [path.split(" -> ")[0] for path in paths]
    assert ops == ["base layer, then lowrank added to it"] * 2 + ["lowrank_linear"]
    assert "Doubled" in str(explain(peft_model)) and "hooks" in str(explain(peft_model))


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast(base_dtype):
    model = adapted(llama(dtype=base_dtype)).train()
    on_step(model, step=0)
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS, labels=IDS).loss.backward()
    expected = by_hand(llama(), model, drawn(model))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=0, atol=0.1)
    assert all(layer.dylora_A["default"].weight.grad.dtype == torch.float32 for layer in layers(model).values())


def test_sequence_classification_and_ranks_of_a_whole_model():
    model = adapted(llama(LlamaForSequenceClassification), task_type=TaskType.SEQ_CLS)
    results = evaluate_dylora_ranks(model, lambda m: logits(m))
    assert list(results) == [1, 2, 3, 4] and not torch.equal(results[1], results[4])
    assert torch.equal(logits(model), results[4])


def test_one_adapter_per_sample_is_refused_not_ignored():
    model = adapted()
    with pytest.raises(NotImplementedError, match="adapter_names"):
        model(IDS, adapter_names=["default", "__base__"])


@pytest.mark.parametrize(
    ("model", "targets"), [(nn.Sequential(nn.Embedding(4, 4)), ["0"]), (nn.MultiheadAttention(4, 2), ["out_proj"])]
)
def test_targets_without_effect_are_refused(model, targets):
    with pytest.raises(TypeError, match="target module"):
        get_peft_model(nn.ModuleDict({"m": model}), DyLoraConfig(target_modules=targets))


def test_registration_is_idempotent_and_yields_to_peft(monkeypatch):
    register(REGISTERED["dylora"])
    assert PEFT_TYPE_TO_TUNER_MAPPING["DYLORA"] is DyLoraModel
    monkeypatch.setitem(PEFT_TYPE_TO_TUNER_MAPPING, "DYLORA", PEFT_TYPE_TO_TUNER_MAPPING["LORA"])
    with pytest.raises(RuntimeError, match="has a method DYLORA of its own"):
        register(REGISTERED["dylora"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, r"r must be in 1\.\.256, got 0"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha must be finite"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout must be in"),
        ({"bias": "lora_only"}, ValueError, "bias must be one of 'none', 'all', 'dylora_only'"),
        ({"rank_pattern": {"q_proj": 0}}, ValueError, r"rank_pattern\['q_proj'\] must be in"),
        ({"r_min": 3, "rank_pattern": {"q_proj": 2}}, ValueError, r"r_min must be in 1\.\.r = 1\.\.2, got 3"),
        ({"resample": "epoch"}, ValueError, "resample must be one of"),
        ({"trainable_token_indices": [1]}, ValueError, "trainable_token_indices must be None"),
        ({"target_modules": "q.*", "layers_to_transform": [0]}, ValueError, "layers_to_transform must be None"),
        ({"layers_pattern": "layers"}, ValueError, "layers_pattern must have layers_to_transform beside it"),
    ],
)
def test_bad_configs_are_named(options, error, message):
    with pytest.raises(error, match=message):
        config(**options)


def test_compiles_once_for_all_ranks_and_steps():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config(target_modules=["0"]))
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    layer, x = model.base_model.model[0], torch.ones(2, 6)
    seen = set()
    for step in range(12):
        on_step(model, step=step)
        A, B, b = layer.dylora_A["default"].weight, layer.dylora_B["default"].weight, drawn(model)
        torch.testing.assert_close(compiled(x), layer.base_layer(x) + ALPHA / b * x @ A[:b].T @ B[:, :b].T)
        seen.add(b)
    assert len(compilations) == 1 and len(seen) == R
