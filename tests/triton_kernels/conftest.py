"""Triton's interpreter replaces `triton.jit` for a whole process, so these tests need two: the kernels run interpreted
in a child process where there is no GPU (test_interpreter.py starts it), the compiler runs in the main one.
"""

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch

# For `from aot import ...`: under --import-mode=importlib a test module finds no neighbours by itself.
sys.path.append(str(Path(__file__).parent))

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Of the interpreter alone.
collect_ignore = [] if INTERPRETED else ["test_bf16.py"]
if INTERPRETED:
    collect_ignore += [
        "test_aot.py",
        "test_aot_bottleneck.py",
        "test_aot_kronecker.py",
        "test_aot_structured.py",
        "test_interpreter.py",
        "test_launches.py",
        "test_native_launches.py",
        "test_traffic.py",
    ]
elif not torch.cuda.is_available():
    collect_ignore += [
        "test_lowrank.py",
        "test_shared_shrink.py",
        "test_bottleneck.py",
        "test_kronecker.py",
        "test_structured.py",
        "test_ops.py",
    ]


@pytest.fixture(scope="session")
def device():
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("needs a GPU or TRITON_INTERPRET=1")
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory is NaN, so that an output that nobody wrote, or a workspace read too early, shows."""

    def poison(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return wrapper

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


def _hasten(interpreter, patch):
    """The interpreter replaces the functions of the language anew for every call of a device function, though those of
    the kernel around it are in place; to look up a type it makes a table of all: both together half of its time. Half
    of the rest are sums of int64 that ask whether an int32 overflows, which no index of tensors this small does
    (test_launches.py has the large ones)."""
    import triton.language as tl

    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    patch.setattr(interpreter.interpreter_builder, "options", options)

    patch_lang, numpy_type = interpreter._patch_lang, interpreter._get_np_dtype
    modules, replaced, types = {}, set(), {}

    def patch_once(fn):
        if fn not in modules:
            modules[fn] = {value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core}
        if modules[fn] <= replaced:
            return None  # a device function's, which nobody asks for
        scope = patch_lang(fn)
        if not replaced:  # a kernel's
            restore = scope.restore
            scope.restore = lambda: (restore(), replaced.clear())
        replaced.update(modules[fn])
        return scope

    def known_type(kind):
        name = "pointer" if kind.scalar.is_ptr() else kind.scalar.name
        if name not in types:
            types[name] = numpy_type(kind)
        return types[name]

    patch.setattr(interpreter, "_patch_lang", patch_once)
    patch.setattr(interpreter, "_get_np_dtype", known_type)


@pytest.fixture(scope="session", autouse=True)
def mended_interpreter():
    """bf16 is right or refused, as where dispatch chooses the interpreted kernels. The interpreter of Triton 3.6 makes
    integers of arrays of one element as numpy 2.4 no longer does."""
    if not INTERPRETED:
        yield
        return
    from peft_fused.triton_kernels.interpreter import install
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def index(self):
        return int(self.handle.data.squeeze())

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        tensor.__index__ = index  # the scope takes it away again with its own

    install()
    patch = pytest.MonkeyPatch()
    patch.setattr(interpreter, "_patch_lang_tensor", patched)
    _hasten(interpreter, patch)
    yield
    patch.undo()
