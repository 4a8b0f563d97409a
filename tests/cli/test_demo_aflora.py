"""The log of AFLoRA's freezing: numbers that agree with the matrices' shapes, and files while training goes on."""

import json

import pytest
import torch
from peft import get_peft_model
from torch import nn

import peft_fused
from peft_fused.cli import demo_aflora
from peft_fused.cli.demo_aflora import FreezingLog

STEPS = 12


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        for layer in self.block:
            x = layer(x).tanh()
        return x


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = peft_fused.AfLoraConfig(r=2, target_modules=["0", "1", "2"], frozen_modules=["1"], window=1)
    return get_peft_model(Blocks(), config)


def train(model, log, seen=lambda step: None):
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for step in range(STEPS):
        peft_fused.on_step(model, step=step, total_steps=STEPS, optimizer=optimizer)
        model(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        log.after_step()
        seen(step)


def test_trained_parameters_follow_from_the_freezing(model):
    log = FreezingLog(model, 0, STEPS)
    train(model, log)
    numbers = log.numbers()
    matrices, trained = numbers["matrices"], numbers["trainable"]
    frozen_at = [matrix["frozen_at"] for matrix in matrices]
    # The layer in the middle never trains A and B; of the others all are frozen in the end, not at once.
    assert frozen_at[2:4] == [0, 0] and len(set(frozen_at)) > 2 and None not in frozen_at
    vectors, matrix = 3 * (2 + 6), 2 * 6

    def at(step):
        return vectors + matrix * sum(end > step for end in frozen_at)

    noted = [max((e["step"], e["parameters"]) for e in trained if e["step"] <= step)[1] for step in range(STEPS)]
    assert noted == [at(step) for step in range(STEPS)]
    assert noted[0] == vectors + 4 * matrix and noted[-1] == vectors
    assert [e["step"] for e in trained] == sorted({0, *frozen_at})
    assert log.mean_trained() == pytest.approx(sum(map(at, range(STEPS))) / STEPS)


def test_files_are_rewritten_while_training_goes_on(model, tmp_path):
    log = FreezingLog(model, 3, STEPS, tmp_path)
    pictures, found = [], []

    def seen(step):
        pictures.append((tmp_path / "aflora.png").read_bytes())
        found.append(json.loads((tmp_path / "aflora.json").read_text()))

    train(model, log, seen)
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    changes = [entry["step"] for entry in log.numbers()["trainable"][1:]]
    assert len(changes) > 1
    for step in changes:
        assert found[step - 1]["steps"] == step and found[step - 1]["trainable"][-1]["step"] == step
        assert pictures[step - 1] != pictures[step - 2]
    assert found[changes[0] - 2]["steps"] == 0 and found[-1] == log.numbers() | {"steps": STEPS}
    assert found[-1]["seed"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["aflora.json", "aflora.png"]


def test_without_pictures_the_numbers_are_written(model, tmp_path):
    FreezingLog(model, 0, STEPS, tmp_path, picture=False)
    assert [path.name for path in tmp_path.iterdir()] == ["aflora.json"]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [("model.layer.11.output.dense", "11.output.dense"), ("a.0.b.2.c", "2.c"), ("encoder.dense", "dense")],
)
def test_short_names(layer, expected):
    assert demo_aflora.short(layer) == expected
