"""Keeps an optimizer from moving the parts of a parameter that were not trained in this step.

A row without a gradient still has momentum and weight decay, by which Adam moves it. The guard copies the parameters
and their state before `optimizer.step` and puts back, after it, everything but the rows (or columns) that were trained.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch.optim import Optimizer


@dataclass
class Guarded:
    """A parameter, the dimension that the ranks lie on, and the indices along it that may change."""

    parameter: torch.nn.Parameter
    dim: int
    live: Callable[[], Iterable[int]]


class UpdateGuard:
    """Masks the steps of one optimizer. `entries` is replaced before every step."""

    def __init__(self, optimizer: Optimizer):
        self.entries: list[Guarded] = []
        self.after_step = lambda: None
        self._before: list[tuple[Guarded, dict]] = []
        optimizer.register_step_pre_hook(self._save)
        optimizer.register_step_post_hook(self._restore)

    @torch.no_grad()
    def _save(self, optimizer, args, kwargs):
        self._before = [
            (entry, {name: t.clone() for name, t in _tensors(optimizer, entry.parameter).items()})
            for entry in self.entries
        ]

    @torch.no_grad()
    def _restore(self, optimizer, args, kwargs):
        for entry, saved in self._before:
            index = torch.tensor(sorted(entry.live()), device=entry.parameter.device)
            for name, tensor in _tensors(optimizer, entry.parameter).items():
                moved = tensor.index_select(entry.dim, index)
                # State that this step created (Adam's first moments) starts at zero where nothing was trained.
                tensor.copy_(saved[name]) if name in saved else tensor.zero_()
                tensor.index_copy_(entry.dim, index, moved)
        self._before = []
        self.after_step()


def _tensors(optimizer: Optimizer, parameter) -> dict[str, torch.Tensor]:
    """The parameter itself and its optimizer state of the same shape."""
    state = optimizer.state.get(parameter, {})
    same = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.shape == parameter.shape}
    return {"": parameter, **same}


_GUARDS: WeakKeyDictionary[Optimizer, UpdateGuard] = WeakKeyDictionary()


def guard_updates(optimizer: Optimizer, entries: list[Guarded], after_step: Callable[[], None]) -> None:
    """Masks the next steps of the optimizer to the live indices of the entries; after_step() is called after each.

    The hooks are installed on the first call. ValueError if a trained parameter is none of the optimizer's.
    """
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for entry in entries:
        if hasattr(entry.parameter, "full_tensor"):
            raise ValueError("strict_frozen: sharded parameters (FSDP2, tensor parallel) are not supported")
        if entry.parameter.requires_grad and id(entry.parameter) not in owned:
            raise ValueError(
                "strict_frozen: an adapter parameter is not among the optimizer's; create the optimizer from the "
                "adapted model (flattened parameters, as FSDP1 makes them, are not supported)"
            )
    guard = _GUARDS.get(optimizer)
    if guard is None:
        guard = _GUARDS[optimizer] = UpdateGuard(optimizer)
    guard.entries, guard.after_step = [e for e in entries if id(e.parameter) in owned], after_step
