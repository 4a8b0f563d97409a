"""The ways to compute one adapted layer that are compared: same weights, same input, same incoming gradient."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

import peft_fused
from peft_fused.methods.schedule import members_of
from peft_fused.ops import dispatch

from .shapes import Shape

ALPHA_OVER_R = 2.0
TARGET = "linear"


class Layer:
    """A callable on x with the leaves whose gradients it fills; a timing.Variant.

    unchecked: results that are known to be wrong in a baseline and are therefore not compared.
    """

    unchecked: tuple[str, ...] = ()

    def __init__(self, call: Callable, x: torch.Tensor, dy: torch.Tensor, parameters, path: str = ""):
        self.call, self.x, self.dy, self.path = call, x, dy, path
        self.parameters = list(parameters)
        self.trainable = [p for p in self.parameters if p.requires_grad]

    def forward(self) -> torch.Tensor:
        return self.call(self.x)

    def backward(self, y: torch.Tensor) -> None:
        y.backward(self.dy)

    def clear(self) -> None:
        self.x.grad = None
        for parameter in self.trainable:
            parameter.grad = None

    def gradients(self) -> list[torch.Tensor]:
        """[dX, dA, dB] of one step, cleared from the leaves."""
        self.clear()
        self.backward(self.forward())
        grads = [self.x.grad] + [p.grad for p in self.trainable]
        self.clear()
        return grads


class TrainingStep:
    """A training step of a stack of layers: schedule and forward pass, then backward and the optimizer's update."""

    def __init__(self, layers: list[torch.nn.Module], x: torch.Tensor, dy: torch.Tensor):
        self.model, self.x, self.dy = torch.nn.Sequential(*layers), x.detach(), dy
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-9, fused=True)  # as Trainer makes it
        self.step = 0

    def forward(self) -> torch.Tensor:
        # A run of which no end comes into sight, for methods whose schedule has one.
        peft_fused.on_step(self.model, step=self.step, total_steps=1 << 30, optimizer=self.optimizer)
        self.step += 1
        return self.model(self.x)

    def backward(self, y: torch.Tensor) -> None:
        y.backward(self.dy)
        self.optimizer.step()

    def clear(self) -> None:
        self.optimizer.zero_grad()


@dataclass
class Case:
    """All variants of one shape, and the reasons for those left out.

    references: what a variant must equal when dropout is off; the PEFT layer is its own reference in eval mode.
    """

    shape: Shape
    variants: dict[str, Layer]
    references: dict[str, Layer]
    peft_model: torch.nn.Module
    skipped: dict[str, str]
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
    """The three lines anyone can write: base, down product, and the up product added in place."""

    def call(x):
        y = base(x)
        s = F.linear(F.dropout(x, dropout), A.to(x.dtype))
        return y.addmm_(s, B.to(x.dtype).t(), alpha=scale)

    return call


def addmm_at_rank(base, A: torch.Tensor, B: torch.Tensor, rank: int, scale: float, dropout: float) -> Callable:
    """DyLoRA in three lines: the first `rank` rows of A and columns of B."""

    def call(x):
        return addmm(base, A[:rank], B[:, :rank], scale, dropout)(x)

    return call


def path_of(model: torch.nn.Module, shape: Shape) -> str:
    """The op that the model's layer calls, and what that op runs for this shape."""
    return "; ".join(path for _, path, _ in dispatch.explain(model, rows=shape.m).lines)


def build(shape: Shape, device: torch.device, seed: int = 0) -> Case:
    """Every variant but the compiled one, which compile_peft adds."""
    torch.manual_seed(seed)
    base = torch.nn.Linear(shape.k, shape.n).to(device, shape.dtype).requires_grad_(False)
    x = torch.randn(shape.m, shape.k, device=device, dtype=shape.dtype, requires_grad=True)
    dy = torch.randn(shape.m, shape.n, device=device, dtype=shape.dtype)

    peft_model = _wrap(base, _config(LoraConfig, shape, lora_dropout=shape.dropout), shape)
    layer = adapted_layer(peft_model)
    _fill_b(layer, shape)
    fused_model = copy.deepcopy(peft_model)
    peft_fused.accelerate(fused_model)
    fused = adapted_layer(fused_model)
    A, B = (copy.deepcopy(module["default"].weight) for module in (layer.lora_A, layer.lora_B))

    variants = {
        "base": Layer(base, x, dy, base.parameters()),
        "peft": Layer(layer, x, dy, layer.parameters()),
        "fused": Layer(fused, x, dy, fused.parameters()),
        "addmm": Layer(addmm(base, A, B, ALPHA_OVER_R, shape.dropout), x, dy, (A, B, *base.parameters())),
    }
    variants["fused"].path = path_of(fused_model, shape)
    case = Case(shape, variants, {"fused": variants["peft"]}, peft_model, {})
    _add_dylora(case, base, A, B)
    return case


def _add_dylora(case: Case, base, A, B) -> None:
    """DyLoRA at half its rank, where its cost is meant to be lower, and the same thing in three lines."""
    shape, x, dy = case.shape, case.variants["base"].x, case.variants["base"].dy
    rank = case.dylora_rank = max(1, shape.r // 2)
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
    case.variants["dylora"] = Layer(layer, x, dy, layer.parameters(), path_of(model, shape))
    case.variants["dylora_addmm"] = Layer(addmm_at_rank(base, A, B, rank, scale, shape.dropout), x, dy, parameters)
    case.references["dylora"] = Layer(addmm_at_rank(base, A, B, rank, scale, 0.0), x, dy, parameters)


def compile_peft(case: Case, budget_s: float) -> float:
    """Adds the variant "compiled" (torch.compile of the PEFT layer) or the reason why not; returns the seconds spent.

    Compilation cannot be interrupted, so the budget can only decide whether it is started.
    """
    if budget_s <= 0:
        case.skipped["compiled"] = "the time set aside for compiling is spent"
        return 0.0
    start = time.perf_counter()
    # All layers share their code: beyond a number of variants of it torch would quietly run the next one uncompiled.
    torch._dynamo.reset()
    model = copy.deepcopy(case.peft_model)
    layer = adapted_layer(model)
    peft = case.variants["peft"]
    variant = Layer(torch.compile(layer, dynamic=False), peft.x, peft.dy, layer.parameters())
    try:
        variant.gradients()
        case.variants["compiled"] = variant
    except Exception as error:  # whatever inductor or the host compiler raises, the benchmark goes on without it
        case.skipped["compiled"] = f"torch.compile failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return time.perf_counter() - start


def saved_bytes(variant: Layer) -> int:
    """Bytes kept for backward, per storage, without the parameters and x, which are there anyway."""
    known = {t.untyped_storage().data_ptr() for t in (variant.x, *variant.parameters)}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = variant.forward()
    total = sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in known)
    del y
    return total


def cuda_peak_bytes(variant: Layer) -> int:
    """Peak of allocated device memory over one training step, above what was allocated before it."""
    variant.clear()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    variant.backward(variant.forward())
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    variant.clear()
    return peak
