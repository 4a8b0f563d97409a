"""SST-2 with a pretrained encoder: structured maps against low rank and bottlenecks with as many or more parameters.

Beside the query and value weights, at equal parameters: LoRA of rank 1, a circulant product C(a . b), and the product
of two symmetric Toeplitz matrices, 2 n each. On the outputs of attention and feed-forward (Houlsby et al. 2019): SURM's
circulant adapter, 3 n with its bias, against bottlenecks with twelve times as many. Everything else is the same: start,
batches, steps, head. Each method has the learning rate that a seed outside of the comparison preferred.
"""

import copy
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_fused
from peft_fused.cli import demo_data, demo_train
from peft_fused.cli.demo_train import Encoder, Settings
from peft_fused.integrations.peft.positions import default_targets

from . import files

SEEDS = (1, 2, 3)
SWEEP_SEED = 0
STEPS = 150
SWEEP_STEPS = 75
RATES = (1e-3, 3e-3, 1e-2)
SETTINGS = Settings(batch_size=32, max_length=64)
# Parameters of a bottleneck over those of a circulant adapter in the same place; SURM's claim is that these do as well.
MORE = 12
LAST = 20
QUERY_VALUE = ["query", "value"]


class Bottleneck(nn.Module):
    """h + up(gelu(down(h))) on the output h of a linear layer, as Houlsby et al. 2019; up starts at zero."""

    def __init__(self, base: nn.Linear, size: int):
        super().__init__()
        n = base.out_features
        self.base, self.down, self.up = base, nn.Linear(n, size), nn.Linear(size, n)
        nn.init.normal_(self.down.weight, std=0.02)
        for start in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(start)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.base(x)
        return h + self.up(nn.functional.gelu(self.down(h)))


def bottleneck_size(n: int) -> int:
    """The smallest with MORE times the 3 n parameters of a circulant adapter: 2 n per unit and its bias, and n."""
    return -(-(MORE * 3 * n - n) // (2 * n + 1))


def _bottlenecks(model: nn.Module) -> nn.Module:
    """A bottleneck wherever SURM's adapter kind goes by default; what is trained else is the head."""
    model.requires_grad_(False)
    targets = tuple(default_targets("houlsby", model.config.model_type))
    for name, module in list(model.base_model.named_modules()):
        if name.endswith(targets):
            parent, _, last = name.rpartition(".")
            setattr(
                model.base_model.get_submodule(parent), last, Bottleneck(module, bottleneck_size(module.out_features))
            )
    model.classifier.requires_grad_(True)
    return model


def _peft(config: Callable[..., object], **options) -> Callable[[nn.Module], nn.Module]:
    return lambda model: get_peft_model(model, config(task_type="SEQ_CLS", **options))


def _surm(**options):
    return _peft(peft_fused.SurmConfig, **options)


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "LoRA r=1": _peft(LoraConfig, r=1, lora_alpha=1, target_modules=QUERY_VALUE),
    "circulant": _surm(structure="circulant", target_modules=QUERY_VALUE),
    "Toeplitz": _surm(structure="symmetric_toeplitz", target_modules=QUERY_VALUE),
    "bottleneck adapter": _bottlenecks,
    "circulant adapter": _surm(structure="circulant", kind="adapter"),
}


def adapter_parameters(model: nn.Module) -> int:
    """Trained parameters without those of the head, which all methods train alike."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name)


def train(method: str, base: nn.Module, data, encode: Encoder, steps: int, rate: float, seed: int):
    """(trained model, losses) of a method from one seed; base is left alone."""
    torch.manual_seed(seed)
    with demo_train.quiet_transformers():
        model = METHODS[method](copy.deepcopy(base))
    settings = Settings(**vars(SETTINGS) | {"steps": steps, "lr": rate, "model": SETTINGS.model})
    found = demo_train.train({method: model}, data.train, encode, settings, seed, lambda: None)
    return model, found[method].losses


def run(folder: Path, data_folder: Path, model: str | None = None, **limits) -> dict:
    """Accuracies on the dev set of every method and seed. data_folder: has SST-2's train.tsv and dev.tsv.

    model: another encoder than the demo's. limits: steps, sweep_steps, seeds, rates, rows (to evaluate), for less.
    """
    steps, sweep_steps = limits.get("steps", STEPS), limits.get("sweep_steps", SWEEP_STEPS)
    seeds, rates = limits.get("seeds", SEEDS), limits.get("rates", RATES)
    data = demo_data.load(data_folder / "train.tsv", data_folder / "dev.tsv", "sentence", "label")
    settings = Settings(**vars(SETTINGS) | {"model": model})
    results = {method: {"sweep": {}, "accuracies": []} for method in METHODS}

    def each(seed: int):
        torch.manual_seed(seed)  # the new head is drawn here, the same for all methods
        base, tokenizer = demo_train.load(settings, len(data.classes))
        return base, Encoder(tokenizer, settings)

    base, encode = each(SWEEP_SEED)
    for method, result in results.items():
        for rate in rates:
            _, losses = train(method, base, data, encode, sweep_steps, rate, SWEEP_SEED)
            result["sweep"][rate] = statistics.fmean(losses[-LAST:])
        result["learning_rate"] = min(result["sweep"], key=result["sweep"].get)
    for seed in seeds:
        base, encode = each(seed)
        batches = demo_train.evaluation_batches(data.evaluation[: limits.get("rows")], encode, settings.batch_size)
        for method, result in results.items():
            model, _ = train(method, base, data, encode, steps, result["learning_rate"], seed)
            result["adapter_parameters"] = adapter_parameters(model)
            result["accuracies"].append(demo_train.accuracy(model, batches))
    for result in results.values():
        result |= files.spread(result["accuracies"])
    found = {
        "seeds": list(seeds), "sweep_seed": SWEEP_SEED, "sweep_steps": sweep_steps, "steps": steps,
        "batch_size": settings.batch_size, "max_length": settings.max_length, "evaluated_rows": sum(
            len(batch["labels"]) for batch in batches
        ),
        "methods": results,
    }  # fmt: skip
    files.write("sst2", found, folder)
    _plot(found, folder)
    return found


def _plot(result: dict, folder: Path) -> None:
    figure, (axis,) = files.axes(1, 6, 3.6)
    for method, each in result["methods"].items():
        axis.errorbar(each["adapter_parameters"], each["mean"], each["std"], marker="o", capsize=3, label=method)
    axis.set(xscale="log", xlabel="trained parameters without the head", ylabel="accuracy, SST-2 dev")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    files.picture("sst2", figure, folder)


def report(result: dict) -> str:
    """Lines for people."""
    return "\n".join(
        f"sst2, {method}: {each['adapter_parameters']:,} parameters, accuracy {each['mean']:.3f} +/- "
        f"{each['std']:.3f}, learning rate {each['learning_rate']:g}"
        for method, each in result["methods"].items()
    )
