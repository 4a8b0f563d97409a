import copy
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version

import contract
import pytest
import torch
from packaging.version import Version
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from transformers.integrations.peft import MIN_PEFT_VERSION

from peft_fused.integrations.peft import (
    DyLoraConfig,
    export,
    export_lora,
)
from peft_fused.integrations.peft.dylora import DyLoraPeftLinear
from peft_fused.integrations.peft.registration import REGISTERED
from peft_fused.methods import on_step, set_dylora_rank

R, ALPHA = 4, 6.0
LLAMA = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, pad_token_id=0, attention_bias=True,
)  # fmt: skip


MLP_BIAS = LlamaConfig(**{**LLAMA.to_dict(), "mlp_bias": True})


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LLAMA).eval()


def adapted(base=None, **options):
    defaults = dict(r=R, lora_alpha=ALPHA, target_modules=["q_proj", "down_proj"], init_weights=False)
    return get_peft_model(llama() if base is None else base, DyLoraConfig(**{**defaults, **options})).eval()


@torch.no_grad()
def logits(model):
    return model(torch.arange(20).reshape(2, 10)).logits


def layers(model):
    return [module for module in model.modules() if isinstance(module, DyLoraPeftLinear)]


@pytest.mark.parametrize("name", REGISTERED)
def test_the_card_says_the_method_and_the_import(tmp_path, name):
    method, config = name.upper(), REGISTERED[name].config(target_modules=["down_proj"])
    get_peft_model(llama(), config, adapter_name="default").save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n") and "library_name: peft" in card and card.count("import peft_fused\n") == 1
    assert f"the method {method}, `peft_fused.{type(config).__name__}`" in card
    after = card.split("## How to Get Started with the Model")[1]
    assert (
        after.split("##")[0].strip().startswith("Use the code below") and "More Information" not in after.split("##")[0]
    )
    # The next one saved there is described in its place, whoever has written the card.
    for text in (card, "# My model\n"):
        (tmp_path / "README.md").write_text(text)
        adapted().save_pretrained(tmp_path)
        card = (tmp_path / "README.md").read_text()
        assert "the method DYLORA" in card and card.count("import peft_fused\n") == card.count("KeyError") == 1
    assert card.startswith("---") and "# My model" in card
    assert not list(tmp_path.glob("*.part"))


def test_an_adapter_of_another_name_has_its_own_card(tmp_path):
    get_peft_model(llama(), DyLoraConfig(r=2, target_modules=["q_proj"]), adapter_name="other").save_pretrained(
        tmp_path
    )
    card = (tmp_path / "other" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n---\n") and "the method DYLORA" in card


def test_what_the_card_says_is_true(tmp_path):
    """In a process that knows nothing but the folder: without the import PEFT ends in a KeyError."""
    adapted().save_pretrained(tmp_path / "adapter")
    llama().save_pretrained(tmp_path / "base")
    (said,) = re.findall(r"```python\n(.*?)```", (tmp_path / "adapter" / "README.md").read_text(), re.DOTALL)
    code = (
        "from transformers import AutoModelForCausalLM\n"
        f"base_model, folder = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'base')!r}), "
        f"{str(tmp_path / 'adapter')!r}\n"
    )

    def python(text):
        return subprocess.run([sys.executable, "-c", code + text], capture_output=True, text=True)

    done = python(said + "print(model.peft_config['default'].peft_type.value)")
    assert done.stdout == "DYLORA\n", done.stderr
    assert "KeyError: 'DYLORA'" in python(said.replace("import peft_fused\n", "")).stderr


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load_are_bit_equal(tmp_path, low_cpu_mem_usage):
    model = adapted(rank_pattern={"down_proj": 2}, r_min=2, seed=5, rank_distribution="geometric")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.split(".")[-2] for key in stored} == {"dylora_A", "dylora_B"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "DYLORA"
    loaded = PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert (loaded.peft_config["default"].policy(), loaded.peft_config["default"].rank_pattern) == (
        model.peft_config["default"].policy(), {"down_proj": 2},
    )  # fmt: skip
    for b in range(1, R + 1):
        set_dylora_rank(model, b)
        set_dylora_rank(loaded, b)
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("variant", contract.only(lambda v: "target_modules" not in v.options), ids=str)
def test_transformers_and_auto_classes_load_it(tmp_path, variant):
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    config = variant.config(target_modules=["q_proj", "down_proj"], init_weights=False)
    model = altered(get_peft_model(base, config).eval())
    model.save_pretrained(tmp_path / "adapter")
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(auto), logits(model))
    native = llama()
    native.load_adapter(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(native), logits(model))
    if variant.additive:
        exported(native, tmp_path / "lora", 16)
        lora = PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
        torch.testing.assert_close(logits(lora), logits(native), rtol=0, atol=1e-4)


@pytest.mark.skipif(
    Version(version("peft")) < Version(MIN_PEFT_VERSION),
    reason="this transformers asks for a newer PEFT than this one in all but load_adapter",
)
def test_transformers_switches_it_and_adds_it(tmp_path, variant):
    model = contract.midway(variant)
    model.save_pretrained(tmp_path)
    native, plain = contract.net(), contract.logits(contract.net())
    native.load_adapter(str(tmp_path))
    native.disable_adapters()
    assert torch.equal(contract.logits(native), plain)
    native.enable_adapters()
    torch.testing.assert_close(contract.logits(native), contract.logits(model))
    fresh = contract.net()
    fresh.add_adapter(variant.config())
    torch.testing.assert_close(contract.logits(fresh), plain, rtol=0, atol=1e-6)
    contract.train(fresh, 5)
    trained = contract.logits(fresh)
    assert (trained - plain).abs().max() > 1e-3
    fresh.disable_adapters()
    assert torch.equal(contract.logits(fresh), plain)
    fresh.enable_adapters()
    assert torch.equal(contract.logits(fresh), trained)


LOAD_IN_PLAIN_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder + "/base"), folder + "/lora").eval()
torch.save(model(torch.arange(20).reshape(2, 10)).logits, folder + "/logits.pt")
assert not [name for name in sys.modules if name.startswith("peft_fused")]
"""


def test_exported_lora_needs_only_peft(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    options = dict(rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 3.0})
    model = adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base"), **options)
    export_lora(model, tmp_path / "lora", rank=3)
    subprocess.run([sys.executable, "-c", LOAD_IN_PLAIN_PEFT, str(tmp_path)], check=True, cwd=tmp_path)
    stored = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (stored["peft_type"], stored["r"], stored["lora_alpha"]) == ("LORA", 3, ALPHA)
    set_dylora_rank(model, 3)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model), rtol=0, atol=1e-6)


def test_export_of_ranks_above_r(tmp_path):
    """With a rank_pattern beyond r, the layers that have r keep it."""
    model = adapted(rank_pattern={"q_proj": 8})
    for b in (3, 4, 6, 8):
        export_lora(model, tmp_path / str(b), rank=b)
        set_dylora_rank(model, b)
        loaded = PeftModel.from_pretrained(llama(), tmp_path / str(b))
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


def test_sharded_models_are_exported_whole(tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = adapted()
        expected = logits(model)
        for layer in model.base_model.model.model.layers:
            fully_shard(layer, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        export_lora(model, tmp_path)
        strict = adapted(strict_frozen=True, frozen=True)
        fully_shard(strict, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.SGD([p for p in strict.parameters() if p.requires_grad])
        with pytest.raises(ValueError, match="sharded parameters"):
            on_step(strict, step=0, optimizer=optimizer)
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path)), expected, rtol=0, atol=1e-6)


def test_export_arguments_are_checked(tmp_path):
    model = adapted()
    for wrong, message in (
        (dict(model="x"), "model must be a torch.nn.Module, got str"),
        (dict(path=5), "path must be a str or os.PathLike, got int"),
        (dict(adapter_name=["default"]), "adapter_name must be a str or None, got list"),
    ):
        with pytest.raises(TypeError, match=message):
            export_lora(**{"model": model, "path": tmp_path, **wrong})
    with pytest.raises(ValueError, match=r"rank must be in 1\.\.4, got 5"):
        export_lora(model, tmp_path, rank=5)
    with pytest.raises(ValueError, match="adapter_name must be one of"):
        export_lora(model, tmp_path, adapter_name="other")
    with pytest.raises(ValueError, match="no peft_fused adapter"):
        export_lora(llama(), tmp_path)
    assert not list(tmp_path.iterdir())


def damage(folder, what, variant):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name, prefix = variant.method.name, variant.method.tuner.prefix
    key = next(key for key in tensors if f".{prefix}" in key and "_extra_state" not in key)
    layer, container, rest = key.partition(f".{prefix}")[0], *key.partition(f".{prefix}")[2].split(".", 1)
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        return
    if what == "missing":
        del tensors[key]
    elif what == "shape":
        tensors[key] = torch.zeros(5)
    elif what == "foreign":
        tensors = {each.replace(prefix, "lora_"): tensor for each, tensor in tensors.items()}
    elif what == "empty":
        tensors = {}
    elif what == "integers":
        tensors[key] = tensors[key].int()
    elif what == "not finite":
        tensors[key][0] = torch.nan
    elif what == "base weight":
        tensors[f"{layer}.base_layer.weight"] = torch.ones(12, 12)
    elif what == "twice":
        tensors[f"{layer}.{prefix}{container}.default.{rest}"] = tensors[key].clone()
    elif what == "no state":
        tensors = {each: tensor for each, tensor in tensors.items() if f"{name}_state" not in each}
    elif what == "no state of a layer":
        del tensors[next(each for each in reversed(tensors) if f"{name}_state" in each)]
    elif what == "other state":
        tensors[f"{layer}.{name}_state.progress"] = torch.zeros(3)
    save_file(tensors, path)


MESSAGES = {
    "truncated": "not a complete safetensors",
    "missing": "1 missing",
    "shape": r"1 of another shape.*\[5\] in the file",
    "foreign": r"\d+ missing.*\d+ unexpected",
    "empty": "no tensors",
    "integers": r"1 of another type: .*: torch.int32 in the file, torch.float32 in the model",
    "not finite": "1 not finite",
    "base weight": r"1 unexpected: .*base_layer\.weight",
    "twice": "twice|1 unexpected",
}
STATES = {
    "no state": r"nothing was loaded\. \w+_state of '.*' is missing",
    "no state of a layer": r"nothing was loaded\. \w+_state of '.*' is missing",
    "other state": r"1 unexpected: .*_state\.progress|must not have",
}
DAMAGED = [
    pytest.param(variant, what, message, id=f"{variant}-{what}")
    for variant in contract.VARIANTS
    for what, message in (MESSAGES | (STATES if variant.method.tuner.tuner_layer_cls.state_names else {})).items()
]


@pytest.mark.parametrize(("variant", "what", "message"), DAMAGED)
def test_a_damaged_checkpoint_is_refused_as_a_whole(tmp_path, variant, what, message):
    contract.midway(variant, init_weights=True).save_pretrained(tmp_path)
    damage(tmp_path, what, variant)
    base = contract.net()
    given = [{}]
    if what not in ("truncated", "empty"):  # of which reading the config says so
        given += [{"config": PeftConfig.from_pretrained(tmp_path)}]
    for options in given:
        with contract.unchanged(base), pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, tmp_path, **options)
    other = contract.train(contract.adapted(variant), 3)
    expected = contract.logits(other)
    with contract.unchanged(other):
        with pytest.raises(ValueError, match=message):
            other.load_adapter(tmp_path, "other", is_trainable=True)
        # Into an adapter that exists PEFT reads the file without its config; a torn one fails in safetensors itself.
        if what != "integers":
            with pytest.raises((SafetensorError, ValueError), match=f"{message}|deserializing|missing"):
                other.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(contract.logits(other), expected)


@pytest.mark.parametrize("foreign", ["lora", *REGISTERED])
def test_another_method_is_refused(tmp_path, variant, foreign):
    if foreign == variant.method.name:
        return
    options = dict(target_modules=["first"])
    config = LoraConfig(**options) if foreign == "lora" else REGISTERED[foreign].config(**options)
    get_peft_model(contract.net(), config).save_pretrained(tmp_path)
    model = contract.midway(variant)
    with contract.unchanged(model):
        with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
            model.load_adapter(tmp_path, "other")
        with pytest.raises(ValueError, match=r"missing|unexpected"):
            model.load_adapter(tmp_path, "default")


def altered(model):
    """All that trains, as training leaves it."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += torch.randn_like(p) / 16
    return model


@pytest.mark.parametrize("bias", ["all", "only"])
def test_modules_to_save_and_biases_travel(tmp_path, variant, bias):
    bias = "all" if bias == "all" else f"{variant.method.name}_only"
    model = altered(contract.adapted(variant, modules_to_save=["head"], bias=bias))
    trainable = contract.trainable(model)
    assert any("head" in name for name in trainable) and any("base_layer.bias" in name for name in trainable)
    assert any("last.bias" in name for name in trainable) == (bias == "all")
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        contract.logits(PeftModel.from_pretrained(contract.net(), tmp_path).eval()), contract.logits(model)
    )


def exported(model, folder, full_rank):
    """By export_lora, exactly: a method that has no rank of its own wants one."""
    try:
        return export_lora(model, folder)
    except ValueError as error:
        assert "rank must be given" in str(error)
        return export_lora(model, folder, rank=full_rank)


@pytest.mark.parametrize("bias", ["all", "only"])
def test_exports_to_lora(tmp_path, additive, bias):
    bias, stored_bias = ("all", "all") if bias == "all" else (f"{additive.method.name}_only", "lora_only")
    model = contract.train(contract.adapted(additive, modules_to_save=["head"], bias=bias), 1)
    error = exported(model, tmp_path, contract.WIDTH)
    assert error is None or error < 1e-5
    lora = PeftModel.from_pretrained(contract.net(), tmp_path).eval()
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert isinstance(lora.peft_config["default"], LoraConfig)
    assert (stored["peft_type"], stored["bias"]) == ("LORA", stored_bias)
    assert not any("_state" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    torch.testing.assert_close(contract.logits(lora), contract.logits(model), rtol=0, atol=1e-5)
    assert (contract.logits(lora) - contract.logits(contract.net())).abs().max() > 1e-2
    with pytest.raises(ValueError, match=r"rank must be (None|in 1\.\.)"):
        export_lora(model, tmp_path / "other", rank=200)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_pefts_own_conversion_to_lora(additive, transposed):
    model = contract.midway(additive, contract.net(transposed=transposed))
    lora_config, state = convert_to_lora(model, contract.WIDTH)
    lora = get_peft_model(contract.net(transposed=transposed), lora_config).eval()
    set_peft_model_state_dict(lora, state)
    torch.testing.assert_close(contract.logits(lora), contract.logits(model), rtol=0, atol=1e-4)


def test_an_adapter_on_the_output_is_not_exported(tmp_path, on_output):
    with pytest.raises(ValueError, match="kind 'adapter', which LoRA cannot express"):
        export_lora(contract.midway(on_output), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def tree(model):
    return {name: type(module) for name, module in model.named_modules()}, {
        name: p.requires_grad for name, p in model.named_parameters()
    }


def test_weights_that_are_missing_or_torn(tmp_path):
    adapted().save_pretrained(tmp_path, safe_serialization=False)
    path = tmp_path / "adapter_model.bin"
    assert layers(PeftModel.from_pretrained(llama(), tmp_path))
    path.write_bytes(path.read_bytes()[:-100])
    base = llama()
    before = tree(base)
    with pytest.raises(ValueError, match=r"adapter_model.bin cannot be read .*nothing was loaded"):
        PeftModel.from_pretrained(base, tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"has neither adapter_model.safetensors nor adapter_model.bin"):
        PeftModel.from_pretrained(base, tmp_path)
    assert tree(base) == before


def test_a_missing_module_to_save_is_refused(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if "lm_head" not in k}, path)
    for target, load in ((llama(), PeftModel.from_pretrained), (adapted(), lambda m, p: m.load_adapter(p, "second"))):
        before = tree(target)
        with pytest.raises(ValueError, match=r"the checkpoint has no .*lm_head.weight; nothing was loaded"):
            load(target, tmp_path)
        assert tree(target) == before


def test_layers_adapted_for_a_refused_checkpoint_are_given_back(tmp_path):
    adapted(target_modules=["k_proj"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)
    model = adapted()
    before = tree(model)
    with pytest.raises(ValueError, match="1 missing"):
        model.load_adapter(tmp_path, "second")
    assert tree(model) == before


def test_a_failing_injection_leaves_the_model_as_it_was():
    base = llama()
    before = tree(base)
    with pytest.raises(TypeError, match="embed_tokens"):
        adapted(base, target_modules=["embed_tokens", "q_proj", "norm"])
    assert tree(base) == before
    model = adapted()
    before = tree(model)
    with pytest.raises(TypeError, match="norm"):
        model.add_adapter("second", DyLoraConfig(target_modules=["k_proj", "norm"]))
    assert tree(model) == before and list(model.peft_config) == ["default"]


def test_every_bias_travels_beside_modules_to_save(tmp_path):
    base = lambda: LlamaForSequenceClassification(LLAMA)  # noqa: E731
    torch.manual_seed(0)
    start = base()
    start.score = torch.nn.Linear(16, 2)
    model = adapted(copy.deepcopy(start), task_type="SEQ_CLS", bias="all")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += torch.randn_like(p) / 4
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(start), tmp_path)), logits(model))


def test_state_dict_helpers_round_trip():
    model = adapted()
    state = {key: torch.randn_like(value) for key, value in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, state)
    assert all(torch.equal(value, state[key]) for key, value in get_peft_model_state_dict(model).items())


def test_an_export_that_is_cut_short_leaves_the_old_one_or_none(tmp_path, monkeypatch):
    model = adapted()
    export_lora(model, tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*arguments, **options):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(export, "save_file", full)
        export_lora(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old

    replace, moved = os.replace, []

    def killed(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(target)
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        export_lora(model, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_model.safetensors"]
    export_lora(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{Q}.base_layer.weight": torch.ones(16, 16)}), f"1 unexpected: {Q}.base_layer.weight"),
        (lambda t: t.update({f"{Q}.weight": torch.ones(16, 16)}), "1 unexpected: .*q_proj.weight"),
        (lambda t: t.pop(f"{Q}.base_layer.bias"), f"1 missing: {Q}.base_layer.bias"),
        (lambda t: t[f"{Q}.base_layer.bias"].fill_(torch.inf), f"1 not finite: {Q}.base_layer.bias"),
        (lambda t: t[f"{Q}.dylora_B.weight"].fill_(torch.nan), "1 not finite: .*q_proj.dylora_B"),
        (lambda t: t["base_model.model.lm_head.weight"].fill_(torch.nan), "1 not finite: .*lm_head"),
        (lambda t: t.update({"lm_head.weight": t.pop("base_model.model.lm_head.weight")}), "has lm_head.weight, which"),
        (lambda t: t.update({f"{Q}.dylora_B.default.weight": torch.ones(16, R)}), "twice|1 unexpected"),
    ],
)
def test_a_checkpoint_holds_an_adapter_and_nothing_else(tmp_path, change, message):
    adapted(modules_to_save=["lm_head"], bias="dylora_only").save_pretrained(tmp_path)
    change_tensors(tmp_path, change)
    for target, load in ((llama(), PeftModel.from_pretrained), (adapted(), lambda m, p: m.load_adapter(p, "second"))):
        before, held = tree(target), copy.deepcopy(target.state_dict())
        with pytest.raises(ValueError, match=message):
            load(target, tmp_path)
        assert tree(target) == before and all(torch.equal(held[k], v) for k, v in target.state_dict().items())
        assert list(getattr(target, "peft_config", {})) == (["default"] if isinstance(target, PeftModel) else [])


@pytest.mark.parametrize(
    ("options", "how"),
    [
        (dict(target_modules=["q_proj"]), dict(save_embedding_layers=True)),
        (dict(target_modules=["q_proj", "lm_head"]), {}),
        (dict(target_modules="all-linear", bias="all"), {}),
        (dict(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"], bias="all"), {}),
    ],
)
def test_whatever_peft_saves_beside_an_adapter_is_let_pass(tmp_path, options, how):
    model = adapted(**options)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += torch.randn_like(p) / 8
    model.save_pretrained(tmp_path, **how)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


@pytest.mark.parametrize("content", [b"", b'{"peft_type": "DYL', b"[]", b"\xff\xfe"])
def test_a_config_that_is_cut_short_is_refused_by_its_name(tmp_path, content):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        DyLoraConfig.from_pretrained(tmp_path)
    base = llama()
    before = tree(base)
    with pytest.raises((ValueError, TypeError)):  # PEFT's own words: it reads the type before it asks for anything
        PeftModel.from_pretrained(base, tmp_path)
    assert tree(base) == before and not hasattr(base, "peft_config")


def test_a_refusal_undoes_what_the_second_adapter_left_in_modules_to_save(tmp_path):
    adapted(modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda t: t.pop(f"{Q}.dylora_A.weight"))
    model = adapted(modules_to_save=["lm_head"])
    wrapper = model.base_model.model.lm_head
    targeted = list(model.base_model.targeted_module_names)
    with pytest.raises(ValueError, match="1 missing"):
        model.load_adapter(tmp_path, "second")
    assert wrapper._adapters == {"default"} and list(wrapper.modules_to_save) == ["default"]
    assert list(model.peft_config) == ["default"] and model.base_model.targeted_module_names == targeted
    adapted(modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "second")
    assert "second" in wrapper.modules_to_save


@pytest.mark.parametrize("variant", contract.only(lambda v: "target_modules" not in v.options), ids=str)
def test_biases_of_modules_saved_whole_load(variant, tmp_path):
    """With bias="all" PEFT saves those of a module in modules_to_save twice, and of one made of several under names
    that the model has."""
    options = dict(target_modules=["q_proj"], modules_to_save=["mlp"], bias="all", init_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(LlamaForCausalLM(MLP_BIAS), variant.config(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM(MLP_BIAS), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model))
