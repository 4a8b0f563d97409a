"""AFLoRA against LoRA of the same rank, with none, one and both of its matrices frozen: one layer, and a training step
of a few layers with optimizer and schedule. All variants have the same base layer, input and incoming gradient.
"""

import copy
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from peft_fused.layers import AfLoraLinear, LoraLinear

from .benchmark import of_method
from .rows import STEP_LAYERS, Case, Comparison
from .shapes import Shape
from .variants import ALPHA_OVER_R, Layer, TrainingStep, frozen_layer, path_of
from .verify import refuse_wrong, relative_rms

# name: matrices frozen. That of A also drops the input; B's gradient is a by-product of the vectors'.
FROZEN = {"aflora": "", "aflora_A": "A", "aflora_B": "B", "aflora_AB": "AB"}


def baseline(layer: AfLoraLinear) -> Callable:
    """Plain PyTorch as anyone would write it."""

    def call(x):
        down, up = layer.lora_A.to(x.dtype), layer.lora_B.to(x.dtype)
        delta = F.linear(F.linear(x, down) * layer.lora_d.to(x.dtype), up) * layer.lora_b.to(x.dtype)
        return layer.base(x) + delta * layer.scale

    return call


def _aflora(base: nn.Linear, shape: Shape, frozen: str) -> AfLoraLinear:
    layer = AfLoraLinear.from_linear(base, r=shape.r, alpha=ALPHA_OVER_R * shape.r, dtype=shape.adapter_dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.lora_A.copy_(torch.randn(shape.r, shape.k, generator=generator) * shape.k**-0.5)
        layer.lora_B.copy_(torch.randn(shape.n, shape.r, generator=generator) * shape.r**-0.5)
        layer.lora_d.copy_(torch.rand(shape.r, generator=generator) + 0.5)
        layer.lora_b.copy_(torch.randn(shape.n, generator=generator))
    for matrix in frozen:
        layer.freezing.freeze(matrix, 1)
        getattr(layer, f"lora_{matrix}").requires_grad_(False)
    layer.freezing.scheduled = True  # a layer without a schedule warns
    return layer


def _lora(base: nn.Linear, shape: Shape) -> LoraLinear:
    layer = LoraLinear.from_linear(base, r=shape.r, alpha=ALPHA_OVER_R * shape.r, dtype=shape.adapter_dtype)
    nn.init.normal_(layer.lora_B, std=1 / (ALPHA_OVER_R * shape.r**0.5))
    return layer


def verify(variants: dict[str, Layer], truth: AfLoraLinear, shape: Shape) -> dict[str, float]:
    """Relative RMS errors of the layer with nothing frozen against plain PyTorch in float64; WrongResult beyond the
    tolerance, or if freezing changes any of the other gradients by more.
    """
    ours = variants["aflora"]
    x = ours.x.detach().double().requires_grad_()
    wide = copy.deepcopy(truth).double()
    reference = Layer(baseline(wide), x, ours.dy.double(), wide.parameters())
    names = ["dx", *(name for name, p in truth.named_parameters() if p.requires_grad)]
    with torch.no_grad():
        base = wide.base(x)
        errors = {"delta": relative_rms(ours.forward().double() - base, reference.forward() - base)}
    exact = dict(zip(names, reference.gradients(), strict=True))
    found = dict(zip(names, ours.gradients(), strict=True))
    errors |= {name: relative_rms(found[name], exact[name]) for name in names}
    for variant, frozen in FROZEN.items():
        left = [name for name in names if name[-1] not in frozen or not name.startswith("lora")]
        for name, grad in zip(left, variants[variant].gradients(), strict=True):
            errors[f"{name}, {variant}"] = relative_rms(grad, exact[name])
    return refuse_wrong(errors, shape, "aflora")


def cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    """One, of a comparison per state of freezing: with LoRA of the same rank by our op, and with plain PyTorch with the
    same matrices frozen. Whether the input is kept is what freezing A is about, so it counts."""
    base, x, dy = frozen_layer(shape, device)
    layers = {name: _aflora(base, shape, frozen) for name, frozen in FROZEN.items()}
    lora = _lora(base, shape)
    variants = {name: Layer(layer, x, dy, layer.parameters()) for name, layer in layers.items()}
    errors = verify(variants, layers["aflora"], shape)
    variants["lora"] = Layer(lora, x, dy, lora.parameters())
    for name in ("aflora", "aflora_AB"):
        layer = copy.deepcopy(layers[name])
        variants[f"baseline of {name}"] = Layer(baseline(layer), x, dy, layer.parameters())
    comparisons = [
        Comparison(
            "aflora", name, {"lora": "lora", "baseline": f"baseline of {name}"}, path_of(layers[name], shape), errors,
            memory=("ours", "lora", "baseline"),
            about={"r": shape.r, "frozen": frozen, "frozen_share": len(frozen) / 2},
        )
        for name, frozen in FROZEN.items()
    ]  # fmt: skip
    case = Case(shape, variants, comparisons, with_input=True)
    if shape.k == shape.n:
        # Layers of their own: an optimizer per stack, and parameters that none of them shares.
        stacks = {name: [_aflora(base, shape, f) for _ in range(STEP_LAYERS)] for name, f in FROZEN.items()}
        stacks["lora"] = [_lora(base, shape) for _ in range(STEP_LAYERS)]
        case.steps = {name: TrainingStep(stack, x, dy) for name, stack in stacks.items()}
    yield case


BENCHMARK = of_method(
    cases,
    Shape(4096, 768, 768, 8, op="aflora"),
    state=lambda row: f"frozen: {row['frozen'] or 'nothing'}",
    ratios={"/ LoRA": "ratio_to_lora", "/ plain": "ratio_to_baseline"},
    reference="lora",
)
