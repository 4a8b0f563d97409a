"""What Triton would compile and launch on an H200, on a machine with or without one. Used by test_launches.py.

`recording()` lets a launch run up to the compiler and the driver, which it replaces. Tensors are on the meta device:
they take no memory, so sizes may be any; a value read by the host raises; and an address is an offset into a storage
that begins at 0, so that views are aligned as in torch's CUDA allocator, whose storages begin at multiples of 512.

`overflows()` finds what a launch would compute in too few bits, `host_transfers()` what would be copied from the host.
"""

import re
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import SimpleNamespace

import pytest
import torch
import triton
from peft_fused.triton_kernels import bottleneck, compiled, kronecker, lowrank, structured
from peft_fused.triton_kernels.problem import H200
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction

from peft_fused import ops
from peft_fused.ops import dispatch
from peft_fused.ops.structured import engine

TARGET = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True, eq=False)
class Compilation:
    """What one entry of a kernel's cache is compiled from."""

    kernel: JITFunction
    key: str
    signature: dict[str, str]
    constants: dict
    attributes: dict
    options: object

    @property
    def name(self) -> str:
        return f"{self.kernel.module.rsplit('.', 1)[-1]}.{self.kernel.__name__}"

    @property
    def source(self) -> ASTSource:
        return ASTSource(self.kernel, self.signature, self.constants, self.attributes)

    @cached_property
    def ttir(self) -> list[str]:
        """Lines of Triton's own representation, of which all functions are inlined."""
        backend, context = make_backend(TARGET), ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        codegen = backend.get_codegen_implementation(self.options)
        module = self.source.make_ir(TARGET, self.options, codegen, backend.get_module_map(), context)
        return backend.make_ttir(module, {}, self.options, TARGET.arch).str_nodebug().splitlines()


@dataclass(frozen=True)
class Launch:
    compilation: Compilation
    grid: tuple[int, int, int]
    arguments: dict[str, object]
    function: int


@dataclass
class Recorder:
    """compilations: in the order in which they were needed. launches: of which there is one for every kernel run."""

    compilations: list[Compilation] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)

    def compile(self, kernel, key, signature, device, constants, options, attributes, warmup):
        """In place of JITFunction._do_compile."""
        compilation = Compilation(kernel, key, signature, constants, attributes, options)
        self.compilations.append(compilation)
        made = _Compiled(self, compilation, len(self.compilations))
        return kernel.device_caches[device][0].setdefault(key, made)


@dataclass(frozen=True)
class _Compiled:
    """What JITFunction.run asks of a compiled kernel, and what the C++ node asks."""

    recorder: Recorder
    compilation: Compilation
    function: int  # its number
    packed_metadata = None

    @property
    def metadata(self):
        threads = {"num_warps": self.compilation.options.num_warps, "shared": 16 * self.function, "num_ctas": 1}
        return SimpleNamespace(**threads, global_scratch_size=0, profile_scratch_size=0)

    def _init_handles(self):
        pass

    def launch_metadata(self, grid, stream, *arguments):
        return None

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter_hook, exit_hook, *arguments):
        names = self.compilation.kernel.arg_names
        named = dict(zip(names, arguments, strict=True))
        self.recorder.launches.append(Launch(self.compilation, (x, y, z), named, self.function))


class _Driver:
    def __init__(self):
        self.device = object()  # unlike any real one's, its caches are empty

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return TARGET


def _on_cuda(problem, *fields, **more):
    return replace(problem(*fields, **more), device="cuda")


@contextmanager
def recording(cpp=False):
    """A Recorder of every launch until the end of the block, on tensors that pass for those of an H200.

    cpp: launches of the C++ node are left to it; otherwise Python's launchers have them.
    """
    recorder, driver, patch = Recorder(), _Driver(), pytest.MonkeyPatch()
    compiled.configured.cache_clear()  # of the C++ node, so that it forgets what is compiled
    if not cpp:
        patch.setattr(compiled, "why_not", lambda: "launches are recorded")
    dispatch.forget()
    patch.setattr(triton.runtime.driver, "_active", driver)
    patch.setattr(JITFunction, "_do_compile", lambda kernel, *arguments: recorder.compile(kernel, *arguments))
    for module in (lowrank, bottleneck, structured, kronecker, ops.lowrank, ops.bottleneck, engine):
        patch.setattr(module, "gpu_of", lambda device: H200)
    for module, name in (
        (lowrank, "LowRankProblem"), (ops.lowrank, "LowRankProblem"), (bottleneck, "BottleneckProblem"),
        (ops.bottleneck, "BottleneckProblem"), (engine, "StructuredProblem"),
    ):  # fmt: skip
        patch.setattr(module, name, partial(_on_cuda, getattr(module, name)))
    patch.setattr(dispatch, "_capability", lambda: (9, 0))
    patch.setattr(torch.cuda, "is_available", lambda: True)
    try:
        yield recorder
    finally:
        patch.undo()
        compiled.configured.cache_clear()
        dispatch.forget()
        for compilation in recorder.compilations:
            compilation.kernel.device_caches.pop(driver.device, None)


# ---------------------------------------------------------------------------------------------------- integer overflow

_SAME = {"tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.trans", "arith.extsi"}


def _quotient(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _corners(function, a, b):
    values = [function(x, y) for x in a for y in b]
    return min(values), max(values)


_BINARY = {
    "arith.addi": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "arith.subi": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "arith.muli": lambda a, b: _corners(lambda x, y: x * y, a, b),
    "arith.minsi": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "arith.maxsi": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
    "arith.divsi": lambda a, b: _corners(_quotient, a, b) if b[0] > 0 else None,
    "arith.remsi": lambda a, b: (0, min(a[1], b[1] - 1)) if a[0] >= 0 and b[0] > 0 else None,
}


# The multipliers of Philox, whose products are to wrap around. Triton 3.8 writes them as products of int32, whose first
# factors are known; up to 3.7 they were bit operations.
_PHILOX = {(value - (1 << 32),) * 2 for value in (0xD2511F53, 0xCD9E8D57)}


def overflows(launch: Launch) -> list[str]:
    """Operations of a launch whose integer result may not fit its type, and 32-bit offsets that cannot be bounded.

    From its arguments and its grid follow the least and the largest value of every index, by interval arithmetic. What
    comes from memory or from bit operations is unknown: dropout's generator overflows on purpose.
    """
    signature = launch.compilation.signature
    given = [launch.arguments[name] for name, kind in signature.items() if kind != "constexpr"]
    known = {f"%arg{index}": (value, value) for index, value in enumerate(given) if isinstance(value, int)}
    found = []
    for line in map(str.strip, launch.compilation.ttir):
        loop = re.match(r"(?:.* = )?scf\.for (%\S+) = (%\S+) to (%\S+) step (%\S+)", line)
        if loop:
            index, begin, end, step = loop[1], *(known[name] for name in loop.groups()[1:])
            known[index] = begin[0], max(begin[0], end[1] - 1)
            found += [line] if known[index][1] + step[1] >= 2**31 else []
            continue
        match = re.match(r"(%\S+) = ([\w.]+) ?(.*?)i(\d+)>?$", line)
        if not match:
            continue
        result, name, text, bits = match[1], match[2], match[3], int(match[4])
        operands = [known.get(operand) for operand in re.findall(r"%[\w#-]+", text)]
        if name == "arith.muli" and _PHILOX.intersection(operands):
            continue
        if name == "tt.addptr":
            found += [line] if bits < 64 and operands[1] is None else []
            continue
        value = _value(name, text, operands, launch.grid)
        if value is not None and bits > 1 and not -(1 << bits - 1) <= value[0] <= value[1] < 1 << bits - 1:
            found.append(f"{line}  in {value[0]}..{value[1]}")
            value = None
        known[result] = value
    return found


def _value(name, text, operands, grid):
    if name == "arith.constant":
        number = re.match(r"(?:dense<)?(-?\d+)>? :", text)
        return (int(number[1]),) * 2 if number else None
    if name == "tt.get_program_id":
        return 0, grid["xyz".index(text[0])] - 1
    if name == "tt.get_num_programs":
        return (grid["xyz".index(text[0])],) * 2
    if name == "tt.make_range":
        end, start = (int(re.search(rf"{key} = (\d+)", text)[1]) for key in ("end", "start"))
        return start, end - 1
    if name == "arith.select":
        operands = operands[1:]  # of either, whatever the condition
    if None in operands or not operands:
        return None
    if name == "arith.select":
        return min(a for a, _ in operands), max(b for _, b in operands)
    if name in _SAME:
        return operands[0]
    return _BINARY[name](*operands) if name in _BINARY else None


# ------------------------------------------------------------------------------------------------------ host transfers


@contextmanager
def host_transfers():
    """A list of the functions that copy from the host, for which it waits, until the end of the block: they make a
    tensor of the device from Python numbers or from a CPU tensor. Reading from the meta device raises anyway.
    """
    found, patch = [], pytest.MonkeyPatch()

    def watched(name, function):
        def wrapper(*args, **kwargs):
            result = function(*args, **kwargs)
            found.extend([name] if result.is_meta else [])
            return result

        return wrapper

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            found.extend([str(function)] if {"cpu", "meta"} <= _devices((args, kwargs, result)) else [])
            return result

    for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
        patch.setattr(owner, name, watched(name, getattr(owner, name)))
    patch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)  # ops run as they do without the mode
    try:
        with Copies():
            yield found
    finally:
        patch.undo()


def _devices(values):
    return {leaf.device.type for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}
