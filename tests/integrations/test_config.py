"""What all configurations check of the fields they share, and how they are stored."""

import json
from dataclasses import fields
from typing import get_args

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from peft_fused import DyLoraConfig, SurmConfig, export_lora
from peft_fused.integrations.peft.config import FusedConfig
from peft_fused.integrations.peft.registration import REGISTERED

CONFIGS = [method.config for method in REGISTERED.values()]
HUGE = 10**400


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def logits(model):
    return model(torch.arange(20).reshape(2, 10)).logits


WRONG = [
    *(("target_modules", value) for value in (3, [3], {"q": 1}, [""], ["("], b"q", "(")),
    *(("exclude_modules", value) for value in (3, [3], {"q": 1}, [""], ["("], b"q", "(")),
    *(("modules_to_save", value) for value in ("uniform", 3, [None], {"a": 1}, [""], ["("])),
    *(("layers_to_transform", value) for value in ("0", 1.5, [0, "1"], -1, True)),
    *(("layers_pattern", value) for value in (3, [1], "(")),
    *(("bias", value) for value in (None, 3, "some", "lora_only", ["none"])),
    *(("init_weights", value) for value in (None, "gaussian", 1)),
    *(("inference_mode", value) for value in (None, "no", 0)),
    *(("fan_in_fan_out", value) for value in (None, 0)),
    *(("base_model_name_or_path", value) for value in (3, ["x"])),
    *(("revision", value) for value in (3, ["x"])),
    *(("auto_mapping", value) for value in (3, "x")),
    *(("trainable_token_indices", value) for value in ([1], {"embed": [1]}, 3)),
    *(("task_type", value) for value in ("NOPE", 3)),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_fields_of_the_wrong_type_are_refused_by_name(config):
    for name, value in WRONG:
        more = {"layers_to_transform": [0]} if name == "layers_pattern" else {}
        with pytest.raises((TypeError, ValueError), match=name.replace("_", "[_ ]")):
            config(**{"target_modules": ["q_proj"], **more, name: value})


def own_numbers(config):
    """Its own fields that hold a number, None or not; but a seed and a number of steps are any integer."""
    shared = {each.name for each in fields(FusedConfig)} | {"seed", "window", "resample_every"}
    own = [each for each in fields(config) if each.name not in shared]
    return [each.name for each in own if {int, float} & {each.type, *get_args(each.type)}]


@pytest.mark.parametrize("config", CONFIGS)
def test_numbers_that_no_float_holds_are_refused_by_name(config):
    names = own_numbers(config)
    assert names
    for name in names:
        for value in (HUGE, -HUGE, float("nan"), float("inf"), "1"):
            with pytest.raises((TypeError, ValueError), match=f"^{name} "):
                config(**{name: value})
    for name in {"rank_pattern", "alpha_pattern"} & set(config.__dataclass_fields__):
        for value in ({"q": HUGE}, {3: 4}, {"(": 4}, {"(?i)q": 4}, {"q": None}, [4], "q", 0):
            with pytest.raises((TypeError, ValueError), match=f"^{name}"):
                config(**{name: value})


@pytest.mark.parametrize("collection", [list, tuple, set])
def test_names_come_in_any_collection(collection):
    given = collection(["q_proj"])
    config = SurmConfig(target_modules=given, modules_to_save=given)
    assert config.target_modules == {"q_proj"} and config.modules_to_save == ["q_proj"]
    assert config.modules_to_save is not given


# In the order in which PEFT would sort them, the second key of each would be tried first.
RANKS = {"self_attn.q_proj": 3, "q_proj": 2, "layers.1.mlp.down_proj": 4, "down_proj": 1}
ALPHAS = {"layers.0.self_attn.q_proj": 7.0, "q_proj": 2.0}


@pytest.mark.parametrize("config", [each for each in CONFIGS if "rank_pattern" in each.__dataclass_fields__])
def test_overlapping_patterns_mean_the_same_after_saving(tmp_path, config):
    options = {"rank_pattern": RANKS}
    if "alpha_pattern" in config.__dataclass_fields__:
        options["alpha_pattern"] = ALPHAS
    made = config(r=6, target_modules=["q_proj", "down_proj"], init_weights=False, **options)
    model = get_peft_model(llama(), made).eval()
    model.save_pretrained(tmp_path / "adapter")
    stored = PeftConfig.from_pretrained(tmp_path / "adapter")
    assert all(list(getattr(stored, name).items()) == list(value.items()) for name, value in options.items())
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "adapter")), logits(model))

    export_lora(model, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)
    assert loaded.peft_config["default"].rank_pattern  # so that the order could matter


class Nested(torch.nn.Module):
    """The name of one layer is the end of the other's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8)})
        self.a = torch.nn.Linear(8, 4)

    def forward(self, x):
        return self.a(self.inner["a"](x))


# What the layers differ in, where a configuration has such an option.
PATTERNS = {"rank_pattern": {"inner.a": 2, "a": 1}, "alpha_pattern": {"inner.a": 5, "a": 7}}
# To approximate a method by that has no rank of its own: exact for the smaller layer, of rank 4.
RANK = 6


def test_exports_of_names_that_end_alike(tmp_path, additive):
    patterns = {name: value for name, value in PATTERNS.items() if name in additive.method.config.__dataclass_fields__}
    config = additive.config(target_modules=["a"], init_weights=False, **patterns)
    model = get_peft_model(Nested(), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) / 4
    exact, rank = ("", None) if config.r else ("a", RANK)
    if rank:
        with pytest.raises(ValueError, match="rank must be given"):
            export_lora(model, tmp_path)
    export_lora(model, tmp_path, rank=rank)
    loaded = PeftModel.from_pretrained(Nested(), tmp_path).eval()
    x = torch.randn(5, 8)
    found, expected = (each.base_model.model.get_submodule(exact) for each in (loaded, model))
    torch.testing.assert_close(found(x), expected(x), rtol=0, atol=1e-5)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    ranks = {loaded.base_model.model.get_submodule(name).r["default"] for name in ("inner.a", "a")}
    assert len(ranks) == (2 if rank or "rank_pattern" in patterns else 1)
    assert sorted(stored["rank_pattern"].values()) == sorted(ranks - {stored["r"]})


def test_a_config_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    DyLoraConfig(r=4).save_pretrained(tmp_path)
    before = (tmp_path / "adapter_config.json").read_bytes()

    def full(*arguments, **options):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(json, "dump", full)
        DyLoraConfig(r=5).save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "adapter_config.json"]
    assert (tmp_path / "adapter_config.json").read_bytes() == before
    DyLoraConfig(r=5).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 5
