"""The pretrained weight, kept on the host, and which weights can be split."""

from collections.abc import Iterable
from itertools import chain

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from ..checks import check_own_weight, span
from ..sharded import is_sharded, local, part_of

# How far apart two devices' fp64 sums may be, in terms of the largest pretrained value.
SUM_ROUNDING = 64 * torch.finfo(torch.float64).eps


def check_writable(name: str, base: nn.Module) -> None:
    """TypeError or ValueError if a module's weight cannot be split now."""
    check_own_weight(f"{name}:", base, but="; ROSA changes the weight in place, which that would undo")
    weight = base.weight
    if is_sharded(weight):
        raise ValueError(f"{name}: the weight is sharded already; ROSA has to be added before fully_shard")
    if weight.is_meta or isinstance(weight, FakeTensor):
        raise ValueError(
            f"{name}: the weight has no values (meta device, fake, or offloaded); ROSA splits and changes it"
        )
    if span(weight) < weight.numel():
        raise ValueError(
            f"{name}: elements of the weight share memory (shape {list(weight.shape)}, strides {weight.stride()}, as "
            "expand makes them); ROSA changes each by itself: give the layer a contiguous weight"
        )


def check_finite(name: str, weight: torch.Tensor) -> None:
    """ValueError if a weight has no singular directions."""
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}: the weight has values that are not finite, so that it has no singular directions")


class PretrainedWeight:
    """W0 on the host, in its own dtype and layout: this process's part of it if the weight is sharded."""

    def __init__(self, weight: torch.Tensor):
        self.values = local(weight).to("cpu", copy=True)

    def part(self, weight: torch.Tensor) -> torch.Tensor:
        """This process's part of W0, on the weight's device. The weight may have been sharded since W0 was taken."""
        held = local(weight)
        if self.values.shape != held.shape:
            self.values = part_of(self.values.to(held.device), weight).to("cpu", copy=True)
        return self.values.to(held.device)

    def whole(self, weight: torch.Tensor) -> torch.Tensor:
        """W0 on the weight's device; collective for a sharded one."""
        part = self.part(weight)
        if not is_sharded(weight):
            return part
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            part, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        ).full_tensor()

    def plus(self, weight: torch.Tensor, change: torch.Tensor | None) -> torch.Tensor:
        """This process's part of round(W0 + change), or of W0; change in the layout of the weight, whole."""
        part = self.part(weight)
        return (part if change is None else part + part_of(change, weight)).to(weight.dtype)

    def write(self, weight: torch.Tensor, change: torch.Tensor | None) -> None:
        """Sets the weight to that, in place."""
        local(weight).copy_(self.plus(weight, change))

    def is_in(self, weight: torch.Tensor, change: torch.Tensor | None) -> bool:
        """Whether this process's part of a weight is W0 + change, up to one rounding, as another device computes it."""
        expected, W0 = self.plus(weight, change), self.part(weight)
        if expected.numel() == 0:
            return True
        info = torch.finfo(weight.dtype)
        room = info.eps * expected.abs().double() + min(info.eps, SUM_ROUNDING) * W0.abs().max() + info.tiny
        return bool(((local(weight).double() - expected).abs() <= room).all())

    def adopt(
        self, weight: torch.Tensor, change: torch.Tensor | None, others: Iterable[torch.Tensor | None] = ()
    ) -> None:
        """Takes W0 from a weight that was loaded and should hold W0 + change: if it does not, it is of another W0.

        others: further changes with which it may have been saved; where it holds W0 plus one of them, W0 stays as well.
        """
        held = (self.is_in(weight, each) for each in chain([change], others))
        # Changes may be collective, so that for sharded weights all processes have to ask for all of them.
        if not any(list(held) if is_sharded(weight) else held):
            given = local(weight)
            found = given if change is None else (given - part_of(change, weight)).to(given.dtype)
            self.values = found.to("cpu", copy=True)
