"""Every method in transformers' Trainer: resumed and checkpointed runs are the straight one, to the bit."""

import contract
import pytest
import torch
from contract import adapted, net
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from peft_fused import PeftFusedCallback, decay_groups


class Rows(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        return {"x": torch.randint(0, contract.VOCAB, (5,), generator=generator), "labels": i % contract.CLASSES}


def fresh(variant):
    model = adapted(variant, init_weights=True, modules_to_save=["head"], **variant.dropout)
    return model.train()


class Decayed(Trainer):
    def create_optimizer(self, *arguments, **options):
        self.optimizer = torch.optim.AdamW(decay_groups(self.model, 0.5), lr=1e-2)
        return self.optimizer


def run(folder, model, callbacks, resume=None, **arguments):
    settings = dict(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=contract.TOTAL,
        save_steps=3, logging_steps=100, report_to=[], use_cpu=True, disable_tqdm=True, seed=3,
    )  # fmt: skip
    arguments = TrainingArguments(**settings | arguments)
    trainer = Decayed(model=model, args=arguments, train_dataset=Rows(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.state.global_step == trainer.args.max_steps
    return model


def callbacks_of(variant):
    return [PeftFusedCallback()] if variant.method.schedule else []


def test_a_resumed_run_equals_the_straight_one_bit_for_bit(variant, tmp_path):
    before = contract.copied(dict(fresh(variant).named_parameters()))
    straight = run(tmp_path / "straight", fresh(variant), callbacks_of(variant))
    moved = dict(straight.named_parameters())
    assert all(not torch.equal(p, before[name]) for name, p in moved.items() if p.requires_grad)
    checkpoint = str(tmp_path / "straight" / "checkpoint-3")
    resumed = run(tmp_path / "resumed", fresh(variant), callbacks_of(variant), checkpoint)
    assert contract.same(straight.state_dict(), resumed.state_dict())
    assert contract.trainable(straight) == contract.trainable(resumed)


def test_checkpointed_training_equals_plain_training(variant, tmp_path):
    options = dict(save_strategy="no")
    plain = run(tmp_path, fresh(variant), callbacks_of(variant), **options)
    for reentrant in (False, True):
        kinds = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        other = run(tmp_path, fresh(variant), callbacks_of(variant), **options, **kinds)
        assert contract.same(plain.state_dict(), other.state_dict())


@pytest.mark.parametrize("variant", contract.only(lambda v: "seed" in v.config().__dict__), ids=str)
def test_another_seed_trains_something_else(variant, tmp_path):
    found = []
    for seed in (0, 1):
        model = adapted(variant, init_weights=True, seed=seed)
        run(tmp_path, model, callbacks_of(variant), save_strategy="no")
        found.append(contract.copied(model.state_dict()))
    assert not contract.same(*found)


def test_callback_on_a_model_without_a_schedule_is_an_error(tmp_path):
    lora = get_peft_model(net(), LoraConfig(target_modules=["first"]))
    with pytest.raises(ValueError, match="no adapter with a schedule"):
        run(tmp_path, lora, [PeftFusedCallback()])
