"""Compiles kernels for the C++ node, which launches them without Python (csrc/triton_launch/launch.h).

The node tells one kind of call from another as `triton.runtime.JITFunction` does, so that a kernel is compiled once for
each, here, when it is first needed. Its handle stays valid: Triton's own cache keeps the kernel loaded.
"""

import contextlib
from functools import cache

import torch
import triton
import triton.language as tl

from . import bottleneck_kernels, lowrank_kernels
from .launching import precision
from .lowrank_plan import LowRankPlan
from .tiles import operand_class

# Versions of Triton whose kernels take their arguments, and after them two pointers to scratch memory.
VERSIONS = ("3.6.", "3.7.", "3.8.", "3.9.")
_MODULES = {"lowrank_kernels": lowrank_kernels, "bottleneck_kernels": bottleneck_kernels}
_TORCH = {
    "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16, "Double": torch.float64,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
}  # fmt: skip
_TRITON = {"Float": tl.float32, "Half": tl.float16, "BFloat16": tl.bfloat16}


class _Pointer:
    """In place of a tensor, for which a kernel is compiled."""

    def __init__(self, dtype: torch.dtype, aligned: bool):
        self.dtype, self.address = dtype, 16 if aligned else 1

    def data_ptr(self) -> int:
        return self.address


def why_not() -> str:
    """Why kernels are not launched from C++; empty if they are."""
    if triton.__version__.startswith(VERSIONS):
        return ""
    versions = ", ".join(f"{version}x" for version in VERSIONS)
    return f"Triton is {triton.__version__}; the C++ node launches kernels of {versions}"


def compile_kernel(name: str, device: int, arguments: list, options: dict) -> tuple[int, int, int]:
    """(handle, threads of a block, bytes of its shared memory) of a kernel for arguments as bindings.cpp tells them."""
    kernel = _kernel(name)
    values = [_value(argument) for argument in arguments]
    with torch.cuda.device(device) if device >= 0 else contextlib.nullcontext():
        made = kernel.warmup(*values, grid=(1,), **options)
        made._init_handles()
    if made.metadata.global_scratch_size or made.metadata.profile_scratch_size or made.metadata.num_ctas != 1:
        raise RuntimeError(f"{name} asks of its launch what the C++ node does not give")
    return made.function, 32 * made.metadata.num_warps, made.metadata.shared


def _kernel(name: str):
    module, function = name.split(".")
    return getattr(_MODULES[module], function)


def _value(argument):
    if not isinstance(argument, tuple):
        return argument
    if len(argument) == 1:
        return _TRITON[argument[0]]
    return _Pointer(_TORCH[argument[0]], argument[1])


def _specialised(kernel) -> str:
    kinds = {(True, True): "v", (True, False): "v", (False, True): "u", (False, False): "s"}
    return "".join(
        "c" if p.is_constexpr else kinds[bool(p.do_not_specialize), bool(p.do_not_specialize_on_alignment)]
        for p in kernel.params
    )


@cache
def configured(module) -> None:
    """Tells the extension of the kernels, once."""
    module.configure_triton([_specialised(_kernel(name)) for name in module.triton_kernels], compile_kernel)


def for_node(module, problem, plan):
    """The plan of a problem as the C++ node takes it."""
    configured(module)
    if isinstance(plan, LowRankPlan):  # whose fp32 factors meet bf16 rows, and each other, as bf16 terms
        kind, of_fp32 = module.LowRankOnTriton, operand_class(problem.dtype, problem.adapter_dtype) == "full"
    else:
        kind, of_fp32 = module.BottleneckOnTriton, problem.adapter_dtype == "float32"
    return kind(plan, precision if of_fp32 else None)
