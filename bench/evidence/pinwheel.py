"""A small network on pinwheel data whose square hidden layers are dense, circulant, Toeplitz, or of low rank.

SURM (Sehanobish et al. 2024): structured layers reach what the dense ones do, low rank with as many parameters does
not. Rank 1 has 2 n parameters per layer; a Toeplitz matrix 2 n - 1, a circulant one n. First and last layer are dense
and trained in all of them.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from peft_fused.ops.structured import circulant_matmul, toeplitz_tail

from . import files

ARMS = 5
WIDTH = 64
HIDDEN = 3
POINTS = 200  # per arm to train on; twice as many are tested
STEPS = 400
LEARNING_RATE = 1e-2
SEEDS = 5


def pinwheel(per_arm: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Points [arms * per_arm, 2] on curved arms, and the arms that they are on. (Johnson et al. 2016.)"""
    arm = torch.arange(ARMS).repeat_interleave(per_arm)
    along, across = torch.randn(2, ARMS * per_arm, generator=generator)
    along, across = 1 + 0.3 * along, 0.05 * across
    angle = 2 * math.pi * arm / ARMS + along.exp()
    x = torch.stack([along * angle.cos() - across * angle.sin(), along * angle.sin() + across * angle.cos()], 1)
    return 2 * x, arm


class Square(nn.Module):
    """x M^T + bias for a square M of one of FAMILIES. Base class; entries start at the variance of a dense layer's."""

    def __init__(self, n: int, **shapes: tuple[int, ...]):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape) * n**-0.5))
        self.bias = nn.Parameter(torch.zeros(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x) + self.bias


class Dense(Square):
    def __init__(self, n: int):
        super().__init__(n, weight=(n, n))

    def product(self, x):
        return F.linear(x, self.weight)


class Circulant(Square):
    def __init__(self, n: int):
        super().__init__(n, c=(n,))

    def product(self, x):
        return circulant_matmul(x, self.c)


class Toeplitz(Square):
    def __init__(self, n: int):
        super().__init__(n, col=(n,), tail=(n - 1,))

    def product(self, x):
        return toeplitz_tail(x, self.col, self.tail)


class Rank1(Square):
    def __init__(self, n: int):
        super().__init__(n, a=(n,), b=(n,))
        nn.init.normal_(self.b)

    def product(self, x):
        return (x @ self.a).unsqueeze(-1) * self.b


FAMILIES = {"dense": Dense, "circulant": Circulant, "Toeplitz": Toeplitz, "rank 1": Rank1}


def network(family: str, width: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    first, last = nn.Linear(2, width), nn.Linear(width, ARMS)
    hidden = [FAMILIES[family](width) for _ in range(HIDDEN)]
    return nn.Sequential(first, nn.ReLU(), *(part for layer in hidden for part in (layer, nn.ReLU())), last)


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, steps: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def run(folder: Path = files.FOLDER, width: int = WIDTH, steps: int = STEPS, seeds: int = SEEDS) -> dict:
    """Accuracies on points not trained on, of every family and seed 0 to seeds - 1, which also draws the data."""
    found, models = {}, {}
    for family in FAMILIES:
        accuracies = []
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            (x, y), (x_test, y_test) = pinwheel(POINTS, generator), pinwheel(2 * POINTS, generator)
            model = network(family, width, seed)
            train(model, x, y, steps)
            accuracies.append((model(x_test).argmax(-1) == y_test).float().mean().item())
            models.setdefault(family, model)
        layer = sum(p.numel() for p in FAMILIES[family](width).parameters()) - width
        found[family] = {"parameters_per_matrix": layer, "accuracies": accuracies, **files.spread(accuracies)}
    result = {
        "seeds": list(range(seeds)), "width": width, "hidden_square_layers": HIDDEN, "steps": steps,
        "learning_rate": LEARNING_RATE, "train_points": ARMS * POINTS, "test_points": 2 * ARMS * POINTS,
        "accuracy": found,
    }  # fmt: skip
    files.write("pinwheel", result, folder)
    _plot(result, models, folder)
    return result


@torch.no_grad()
def _plot(result: dict, models: dict[str, nn.Module], folder: Path) -> None:
    """Decision regions of the first seed's models, with its test points."""
    generator = torch.Generator().manual_seed(0)
    pinwheel(POINTS, generator)
    x, y = pinwheel(2 * POINTS, generator)
    edge = x.abs().max().item() * 1.05
    line = torch.linspace(-edge, edge, 200)
    grid = torch.cartesian_prod(line, line)
    figure, axes = files.axes(len(models), 3 * len(models), 3.5)
    for axis, (family, model) in zip(axes, models.items(), strict=True):
        regions = model(grid).argmax(-1).view(200, 200).T
        axis.imshow(regions, origin="lower", extent=(-edge, edge, -edge, edge), cmap="Set3", interpolation="nearest")
        axis.scatter(*x.T, c=y, s=1, cmap="Set1")
        accuracy = result["accuracy"][family]
        axis.set(title=f"{family}: {accuracy['parameters_per_matrix']} per matrix, {accuracy['mean']:.3f}")
        axis.set_axis_off()
    files.picture("pinwheel", figure, folder)


def report(result: dict) -> str:
    """Lines for people."""
    return "\n".join(
        f"pinwheel, {family}: {each['parameters_per_matrix']} parameters per matrix, accuracy {each['mean']:.3f} +/- "
        f"{each['std']:.3f}, least {min(each['accuracies']):.3f}"
        for family, each in result["accuracy"].items()
    )
