import copy
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from peft_fused.integrations.peft import (
    AdaMixConfig,
    AfLoraConfig,
    DyLoraConfig,
    RosaConfig,
    SurmConfig,
    export,
    export_lora,
)
from peft_fused.integrations.peft.dylora import DyLoraPeftLinear
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


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (DyLoraConfig(r=2, target_modules=["q_proj"]), "DYLORA"),
        (SurmConfig(structure="circulant", target_modules=["o_proj"]), "SURM"),
        (AdaMixConfig(r=2, target_modules=["down_proj"]), "ADAMIX"),
        (AfLoraConfig(r=2, target_modules=["q_proj"]), "AFLORA"),
        (RosaConfig(r=2, target_modules=["q_proj"]), "ROSA"),
    ],
)
def test_the_card_says_the_method_and_the_import(tmp_path, config, method):
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


def test_transformers_and_auto_classes_load_it(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    auto = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(auto), expected)
    native = llama()
    native.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(native), expected)
    set_dylora_rank(native, 1)
    assert not torch.equal(logits(native), expected) and on_step(native, step=0) == 4
    export_lora(native, tmp_path / "lora")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "lora")), logits(native))


def test_modules_to_save_and_biases_travel(tmp_path):
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"], bias="dylora_only")
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("lm_head" in name for name in trainable) and any("q_proj.base_layer.bias" in name for name in trainable)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += torch.randn_like(p) / 4
    model.save_pretrained(tmp_path / "adapter")
    export_lora(model, tmp_path / "lora", rank=R)
    for folder in ("adapter", "lora"):
        loaded = PeftModel.from_pretrained(llama(), tmp_path / folder)
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


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


def damage(folder, what):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if "q_proj.dylora_B" in k)
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        return
    if what == "missing":
        del tensors[key]
    elif what == "shape":
        tensors[key] = torch.zeros(16, R + 1)
    elif what == "foreign":
        tensors = {k.replace("dylora", "lora"): v for k, v in tensors.items()}
    elif what == "empty":
        tensors = {}
    elif what == "integers":
        tensors[key] = tensors[key].int()
    save_file(tensors, path)


MESSAGES = {
    "truncated": "not a complete safetensors",
    "missing": "1 missing",
    "shape": r"1 of another shape.*\[16, 5\] in the file",
    "foreign": "8 missing.*8 unexpected",
    "empty": "no tensors",
    "integers": r"1 of another type: .*dylora_B.*: torch.int32 in the file, torch.float32 in the model",
}


@pytest.mark.parametrize("what", MESSAGES)
def test_a_damaged_checkpoint_is_refused_as_a_whole(tmp_path, what):
    model = adapted()
    model.save_pretrained(tmp_path)
    damage(tmp_path, what)
    base = llama()
    names = {name: p.requires_grad for name, p in base.named_parameters()}
    with pytest.raises(ValueError, match=MESSAGES[what]):
        PeftModel.from_pretrained(base, tmp_path)
    assert names == {name: p.requires_grad for name, p in base.named_parameters()}
    assert not layers(base) and torch.equal(logits(base), logits(llama()))

    other = adapted()
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=MESSAGES[what]):
        other.load_adapter(tmp_path, "second")
    assert list(other.peft_config) == ["default"]
    if what == "integers":
        return
    # Into an adapter that exists PEFT reads the file without its config; the torn one fails in safetensors itself.
    torn = what == "truncated"
    message = "deserializing" if torn else "missing|of another shape"
    with pytest.raises(SafetensorError if torn else ValueError, match=message):
        other.load_adapter(tmp_path, "default")
    after = other.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)


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


@pytest.mark.parametrize("what", ["missing", "shape", "foreign"])
def test_a_config_given_by_hand_changes_nothing(tmp_path, what):
    adapted(init_weights=True).save_pretrained(tmp_path)
    damage(tmp_path, what)
    base = llama()
    before = tree(base)
    with pytest.raises(ValueError, match=MESSAGES[what]):
        PeftModel.from_pretrained(base, tmp_path, config=PeftConfig.from_pretrained(tmp_path))
    assert tree(base) == before


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


def test_another_method_is_refused(tmp_path):
    get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    model = adapted()
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.load_adapter(tmp_path, "second")
    with pytest.raises(ValueError, match="unexpected"):
        model.load_adapter(tmp_path, "default")
    assert list(model.peft_config) == ["default"]


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


@pytest.mark.parametrize("method", [DyLoraConfig, SurmConfig, AdaMixConfig, AfLoraConfig, RosaConfig])
def test_biases_of_modules_saved_whole_load(method, tmp_path):
    """With bias="all" PEFT saves those of a module in modules_to_save twice, and of one made of several under names
    that the model has."""
    options = dict(target_modules=["q_proj"], modules_to_save=["mlp"], bias="all", init_weights=False)
    torch.manual_seed(1)
    model = get_peft_model(LlamaForCausalLM(MLP_BIAS), method(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    loaded = PeftModel.from_pretrained(LlamaForCausalLM(MLP_BIAS), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model))
