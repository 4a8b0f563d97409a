"""What all tuners share, on a model whose head is a module of modules, as RoBERTa's is."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import RobertaConfig, RobertaForSequenceClassification

import peft_fused

ATTENTION = dict(target_modules=["query", "value"])
CONFIGS = {
    "dylora": lambda: peft_fused.DyLoraConfig(r=2, init_weights=False, task_type="SEQ_CLS", **ATTENTION),
    "surm": lambda: peft_fused.SurmConfig(init_weights=False, task_type="SEQ_CLS", **ATTENTION),
    "adamix": lambda: peft_fused.AdaMixConfig(
        kind="lora", r=2, init_weights=False, task_type="SEQ_CLS", **ATTENTION
    ),
    "aflora": lambda: peft_fused.AfLoraConfig(r=2, init_weights=False, task_type="SEQ_CLS"),
    "rosa": lambda: peft_fused.RosaConfig(r=2, task_type="SEQ_CLS", **ATTENTION),
}  # fmt: skip


def base():
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        initializer_range=0.3, max_position_embeddings=20,
    )  # fmt: skip
    return RobertaForSequenceClassification(config)


def adapt(method):
    torch.manual_seed(1)
    model = get_peft_model(base(), CONFIGS[method]()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:  # as training leaves it
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def logits(model):
    return model(torch.arange(2, 14).reshape(2, 6)).logits


@pytest.mark.parametrize("method", CONFIGS)
def test_unloading_keeps_the_trained_head(method):
    model = adapt(method)
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected)
    assert type(merged.classifier).__name__ == "RobertaClassificationHead"
    model, head = adapt(method), None
    with model.disable_adapter():
        merged = model.merge_and_unload()
    head = merged.classifier.out_proj.weight
    assert not torch.equal(head, base().classifier.out_proj.weight)
    torch.testing.assert_close(logits(merged), expected)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_checkpoint_that_does_not_fit_leaves_the_model_as_it_was(method, tmp_path):
    from safetensors.torch import load_file, save_file

    adapt(method).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    dropped = next(key for key in tensors if f"{method}_" in key and "state" not in key)
    save_file({key: value for key, value in tensors.items() if key != dropped}, path, metadata={"format": "pt"})
    model = base().eval()
    expected, names = logits(model), str(model)
    with pytest.raises(ValueError, match=r"nothing was loaded.*1 missing"):
        PeftModel.from_pretrained(model, tmp_path)
    assert str(model) == names
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_added_later_is_in_the_mode_of_its_layer(method):
    model = adapt(method)
    model.add_adapter("second", CONFIGS[method]())
    assert not any(module.training for module in model.modules())
    model.train().add_adapter("third", CONFIGS[method]())
    assert all(m.training for name, m in model.named_modules() if ".third" in name)


def test_a_second_adamix_adapter_evaluates_with_the_average(tmp_path):
    adapt("adamix").save_pretrained(tmp_path)
    ids = torch.arange(12).view(2, 6)
    model = PeftModel.from_pretrained(base(), tmp_path).eval()
    expected = model(ids).logits
    model.load_adapter(tmp_path, "two", is_trainable=True)
    model.set_adapter("two")
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("first", (True, False))
def test_a_name_that_would_lose_tensors_is_refused(method, first):
    """PEFT leaves out of a saved adapter every key that has another adapter's name in it."""
    names = ("query", "default") if first else ("default", "query")
    model = get_peft_model(base(), CONFIGS[method](), adapter_name=names[0])
    keys = set(model.state_dict())
    with pytest.raises(ValueError, match="adapter_name: beside adapter 'default' none can be named 'query'"):
        model.add_adapter(names[1], CONFIGS[method]())
    assert set(model.state_dict()) == keys and list(model.peft_config) == [names[0]]


def test_the_name_of_extra_state_is_refused():
    model = get_peft_model(base(), CONFIGS["rosa"]())
    with pytest.raises(ValueError, match="none can be named '_extra_state'"):
        model.add_adapter("_extra_state", CONFIGS["rosa"]())
