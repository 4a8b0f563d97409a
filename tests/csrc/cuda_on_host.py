"""Compiles CUDA sources for the CPU with g++ (cuda_on_host.h is the device) and lends them guarded memory."""

import ctypes
import mmap
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from peft_fused.ops.dropout import dropout_threshold

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "csrc" / "kernels"
CPU = Path("/proc/cpuinfo")
TOOLKIT = ("cuda_runtime_api.h", "cuda_fp16.h", "cuda_bf16.h")
# What is undefined ends in a trap, which the device reports. Products and sums are contracted, as by nvcc.
FLAGS = ["-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-fvisibility=hidden", "-U_FORTIFY_SOURCE"]
FLAGS += ["-fsanitize=undefined,float-cast-overflow", "-fsanitize-undefined-trap-on-error"]
FLAGS += ["-fexpensive-optimizations", "-ffp-contract=fast"]
if re.search(r"^flags.*\bfma\b", CPU.read_text() if CPU.exists() else "", re.MULTILINE):
    FLAGS.append("-mfma")
ORDERS = {"forwards": 0, "backwards": 1, "shuffled": 2}  # as set_order takes them
NUMBERS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # of enum class Type
# Elements between rows and before the first: dense; aligned at a stride; never aligned; aligned in some rows.
LAYOUTS = [(0, 0), (8, 0), (8, 1), (3, 2)]
THRESHOLD = dropout_threshold(0.3)
LAUNCH = re.compile(r"(\w+(?:<[^<>]*>)?)<<<(.+?)>>>\((.*?)\);", re.DOTALL)
DYNAMIC_SHARED = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")


def translate(text):
    """What g++ does not parse: launches, and the declaration of dynamic shared memory."""
    text = LAUNCH.sub(r"cuda_on_host::Launch(\2)(\1, \3);", text)
    text = DYNAMIC_SHARED.sub(r"\1* const \2 = cuda_on_host::dynamic_shared<\1>();", text)
    assert "<<<" not in text and "extern __shared__" not in text, "a launch or a declaration was not recognised"
    return text


def tokens(code):
    """Finds the same tokens, whatever space and comments of a line lie between them."""
    found = re.findall(r"\w+|[^\w\s]", code)
    edges = [r"\b" if word[0].isalnum() or word[0] == "_" else "" for word in (found[0], found[-1])]
    return re.compile(edges[0] + r"\s*(?://[^\n]*\n\s*)?".join(map(re.escape, found)) + edges[1])


class Unit(NamedTuple):
    """What is compiled: a .cu file, C++ of what Python calls, and the parameters of kernels as Python lays them out,
    each structure with the name that it has in C++."""

    source: Path
    entries: str = ""
    structures: tuple = ()


def compile_kernels(unit, defects, folder):
    """The library of a unit and of the headers of csrc/kernels.

    defects: (old, new) each, code of one of these files, however it is spaced there; DEFECT in `new` is true after
    set_defect(position).
    """
    folder.mkdir()
    texts = {path.name: path.read_text() for path in (unit.source, *KERNELS.glob("*.h"))}
    for i, (old, new) in enumerate(defects):
        code, changed = tokens(old), new.replace("DEFECT", f"(defect == {i})")
        found = [name for name, text in texts.items() if code.search(text)]
        assert len(found) == 1, f"a defect is put into one file, but {old!r} is code of {found or 'none'} of {[*texts]}"
        texts[found[0]] = code.sub(lambda _, changed=changed: changed, texts[found[0]])
    for name, text in texts.items():
        (folder / name).write_text(translate(text))
    for name in TOOLKIT:
        (folder / name).write_text('#include "cuda_on_host.h"\n')
    sizes = "".join(
        f"static_assert(sizeof(peft_fused::{s.__name__}) == {ctypes.sizeof(s)});\n" for s in unit.structures
    )
    text, library = folder / "unit.cpp", folder / "unit.so"
    text.write_text(f'#include "cuda_on_host.h"\n#include "{unit.source.name}"\n{sizes}{unit.entries}')
    done = subprocess.run(
        ["g++", *FLAGS, f"-I{folder}", f"-I{HERE}", str(text), "-o", str(library)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[:4000]
    return Library(library)


class DeviceError(RuntimeError):
    """A launch that a device would have refused, or would not have got through."""


class Library:
    def __init__(self, path):
        self._library = ctypes.CDLL(str(path))
        self._library.take_message.restype = ctypes.c_char_p

    def set_order(self, order):
        self._library.set_order(order)

    def set_defect(self, number):
        self._library.set_defect(number)

    def value(self, name, *arguments):
        return getattr(self._library, name)(*arguments)

    def __call__(self, name, *arguments):
        """Calls an entry that returns a cudaError_t; tensors are passed as their addresses, numbers as int."""
        plain = (ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in arguments)
        status = self.value(name, *plain)
        if status:
            raise DeviceError(f"{status}: {self._library.take_message().decode()}")


# ------------------------------------------------------------------------------------------------------ guarded memory

_libc = ctypes.CDLL(None, use_errno=True)
_NO_ACCESS, _READ_ONLY = 0, 1  # PROT_NONE, PROT_READ
_GUARD = 1 << 20
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    """The same bytes as integers, which a NaN equals too."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def _protect(address, size, access):
    if _libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), access):
        raise OSError(ctypes.get_errno(), "mprotect")


class Memory:
    """Tensors on pages of their own, between stretches without access: they end where the pages do, or start there.

    Around and between their rows all bytes are 0xFF: NaN for who reads them, seen by `check` if somebody writes them.
    """

    def __init__(self, at_end):
        self._at_end = at_end
        self._lent, self._writable = [], []  # alive until a launch is through

    def lend(self, tensor, writable=False):
        """A copy with the same strides, and the alignment of its base to 16 bytes; None for None."""
        if tensor is None:
            return None
        size, page = tensor.element_size(), mmap.PAGESIZE
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        span, unaligned = (last + 1) * size if tensor.numel() else 0, tensor.storage_offset() * size % 16
        room = -(-(span + unaligned) // 16) * 16
        inner = max(1, -(-room // page)) * page
        pages = mmap.mmap(-1, inner + 2 * _GUARD)
        owned = torch.frombuffer(pages, dtype=_INTEGERS[size], offset=_GUARD, count=inner // size).fill_(-1)
        offset = (inner - room if self._at_end else 0) + unaligned
        lent = owned.as_strided(tensor.shape, tensor.stride(), offset // size)
        lent.copy_(bits(tensor))
        start = owned.data_ptr()
        _protect(start - _GUARD, _GUARD, _NO_ACCESS)
        _protect(start + inner, _GUARD, _NO_ACCESS)
        self._lent.append(lent)
        if writable:
            self._writable.append((owned, lent))
        else:
            _protect(start, inner, _READ_ONLY)
        return lent.view(tensor.dtype)

    def result(self, rows, columns, dtype, stride=None, unaligned=0):
        """An output of NaNs, its row stride at least `columns`, its base so many elements past an aligned one."""
        stride = columns if stride is None else stride
        whole = torch.full((unaligned + rows * stride + columns,), -1, dtype=_INTEGERS[dtype.itemsize])
        return self.lend(whole.as_strided((rows, columns), (stride, 1), unaligned).view(dtype), writable=True)

    def check(self):
        for owned, lent in self._writable:
            around = owned.clone()
            around.as_strided(lent.shape, lent.stride(), lent.storage_offset()).fill_(-1)
            assert bool((around == -1).all()), "a kernel has written beside its output"


def laid_out(tensor, layout):
    """The same matrix with `layout` elements between its rows and before the first."""
    between, before = layout
    stride = tensor.shape[-1] + between
    place = torch.empty(before + tensor.shape[:-1].numel() * stride, dtype=tensor.dtype)
    outer = [tensor.shape[-2] * stride] if tensor.dim() == 3 else []
    return place.as_strided(tensor.shape, [*outer, stride, 1], before).copy_(tensor)


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def in_orders(library, run, orders=ORDERS):
    """The tensors that run(memory) gives: the same bits in every order of the threads, anything else being a race.

    Backwards, the guarded memory starts with the tensors, otherwise it ends with them.
    """
    found = []
    for order in orders:
        library.set_order(ORDERS[order])
        memory = Memory(at_end=order != "backwards")
        found.append(run(memory))
        memory.check()
    for other, order in zip(found, orders, strict=True):
        for first, again in zip(found[0], other, strict=True):
            assert torch.equal(bits(first), bits(again)), f"threads run {order} give another result"
    return found[0]


class IntControl(ctypes.Structure):
    _fields_ = (("pointer", ctypes.c_void_p), ("value", ctypes.c_int64))


class FloatControl(ctypes.Structure):
    _fields_ = (("pointer", ctypes.c_void_p), ("value", ctypes.c_float))


def control(unit, defects):
    """A test, the control of checks: each passes until its defect is switched on. defects: by name a check and the
    change of the unit's code that it has to see."""
    changes = tuple(tuple(change) for _, *change in defects.values())

    @pytest.mark.parametrize("defect", [*defects])
    def test_a_defect_shows(compiled, defect):
        library, (check, *_) = compiled(unit, changes), defects[defect]
        library.set_defect(-1)
        check(library)
        library.set_defect([*defects].index(defect))
        with pytest.raises((AssertionError, DeviceError)):
            check(library)

    return test_a_defect_shows
