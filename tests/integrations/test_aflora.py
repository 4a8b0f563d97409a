import copy
import json
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTModel,
)

import peft_fused
from peft_fused.integrations.peft import AfLoraConfig
from peft_fused.integrations.peft.aflora import ATTENTION, TARGETS, AfLoraPeftLinear
from peft_fused.integrations.transformers import PeftFusedCallback
from peft_fused.methods import freezing_history, on_step

R, ALPHA, STEPS = 4, 6.0, 12
IDS = torch.arange(20).reshape(2, 10)
LLAMA = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, pad_token_id=0,
)  # fmt: skip


def llama(dtype=torch.float32):
    torch.manual_seed(0)
    return LlamaForCausalLM(LLAMA).to(dtype).eval()


def gpt2(dtype=torch.float32):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).to(dtype).eval()


def bert():
    torch.manual_seed(0)
    sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    return BertForSequenceClassification(BertConfig(**sizes)).eval()


def config(**options):
    defaults = dict(
        r=R, lora_alpha=ALPHA, target_modules=["q_proj", "up_proj", "down_proj"], init_weights=False, d_initial=1.0,
        t_i=2, t_f=0.25, window=2,
    )  # fmt: skip
    return AfLoraConfig(**{**defaults, **options})


def adapted(base=None, **options):
    base = llama() if base is None else base
    if isinstance(base, LlamaForCausalLM):  # of both kinds, as an encoder has them
        options = {"frozen_modules": ["q_proj"], **options}
    return get_peft_model(base, config(**options)).eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, AfLoraPeftLinear)}


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def delta_in_double(layer, scale, adapter="default"):
    A, B = (getattr(layer, f"aflora_{m}")[adapter].weight.detach().double() for m in "AB")
    d, b = (getattr(layer.aflora_vectors[adapter], name).detach().double() for name in "db")
    return scale * torch.diag(b) @ B @ torch.diag(d) @ A


def by_hand(base, model, scale=ALPHA / R, adapter="default"):
    """The base model with the dense change added to its weights."""
    for name, layer in layers(model).items():
        if adapter in layer.aflora_A:
            delta = delta_in_double(layer, scale, adapter)
            weight = base.get_submodule(name.removeprefix("base_model.model.")).weight
            weight.data += (delta.T if layer.transposed else delta).to(weight.dtype)
    return base


def train(model, optimizer, start, stop, total=STEPS):
    model.train()
    for step in range(start, stop):
        on_step(model, step=step, total_steps=total, optimizer=optimizer)
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(0, 32, (2, 8), generator=generator)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adam(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)


def mid_schedule(base=None, steps=6, **options):
    model = adapted(base, **options)
    optimizer = adam(model)
    train(model, optimizer, 0, steps)
    some = [freezing.step for freezing in freezing_history(model)]
    assert None in some and any(step for step in some)
    return model.eval(), optimizer


# -------------------------------------------------------------------------------------------------- forward and merging


@pytest.mark.parametrize("alpha", [ALPHA, None])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_forward_equals_the_dense_formula(make, alpha):
    model = adapted(make(), target_modules=None if make is gpt2 else ["q_proj", "down_proj"], lora_alpha=alpha)
    expected = by_hand(make(), model, 1.0 if alpha is None else ALPHA / R)
    torch.testing.assert_close(logits(model), logits(expected))
    assert (logits(model) - logits(make())).abs().max() > 1e-2


def test_starts_as_nothing_with_the_papers_numbers():
    model = get_peft_model(bert(), AfLoraConfig()).eval()
    assert torch.equal(logits(model), logits(bert()))
    for layer in layers(model).values():
        A, B, vectors = layer.aflora_A["default"].weight, layer.aflora_B["default"].weight, layer.aflora_vectors
        assert A.shape[0] == 4 and vectors["default"].d.eq(0.1).all() and vectors["default"].b.eq(0).all()
        for weight, fan_in in ((A, layer.in_features), (B, 4)):
            bound = math.sqrt(6 / fan_in)
            assert 0.8 * bound < weight.abs().max() <= bound


def test_gradients_are_those_of_the_dense_formula():
    model, _ = mid_schedule(llama(torch.float64), frozen_modules=["k_proj"])
    model.train()
    model(IDS, labels=IDS).loss.backward()
    reference = llama(torch.float64)
    weights = {name: p for name, p in reference.named_parameters() if p.dim() == 2}
    by_hand(reference, model)(IDS, labels=IDS).loss.backward()
    kinds = set()
    for name, layer in layers(model).items():
        G = ALPHA / R * weights[name.removeprefix("base_model.model.") + ".weight"].grad
        A, B, vectors = layer.aflora_A["default"].weight, layer.aflora_B["default"].weight, layer.aflora_vectors
        d, b, state = vectors["default"].d, vectors["default"].b, layer.aflora_state["default"]
        expected = {"A": d[:, None] * (B.T @ (b[:, None] * G)), "B": b[:, None] * (G @ A.T) * d}
        for matrix, parameter in (("A", A), ("B", B)):
            kinds.add((matrix, state.is_frozen(matrix)))
            if state.is_frozen(matrix):
                assert parameter.grad is None
            else:
                torch.testing.assert_close(parameter.grad, expected[matrix])
        torch.testing.assert_close(d.grad, ((b[:, None] * B) * (G @ A.T)).sum(0))
        torch.testing.assert_close(b.grad, ((B * d) * (G @ A.T)).sum(1))
    assert kinds >= {("A", False), ("B", True)}


# ------------------------------------------------------------------------------------------------- who trains, and when


def test_the_papers_targets_and_what_is_frozen_from_the_start():
    model = get_peft_model(bert(), AfLoraConfig(task_type="SEQ_CLS"))
    found = {name.partition("layer.")[2][2:]: layer for name, layer in layers(model).items()}
    attention = {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"}
    assert found.keys() == attention | {"intermediate.dense", "output.dense"}
    for name, layer in found.items():
        frozen = name in attention
        assert layer.aflora_state["default"].frozen_at == dict.fromkeys("AB", 0 if frozen else -1)
        assert layer.aflora_A["default"].weight.requires_grad is layer.aflora_B["default"].weight.requires_grad
        assert layer.aflora_A["default"].weight.requires_grad is not frozen
    adapter = {name for name in trainable(model) if "aflora" in name}
    assert len(adapter) == 2 * (6 * 2 + 2 * 2)
    in_head = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "classifier" in name)
    vectors, in_ffn = 2 * (6 * 4 + 4 * 16 + 24 + 16), 2 * 2 * 4 * (16 + 24)
    assert model.get_nb_trainable_parameters()[0] - in_head == vectors + in_ffn


@pytest.mark.parametrize(
    ("base", "attention"),
    [
        (gpt2, {"attn.c_attn", "attn.c_proj"}),
        (
            lambda: DistilBertModel(DistilBertConfig(vocab_size=32, dim=16, n_layers=1, n_heads=2, hidden_dim=24)),
            {"q_lin", "k_lin", "v_lin", "out_lin"},
        ),
        (
            lambda: ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32)),
            {"q_proj", "k_proj", "v_proj", "o_proj"},
        ),
    ],
)
def test_known_models_need_no_names(base, attention):
    model = get_peft_model(base(), AfLoraConfig())
    assert layers(model)
    for name, layer in layers(model).items():
        in_attention = any(name.endswith(end) for end in attention)
        assert layer.aflora_state["default"].is_frozen("A") is in_attention
    assert {state.is_frozen("A") for m in layers(model).values() for state in m.aflora_state.values()} == {True, False}


def test_decoders_of_the_papers_kind_train_all_matrices():
    model = get_peft_model(llama(), AfLoraConfig())
    assert {name.rpartition(".")[2] for name in layers(model)} == {"q_proj", "k_proj", "v_proj", "up_proj", "down_proj"}
    assert not any(m.aflora_state["default"].is_frozen("A") for m in layers(model).values())
    assert TARGETS.keys() > ATTENTION.keys()


def test_frozen_modules_match_as_target_modules_do():
    def frozen(base=None, **options):
        model = adapted(base, **options)
        return {n.partition("layers.")[2] for n, m in layers(model).items() if m.aflora_state["default"].is_frozen("A")}

    assert frozen(frozen_modules=[]) == set()
    assert frozen(frozen_modules=["down_proj"]) == {"0.mlp.down_proj", "1.mlp.down_proj"}
    assert frozen(frozen_modules=["1.mlp.down_proj"]) == {"1.mlp.down_proj"}
    assert frozen(frozen_modules=r".*layers\.0\..*") == {"0.self_attn.q_proj", "0.mlp.up_proj", "0.mlp.down_proj"}
    assert frozen(frozen_modules=None) == set()
    plain = get_peft_model(nn.Sequential(nn.Linear(4, 4)), AfLoraConfig(target_modules=["0"]))
    assert not layers(plain)["base_model.model.0"].aflora_state["default"].is_frozen("A")
    base = llama()
    with pytest.raises(ValueError, match=r"frozen_modules must name modules of the model, got \['proj'\]"):
        get_peft_model(base, config(frozen_modules=["proj"]))
    assert not layers(base) and all(p.requires_grad for p in base.parameters())


def test_training_freezes_everything_but_the_vectors():
    model = adapted()
    optimizer = adam(model)
    train(model, optimizer, 0, STEPS)
    assert {name.split(".")[-3] for name in trainable(model)} == {"aflora_vectors"}
    history = freezing_history(model)
    assert len(history) == 12 and len({freezing.step for freezing in history}) > 3
    assert {f.step for f in history if "q_proj" in f.layer} == {0}
    assert not any(state.kept for layer in layers(model).values() for state in layer.aflora_state.values())
    assert len(optimizer.state) == len(trainable(model)) == sum(len(g["params"]) for g in optimizer.param_groups)


def test_frozen_matrices_never_thaw():
    model, _ = mid_schedule()
    wanted = trainable(model)
    model.train()
    model.set_adapter("default")
    assert trainable(model) == wanted
    with model.disable_adapter():
        assert not trainable(model)
    assert trainable(model) == wanted
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert trainable(model) == wanted
    model.set_requires_grad("default", False)
    assert not trainable(model)
    model.set_requires_grad("default", True)
    assert trainable(model) == wanted
    model.add_adapter("second", config(target_modules=["k_proj", "up_proj"]))
    assert trainable(model) == wanted
    model.set_adapter("second")
    assert all(".second." in name for name in trainable(model))
    model.set_adapter("default")
    assert trainable(model) == wanted
    model.delete_adapter("second")
    assert trainable(model) == wanted


def test_two_adapters_train_one_after_the_other():
    model, _ = mid_schedule()
    first, before = logits(model), freezing_history(model, adapter_name="default")
    model.add_adapter("second", config(target_modules=["q_proj", "up_proj"], frozen_modules=[], t_i=0, t_f=0.5))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    train(model, adam(model), 0, STEPS)
    model.eval()
    assert freezing_history(model, adapter_name="default") == before
    assert all(freezing.step for freezing in freezing_history(model, adapter_name="second"))
    assert len(freezing_history(model)) == len(before) + 8
    second = logits(model)
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(model), logits(by_hand(by_hand(llama(), model), model, adapter="second")))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("default")
    assert model.active_adapters == ["second"] and not any("default" in name for name, _ in model.named_modules())
    torch.testing.assert_close(logits(model), second)


# --------------------------------------------------------------------------------------------------- saving and loading


def assert_same_state(a, b):
    assert freezing_history(a) == freezing_history(b) and trainable(a) == trainable(b)
    a, b = ({k: v for k, v in m.state_dict().items() if "aflora" in k} for m in (a, b))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert any(v[5:].any() for k, v in a.items() if k.endswith("_extra_state"))


def test_save_and_load_in_mid_schedule(tmp_path):
    model, _ = mid_schedule(
        rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 3.0}, ramp="quadratic", beta1=0.5, steps=8
    )
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert all(tensor.is_floating_point() for tensor in stored.values())
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "AFLORA" and saved["frozen_modules"] == ["q_proj"]
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert loaded.peft_config["default"].policy() == model.peft_config["default"].policy()
    assert_same_state(model, loaded)
    assert torch.equal(logits(loaded.eval()), logits(model))
    inference = PeftModel.from_pretrained(llama(), tmp_path)
    assert not trainable(inference) and torch.equal(logits(inference), logits(model))
    on_step(inference, step=0)  # nothing trains, so nothing is asked for
    other = adapted(llama())
    other.load_adapter(tmp_path, "second", is_trainable=True)
    other.set_adapter("second")
    assert {n.replace(".second.", ".default.") for n in trainable(other)} == trainable(model)
    # Into an adapter that is in another state: what is loaded counts.
    model.load_adapter(tmp_path, "default", is_trainable=True)
    fresh = adapted(rank_pattern={"down_proj": 2}, alpha_pattern={"q_proj": 3.0})
    fresh.load_adapter(tmp_path, "default", is_trainable=True)
    assert_same_state(model, fresh)


def damage(folder, what):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    state = next(k for k in tensors if "down_proj.aflora_state._extra_state" in k)
    if what == "no state":
        del tensors[state]
    elif what == "shape":
        tensors[state] = tensors[state][:-1].clone()
    elif what == "number":
        tensors[state][0] = 0.5
    save_file(tensors, path)


MESSAGES = {
    "no state": "aflora_state of '.*' is missing, without which matrices that are frozen would train again",
    "shape": r"aflora_state of '.*down_proj' must have \d+ or \d+ numbers",
    "number": r"aflora_state of '.*down_proj' starts with \[0.5, ",
}


@pytest.mark.parametrize("what", MESSAGES)
def test_a_damaged_state_is_refused(tmp_path, what):
    model, _ = mid_schedule()
    model.save_pretrained(tmp_path)
    damage(tmp_path, what)
    base = llama()
    with pytest.raises(ValueError, match=MESSAGES[what]):
        PeftModel.from_pretrained(base, tmp_path)
    assert not layers(base) and all(p.requires_grad for p in base.parameters())


# --------------------------------------------------------------------------------------------------------------- export


@pytest.mark.parametrize("alpha", [ALPHA, None])
def test_export_is_exact(tmp_path, alpha):
    model = adapted(lora_alpha=alpha, rank_pattern={"down_proj": 2}, alpha_pattern={"up_proj": 3.0})
    assert peft_fused.export_lora(model, tmp_path) is None
    lora = PeftModel.from_pretrained(llama(), tmp_path).eval()
    torch.testing.assert_close(logits(lora), logits(model), rtol=0, atol=1e-5)
    assert not any("state" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    exact, by_name = dict(lora.named_modules()), layers(model)
    for name, layer in by_name.items():
        scale = 3.0 / R if "up_proj" in name else 1.0 if alpha is None else alpha / (2 if "down_proj" in name else R)
        delta = exact[name].get_delta_weight("default").double()
        torch.testing.assert_close(delta, delta_in_double(layer, scale), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="rank must be None for an AFLoRA adapter, which is exported whole, got 2"):
        peft_fused.export_lora(model, tmp_path / "other", rank=2)
    assert not (tmp_path / "other").exists()


# -------------------------------------------------------------------------------------------------------------- Trainer


class Tokens(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        ids = torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def trainer(folder, model, **arguments):
    settings = dict(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=STEPS,
        learning_rate=1e-2, weight_decay=0.1, save_steps=3, logging_steps=100, report_to=[], use_cpu=True,
        disable_tqdm=True, seed=3,
    )  # fmt: skip
    args = TrainingArguments(**{**settings, **arguments})
    return Trainer(model=model, args=args, train_dataset=Tokens(), callbacks=[PeftFusedCallback()])


def fresh(**options):
    model = adapted(init_weights=True, lora_dropout=0.1, **options)
    return model.train()


@pytest.mark.parametrize("rule", ["code", "paper"])
@pytest.mark.parametrize("at", [3, 6, 9])
def test_a_resumed_training_equals_the_straight_one_bit_for_bit(tmp_path, at, rule):
    straight = fresh(rule=rule)
    trainer(tmp_path / "straight", straight).train()
    steps = {freezing.step for freezing in freezing_history(straight)}
    assert None not in steps and any(step > 6 for step in steps) and any(0 < step <= 6 for step in steps)
    resumed = fresh(rule=rule)
    run = trainer(tmp_path / "resumed", resumed)
    run.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{at}"))
    assert run.state.global_step == STEPS
    assert freezing_history(straight) == freezing_history(resumed) and trainable(straight) == trainable(resumed)
    a, b = straight.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("at", [3, 5, 9])
def test_a_resumed_loop_equals_the_straight_one_bit_for_bit(tmp_path, at):
    straight = fresh()
    optimizer = adam(straight)
    torch.manual_seed(5)
    train(straight, optimizer, 0, at)
    straight.save_pretrained(tmp_path)
    stored, generator = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    train(straight, optimizer, at, STEPS)
    resumed = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    optimizer = adam(resumed)
    optimizer.load_state_dict(stored)
    torch.set_rng_state(generator)
    train(resumed, optimizer, at, STEPS)
    assert freezing_history(straight) == freezing_history(resumed)
    a, b = straight.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, r"r must be in 1\.\.256, got 0"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha must be finite"),
        ({"lora_alpha": "8"}, TypeError, "lora_alpha must be a number, got '8'"),
        ({"lora_dropout": 1.0}, ValueError, "lora_dropout must be in"),
        ({"d_initial": None}, TypeError, "d_initial must be a number, got None"),
        ({"bias": "lora_only"}, ValueError, "bias must be one of 'none', 'all', 'aflora_only'"),
        ({"rank_pattern": {"q_proj": 0}}, ValueError, r"rank_pattern\['q_proj'\] must be in"),
        ({"alpha_pattern": {"q_proj": "x"}}, TypeError, r"alpha_pattern\['q_proj'\] must be a number"),
        ({"rank_pattern": [1]}, TypeError, "rank_pattern must be a dict or None, got list"),
        ({"frozen_modules": 3}, TypeError, "frozen_modules must be a list of str, a str or None, got 3"),
        ({"frozen_modules": [3]}, TypeError, r"frozen_modules must be a list of str, a str or None, got \[3\]"),
        ({"frozen_modules": "("}, ValueError, r"frozen_modules must be a regular expression, got '\('"),
        ({"t_i": 0.6, "t_f": 0.5}, ValueError, r"t_i \+ t_f must be at most 1, got 0.6 \+ 0.5"),
        ({"t_f": True}, TypeError, "t_f must be a number, got True"),
        ({"ramp": "linear"}, ValueError, "ramp must be one of"),
        ({"rule": "random"}, ValueError, "rule must be one of"),
        ({"beta2": 1.0}, ValueError, "beta2 must be in"),
        ({"window": 2.5}, TypeError, "window must be an int, got 2.5"),
    ],
)
def test_bad_configs_are_named(options, error, message):
    with pytest.raises(error, match=message):
        config(**options)


def test_the_trainer_is_told_when_the_run_is_too_short(tmp_path):
    with pytest.raises(ValueError, match=r"t_i \+ t_f must be at most total_steps = 12, got t_i=10"):
        trainer(tmp_path, fresh(t_i=10, t_f=5)).train()
