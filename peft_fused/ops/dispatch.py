"""Which implementation runs an operation, and why not the others.

A backend is usable when its list of reasons against it is empty. The choice is a pure function of the problem, made
again on every call from cached answers; nothing is tried and caught. What depends on the op, its problem answers:
`describe()`, `limits(backend)`, `preference(hosted)`, `hosted(node, backend)` and `words(backend, onednn)`;
`triton_kernels.plan.Problem` is the low-rank op's, `ops.structured.StructuredProblem` that of the structured ones.
"""

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from ..triton_kernels.plan import Problem
from . import native
from .arguments import check_flag

__all__ = ["BACKENDS", "Explanation", "Problem", "choose", "explain", "forced", "problem_of", "use_backend", "why_not"]

logger = logging.getLogger("peft_fused")

BACKENDS = ("reference", "torch", "triton", "cuda")
NATIVE_DTYPES = ("float32", "float16", "bfloat16")
# Below this many multiply-adds the base product on a current GPU takes less time than launching Triton kernels from
# Python does, so the C++ node, which launches without Python, comes first there.
LAUNCH_BOUND = 4e10


class _Forced:
    """What use_backend and the environment have asked for; None leaves the choice to the problem.

    native_serves is derived, for the one read that every call makes: whether the C++ node is to be asked first.
    """

    backend: str | None = None
    native: bool = True
    native_serves: bool = False

    def set(self, backend: str | None, native_allowed: bool) -> None:
        self.backend, self.native = backend, native_allowed
        self.native_serves = native.module is not None and native_allowed and backend in (None, "torch", "cuda")


state = _Forced()


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}, allowed: {', '.join(BACKENDS)}")
    return name


if os.environ.get("PEFT_FUSED_BACKEND"):
    state.set(_check_name(os.environ["PEFT_FUSED_BACKEND"], "PEFT_FUSED_BACKEND"), True)
else:
    state.set(None, True)


def forced() -> str | None:
    """The backend that use_backend or PEFT_FUSED_BACKEND asks for."""
    return state.backend


def native_allowed() -> bool:
    """Whether the C++ node may host the torch and cuda backends."""
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
def _gpu(device: torch.device) -> tuple[str, int, tuple[int, int]]:
    properties = torch.cuda.get_device_properties(device)
    return properties.name, properties.multi_processor_count, (properties.major, properties.minor)


def gpu_of(x: torch.Tensor) -> tuple[str, int]:
    """(name, multiprocessors) of the GPU that x is on; ("", 1) on a CPU."""
    return _gpu(x.device)[:2] if x.is_cuda else ("", 1)


@cache
def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def problem_of(
    x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, *, has_weight: bool, dropout: bool, uv: bool = False
) -> Problem:
    """Description of lowrank_linear (has_weight) or lowrank on these tensors. uv: whether there is u or v."""
    gpu, sm_count = gpu_of(x)
    k = x.shape[-1]
    m = x.numel() // k if k else 0
    return Problem(
        m,
        B.shape[-2],
        k,
        A.shape[-2],
        name_of(x.dtype),
        name_of(A.dtype),
        x.device.type,
        gpu,
        sm_count,
        dropout,
        has_weight,
        uv,
    )


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


def _gpu_too_old() -> list[str]:
    capability = _gpu(torch.device("cuda"))[2] if torch.cuda.is_available() else (0, 0)
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
    if problem.device != "cuda" and not (backend == "triton" and interpret):
        reasons.append(f"x is on {problem.device}; {_NEEDS[backend]}")
    if backend == "triton" and interpret and problem.dtype == "bfloat16":
        reasons.append("Triton's interpreter computes bfloat16 products wrongly")
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


def hosts(problem, backend: str) -> bool:
    """Whether the C++ node runs a problem on a backend, "" for one that nobody has forced."""
    return native_allowed() and problem.hosted(native.module, backend)


def _preference(problem) -> tuple[str, ...]:
    return problem.preference(hosts(problem, "")) if problem.device == "cuda" else ("torch",)


_said = set()


def choose(problem) -> str:
    """Backend of a problem: the forced one, or the first usable one in order of preference.

    RuntimeError, with every reason, when the forced backend cannot run the problem.
    """
    return preferred(problem) if state.backend is None else require(state.backend, problem)


def require(name: str, problem) -> str:
    """The name, if that backend can run the problem; RuntimeError with every reason if it cannot."""
    reasons = why_not(name, problem)
    if reasons:
        raise RuntimeError(f"backend {name!r} cannot run {problem.describe()}: " + "; ".join(reasons))
    return name


def preferred(problem, traced: bool = False) -> str:
    """The first usable backend in order of preference, whatever is forced.

    traced leaves out `cuda`, whose C++ node is no operator that a graph could hold.
    """
    order = [name for name in _preference(problem) if not (traced and name == "cuda")]
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
    backend = choose(problem)
    if backend == "reference":
        return "reference: plain PyTorch, autograd by torch"
    node = "C++ autograd node" if hosts(problem, backend) else "Python autograd node"
    return f"{backend}: {node}{problem.words(backend, uses_onednn(problem))}"


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


def uses_onednn(problem) -> bool:
    """Whether a dense fp32 product of a problem's sizes (m, n, k) goes to oneDNN."""
    return (
        problem.device == "cpu"
        and problem.dtype == "float32"
        and problem.m * problem.n * problem.k >= ONEDNN_LEAST
        and torch.backends.mkldnn.enabled
        and _onednn_beats_blas()
    )


if native.module is not None:
    native.module.configure(_onednn_beats_blas(), ONEDNN_LEAST, LAUNCH_BOUND)


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
    chosen = state.backend or choose(problem)
    against = []
    for name in BACKENDS:
        reasons = why_not(name, problem)
        if name == chosen and not reasons:
            continue
        if not reasons:
            reasons = [f"{state.backend} is forced" if state.backend else f"{chosen} comes first for this problem"]
        against.append(f"{name}: " + "; ".join(reasons))
    return tuple(against)


# Functions module -> (path, reasons) or None, for layers of other packages; integrations/peft adds PEFT's.
explainers: list[Callable] = []


def explain(target, *, rows: int = 2048) -> Explanation:
    """Path of a Problem, or of every adapter layer of a model, with the reasons against the other backends.

    rows: of x, tokens times batch size, on which the choice for a model's layers depends. Layers answer through
    `explain_route(rows) -> (path, reasons, problem)`, which names the ops that they call and what they give the first
    of them, or None: see layers/route.py. TypeError for anything else, ValueError for a number of rows outside
    1..2^31 - 1.
    """
    if isinstance(rows, bool) or not isinstance(rows, int):
        raise TypeError(f"explain: rows must be an int, got {type(rows).__name__}")
    if not 1 <= rows < 1 << 31:
        raise ValueError(f"explain: rows must be in 1..2^31 - 1, got {rows}")
    if hasattr(type(target), "limits"):
        return Explanation(((target.describe(), path_of(target), reasons_against_others(target)),))
    if not isinstance(target, torch.nn.Module):
        raise TypeError(f"explain: target must be a Problem or a torch.nn.Module, got {type(target).__name__}")
    lines = []
    for name, module in target.named_modules():
        if hasattr(type(module), "explain_route"):
            path, reasons, problem = module.explain_route(rows)
            if problem is not None:
                path, reasons = f"{path} -> {path_of(problem)}", [*reasons, *reasons_against_others(problem)]
        elif left := next(filter(None, (explainer(module) for explainer in explainers)), None):
            path, reasons = left
        else:
            continue
        lines.append((name or type(module).__name__, path, tuple(reasons)))
    return Explanation(tuple(lines))
