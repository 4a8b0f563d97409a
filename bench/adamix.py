"""AdaMix with 1, 4 and 16 experts, and the obvious modules for it: one layer, and a training step of a few layers with
routes, optimizer and schedule. All variants have the same base layer, input and incoming gradient.
"""

import random
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from peft_fused.layers import AdaMixLinear
from peft_fused.layers.adamix.routes import PASSES, write_routes

from .benchmark import of_method
from .rows import STEP_LAYERS, Case, Comparison
from .shapes import Shape
from .variants import ALPHA_OVER_R, Layer, TrainingStep, frozen_layer, path_of
from .verify import WrongResult, refuse_wrong, relative_rms

EXPERTS = (1, 4, 16)
KINDS = ("adapter", "lora")


class Baseline(nn.Module):
    """The same layer as anyone would write it, and the authors do: lists of modules, one chosen by Python's random."""

    def __init__(self, layer: AdaMixLinear):
        super().__init__()
        self.base, self.adapter = layer.base, not layer.additive
        self.frozen = nn.ParameterList([layer.weight, layer.bias])
        self.scale = 1.0 if self.adapter else layer.block.scale
        self.sides = nn.ModuleList()
        for stack in (layer.block.down, layer.block.up):
            weights = stack.weight if stack.stacked else stack.weight[None]
            biases = [None] * len(weights) if stack.bias is None else stack.bias.reshape(len(weights), -1)
            self.sides.append(nn.ModuleList(map(self._linear, weights, biases)))

    @staticmethod
    def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
        made = nn.Linear(*weight.shape[::-1], bias=bias is not None, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            made.weight.copy_(weight)
            if bias is not None:
                made.bias.copy_(bias)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down, up = (random.choice(list(side)) for side in self.sides)
        h = self.base(x)
        if self.adapter:
            return h + up(F.gelu(down(h.to(down.weight.dtype)))).to(h.dtype)
        return h + self.scale * up(down(x.to(down.weight.dtype))).to(h.dtype)


def _layer(base: nn.Linear, shape: Shape, kind: str, experts: int) -> AdaMixLinear:
    layer = AdaMixLinear.from_linear(
        base, kind=kind, r=shape.r, num_experts=experts, alpha=ALPHA_OVER_R * shape.r, dtype=shape.adapter_dtype
    )
    torch.manual_seed(1)
    layer.block.randomize()
    layer.block.routes.scheduled = True  # a layer without a schedule warns
    return layer


def verify(layer: AdaMixLinear, x: torch.Tensor, dy: torch.Tensor, shape: Shape) -> dict[str, float]:
    """Relative RMS errors of the last expert's delta and gradients against plain modules in float64; WrongResult beyond
    the tolerance, or if an expert that was not routed has a gradient.
    """
    block = layer.block
    last = block.routes.policy.num_experts - 1 if block.down.stacked else 0
    write_routes([block.routes], [((last,) * PASSES, (0,) * PASSES)])
    reference = Baseline(layer)
    del reference.frozen  # the base layer's own, which are not to change their type
    reference.double()
    weight, bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()
    reference.base = lambda x: F.linear(x, weight, bias)
    reference.sides[0] = nn.ModuleList([reference.sides[0][last]])
    wide = x.detach().double().requires_grad_()
    ours, truth = Layer(layer, x, dy, layer.parameters()), Layer(reference, wide, dy.double(), reference.parameters())
    with torch.no_grad():
        errors = {
            "delta": relative_rms(layer(x).double() - layer.base(x).double(), reference(wide) - reference.base(wide))
        }
    ours.clear()  # of what was timed before
    ours.backward(ours.forward())
    truth.backward(truth.forward())
    down, up = (side[0] for side in reference.sides)
    pairs = {"dx": (x.grad, wide.grad), "dup": (block.up.weight.grad, up.weight.grad)}
    grad = block.down.weight.grad
    pairs["ddown"] = (grad[last] if block.down.stacked else grad, down.weight.grad)
    errors |= {name: relative_rms(got, true) for name, (got, true) in pairs.items()}
    stray = block.down.stacked and bool(grad[:last].any())
    ours.clear()
    if stray:
        raise WrongResult(f"adamix at {shape.name} {shape.dtype_name}: a gradient of an unrouted expert")
    return refuse_wrong(errors, shape, "adamix")


def cases(shape: Shape, device: torch.device) -> Iterator[Case]:
    """One per kind, of a comparison per number of experts: with the same layer of one expert, and with the obvious
    modules of as many."""
    base, x, dy = frozen_layer(shape, device)
    for kind in KINDS:
        layers = {str(experts): _layer(base, shape, kind, experts) for experts in EXPERTS}
        errors = {name: verify(layer, x, dy, shape) for name, layer in layers.items()}
        modules = dict(layers) | {f"baseline of {name}": Baseline(layer) for name, layer in layers.items()}
        case = Case(shape, {name: Layer(module, x, dy, module.parameters()) for name, module in modules.items()}, [])
        for name, layer in layers.items():
            case.comparisons.append(
                Comparison(
                    "adamix",
                    name,
                    {"one": "1", "baseline": f"baseline of {name}"},
                    path_of(layer, shape),
                    errors[name],
                    memory=("ours", "baseline"),
                    about={"kind": kind, "experts": int(name), "r": shape.r},
                )
            )
        if shape.k == shape.n:
            stacks = {name: [_layer(base, shape, kind, int(name)) for _ in range(STEP_LAYERS)] for name in layers}
            stacks |= {f"baseline of {name}": list(map(Baseline, stack)) for name, stack in stacks.items()}
            case.steps = {name: TrainingStep(stack, x, dy) for name, stack in stacks.items()}
        yield case


BENCHMARK = of_method(
    cases,
    Shape(4096, 768, 768, 16, op="adamix"),
    state=lambda row: f"{row['kind']}, E={row['experts']}",
    ratios={"/ one expert": "ratio_to_one", "/ plain": "ratio_to_baseline"},
    reference="baseline",
)
