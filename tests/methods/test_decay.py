import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from peft_fused.integrations.peft import SurmConfig
from peft_fused.layers import CirculantLinear, KroneckerLinear, LoraLinear, SurmAdapter
from peft_fused.methods import decay_groups


def names(model, group):
    owned = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in owned}


def bert():
    sizes = dict(vocab_size=50, hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20)
    return BertForSequenceClassification(BertConfig(**sizes))


@pytest.mark.parametrize("kind", ["lora", "adapter"])
def test_structured_parameters_biases_and_norms_are_not_decayed(kind):
    model = get_peft_model(bert(), SurmConfig(kind=kind, task_type="SEQ_CLS"))
    for name, parameter in model.named_parameters():
        if "LayerNorm" in name:
            parameter.requires_grad_(True)
    decayed, spared = decay_groups(model, 0.25)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.25, 0.0)
    # The classifier's copy is what PEFT trains of modules_to_save.
    assert {name.split(".")[-1] for name in names(model, decayed)} == {"weight"}
    assert all("classifier.modules_to_save" in name for name in names(model, decayed))
    ends = {name.split(".")[-1] for name in names(model, spared)}
    assert ends == ({"a", "b", "weight", "bias"} | ({"beta"} if kind == "adapter" else set()))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names(model, decayed) | names(model, spared) == trainable


def test_plain_layers_and_other_methods():
    model = nn.ModuleDict({
        "lora": LoraLinear.from_linear(nn.Linear(4, 4)),
        "circulant": CirculantLinear.from_linear(nn.Linear(4, 4)),
        "kronecker": KroneckerLinear.from_linear(nn.Linear(4, 4)),
        "adapter": SurmAdapter(4),
        "head": nn.Linear(4, 2),
        # A name with "bias" or "norm" in it says nothing.
        "debias_norm": nn.Linear(4, 2, bias=False),
    })  # fmt: skip
    decayed, spared = decay_groups(model, 0.1)
    assert names(model, decayed) == {"lora.lora_A", "lora.lora_B", "head.weight", "debias_norm.weight"}
    assert names(model, spared) == {
        "circulant.adapter.map.a", "circulant.adapter.map.b", "kronecker.adapter.map.A", "kronecker.adapter.map.B",
        "adapter.beta", "adapter.map.a", "adapter.map.b", "head.bias",
    }  # fmt: skip


def test_norms_of_models_and_the_optimizer_step():
    config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    decayed, spared = decay_groups(model, 0.1)
    assert names(model, spared) == {name for name, _ in model.named_parameters() if "norm" in name}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    torch.optim.AdamW([decayed, spared], lr=0.5).step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == names(model, decayed)


def test_a_parameter_shared_with_a_norm_is_spared_once():
    norm, other = nn.LayerNorm(4), nn.Embedding(1, 4)
    other.weight = norm.weight
    (group,) = decay_groups(nn.ModuleList([other, norm]), 0.1)
    assert group["weight_decay"] == 0.0 and len(group["params"]) == 2


def test_one_kind_of_parameters_gives_one_group():
    model = get_peft_model(bert(), LoraConfig(target_modules=["query"]))
    (group,) = decay_groups(model, 0.1)
    assert group["weight_decay"] == 0.1 and len(group["params"]) == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("model", 0.1), TypeError, "model must be a torch.nn.Module, got str"),
        ((nn.Linear(2, 2), "0.1"), TypeError, "weight_decay must be a number"),
        ((nn.Linear(2, 2), -0.1), ValueError, "weight_decay must be at least 0, got -0.1"),
        ((nn.ReLU(), 0.1), ValueError, "no trainable parameters"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        decay_groups(*arguments)


def test_biases_of_any_name():
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.LSTM(4, 4))
    decayed, spared = decay_groups(model, 0.1)
    assert sorted(p.dim() for p in decayed["params"]) == [2] * 4 and {p.dim() for p in spared["params"]} == {1}
