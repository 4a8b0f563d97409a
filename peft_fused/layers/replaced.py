"""What merging puts aside: the weight from before, to be put back bit for bit."""

import torch

from .sharded import local

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplacedWeight:
    """A weight on the host, and a mark of what has taken its place on the device."""

    def __init__(self, weight: torch.Tensor):
        self.values = weight.detach().to("cpu", copy=True)
        self._mark = 0

    def note(self, weight: torch.Tensor) -> None:
        """What has taken its place, as it is now."""
        self._mark = _mark(weight)

    @torch.no_grad()
    def put_back(self, weight: torch.Tensor, name: str) -> None:
        """Writes the values to the weight, whose dtype and device may have changed since.

        RuntimeError, and nothing is written, if something else has written to it, such as the merging of another layer
        that shares it: that would be lost.
        """
        if weight.dtype == self.values.dtype and _mark(weight) != self._mark:
            raise RuntimeError(
                f"unmerge: the weight of {name} has changed since it was merged, and what was merged cannot be told "
                "from that change. Layers that share a weight are unmerged in the reverse order of merging; to keep "
                "the weight as it is, unload the adapter"
            )
        weight.copy_(self.values)


def _mark(weight: torch.Tensor) -> int:
    """The sum of a weight's bits, read as integers."""
    return local(weight).view(_BITS[weight.element_size()]).sum(dtype=torch.int64).item()
