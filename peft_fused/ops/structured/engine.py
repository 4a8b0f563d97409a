"""What the structured ops share: the call, its checks by kind, the choice of an algorithm and the registered operation.

Saved for backward: x itself and the parameters, each only where a gradient reads it; spectra and intermediates are
recomputed. Implementations: `fft.py`, `materialized.py` and `gemm.py` here, between which `plan.py` chooses, the Triton
kernels behind `kernels.py`, and `csrc/autograd/structured.cpp` with `csrc/kernels/fft.cu`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from ...triton_kernels.launching import gpu_of, name_of
from .. import dispatch
from ..arguments import (
    FLOATING,
    check_dense,
    check_dropout,
    check_flag,
    check_memory,
    check_scale,
    dtype_names,
    seed_tensor,
)
from ..common import cast_and_drop, rows, unflatten
from ..dropout import drop, dropout_threshold, keep_mask, keep_scale
from ..operation import Control, Input, Operation, is_huge, on_host, taken_types
from . import fft, gemm, kernels, maps, materialized
from .plan import StructuredProblem


@dataclass(frozen=True)
class Structure:
    """One kind of map. names: of its parameters, q's None where it has none or it is optional. plain(x, p, q, n): the
    map [..., K] -> [..., n] in plain PyTorch, in the dtype that x and the parameters share. outputs(x, p, q,
    out_features, transposed, names): the checks of the shapes, and n."""

    kind: str
    names: tuple[str, str | None]
    plain: Callable
    outputs: Callable


STRUCTURES: dict[str, Structure] = {}


def register(kind: str, names: tuple[str, str | None], plain: Callable, outputs: Callable) -> None:
    STRUCTURES[kind] = Structure(kind, names, plain, outputs)


def run(
    kind, x, p, q, *, out_features=None, add=None, scale=1.0, dropout_p=0.0, seed=None, transposed=False, names=None
):  # fmt: skip
    """add + scale * M drop(x), or M^T: [..., K] -> [..., n] in x's type.

    names: of p and q where the caller has others than the structure.
    """
    return _call(x, p, q, add, kind, out_features, scale, dropout_p, seed, transposed, names or STRUCTURES[kind].names)


def reference(
    kind, x, p, q, *, out_features=None, add=None, scale=1.0, dropout_p=0.0, seed=None, transposed=False
):  # fmt: skip
    """`run` in plain PyTorch, differentiated by autograd."""
    n = STRUCTURES[kind].outputs(x, p, q, out_features, transposed, STRUCTURES[kind].names)
    # No FFT library has bf16: convolutions are computed in fp32 at least and rounded once.
    dtype = p.dtype
    if kind != "kronecker":
        dtype = torch.promote_types(torch.promote_types(x.dtype, p.dtype), torch.float32)
    xd, pd, qd = (t if t is None else t.to(dtype) for t in (x, p, q))
    if dropout_p > 0:
        threshold = dropout_threshold(dropout_p)
        keep = keep_mask(seed_tensor(seed, x.device), math.prod(x.shape[:-1]), x.shape[-1], threshold)
        xd = xd * keep.reshape(x.shape) * keep_scale(threshold)
    plain = STRUCTURES[kind].plain
    if transposed:
        columns = plain(torch.eye(n, dtype=dtype, device=x.device), pd, qd, x.shape[-1])
        delta = xd @ columns.mT
    elif 0 in x.shape:  # which torch.fft refuses
        delta = xd @ plain(torch.eye(x.shape[-1], dtype=dtype, device=x.device), pd, qd, n)
    else:
        delta = plain(xd, pd, qd, n)
    delta = delta * scale
    return (delta if add is None else add + delta).to(x.dtype)


def structured_problem(
    kind, x, p, q, n: int, dropout: bool, transposed: bool = False, scale=1.0
) -> StructuredProblem:  # fmt: skip
    """Description of a structured op, called now on these tensors."""
    shapes = p.shape, None if q is None else q.shape
    return _problem(kind, x.shape, taken_types(x, p), shapes, x.device, n, dropout, transposed, scale)


def _problem(kind, x, types, shapes, device, n, dropout, transposed, scale) -> StructuredProblem:
    """The same of the shape x, and those of p and q."""
    return StructuredProblem(
        math.prod(x[:-1]), n, x[-1], *map(name_of, types), device.type, gpu_of(device), kind,
        maps.sizes_of(kind, *shapes), dropout, transposed, huge_scale=is_huge(scale, types[1]),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- checks


def check_tensor(name: str, tensor) -> None:
    """TypeError or ValueError unless it is a dense tensor with memory behind it."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    check_dense(name, tensor)
    check_memory(name, tensor)


def check_parameter(name: str, tensor, dims: tuple[int, ...], text: str) -> None:
    """TypeError or ValueError unless a parameter is a tensor of one of these numbers of dimensions, none of size 0."""
    check_tensor(name, tensor)
    if tensor.dim() not in dims or 0 in tensor.shape:
        raise ValueError(f"{name} must have shape {text} with no size of 0, got {list(tensor.shape)}")


def check_input(x, size: int | None, why: str) -> None:
    """TypeError or ValueError unless x is a dense floating-point tensor [..., size]."""
    check_tensor("x", x)
    if x.dtype not in FLOATING:
        raise TypeError(f"x must be floating point ({dtype_names(FLOATING)}), got {dtype_names((x.dtype,))}")
    if x.dim() < 1:
        raise ValueError("x must have shape [..., K], got a 0-d tensor")
    if x.shape[-1] < 1:
        raise ValueError(f"x must have at least one feature, got shape {list(x.shape)}")
    if size is not None and x.shape[-1] != size:
        raise ValueError(f"x must have {size} features ({why}), got shape {list(x.shape)}")


# ------------------------------------------------------------------------------------------------------------ the op


@dataclass(slots=True, eq=False)
class StructuredCall:
    """A call of an op. dropout_p and seed as given, n as the checks find it; threshold, seed: what runs once it is
    settled."""

    x: torch.Tensor | None
    p: torch.Tensor | None
    q: torch.Tensor | None
    add: torch.Tensor | None
    kind: str
    n: int | None
    scale: float | torch.Tensor = 1.0
    threshold: int = 0
    seed: int | torch.Tensor | None = None
    transposed: bool = False
    out_features: int | None = None
    dropout_p: float = 0.0
    names: tuple[str, str | None] = ("p", "q")


class Structured(Operation):
    name = "structured"
    Call = StructuredCall
    inputs = (
        Input("x"), Input("p", parameter=True), Input("q", optional=True, parameter=True),
        Input("add", optional=True, passes=True),
    )  # fmt: skip
    controls = (
        Control("kind", "str"), Control("n", "int"), Control("scale", "float", tensor=True),
        Control("threshold", "int"), Control("seed", "Tensor?"), Control("transposed", "bool"),
    )  # fmt: skip
    hides = False
    # What is kept from call to call, tables and dense matrices, must not lie in the memory of a graph of inductor's.
    tags = (torch.Tag.cudagraph_unsafe,)

    def read(self, x, p, q, add, kind, out_features, scale, dropout_p, seed, transposed, names) -> StructuredCall:
        return StructuredCall(x, p, q, add, kind, None, scale, 0, seed, transposed, out_features, dropout_p, names)

    def label(self, call, name: str) -> str:
        return dict(zip(("p", "q"), call.names, strict=True)).get(name) or name

    def check(self, call) -> None:
        check_flag("transposed", call.transposed)
        self.check_inputs(call, lambda: self._check_shapes(call))
        check_scale(call.scale, call.x)
        check_dropout(call.dropout_p, call.seed, call.x.device)

    def _check_shapes(self, call) -> None:
        x, add = call.x, call.add
        call.n = STRUCTURES[call.kind].outputs(x, call.p, call.q, call.out_features, call.transposed, call.names)
        if add is not None and tuple(add.shape) != (*x.shape[:-1], call.n):
            raise ValueError(f"add must have shape [..., N] = {[*x.shape[:-1], call.n]}, got {list(add.shape)}")

    def problem(self, like, call, device) -> StructuredProblem:
        (x, dtype), (p, parameter_dtype), q = like["x"], like["p"], like["q"]
        dropout = (call.threshold or dropout_threshold(call.dropout_p)) > 0
        shapes = p, q and q[0]
        types = dtype, parameter_dtype
        return _problem(call.kind, x, types, shapes, device, call.n, dropout, call.transposed, call.scale)

    def output(self, like, call):
        return call.n, None

    def reads(self, call, needs) -> set[str]:
        reads = {"p"} if call.q is None else {"p", "q"}
        return reads | {"x"} if needs & {"p", "q"} else reads

    def flops(self, shapes, call, needs) -> int:
        """By transforms or small products, whatever its plan makes of it: backward has a pass for dx and one for the
        parameters. A convolution of L numbers is two transforms of 2.5 L log2 L and 3 L."""
        x, p, q = (shapes[name] for name in ("x", "p", "q"))
        passes = math.prod(x[:-1]) * (1 if needs is None else ("x" in needs) + bool(needs & {"p", "q"}))
        if call.kind == "kronecker":
            (a1, a2), (b1, b2) = p, q
            return 2 * passes * min(b2 * a1 * (a2 + b1), b1 * a2 * (b2 + a1))
        convolutions = math.prod(p[:2]) if len(p) == 3 else {"toeplitz_product": 2, "ldr": 2 * p[0]}.get(call.kind, 1)
        if call.kind == "toeplitz":
            length = p[0] + q[0]
        else:
            length = p[-1] if call.kind in ("circulant", "ldr") else 2 * p[-1] - 1
        return int(passes * convolutions * length * (5 * math.log2(max(2, length)) + 3))

    def reference(self, call) -> torch.Tensor:
        return reference(
            call.kind, call.x, call.p, call.q, out_features=call.out_features, add=call.add, scale=call.scale,
            dropout_p=call.dropout_p, seed=call.seed, transposed=call.transposed,
        )  # fmt: skip

    def forward(self, call, decision):
        x, p, q, problem = call.x, call.p, call.q, decision.problem
        options = dict(
            kind=call.kind, n=problem.n, scale=on_host(call.scale), threshold=call.threshold, seed=call.seed,
            transposed=call.transposed,
        )  # fmt: skip
        x2, add2 = rows(x), None if call.add is None else rows(call.add)
        if x2.shape[0] == 0:
            return x.new_empty(*x.shape[:-1], problem.n), None
        if decision.backend == "triton":
            return unflatten(kernels.forward(x2, p, q, add2, **options), x), None
        method, length, *_ = decision.plan
        if method == "gemm":
            del options["kind"], options["n"]
            y = gemm.forward(x2, p, q, add2, **options)
        elif method == "dense":
            y = materialized.forward(x2, p, q, add2, **options)
        else:
            y = fft.forward(x2, p, q, add2, **options, length=length)
        return unflatten(y, x), None

    def backward(self, dy, call, hidden, like, needs, decision):
        p, q, kind, seed, threshold = call.p, call.q, call.kind, call.seed, call.threshold
        scale, problem = on_host(call.scale), decision.problem
        dy2, x2 = rows(dy), None if call.x is None else rows(call.x)
        wanted = [name in needs for name in ("x", "p", "q")]
        if call.transposed:
            # <dy, M^T x> = <M dy, x>: the gradient of x is the map itself, and of M that of y = M dy.
            problem = replace(problem, n=problem.k, k=problem.n, transposed=False, dropout=False)
            decision = dispatch.decide(problem, node=False, backend=decision.backend)
            dx = None
            if wanted[0]:
                dx, _ = self.forward(StructuredCall(dy2, p, q, None, kind, problem.n, scale), decision)
                dx = drop(dx, seed, threshold) if threshold else dx
            parts = [None, None, None]
            if wanted[1] or wanted[2]:
                # A dropped-out x keeps its digits: the parameters' gradients may be fp32 beside half-precision rows.
                x2 = cast_and_drop(x2, p.dtype, seed, threshold) if threshold else x2
                parts = _gradients(decision, x2, dy2, p, q, scale, 0, None, (False, *wanted[1:]))
            grads = (dx, *parts[1:])
        else:
            grads = _gradients(decision, dy2, x2, p, q, scale, threshold, seed, wanted)
        grads = {name: grad for name, grad in zip(("x", "p", "q"), grads, strict=True) if name in needs}
        if "x" in grads:
            grads["x"] = grads["x"].view(like["x"][0])
        return grads


def _gradients(decision, dy2, x2, p, q, scale, threshold, seed, needs):
    """(dx, dp, dq) of the map that is not transposed, None where not needed."""
    k = decision.problem.k
    options = dict(kind=decision.problem.kind, k=k, scale=scale, threshold=threshold, seed=seed, needs=needs)
    if dy2.shape[0] == 0:
        return [None if t is None else t.new_zeros(t.shape) for t in (dy2.new_empty(0, k), p, q)]
    if decision.backend == "triton":
        return kernels.backward(dy2, x2, p, q, **options)
    method, length, *_ = decision.plan
    if method == "gemm":
        del options["kind"], options["k"]
        return gemm.backward(dy2, x2, p, q, **options)
    if method == "dense":
        transforms = kernels.backward if decision.triton else partial(fft.backward, length=length)
        vectors = options | {"needs": (False, *needs[1:])}
        correlate = partial(transforms, dy2, x2, p, q, **vectors)
        return materialized.backward(dy2, x2, p, q, **options, correlate=correlate)
    return fft.backward(dy2, x2, p, q, **options, length=length)


STRUCTURED = Structured()
_call = STRUCTURED.__call__
