"""Keeps an optimizer from moving the parts of a parameter that were not trained in this step.

A row without a gradient still has momentum and weight decay, by which Adam moves it. So parameters and their state are
copied before the update, and all but the rows (or columns) that were trained is put back after it.
"""

from collections.abc import Iterable
from itertools import groupby

import torch
from torch import nn
from torch.optim import Optimizer

from ..layers.sharded import is_sharded
from .schedule import check_owned


def check_guarded(option: str, optimizer: Optimizer | None, parameters: Iterable[nn.Parameter]) -> None:
    """ValueError, naming the option, if the optimizer's updates of these parameters cannot be masked."""
    if optimizer is None:
        raise ValueError(f"{option}=True masks the optimizer's update: pass optimizer= to on_step")
    parameters = list(parameters)
    if any(map(is_sharded, parameters)):
        raise ValueError(f"{option}: sharded parameters (FSDP2, tensor parallel) are not supported")
    check_owned(option, (parameter for parameter in parameters if parameter.requires_grad), optimizer)


class Kept:
    """A parameter and its optimizer state as they are before an update. dim: along which a part of it is trained."""

    @torch.no_grad()
    def __init__(self, optimizer: Optimizer, parameter: nn.Parameter, dim: int):
        self.optimizer, self.parameter, self.dim = optimizer, parameter, dim
        self.saved = {name: tensor.clone() for name, tensor in self._tensors().items()}

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The parameter itself and its optimizer state of the same shape."""
        state = self.optimizer.state.get(self.parameter, {})
        same = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.shape == self.parameter.shape}
        return {"": self.parameter, **same}

    @torch.no_grad()
    def restore(self, live: Iterable[int]) -> None:
        """Puts back all but the live indices along `dim`."""
        # By runs of neighbours: a tensor of indices would have the host wait for its copy to the device.
        runs = [[i for _, i in run] for _, run in groupby(enumerate(sorted(live)), lambda pair: pair[1] - pair[0])]
        for name, tensor in self._tensors().items():
            parts = [tensor.narrow(self.dim, run[0], len(run)) for run in runs]
            moved = [(part, part.clone()) for part in parts]
            # State that this step created (Adam's first moments) starts at zero where nothing was trained.
            tensor.copy_(self.saved[name]) if name in self.saved else tensor.zero_()
            for target, value in moved:
                target.copy_(value)
