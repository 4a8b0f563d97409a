"""Which modules of a model hold the same memory, as tied ones do."""

import torch
from torch import nn

from ...layers.rosa import span


class HeldMemory:
    """Where the parameters and buffers of all modules of a model lie."""

    def __init__(self, model: nn.Module):
        self._places = [
            (*place, name, module)
            for name, module in model.named_modules()
            for tensor in (*module._parameters.values(), *module._buffers.values())
            if (place := _place_of(tensor)) is not None
        ]

    def other_holders(self, base: nn.Module) -> list[str]:
        """Names of the other modules with a parameter or buffer that lies, in part, where a module's weight does."""
        place = _place_of(base.weight)
        if place is None:
            return []
        device, first, end = place
        found = {
            name for where, a, b, name, module in self._places
            if where == device and a < end and first < b and module is not base
        }  # fmt: skip
        return sorted(found)


def _place_of(tensor: torch.Tensor | None) -> tuple[torch.device, int, int] | None:
    """(device, first byte, end) of a tensor's memory; None if it has none, or is not plain."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout == torch.strided
    if not plain or tensor.is_meta or tensor.numel() == 0:
        return None
    return tensor.device, tensor.data_ptr(), tensor.data_ptr() + span(tensor) * tensor.element_size()
