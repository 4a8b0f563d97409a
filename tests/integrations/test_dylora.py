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
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from peft_fused import copy_adapter
from peft_fused.integrations.peft import DyLoraConfig
from peft_fused.integrations.peft.dylora import DyLoraPeftLinear
from peft_fused.integrations.transformers import PeftFusedCallback
from peft_fused.methods import draw_rank, evaluate_dylora_ranks, on_step, set_dylora_rank

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


def test_trains_as_many_parameters_as_lora():
    assert adapted().get_nb_trainable_parameters()[0] == 2 * R * (16 + 16 + 24 + 16)


def test_training_gradients_follow_the_drawn_rank():
    model = adapted().train()
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


def test_merges_at_the_evaluation_rank_which_then_stays():
    model = adapted()
    set_dylora_rank(model, 2)
    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(by_hand(llama(), model, 2)), before, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="unmerge it first"):
        set_dylora_rank(model, 1)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


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


def test_adapters_have_ranks_of_their_own():
    model = adapted()
    model.add_adapter("second", config(target_modules=["q_proj", "v_proj"], r=2, lora_alpha=ALPHA))
    model.base_model.set_adapter(["default", "second"])
    expected = by_hand(by_hand(llama(), model, R), model, 2, "second")
    torch.testing.assert_close(logits(model), logits(expected))
    set_dylora_rank(model, 1, adapter_name="second")
    ranks = {(n, s.eval_value) for layer in layers(model).values() for n, s in layer.dylora_ranks.items()}
    assert ranks == {("default", R), ("second", 1)}
    model.delete_adapter("default")
    set_dylora_rank(model, None)
    torch.testing.assert_close(logits(model), logits(by_hand(llama(), model, 2, "second")))


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


def test_sequence_classification_and_ranks_of_a_whole_model():
    model = adapted(llama(LlamaForSequenceClassification), task_type=TaskType.SEQ_CLS)
    results = evaluate_dylora_ranks(model, lambda m: logits(m))
    assert list(results) == [1, 2, 3, 4] and not torch.equal(results[1], results[4])
    assert torch.equal(logits(model), results[4])


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


# -------------------------------------------------------------------------------------------------------------- Trainer

STEPS = 6


class Tokens(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        ids = torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def trained(**options):
    torch.manual_seed(1)
    return get_peft_model(
        llama(), DyLoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, **options)
    ).train()


class Recorder(PeftFusedCallback):
    """Notes (step, micro, training rank, evaluation rank) as the layers see them when a micro-batch ends."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def note(self, state, model):
        ranks = {
            (m.dylora_ranks["default"].train_rank.item(), m.dylora_ranks["default"].eval_rank.item())
            for m in model.modules()
            if isinstance(m, DyLoraPeftLinear)
        }
        (pair,) = ranks
        self.seen.append((state.global_step, self.micro, *pair))

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self.note(state, model)
        super().on_substep_end(args, state, control, model=model, **kwargs)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.note(state, model)


def trainer(folder, net, accumulate=1, callbacks=(), **arguments):
    settings = dict(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=accumulate, max_steps=STEPS,
        learning_rate=1e-2, weight_decay=0.1, save_steps=3, logging_steps=100, report_to=[], use_cpu=True,
        disable_tqdm=True, seed=3,
    )  # fmt: skip
    args = TrainingArguments(**{**settings, **arguments})
    return Trainer(model=net, args=args, train_dataset=Tokens(), callbacks=list(callbacks))


def factors(net):
    return {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("resample", ["step", "micro"])
def test_the_schedule_reaches_every_step_and_micro_batch(tmp_path, resample):
    net, recorder = trained(resample=resample, seed=11), Recorder()
    before = factors(net)
    trainer(tmp_path, net, accumulate=3, callbacks=[recorder]).train()
    policy = net.peft_config["default"].policy()
    expected = [(s, m, draw_rank(policy, 4, s, m), 4) for s in range(STEPS) for m in range(3)]
    assert recorder.seen == expected
    assert len({rank for _, _, rank, _ in expected}) > 1
    assert all(not torch.equal(p, before[name]) for name, p in factors(net).items())


def test_a_resumed_strict_run_equals_the_straight_one_bit_for_bit(tmp_path):
    options = {"resample": "micro", "strict_frozen": True, "frozen": True}
    straight = trained(**options)
    trainer(tmp_path / "straight", straight, accumulate=2, callbacks=[PeftFusedCallback()]).train()
    resumed = trained(**options)
    run = trainer(tmp_path / "resumed", resumed, accumulate=2, callbacks=[PeftFusedCallback()])
    run.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert run.state.global_step == STEPS
    a, b = factors(straight), factors(resumed)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_strict_frozen_works_through_the_wrapped_optimizer(tmp_path):
    net = trained(frozen=True, strict_frozen=True, init_weights=False)
    moved = []

    class Watch(PeftFusedCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.before = factors(model)

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            rank = draw_rank(net.peft_config["default"].policy(), 4, state.global_step)
            for name, p in factors(model).items():
                rows = (p != self.before[name]).any(dim=1 if "dylora_A" in name else 0)
                moved.append(rows.nonzero().flatten().tolist() == [rank - 1])

    trainer(tmp_path, net, callbacks=[Watch()]).train()
    assert len(moved) == STEPS * 8 and all(moved)
