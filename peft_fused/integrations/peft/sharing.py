"""Which modules of a model hold the same memory, as tied ones do."""

from bisect import bisect_left
from collections import defaultdict
from itertools import accumulate

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from ...layers.checks import span
from ...layers.sharded import is_sharded, local


class HeldMemory:
    """Where the parameters and buffers of all modules of a model lie, but those that modules_to_save has replaced."""

    def __init__(self, model: nn.Module):
        modules = list(model.named_modules())
        replaced = {
            id(inner) for _, m in modules if isinstance(m, AuxiliaryTrainingWrapper)
            for inner in m.original_module.modules()
        }  # fmt: skip
        # Of each module, under which names it stands where it is not what an adapter wraps.
        self._names = defaultdict(list)
        places = defaultdict(list)
        for name, module in modules:
            if not isinstance(module, BaseTunerLayer):
                for child, inner in module._modules.items():
                    self._names[id(inner)].append(f"{name}.{child}".lstrip("."))
            if id(module) in replaced:
                continue
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if (place := _place_of(tensor)) is not None:
                    device, *ends = place
                    places[device].append((*ends, name, module))
        # In order of their first bytes, and beside each the last byte of all up to it.
        self._places = {device: sorted(found, key=lambda place: place[:2]) for device, found in places.items()}
        self._ends = {
            device: list(accumulate((last for _, last, *_ in found), max)) for device, found in self._places.items()
        }
        self._tied = _tied_embeddings(model)

    def other_holders(self, base: nn.Module, name: str | None = None) -> list[str]:
        """Names of the other modules with a parameter or buffer that lies, in part, where a module's weight does; and
        others of its own than this one, under which it is called without an adapter.
        """
        found = set(self._names.get(id(base), ())) - {name}
        place = _place_of(base.weight)
        if place is None:
            # Offloaded: that two weights are one cannot be seen from their memory.
            found.update(other for module, other in self._tied.items() if base in self._tied and module is not base)
            return sorted(found)
        device, first, last = place
        places, ends = self._places.get(device, []), self._ends.get(device, [])
        index = bisect_left(places, (last,), key=lambda place: place[:1])
        while index and ends[index - 1] > first:
            index -= 1
            _, end, other, module = places[index]
            if end > first and module is not base:
                found.add(other)
        return sorted(found)


def _tied_embeddings(model: nn.Module) -> dict[nn.Module, str]:
    """The two modules whose weights a transformers model ties, with their names, if it does."""
    if not isinstance(model, PreTrainedModel) or not getattr(model.config, "tie_word_embeddings", False):
        return {}
    try:
        pair = [model.get_input_embeddings(), model.get_output_embeddings()]
    except NotImplementedError:  # how models without embeddings answer
        return {}
    if any(module is None or isinstance(module, AuxiliaryTrainingWrapper) for module in pair):
        return {}  # there is no second one, or a copy that is saved whole stands in its place
    pair = [module.get_base_layer() if isinstance(module, BaseTunerLayer) else module for module in pair]
    return {module: name for name, module in model.named_modules() if module in pair}


def _place_of(tensor: torch.Tensor | None) -> tuple[torch.device, int, int] | None:
    """(device, first byte, end) of a tensor's memory; None if it has none, or is not plain."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter)
    if tensor is None or not (plain or is_sharded(tensor)):
        return None
    tensor = local(tensor)
    if tensor.layout != torch.strided or tensor.is_meta or tensor.numel() == 0:
        return None
    return tensor.device, tensor.data_ptr(), tensor.data_ptr() + span(tensor) * tensor.element_size()
