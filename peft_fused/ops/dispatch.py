"""Which implementation runs an operation, and why not the others.

A backend is usable when its list of reasons against it is empty. `decide` is a function of the problem and of what is
forced; nothing is tried and caught. What depends on the op, its problem answers (triton_kernels/problem.py).
"""

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from ..triton_kernels.problem import Problem
from . import native
from .arguments import check_flag

__all__ = ["BACKENDS", "Decision", "Explanation", "decide", "explain", "forced", "use_backend", "why_not"]

logger = logging.getLogger("peft_fused")

BACKENDS = ("reference", "torch", "triton", "cuda")
NATIVE_DTYPES = ("float32", "float16", "bfloat16")


class _Forced:
    """What use_backend and the environment have asked for; None leaves the choice to the problem.

    keys: whether the extension tells the keys of calls, and by them what was decided of a call before.
    """

    backend: str | None = None
    native: bool = True
    keys: bool = False

    def set(self, backend: str | None, native_allowed: bool) -> None:
        self.backend, self.native = backend, native_allowed
        self.keys = native_allowed and native.module is not None
        forget()


# The decisions that ops remember by the keys of calls.
forgetful: list[dict] = []


def forget() -> None:
    """Forgets what was decided, because something that decisions depend on has changed."""
    for decisions in forgetful:
        decisions.clear()
    _why_not.cache_clear()
    _decide.cache_clear()


state = _Forced()


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}, allowed: {', '.join(BACKENDS)}")
    return name


def forced() -> str | None:
    """The backend that use_backend or PEFT_FUSED_BACKEND asks for."""
    return state.backend


def native_allowed() -> bool:
    """Whether the C++ node may host a backend."""
    return state.native and native.module is not None


class use_backend:
    """From here on every op runs on the named backend, or raises RuntimeError with all reasons if it cannot.

    It takes effect when called, like torch.set_grad_enabled; as a context manager it puts back, at the end of the
    block, what was set before. None restores the automatic choice. native=False keeps the Python autograd node in place
    of the C++ one. It holds for the whole process. Raises ValueError for an unknown name, and RuntimeError, before
    anything has changed, for a backend on which nothing can run on this machine.
    """

    def __init__(self, name: str | None, *, native: bool = True):
        check_flag("native", native)
        if name is not None and (reasons := unusable(_check_name(name, "use_backend: name"), native)):
            raise RuntimeError(f"use_backend: nothing can run on {name!r} on this machine: " + "; ".join(reasons))
        self._before = state.backend, state.native
        state.set(name, native)

    def __enter__(self) -> None:
        return None

    def __exit__(self, *exception) -> None:
        state.set(*self._before)


@cache
def _triton_missing() -> str:
    """Reason why Triton kernels cannot be launched at all, empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return ""


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


_NEEDS = {
    "triton": "Triton kernels need a CUDA device, or TRITON_INTERPRET=1",
    "cuda": "CUDA kernels need a CUDA device",
}


def _not_installed(backend: str, native_wanted: bool) -> list[str]:
    if backend == "triton":
        return [_triton_missing()] if _triton_missing() else []
    if native.module is None:
        return [f"C++ extension: {native.why_missing}"]
    if not native.has_cuda():
        return ["the C++ extension was built without CUDA kernels"]
    return [] if native_wanted else ["its kernels run in the C++ node, which use_backend(native=False) excludes"]


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)


def _gpu_too_old() -> list[str]:
    capability = _capability()
    if capability >= (8, 0):
        return []
    return [f"the GPU has compute capability {capability[0]}.{capability[1]}; 8.0 is the least"]


def unusable(backend: str, native_wanted: bool = True) -> list[str]:
    """Reasons why no problem at all can run on a backend on this machine; empty if some can."""
    if backend in ("reference", "torch"):
        return []
    reasons = _not_installed(backend, native_wanted)
    if backend == "triton" and interpreting():
        return reasons
    if not torch.cuda.is_available():
        return [f"torch sees no CUDA device; {_NEEDS[backend]}", *reasons]
    return reasons + _gpu_too_old()


def why_not(backend: str, problem) -> list[str]:
    """Reasons against a backend for a problem; an empty list means that it can run. ValueError for an unknown name."""
    return list(_against(_check_name(backend, "why_not"), problem))


def _against(backend: str, problem) -> tuple[str, ...]:
    return _why_not(backend, problem, interpreting(), state.native)


@lru_cache(maxsize=4096)
def _why_not(backend: str, problem, interpret: bool, native_wanted: bool) -> tuple[str, ...]:
    reasons = []
    if backend in ("reference", "torch"):
        return ()
    if problem.dtype not in NATIVE_DTYPES:
        reasons.append(f"x is {problem.dtype}; the kernels take {', '.join(NATIVE_DTYPES)}")
    reasons.extend(problem.limits(backend))
    if backend == "cuda" and problem.huge_scale:
        reasons.append("the scale is beyond its types' range")
    if problem.device != "cuda" and not (backend == "triton" and interpret):
        reasons.append(f"x is on {problem.device}; {_NEEDS[backend]}")
    reasons.extend(_not_installed(backend, native_wanted))
    if problem.device == "cuda" and not interpret:
        reasons.extend(_gpu_too_old())
    return tuple(reasons)


def exporting() -> bool:
    """Whether torch.export (of which torch.onnx makes use) or torch.jit.trace records a graph, to run elsewhere."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def in_graph() -> str:
    """The backend of a call that is recorded: the forced one; the plain formula where the graph is to be exported; else
    "auto", which is chosen when the graph runs.
    """
    return state.backend or ("reference" if exporting() else "auto")


@dataclass(frozen=True, slots=True)
class Decision:
    """How a call runs: by which backend, in the C++ autograd node or in Python's, and by what plan of the problem.

    triton: whether Triton's kernels may have a part in it, because they can run it and nothing is forced.
    """

    backend: str
    native: bool
    problem: object
    plan: object
    triton: bool = False


NO_CUDA_IN_GRAPH = (
    "backend 'cuda' runs in the C++ node, which takes no tensor subclasses, dispatch modes or torch.compile"
)
_UNSET = "as use_backend says"


def decide(problem, *, node: bool = True, backend: str | None = _UNSET) -> Decision:
    """The decision for a problem: the forced backend, or the first usable one in order of preference.

    backend: forced in place of use_backend's. node=False: for a call that the C++ node cannot hold, because it is
    recorded or has a tensor of a subclass.
    RuntimeError, with every reason, when the forced backend cannot run the problem.
    """
    backend = state.backend if backend is _UNSET else backend
    return _decide(problem, backend, node, native_allowed(), interpreting())


@lru_cache(maxsize=4096)
def _decide(problem, asked: str | None, node: bool, native_wanted: bool, interpret: bool) -> Decision:
    backend = preferred(problem, node) if asked is None else require(asked, problem)
    if backend == "cuda" and not node:
        raise RuntimeError(NO_CUDA_IN_GRAPH)
    if backend == "triton" and problem.m * problem.n * problem.k == 0:
        backend = "torch"  # there is nothing to launch a kernel on
    if backend == "triton" and interpret:
        from ..triton_kernels import interpreter

        interpreter.install()  # Triton's own would compute on the bits of bf16 numbers
    hosted = native_wanted and not problem.huge_scale and backend != "reference" and problem.native(backend)
    plan = None if backend == "reference" else problem.launch_plan(backend)
    if hosted and backend == "triton":
        from ..triton_kernels import compiled

        hosted = not (interpret or _launched_by_python(compiled.why_not()))
        plan = compiled.for_node(native.module, problem, plan) if hosted else plan
    return Decision(backend, hosted and node, problem, plan, asked is None and not _against("triton", problem))


@cache
def _launched_by_python(why: str) -> bool:
    if why:
        logger.warning("peft_fused: %s: kernels are launched from Python, which costs the host more time", why)
    return bool(why)


_said = set()


def require(name: str, problem) -> str:
    """The name, if that backend can run the problem; RuntimeError with every reason if it cannot."""
    reasons = why_not(name, problem)
    if reasons:
        raise RuntimeError(f"backend {name!r} cannot run {problem.describe()}: " + "; ".join(reasons))
    return name


def preferred(problem, node: bool = True) -> str:
    """The first usable backend in order of preference, whatever is forced; without the node, none that it alone has."""
    order = problem.preference() if problem.device == "cuda" else ("torch",)
    order = [name for name in order if name != "cuda" or node]
    chosen = next(name for name in order if not _against(name, problem))
    # Skipping a kernel on the device it was written for is worth a line, once; a CPU has no other path to miss.
    if problem.device == "cuda" and chosen == "torch" and order[0] != "torch":
        told = (type(problem), problem.dtype)
        if told not in _said:
            _said.add(told)
            against = "; ".join(f"{name}: {', '.join(why_not(name, problem))}" for name in order[:-1])
            logger.warning("peft_fused: %s runs on plain torch (%s)", problem.describe(), against)
    return chosen


def path_of(problem) -> str:
    """The backend, its host node and the order of its kernels, in words."""
    if state.backend is not None and why_not(state.backend, problem):
        return f"RuntimeError: {state.backend} is forced and cannot run it"
    decision = decide(problem)
    if decision.backend == "reference":
        return "reference: plain PyTorch, autograd by torch"
    node = "C++ autograd node" if decision.native else "Python autograd node"
    return f"{decision.backend}: {node}{problem.words(decision.backend)}"


@lru_cache(maxsize=1)
def _onednn_beats_blas() -> bool:
    """Whether fp32 products go to oneDNN: torch carries MKL, whose AVX-512 kernels run on Intel CPUs only."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    return not _is_intel()


def _is_intel() -> bool:
    try:
        with open("/proc/cpuinfo") as file:
            return any("GenuineIntel" in line for line in file)
    except OSError:
        return True


# Packing the operands for oneDNN costs more than it gains below this many multiply-adds.
ONEDNN_LEAST = 1 << 22


def uses_onednn(dtype, multiply_adds: int) -> bool:
    """Whether a dense product of so many multiply-adds on a CPU goes to oneDNN, as `uses_onednn` of csrc's common.cpp
    says."""
    return (
        dtype == torch.float32
        and multiply_adds >= ONEDNN_LEAST
        and torch.backends.mkldnn.enabled
        and _onednn_beats_blas()
    )


if native.module is not None:
    native.module.configure(_onednn_beats_blas(), ONEDNN_LEAST)

if os.environ.get("PEFT_FUSED_BACKEND"):
    state.set(_check_name(os.environ["PEFT_FUSED_BACKEND"], "PEFT_FUSED_BACKEND"), True)
else:
    state.set(None, True)


def first_of(names: list[str]) -> str:
    """The names, or the first three of more, for a line about several equal layers."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


@dataclass(frozen=True)
class Explanation:
    """What runs and why. `lines` holds one (name, path, reasons against the alternatives) per op or layer."""

    lines: tuple[tuple[str, str, tuple[str, ...]], ...]

    def __str__(self) -> str:
        # Most layers of a model are equal: those are one line, with their number and the first of their names.
        names: dict[tuple, list[str]] = {}
        for name, path, reasons in self.lines:
            names.setdefault((path, reasons), []).append(name)
        text = []
        for (path, reasons), group in names.items():
            text.append(f"{group[0]}: {path}" if len(group) == 1 else f"{len(group)} equal [{first_of(group)}]: {path}")
            text.extend(f"    not {reason}" for reason in reasons)
        return "\n".join(text) if text else "no peft_fused layer or op in here"


def reasons_against_others(problem) -> tuple[str, ...]:
    chosen = state.backend or decide(problem).backend
    against = []
    for name in BACKENDS:
        reasons = why_not(name, problem)
        if name == chosen and not reasons:
            continue
        if not reasons:
            reasons = [f"{state.backend} is forced" if state.backend else f"{chosen} comes first for this problem"]
        against.append(f"{name}: " + "; ".join(reasons))
    return tuple(against)


# Functions (module, rows) -> (path, reasons) or None, for layers of other packages; integrations/peft adds PEFT's.
explainers: list[Callable] = []


def is_routed(module: torch.nn.Module) -> bool:
    """Whether a layer answers for what its forward runs."""
    return hasattr(type(module), "explain_route")


def explain(target, *, rows: int = 2048) -> Explanation:
    """Path of a problem, or of every adapter layer of a model, with the reasons against the other backends.

    It tells of a call made now with x alone: of the mode, the active adapters and the autocast that it finds. A batch
    with adapter_names takes PEFT's own forward. rows: of x, tokens times batch size, on which the choice for a model's
    layers depends. Layers answer through `explain_route(rows) -> (path, reasons, problem)`, which names the ops that
    they call and what they give the first of them, or None: see layers/route.py. TypeError for anything else,
    ValueError for a number of rows outside 1..2^31 - 1.
    """
    if isinstance(rows, bool) or not isinstance(rows, int):
        raise TypeError(f"explain: rows must be an int, got {type(rows).__name__}")
    if not 1 <= rows < 1 << 31:
        raise ValueError(f"explain: rows must be in 1..2^31 - 1, got {rows}")
    if isinstance(target, Problem):
        return Explanation(((target.describe(), path_of(target), reasons_against_others(target)),))
    if not isinstance(target, torch.nn.Module):
        raise TypeError(f"explain: target must be a problem or a torch.nn.Module, got {type(target).__name__}")
    lines, inside = [], ()
    for name, module in target.named_modules():
        if is_routed(module):
            inside = (*inside, f"{name}." if name else "")
            path, reasons, problem = module.explain_route(rows)
            if problem is not None:
                path, reasons = f"{path} -> {path_of(problem)}", [*reasons, *reasons_against_others(problem)]
        elif name.startswith(inside):
            continue  # a part of one of those
        elif left := next(filter(None, (explainer(module, rows) for explainer in explainers)), None):
            path, reasons = left
        else:
            continue
        lines.append((name or type(module).__name__, path, tuple(reasons)))
    return Explanation(tuple(lines))
