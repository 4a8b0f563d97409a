"""AFLoRA against LoRA of the same rank, with none, one and both of its matrices frozen: one layer, and a training step
of a few layers with optimizer and schedule. All variants have the same base layer, input and incoming gradient.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from peft_fused.layers import AfLoraLinear, LoraLinear

from .baselines import ALPHA_OVER_R, Layer, TrainingStep, path_of
from .shapes import Shape
from .timing import MODES, STEP, clock_of, interleave, ratio, step_clock
from .verify import TOLERANCE, WrongResult, relative_rms

# name: matrices frozen. That of A also drops the input; B's gradient is a by-product of the vectors'.
FROZEN = {"aflora": "", "aflora_A": "A", "aflora_B": "B", "aflora_AB": "AB"}
STEP_LAYERS = 4


def lines(layer: AfLoraLinear) -> Callable:
    """The obvious lines of plain PyTorch."""

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


def kept_bytes(variant: Layer) -> int:
    """Bytes kept for backward, per storage, without the parameters; the input counts, it is some layer's output."""
    parameters = {p.untyped_storage().data_ptr() for p in variant.parameters}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = variant.forward()
    del y
    return sum(size for pointer, size in kept.items() if pointer not in parameters)


def verify(variants: dict[str, Layer], truth: AfLoraLinear, shape: Shape) -> dict[str, float]:
    """Relative RMS errors of the layer with nothing frozen against the lines in float64; WrongResult beyond the
    tolerance, or if freezing changes any of the other gradients by more.
    """
    limit = TOLERANCE[shape.dtype]
    ours = variants["aflora"]
    x = ours.x.detach().double().requires_grad_()
    wide = copy.deepcopy(truth).double()
    reference = Layer(lines(wide), x, ours.dy.double(), wide.parameters())
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
    wrong = {what: error for what, error in errors.items() if not error <= limit}
    if wrong:
        text = ", ".join(f"{what} {error:.2e}" for what, error in wrong.items())
        raise WrongResult(f"aflora at {shape.name} {shape.dtype_name}: {text} beyond {limit:.0e}")
    return errors


def run_case(shape: Shape, device: torch.device, *, seconds: float) -> list[dict]:
    """One row per state of freezing and mode; the mode "step", of a square layer only, is a whole training step.

    Ratios are to LoRA of the same rank by our op, and to the lines of plain PyTorch with the same matrices frozen.
    """
    torch.manual_seed(0)
    base = nn.Linear(shape.k, shape.n).to(device, shape.dtype).requires_grad_(False)
    x = torch.randn(shape.m, shape.k, device=device, dtype=shape.dtype, requires_grad=True)
    dy = torch.randn(shape.m, shape.n, device=device, dtype=shape.dtype)
    layers = {name: _aflora(base, shape, frozen) for name, frozen in FROZEN.items()}
    lora = _lora(base, shape)
    variants = {name: Layer(layer, x, dy, layer.parameters()) for name, layer in layers.items()}
    errors = verify(variants, layers["aflora"], shape)
    variants["lora"] = Layer(lora, x, dy, lora.parameters())
    for name in ("aflora", "aflora_AB"):
        layer = copy.deepcopy(layers[name])
        variants[f"lines of {name}"] = Layer(lines(layer), x, dy, layer.parameters())
    saved = {name: kept_bytes(variant) for name, variant in variants.items()}
    times = interleave(variants, clock_of(device, shape.calls), seconds=seconds)
    if shape.k == shape.n:
        # Layers of their own: an optimizer per stack, and parameters that none of them shares.
        stacks = {name: [_aflora(base, shape, f) for _ in range(STEP_LAYERS)] for name, f in FROZEN.items()}
        stacks["lora"] = [_lora(base, shape) for _ in range(STEP_LAYERS)]
        measured = {name: TrainingStep(stack, x, dy) for name, stack in stacks.items()}
        for name, found in interleave(measured, step_clock(device), seconds=seconds).items():
            times[name][STEP] = found["both"]

    def row(name: str, mode: str) -> dict:
        mine, plain = times[name][mode], times.get(f"lines of {name}", {}).get(mode)
        others = {"ours": mine, "lora": times["lora"][mode], "lines": plain}
        return {
            "op": "aflora",
            "shape": shape.name,
            "r": shape.r,
            "frozen": FROZEN[name],
            "frozen_share": len(FROZEN[name]) / 2,
            "dtype": shape.dtype_name,
            "dropout": 0.0,
            "mode": mode,
            "ratio_to_lora": ratio(mine, times["lora"][mode]),
            "ratio_to_lines": None if plain is None else ratio(mine, plain),
            "ms_median": {label: t.median for label, t in others.items() if t},
            "ms_iqr": {label: t.iqr for label, t in others.items() if t},
            "rounds": len(mine.ms),
            "layers": STEP_LAYERS if mode == STEP else 1,
            "path": path_of(layers[name], shape),
            "saved_bytes": {"ours": saved[name], "lora": saved["lora"], "lines": saved.get(f"lines of {name}")},
            "skipped": {},
            "error_vs_reference": errors,
        }

    modes = MODES + ((STEP,) if shape.k == shape.n else ())
    return [row(name, mode) for name in FROZEN for mode in modes]
