"""What merging puts aside: the weight from before, to be put back bit for bit."""

import contextlib
from collections.abc import Callable, Iterator

import torch

from .sharded import local

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplacedWeight:
    """A weight on the host, `values`, and a mark of what has taken its place on the device."""

    def __init__(self, weight: torch.Tensor):
        self.values = weight.detach().to("cpu", copy=True)
        self._mark: int | None = None

    def note(self, weight: torch.Tensor) -> None:
        """What has taken its place, as it is now."""
        self._mark = _mark(weight)

    def is_as_noted(self, weight: torch.Tensor) -> bool:
        return self._mark is None or _mark(weight) == self._mark

    def check(self, weight: torch.Tensor, name: str) -> None:
        """RuntimeError if something else has written to the weight, such as the merging of another layer that shares
        it: to put the values back would undo that, too.
        """
        if not self.is_as_noted(weight):
            raise RuntimeError(
                f"unmerge: the weight of {name} has changed since it was merged, and what was merged cannot be told "
                "from that change. Layers that share a weight are unmerged in the reverse order of merging; to keep "
                "the weight as it is, unload the adapter"
            )


@contextlib.contextmanager
def kept_through(replaced: ReplacedWeight | None, weight: Callable[[], torch.Tensor]) -> Iterator[None]:
    """Notes the weight anew after a change of its type or device, unless something else had written to it."""
    follows = replaced is not None and replaced.is_as_noted(weight())
    yield
    if follows:
        replaced.note(weight())


def _mark(weight: torch.Tensor) -> int | None:
    """The sum of a weight's bits, read as integers; None if it has none."""
    if weight.is_meta:
        return None
    return local(weight).view(_BITS[weight.element_size()]).sum(dtype=torch.int64).item()
