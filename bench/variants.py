"""What is timed: a layer with the leaves whose gradients it fills, or a training step; and the bytes that one keeps."""

from collections.abc import Callable

import torch

import peft_fused
from peft_fused.ops import dispatch

from .shapes import Shape

ALPHA_OVER_R = 2.0


class Layer:
    """A callable on x with the leaves whose gradients it fills; a timing.Variant.

    unchecked: results that are known to be wrong in a baseline and are therefore not compared.
    """

    unchecked: tuple[str, ...] = ()

    def __init__(self, call: Callable, x: torch.Tensor, dy: torch.Tensor, parameters):
        self.call, self.x, self.dy = call, x, dy
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
        """Of x and of every parameter that is trained, after one step, cleared from the leaves."""
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


def frozen_layer(shape: Shape, device: torch.device) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """A frozen layer, its input and the gradient that comes in: the same for all variants of a shape."""
    torch.manual_seed(0)
    base = torch.nn.Linear(shape.k, shape.n).to(device, shape.dtype).requires_grad_(False)
    x = torch.randn(shape.m, shape.k, device=device, dtype=shape.dtype, requires_grad=True)
    return base, x, torch.randn(shape.m, shape.n, device=device, dtype=shape.dtype)


def path_of(model: torch.nn.Module, shape: Shape) -> str:
    """The op that the model's layer calls, and what that op runs for this shape."""
    return "; ".join(path for _, path, _ in dispatch.explain(model, rows=shape.m).lines)


def saved_bytes(variant: Layer, *, with_input: bool = False) -> int:
    """Bytes kept for backward, per storage, without the parameters, which are there anyway; nor the input, unless
    whether it is kept is the question: it is some layer's output."""
    known = {t.untyped_storage().data_ptr() for t in variant.parameters}
    known |= set() if with_input else {variant.x.untyped_storage().data_ptr()}
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
