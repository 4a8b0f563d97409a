"""What the launchers share: how they give the kernels devices, types, controls and strides."""

from functools import cache

import torch

from .problem import Gpu


@cache
def gpu_of(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return Gpu()
    p = torch.cuda.get_device_properties(device)
    return Gpu(p.name, p.multi_processor_count, p.shared_memory_per_block_optin, 10 * p.major + p.minor)


@cache
def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def precision() -> str:
    """fp32 products keep fp32 accuracy by three tf32 ones unless the user lets PyTorch's own products use tf32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def control(value, default):
    """(pointer, value) of a runtime control, in the default's type so that 2 and 2.0 are one specialisation."""
    if isinstance(value, torch.Tensor):
        return value, default
    return None, default if value is None else type(default)(value)


def dense(vector):
    """The kernels read bias, u and v without a stride."""
    return None if vector is None else vector.contiguous()


def stack_strides(factor) -> tuple[int, int, int]:
    return (factor.stride(0) if factor.dim() == 3 else 0, factor.stride(-2), factor.stride(-1))
