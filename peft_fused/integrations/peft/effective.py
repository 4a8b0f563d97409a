"""What a module that reads an adapted layer's weight, instead of calling the layer, gets: the weight with the adapters.

Attention and mixer modules read the weights of their projections, and torch.nn.TransformerEncoderLayer those of its
layers. The base weight alone would leave the adapters out there, and would be wrong even before training for adapters
whose factors are a part of the pretrained weight.
"""

import torch
from torch.utils._pytree import tree_map

# What is asked of a weight without reading it: answered from the base weight's, at no cost.
_PROPERTIES = (
    "shape", "dtype", "device", "layout", "ndim", "requires_grad", "grad", "is_leaf", "is_cuda", "is_cpu", "is_meta",
    "is_sparse", "is_quantized", "is_nested", "itemsize", "nbytes",
)  # fmt: skip
_METHODS = (
    "size", "dim", "stride", "numel", "nelement", "element_size", "is_contiguous", "is_floating_point", "is_complex",
    "storage_offset", "get_device", "__len__",
)  # fmt: skip
_METADATA = {getattr(torch.Tensor, name).__get__ for name in _PROPERTIES} | {
    getattr(torch.Tensor, name) for name in _METHODS
}
_DATA = torch.Tensor.data.__get__


class EffectiveWeight(torch.Tensor):
    """The weight of an adapted layer, base and active adapters, computed when it is first used.

    Shape, dtype, device and stride are the base weight's. What is computed from it has gradients for the adapters. It
    cannot be written to. Raises RuntimeError, where it is used, if no weight can express the adapters.
    """

    @staticmethod
    def __new__(cls, layer, detached: bool = False):
        weight = layer.get_base_layer().weight
        trains = not detached and torch.is_grad_enabled()
        self = torch.Tensor._make_wrapper_subclass(
            cls, weight.shape, strides=weight.stride(), dtype=weight.dtype, device=weight.device, requires_grad=trains
        )
        with torch._C.DisableTorchFunctionSubclass():
            self._layer, self._detached, self._value = layer, detached, None
            if trains:
                self.register_hook(_no_way_back)
        return self

    def value(self) -> torch.Tensor:
        """The plain tensor."""
        if self._value is None:
            value = self._layer.effective_weight()
            self._value = value.detach() if self._detached else value
        return self._value

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func in _METADATA:
                return func(*args, **kwargs)
            if func == _DATA:
                return cls(args[0]._layer, detached=True)
            name = func.__name__
            writes = name == "__set__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
            if (writes or name == "__setitem__") and isinstance(args[0], cls):
                raise RuntimeError(
                    f"{name}: the weight of an adapted {type(args[0]._layer).__name__} is computed from the base "
                    "weight and the adapters, and cannot be changed; get_base_layer().weight can"
                )
            args, kwargs = tree_map(lambda each: each.value() if isinstance(each, cls) else each, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(
            f"{func}: it was given the weight of an adapted layer as it is, and has no way to compute it; call the "
            "layer instead, or leave it out with exclude_modules"
        )


def _no_way_back(gradient: torch.Tensor) -> None:
    raise RuntimeError(
        "an autograd function of its own has computed a gradient of an adapted layer's weight, which has no way to the "
        "adapters from there; call the layer instead, or leave it out with exclude_modules"
    )
