import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
)
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTModel,
)

from peft_fused.integrations.peft import SurmConfig, export_lora
from peft_fused.integrations.peft.surm import SurmPeftLinear
from peft_fused.ops.dispatch import explain

IDS = torch.arange(20).reshape(2, 10)
LLAMA = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, pad_token_id=0, attention_bias=True,
)  # fmt: skip
SQUARE = ["q_proj", "o_proj"]
TARGETS = ["q_proj", "v_proj", "down_proj"]  # 16 x 16, 8 x 16, 16 x 24
FORMS = {
    "circulant": {},
    "circulant, one vector": {"product": False},
    "blocks": {"rectangular": "block", "block_size": 4},
    "toeplitz": {"structure": "toeplitz"},
    "symmetric": {"structure": "symmetric_toeplitz", "target_modules": SQUARE},
    "kronecker": {"structure": "kronecker"},
    "kronecker, r = 4": {"structure": "kronecker", "r": 4},
    "ldr": {"structure": "ldr", "q": 2, "target_modules": SQUARE},
}


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    return LlamaForCausalLM(LLAMA).to(dtype).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def config(form="circulant", **options):
    return SurmConfig(**{"target_modules": TARGETS, "surm_alpha": 2.0, **FORMS[form], **options})


def randomized(model):
    """The model with adapters that change something; the structured start is too small to tell rounding from."""
    torch.manual_seed(1)
    for layer in layers(model).values():
        for block in layer.surm_block.values():
            for parameter in block.parameters():
                nn.init.normal_(parameter, std=0.3)
    return model


def adapted(base=None, form="circulant", **options):
    return randomized(get_peft_model(llama() if base is None else base, config(form, **options)).eval())


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, SurmPeftLinear)}


def by_hand(base, model, *names):
    """The base model with the scaled dense matrices added to its weights."""
    for name, layer in layers(model).items():
        for adapter in names or ("default",):
            if adapter in layer.surm_block:
                block = layer.surm_block[adapter]
                assert block.scale == (2.0 / block.map.r if block.map.structure == "kronecker" else 2.0)
                weight = base.get_submodule(name.removeprefix("base_model.model.")).weight
                delta = block.scale * block.map.delta()
                weight.data += delta.T if layer.transposed else delta
    return base


@pytest.mark.parametrize("form", FORMS)
def test_forward_equals_the_dense_formula(form):
    model = adapted(form=form)
    torch.testing.assert_close(logits(model), logits(by_hand(llama(), model)))
    assert (logits(model) - logits(llama())).abs().max() > 1e-2


@pytest.mark.parametrize("form", ["circulant", "toeplitz", "kronecker", "blocks"])
def test_conv1d_is_a_transposed_linear(form):
    model = adapted(gpt2(), form, target_modules=["c_attn", "c_proj", "c_fc"])
    before = logits(model)
    torch.testing.assert_close(before, logits(by_hand(gpt2(), model)))
    torch.testing.assert_close(logits(model.merge_and_unload()), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_only_the_adapter_is_trainable_and_starts_as_nothing(form, kind):
    model = get_peft_model(llama(), config(form, kind=kind)).eval()
    assert {name.split(".surm_block.")[0] for name, p in model.named_parameters() if p.requires_grad} == set(
        layers(model)
    )
    assert torch.equal(logits(model), logits(llama()))
    model(IDS, labels=IDS).loss.backward()
    for layer in layers(model).values():
        block = layer.surm_block["default"]
        assert all(getattr(block.map, name).grad.any() for name in block.map.zeros)
    random = get_peft_model(llama(), config(form, kind=kind, init_weights=False)).eval()
    assert not torch.equal(logits(random), logits(llama()))


@pytest.mark.parametrize("structure", ["circulant", "toeplitz", "kronecker", "ldr"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_adapter_kind_reads_the_output_of_its_layer(structure, make):
    targets = ["o_proj", "down_proj"] if make is llama else ["c_proj"]
    options = dict(structure=structure, kind="adapter", activation="silu", surm_alpha=None)
    model = randomized(get_peft_model(make(), SurmConfig(target_modules=targets, **options)).eval())
    expected = make()
    for name, layer in layers(model).items():
        block, target = layer.surm_block["default"], expected.get_submodule(name.removeprefix("base_model.model."))

        def insert(module, inputs, h, block=block):
            return h + nn.functional.silu(h @ block.map.delta().T) + block.beta

        target.register_forward_hook(insert)
    torch.testing.assert_close(logits(model), logits(expected))
    assert (logits(model) - logits(make())).abs().max() > 1e-2


DEFAULTS = [
    (lambda: llama(), ["o_proj", "down_proj"], 4),
    (lambda: gpt2(), ["c_proj"], 2),
    (lambda: bert(), ["attention.output.dense", "0.output.dense"], 2),
    (lambda: DistilBertModel(DistilBertConfig(vocab_size=9, dim=8, n_layers=1, n_heads=1)), ["out_lin", "lin2"], 2),
    (
        lambda: ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=12)),
        ["o_proj", "fc2", "attention.output.dense", "0.output.dense"], 2,
    ),
]  # fmt: skip


def bert(layers=1, **sizes):
    tiny = dict(hidden_size=8, num_attention_heads=2, intermediate_size=12)
    return BertForSequenceClassification(BertConfig(vocab_size=40, num_hidden_layers=layers, **{**tiny, **sizes}))


@pytest.mark.parametrize(("make", "ends", "count"), DEFAULTS)
def test_default_targets_of_the_adapter_kind(make, ends, count):
    found = layers(get_peft_model(make(), SurmConfig(kind="adapter")))
    assert len(found) == count and all(name.endswith(tuple(ends)) for name in found)


def test_default_targets_of_the_lora_kind_are_those_of_lora():
    found, others = get_peft_model(llama(), SurmConfig()), get_peft_model(llama(), LoraConfig())
    assert list(layers(found)) == [name for name, m in others.named_modules() if hasattr(m, "lora_A")]
    unknown = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"target_modules must be given for kind='adapter'.*llama"):
        get_peft_model(unknown, SurmConfig(kind="adapter"))


# Of BERT-base, 12 layers of 768 x 768, without the head: methods as published, all by arithmetic.
COUNTS = [
    (dict(kind="adapter"), 55_296),
    (dict(kind="adapter", product=False), 36_864),
    (dict(target_modules=["query", "value"], product=False), 18_432),
    (dict(target_modules=["query", "value"]), 36_864),
    (dict(target_modules=["query", "value"], structure="symmetric_toeplitz"), 36_864),
    (dict(target_modules=["query", "key", "value"]), 55_296),
    (dict(target_modules=["intermediate.dense"], structure="toeplitz"), 12 * (768 + 3072 - 1)),
    *((dict(target_modules=["intermediate.dense"], structure="kronecker", r=r), 12 * 3840) for r in (None, 8, 24, 256)),
    (dict(target_modules=["query", "value"], structure="ldr", q=2), 24 * 4 * 768),
]


@pytest.mark.parametrize(("options", "count"), COUNTS)
def test_parameter_counts_are_the_published_ones(options, count):
    with torch.device("meta"):
        base = bert(12, hidden_size=768, num_attention_heads=12, intermediate_size=3072)
        model = get_peft_model(base, SurmConfig(**options))
    assert model.get_nb_trainable_parameters()[0] == count


def test_training_gradients_are_those_of_the_dense_formula():
    model = adapted().train()
    model(IDS, labels=IDS).loss.backward()
    dense = by_hand(llama(), model).train()
    dense(IDS, labels=IDS).loss.backward()
    for name, layer in layers(model).items():
        m = layer.surm_block["default"].map
        weight = dense.get_submodule(name.removeprefix("base_model.model.")).weight
        expected = torch.autograd.grad(2.0 * m.delta(), [m.a, m.b], weight.grad)
        torch.testing.assert_close([m.a.grad, m.b.grad], list(expected))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_structure_merges_exactly(form, dtype):
    model = adapted(llama(dtype), form)
    before, weights = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter(safe_merge=True)
    for name, layer in layers(model).items():
        base = weights[f"{name}.base_layer.weight"]
        assert torch.equal(layer.weight, (base.float() + layer.get_delta_weight("default")).to(dtype))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


def test_merging_the_adapter_kind_is_refused_before_anything_has_changed():
    model = adapted()
    model.add_adapter("block", config(kind="adapter", target_modules=["down_proj"]))
    randomized(model).base_model.set_adapter(["default", "block"])
    before, weights = logits(model), {name: p.clone() for name, p in model.named_parameters()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="'block' is of kind 'adapter' and cannot be merged: its non-linear block"):
            merge()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert torch.equal(logits(model), before)
    with pytest.raises(ValueError, match="cannot be merged"):
        next(m for name, m in layers(model).items() if "down_proj" in name).merge(adapter_names=["block"])
    model.merge_adapter(["default"])
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(model, 2, adapter_name="block")
    assert torch.equal(logits(model.unload()), logits(llama()))


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_the_file_has_the_vectors_by_name(tmp_path, kind):
    adapted(kind=kind).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    ends = {key.split(".surm_block.")[1] for key in stored}
    assert ends == {"map.a", "map.b"} | ({"beta"} if kind == "adapter" else set())


@pytest.mark.parametrize("form", FORMS)
def test_every_structure_travels(tmp_path, form):
    model = adapted(form=form)
    model.save_pretrained(tmp_path)
    # Trainable as the model is: torch.matmul, on which the Kronecker map runs, orders its sums by whether a factor is.
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).eval()
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("form", "options", "message"),
    [
        (
            "ldr",
            {"target_modules": TARGETS},
            r"target module 'model.layers.0.self_attn.v_proj': .*'ldr' must be on a sq",
        ),
        (
            "kronecker",
            {"r": 3},
            r"target module 'model.layers.0.self_attn.q_proj': r must divide in_features = 16 and ",
        ),
        ("blocks", {"block_size": 16}, r"target module '.*v_proj': block_size must divide .*out_features = 8, got 16"),
    ],
)
def test_options_that_do_not_fit_a_layer_name_it_and_leave_nothing_behind(form, options, message):
    base = llama()
    names = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config(form, **options))
    assert names == {name: type(module) for name, module in base.named_modules()}
    assert all(p.requires_grad for p in base.parameters())
    model = adapted()
    names = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", config(form, **options))
    assert names == {name: type(module) for name, module in model.named_modules()}
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"structure": "hankel"}, ValueError, "structure must be one of"),
        ({"kind": "prefix"}, ValueError, "kind must be one of 'lora', 'adapter'"),
        ({"structure": "ldr", "q": 0}, ValueError, "q must be at least 1"),
        ({"structure": "toeplitz", "r": 4}, ValueError, "r is an option of 'kronecker', got 4 with 'toeplitz'"),
        ({"surm_alpha": float("inf")}, ValueError, "surm_alpha must be finite"),
        ({"surm_dropout": 1.0}, ValueError, "surm_dropout must be in"),
        ({"activation": "relu"}, ValueError, "activation is an option of kind='adapter', got 'relu'"),
        ({"kind": "adapter", "activation": "sigmoid"}, ValueError, "activation must be 0 at 0"),
        ({"kind": "adapter", "activation": nn.GELU()}, TypeError, "activation must be the name of one"),
        ({"bias": "lora_only"}, ValueError, "bias must be one of 'none', 'all', 'surm_only'"),
        ({"init_weights": 1}, TypeError, "init_weights must be True or False"),
        ({"trainable_token_indices": [1]}, ValueError, "trainable_token_indices must be None"),
    ],
)
def test_bad_configs_are_named(options, error, message):
    with pytest.raises(error, match=message):
        SurmConfig(**{"target_modules": ["q_proj"], **options})


def test_explain_names_what_runs():
    model = adapted()
    model.add_adapter("block", SurmConfig(kind="adapter", target_modules=["down_proj"]))
    lines = {name.split(".")[-1]: path for name, path, _ in explain(model, rows=64).lines}
    assert lines["q_proj"].startswith("base layer, then circulant added to it -> torch: ")
    model.set_adapter("block")
    lines = {name.split(".")[-1]: path for name, path, _ in explain(model, rows=64).lines}
    assert lines["down_proj"].startswith("base layer, then circulant, activation and bias on its output -> torch: ")
    assert lines["q_proj"] == "base layer" and "not active in this layer" in str(explain(model))
    layer = next(m for name, m in layers(model).items() if "down_proj" in name)
    problem = layer.explain_route(64)[2]
    assert (problem.m, problem.k, problem.n) == (64, 16, 16)  # of the output, the layer itself has 24 inputs
    with model.disable_adapter():
        assert all(path == "base layer" for _, path, _ in explain(model).lines)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("form", ["circulant", "kronecker, r = 4"])
def test_export_lora_of_every_rank_and_its_error(tmp_path, make, form):
    targets = TARGETS if make is llama else ["c_attn", "c_proj"]
    model = adapted(make(), form, target_modules=targets)
    expected, errors = logits(model), []
    for rank in (1, 4, 16):
        error = export_lora(model, tmp_path / str(rank), rank=rank)
        loaded = PeftModel.from_pretrained(make(), tmp_path / str(rank)).eval()
        worst = 0.0
        for name, layer in layers(model).items():
            lora, delta = loaded.get_submodule(name).get_delta_weight("default"), layer.get_delta_weight("default")
            best = torch.linalg.svdvals(delta)[rank:].norm() / delta.norm()
            torch.testing.assert_close((lora - delta).norm() / delta.norm(), best, rtol=0, atol=1e-5)
            worst = max(worst, best.item())
        assert error == pytest.approx(worst, abs=1e-5)
        errors.append((logits(loaded) - expected).abs().max().item())
    assert errors[0] > 1e-3 and errors[-1] < 1e-5
    untrained = get_peft_model(make(), config(form, target_modules=targets))
    assert export_lora(untrained, tmp_path / "zero", rank=1) == 0.0
    with pytest.raises(ValueError, match=r"rank must be given for a SURM adapter, 1\.\.16"):
        export_lora(model, tmp_path / "none")
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.16, got 17"):
        export_lora(model, tmp_path / "none", rank=17)
    assert not (tmp_path / "none").exists()
