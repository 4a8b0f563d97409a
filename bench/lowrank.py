"""LoRA and DyLoRA layers beside the frozen layer, PEFT, the baseline in plain PyTorch, and torch.compile of PEFT:
same weights, same input, same incoming gradient.
"""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

import peft_fused
from peft_fused.methods.schedule import members_of

from .benchmark import Benchmark, CompileBudget, Table
from .rows import Case, Comparison
from .shapes import BF16, Shape
from .variants import ALPHA_OVER_R, Layer, frozen_layer, path_of
from .verify import WrongResult, refuse_wrong, relative_rms

TINY = (Shape(4, 32, 32, 8, compiled=True), Shape(64, 96, 80, 4, dropout=0.1))

CPU = (
    Shape(4, 32, 32, 8, compiled=True),
    Shape(4096, 768, 768, 8, compiled=True),
    Shape(4096, 768, 768, 8, dropout=0.1),
    Shape(4096, 768, 768, 8, BF16),
    Shape(4096, 768, 3072, 8),
    Shape(512, 4096, 4096, 16),
    Shape(512, 4096, 4096, 16, BF16),
)

CPU_ALL = (
    *CPU,
    Shape(4096, 768, 768, 8, BF16, BF16),
    Shape(4096, 768, 768, 64),
    Shape(4096, 3072, 768, 8),
    Shape(512, 4096, 4096, 16, dropout=0.1),
    Shape(512, 768, 768, 8),
    Shape(32, 768, 768, 8),
    Shape(1, 4096, 4096, 16),
)

# What matters most comes first, in case a run on a borrowed GPU is cut short.
_CUDA_BF16 = [
    Shape(m, k, n, r, BF16, adapter)
    for m, k, n, r in (
        (4096, 768, 768, 8),
        (4096, 4096, 4096, 16),
        (512, 4096, 4096, 16),
        (4096, 768, 3072, 8),
        (4096, 4096, 4096, 128),
        (1, 4096, 4096, 16),
        (64, 4096, 4096, 16),
        (16384, 4096, 4096, 16),
        (16384, 8192, 8192, 64),
        (4096, 4096, 14336, 16),
    )
    for adapter in (torch.float32, BF16)
]
CUDA = (
    *_CUDA_BF16,
    Shape(4, 32, 32, 8),
    Shape(4096, 768, 768, 8),
    Shape(4096, 768, 768, 8, BF16, dropout=0.1),
    Shape(4096, 4096, 4096, 16, BF16, dropout=0.1),
    Shape(4096, 4096, 4096, 16, BF16, BF16, dropout=0.1),
)

TARGET = "linear"
# The share of the delta that dropout leaves on average is 1; with thousands of masked inputs it is met within this.
DROPOUT_TOLERANCE = 0.1
DROPOUT_LEAST = 1 << 16


@dataclass
class Variants:
    """All variants of one shape, and the paths of ours.

    references: what a variant must equal when dropout is off; the PEFT layer is its own reference in eval mode.
    """

    shape: Shape
    layers: dict[str, Layer]
    paths: dict[str, str]
    references: dict[str, Layer]
    peft_model: torch.nn.Module
    dylora_rank: int = 0


class _Host(torch.nn.Module):
    """The smallest model that get_peft_model takes."""

    def __init__(self, base: torch.nn.Linear):
        super().__init__()
        self.linear = base

    def forward(self, x):
        return self.linear(x)


def adapted_layer(model) -> torch.nn.Module:
    return model.base_model.model.get_submodule(TARGET)


def _config(kind, shape: Shape, **more):
    return kind(r=shape.r, lora_alpha=ALPHA_OVER_R * shape.r, target_modules=[TARGET], **more)


def _wrap(base: torch.nn.Linear, config, shape: Shape):
    model = get_peft_model(
        _Host(copy.deepcopy(base)), config, autocast_adapter_dtype=shape.adapter_dtype == torch.float32
    )
    return model.train()


def _fill_b(layer, shape: Shape) -> None:
    """B starts at zero; the benchmark needs a delta as large as the base output, or a wrong delta would go unseen."""
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(0, 1 / (ALPHA_OVER_R * shape.r**0.5))


def addmm(base, A: torch.Tensor, B: torch.Tensor, scale: float, dropout: float) -> Callable:
    """The baseline that anyone can write: base, down product, and the up product added in place."""

    def call(x):
        y = base(x)
        s = F.linear(F.dropout(x, dropout), A.to(x.dtype))
        return y.addmm_(s, B.to(x.dtype).t(), alpha=scale)

    return call


def addmm_at_rank(base, A: torch.Tensor, B: torch.Tensor, rank: int, scale: float, dropout: float) -> Callable:
    """The same for DyLoRA: the first `rank` rows of A and columns of B."""

    def call(x):
        return addmm(base, A[:rank], B[:, :rank], scale, dropout)(x)

    return call


def build(shape: Shape, device: torch.device) -> Variants:
    """Every variant but the compiled one, which compile_peft adds."""
    base, x, dy = frozen_layer(shape, device)
    peft_model = _wrap(base, _config(LoraConfig, shape, lora_dropout=shape.dropout), shape)
    layer = adapted_layer(peft_model)
    _fill_b(layer, shape)
    fused_model = copy.deepcopy(peft_model)
    peft_fused.accelerate(fused_model)
    fused = adapted_layer(fused_model)
    A, B = (copy.deepcopy(module["default"].weight) for module in (layer.lora_A, layer.lora_B))

    layers = {
        "frozen": Layer(base, x, dy, base.parameters()),
        "peft": Layer(layer, x, dy, layer.parameters()),
        "fused": Layer(fused, x, dy, fused.parameters()),
        "addmm": Layer(addmm(base, A, B, ALPHA_OVER_R, shape.dropout), x, dy, (A, B, *base.parameters())),
    }
    found = Variants(shape, layers, {"fused": path_of(fused_model, shape)}, {"fused": layers["peft"]}, peft_model)
    _add_dylora(found, base, A, B)
    return found


def _add_dylora(found: Variants, base, A, B) -> None:
    """DyLoRA at half its rank, where its cost is meant to be lower, and its baseline in plain PyTorch."""
    shape, x, dy = found.shape, found.layers["frozen"].x, found.layers["frozen"].dy
    rank = found.dylora_rank = max(1, shape.r // 2)
    model = _wrap(base, _config(peft_fused.DyLoraConfig, shape, lora_dropout=shape.dropout), shape)
    layer = adapted_layer(model)
    (member,) = members_of(model)["dylora"]
    with torch.no_grad():
        member.A.copy_(A)
        member.B.copy_(B)
    peft_fused.on_step(model, step=0)  # a layer without a schedule warns; the rank drawn is replaced at once
    peft_fused.set_dylora_rank(model, rank)
    A, B = copy.deepcopy(A), copy.deepcopy(B)
    parameters, scale = (A, B, *base.parameters()), ALPHA_OVER_R * shape.r / rank
    found.paths["dylora"] = path_of(model, shape)
    found.layers["dylora"] = Layer(layer, x, dy, layer.parameters())
    found.layers["dylora_addmm"] = Layer(addmm_at_rank(base, A, B, rank, scale, shape.dropout), x, dy, parameters)
    found.references["dylora"] = Layer(addmm_at_rank(base, A, B, rank, scale, 0.0), x, dy, parameters)


def compile_peft(found: Variants, budget: CompileBudget) -> str:
    """Adds the variant "compiled" (torch.compile of the PEFT layer); the reason why not, or an empty string."""
    if why := budget.refusal(found.shape):
        return why
    start = time.perf_counter()
    # All layers share their code: beyond a number of variants of it torch would quietly run the next one uncompiled.
    torch._dynamo.reset()
    layer = adapted_layer(copy.deepcopy(found.peft_model))
    peft = found.layers["peft"]
    variant = Layer(torch.compile(layer, dynamic=False), peft.x, peft.dy, layer.parameters())
    try:
        variant.gradients()
        found.layers["compiled"] = variant
    except Exception as error:  # whatever inductor or the host compiler raises, the benchmark goes on without it
        why = f"torch.compile failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    budget.seconds -= time.perf_counter() - start
    return why


# ---------------------------------------------------------------------------------------------------------------- check


def _set_training(found: Variants, training: bool) -> None:
    for variant in found.layers.values():
        if isinstance(variant.call, torch.nn.Module):
            variant.call.train(training)


def _errors(ours: Layer, reference: Layer, frozen: torch.Tensor) -> dict[str, float]:
    """Relative RMS error of the delta alone and of every gradient."""
    delta, truth = (variant.forward().detach().double() - frozen.double() for variant in (ours, reference))
    errors = {"delta": relative_rms(delta, truth)}
    for name, grad, expected in zip(("dx", "dA", "dB"), ours.gradients(), reference.gradients(), strict=True):
        errors[name] = relative_rms(grad, expected)
    return errors


def _check_dropout(name: str, dropped: torch.Tensor, full: torch.Tensor) -> None:
    """Masks differ between implementations, so dropout is judged by what it leaves of the delta: the projection on
    the undropped delta is 1 on average, and something was dropped."""
    dropped, full = dropped.double(), full.double()
    share = ((dropped * full).sum() / (full * full).sum()).item()
    if relative_rms(dropped, full) < 1e-2:
        raise WrongResult(f"{name}: dropout is configured but nothing is dropped")
    if full.numel() >= DROPOUT_LEAST and abs(share - 1) > DROPOUT_TOLERANCE:
        raise WrongResult(f"{name}: with dropout {share:.3f} of the delta is left on average, expected 1")


def verify(found: Variants) -> dict[str, dict[str, float]]:
    """Errors of ours with dropout off; WrongResult when one is beyond the tolerance."""
    frozen = found.layers["frozen"].forward().detach()
    _set_training(found, False)
    try:
        errors = {name: _errors(found.layers[name], truth, frozen) for name, truth in found.references.items()}
    finally:
        _set_training(found, True)
    for name, each in errors.items():
        refuse_wrong(each, found.shape, name)
    if found.shape.dropout:
        for name, reference in found.references.items():
            _set_training(found, False)
            undropped = reference.forward().detach()
            _set_training(found, True)
            _check_dropout(name, found.layers[name].forward().detach() - frozen, undropped - frozen)
    return errors


def cases(shape: Shape, device: torch.device, budget: CompileBudget) -> Iterator[Case]:
    """One: LoRA, and DyLoRA at half its rank, which PEFT does not have."""
    found = build(shape, device)
    errors = verify(found)
    why = compile_peft(found, budget)

    def comparison(op: str, ours: str, rank: int, **references) -> Comparison:
        return Comparison(
            op, ours, {"frozen": "frozen"} | references, found.paths[ours], errors[ours], memory=("ours", "peft"),
            about={"r": shape.r, "active_rank": rank},
        )  # fmt: skip

    lora = comparison("lora", "fused", shape.r, peft="peft", addmm="addmm", compiled="compiled")
    dylora = comparison("dylora", "dylora", found.dylora_rank, peft=None, addmm="dylora_addmm", compiled=None)
    yield Case(shape, found.layers, [lora, dylora], {"compiled": why} if why else {})


def _rank(row: dict) -> str:
    return str(row["r"]) if row["active_rank"] == row["r"] else f"{row['active_rank']} of {row['r']}"


BENCHMARK = Benchmark(
    ops=("lowrank",),
    rows=("lora", "dylora"),
    cases=cases,
    compiles=True,
    seconds={"tiny": 0.2, "default": 6.0, "all": 15.0},
    shapes={"tiny": TINY, "default": CPU, "all": CPU_ALL, "cuda": CUDA},
    table=Table(
        "adapted layers",
        first={"rank": _rank, "drop": lambda row: f"{row['dropout']:g}"},
        ratios={
            "/ frozen": "ratio_to_frozen",
            "/ PEFT": "ratio_to_peft",
            "/ addmm_": "ratio_to_addmm",
            "/ compiled": "ratio_to_compiled",
        },
        saved={"saved,\nours": "ours", "saved,\nPEFT": "peft"},
        last={"of\nfloor": lambda row: f"{row['floor_ms'] / row['ms_median']['ours']:.0%}"},
    ),
)
