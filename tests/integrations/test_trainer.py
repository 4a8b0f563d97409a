import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from peft_fused.integrations.peft import DyLoraConfig
from peft_fused.integrations.peft.dylora import DyLoraPeftLinear
from peft_fused.integrations.transformers import PeftFusedCallback
from peft_fused.methods import draw_rank

STEPS = 6


class Tokens(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        ids = torch.randint(0, 32, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def model(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    base = LlamaForCausalLM(config)
    torch.manual_seed(1)
    return get_peft_model(base, DyLoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, **options))


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
    net, recorder = model(resample=resample, seed=11), Recorder()
    before = factors(net)
    trainer(tmp_path, net, accumulate=3, callbacks=[recorder]).train()
    policy = net.peft_config["default"].policy()
    expected = [(s, m, draw_rank(policy, 4, s, m), 4) for s in range(STEPS) for m in range(3)]
    assert recorder.seen == expected
    assert len({rank for _, _, rank, _ in expected}) > 1
    assert all(not torch.equal(p, before[name]) for name, p in factors(net).items())


@pytest.mark.parametrize("options", [{}, {"resample": "micro", "strict_frozen": True, "frozen": True}])
def test_resumed_run_equals_the_straight_one_bit_for_bit(tmp_path, options):
    straight = model(**options)
    trainer(tmp_path / "straight", straight, accumulate=2, callbacks=[PeftFusedCallback()]).train()
    resumed = model(**options)
    run = trainer(tmp_path / "resumed", resumed, accumulate=2, callbacks=[PeftFusedCallback()])
    run.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert run.state.global_step == STEPS
    a, b = factors(straight), factors(resumed)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_another_seed_trains_something_else(tmp_path):
    runs = [model(seed=seed) for seed in (0, 1)]
    for i, net in enumerate(runs):
        trainer(tmp_path / str(i), net, callbacks=[PeftFusedCallback()]).train()
    a, b = map(factors, runs)
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_strict_frozen_works_through_the_wrapped_optimizer(tmp_path):
    net = model(frozen=True, strict_frozen=True, init_weights=False)
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


def test_checkpointed_training_equals_plain_training(tmp_path):
    nets = [model(), model()]
    for i, net in enumerate(nets):
        checkpointing = bool(i)
        trainer(
            tmp_path / str(i), net, callbacks=[PeftFusedCallback()], gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False} if checkpointing else None,
        ).train()  # fmt: skip
    a, b = map(factors, nets)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_callback_on_a_model_without_a_schedule_is_an_error(tmp_path):
    base = copy.deepcopy(model().unload())
    lora = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no adapter with a schedule"):
        trainer(tmp_path, lora, callbacks=[PeftFusedCallback()]).train()
