"""The scaffold of an op: its registered operations, its autograd nodes, and the one decision that every call follows.

An op is an `Operation`. It states its inputs and controls, the checks and the problem of a call, its formula as a
reference, what backward reads, and its implementations; everything else is made of that here. A call is an object (the
op's `Call`), which the checks, the reference, the implementations and backward take.

A call is decided once: `dispatch.decide` says of its problem which backend runs it, in which autograd node and by which
plan, and whatever runs gets that `Decision`. (On Triton a structured op is one convolution or several, and the launcher
plans each by its sizes: triton_kernels/fft_plan.py.) The C++ extension makes of a usual call a key, on which its checks
and its decision depend alone: both are made once per key, and where the decision is for the C++ node, the extension
runs the call, which it casts under autocast. Python casts what it does not run, and the call then begins anew. What
else is unusual (tensor subclasses, dispatch modes, lazy values) is checked in full and decided without that node.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from . import dispatch, native
from .arguments import (
    FLOATING,
    autocasts,
    check_beside,
    check_dense,
    check_derivative,
    check_kept,
    check_memory,
    dtype_names,
    is_watched,
    lazy,
    resolved,
    saved_tensors,
    seed_tensor,
)
from .dropout import dropout_threshold

LIBRARY = torch.library.Library("peft_fused", "DEF")
# Every op there is.
OPERATIONS: list["Operation"] = []
# Keys of decisions that an op remembers; then it begins anew.
MOST_KEYS = 4096
# Names that every call looks up. The extension itself sees whatever else records a call; it does not see Dynamo.
_state, _Tensor, _in_dynamo = dispatch.state, torch.Tensor, torch.compiler.is_dynamo_compiling


@dataclass(frozen=True)
class Input:
    """A tensor of an op.

    parameter: of the adapter, in x's type or fp32, which autocast leaves in fp32: mixing is what the ops do well, and
    it is the more accurate choice. passes: its gradient is that of the output, unchanged.
    """

    name: str
    optional: bool = False
    parameter: bool = False
    passes: bool = False


@dataclass(frozen=True)
class Control:
    """What a call has beside its inputs. kind: a type of torch's schemas. tensor: whether a tensor may stand in place
    of a number, for which the schema has a second column."""

    name: str
    kind: str
    tensor: bool = False

    @property
    def schema(self) -> str:
        return f"{self.kind} {self.name}" + (f", Tensor? {self.name}_t" if self.tensor else "")


def taken_dtype(tensor: torch.Tensor, device: torch.device, parameter: bool = False) -> torch.dtype:
    """The type in which an op takes a tensor: its own, or what autocast makes of it. device: x's. parameter: see
    `Input`."""
    dtype = tensor.dtype
    if not dtype.is_floating_point or dtype == torch.float64 or (parameter and dtype == torch.float32):
        return dtype
    return torch.get_autocast_dtype(device.type) if autocasts(device.type) else dtype


def taken_types(x: torch.Tensor, parameter: torch.Tensor) -> tuple[torch.dtype, torch.dtype]:
    """Those of x and of a parameter."""
    return taken_dtype(x, x.device), taken_dtype(parameter, x.device, parameter=True)


def is_huge(scale, dtype: torch.dtype) -> bool:
    """Whether a scale is beyond the range of a type. A tensor's on a device is not read, and taken to be in it."""
    scale = on_host(scale)
    return not isinstance(scale, torch.Tensor) and not abs(scale) <= torch.finfo(dtype).max


def on_host(value):
    """A number, or the numbers, in a tensor of the CPU, where reading them costs nothing; a device tensor stays one."""
    return value.tolist() if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value


class Operation:
    """One op; see the module. Called with its inputs and then its controls, as `read` takes them."""

    name: str
    # A dataclass whose fields are the inputs, then the controls.
    Call: type
    inputs: tuple[Input, ...]
    controls: tuple[Control, ...]
    # Whether forward returns something beside y that backward reads.
    hides: bool = True
    tags: tuple = ()

    # -------------------------------------------------------------------------------------------- what an op states

    def read(self, *arguments):
        """The call of the public function's arguments, unchecked."""
        raise NotImplementedError

    def check(self, call) -> None:
        """Raises ValueError or TypeError naming the first bad argument, what it is and what is allowed."""
        raise NotImplementedError

    def problem(self, like: dict, call, device: torch.device):
        """Description of a call for `dispatch`. like: (shape, dtype) of every input by name, None for an absent one."""
        raise NotImplementedError

    def output(self, like: dict, call) -> tuple[int, tuple[int, torch.dtype] | None]:
        """(columns of y, (columns, dtype) of what is hidden) for the shapes of a call."""
        raise NotImplementedError

    def reached(self, call, needs: set[str]) -> set[str]:
        """Of the inputs that a gradient is asked for, those that the output of this call depends on."""
        return needs

    def reads(self, call, needs: set[str]) -> set[str]:
        """Names of what backward reads for the gradients of `needs`: of inputs, and "hidden"."""
        raise NotImplementedError

    def reference(self, call) -> torch.Tensor:
        raise NotImplementedError

    def forward(self, call, decision):
        """(y, hidden or None) by the decision's backend, torch or triton."""
        raise NotImplementedError

    def backward(self, dy, call, hidden, like: dict, needs: set[str], decision) -> dict[str, torch.Tensor]:
        """The gradients by name, each in its tensor's type. The call lacks what `reads` does not name."""
        raise NotImplementedError

    def flops(self, shapes: dict, call, needs: set[str] | None) -> int:
        """Operations of forward, or of backward for the gradients of `needs`: two per multiply-add of its products.

        shapes: of every input by name, None for an absent one. Of the call, the controls.
        """
        raise NotImplementedError

    def settle(self, call):
        """The call with what runs in place of what was given: the threshold and the seed of dropout."""
        if "threshold" in self.Call.__slots__:
            call.threshold = dropout_threshold(call.dropout_p)
            call.seed = seed_tensor(call.seed, getattr(call, self.names[0]).device) if call.threshold else None
        return call

    def label(self, call, name: str) -> str:
        """What the caller calls an input."""
        return name

    # ----------------------------------------------------------------------------------------------------- a call

    def __init__(self):
        self.names = tuple(i.name for i in self.inputs)
        self.own = tuple(i.name for i in self.inputs if not i.passes)
        self.passing = next((i.name for i in self.inputs if i.passes), None)
        self.decisions: dict[bytes, dispatch.Decision] = {}
        dispatch.forgetful.append(self.decisions)
        self._register()
        OPERATIONS.append(self)

    def __call__(self, *arguments) -> torch.Tensor:
        """The result. Public functions call this bound method: calling the object takes a detour through its type."""
        if _state.keys and not _in_dynamo():
            # The C++ node's result, if it was decided to run there; else the decision, or the key of one to be made.
            # The extension need not have the op.
            node = getattr(native.module, self.name, None)
            found = node and node(self.decisions, *arguments)
            if type(found) is _Tensor:
                return found
            if type(found) is bytes:
                self._decide(found, self.read(*arguments))
                return self(*arguments)
            if found is not None:
                return self._run(self.settle(self.read(*arguments)), found)
        return self._unusual(arguments)

    def _decide(self, key: bytes, call) -> None:
        """Checks a call and remembers how calls of its key run."""
        self.check(call)
        decision = dispatch.decide(self.problem(self.likeness(call), call, getattr(call, self.names[0]).device))
        if len(self.decisions) >= MOST_KEYS:
            self.decisions.clear()
        self.decisions[key] = decision

    def _unusual(self, arguments) -> torch.Tensor:
        tensors = arguments[: len(self.inputs)]
        x = tensors[0]
        if isinstance(x, torch.Tensor) and autocasts(x.device.type):
            cast = [
                t.to(taken_dtype(t, x.device, i.parameter)) if isinstance(t, torch.Tensor) else t
                for t, i in zip(tensors, self.inputs, strict=True)
            ]
            with torch.autocast(x.device.type, enabled=False):
                return self(*cast, *arguments[len(tensors) :])
        call = self.read(*arguments)
        self.check(call)
        if lazy(*_flat(arguments)):
            return self(*(_resolved(value) for value in arguments))
        call = self.settle(call)
        if is_watched(x):
            # It chooses inside the op, where sizes are numbers: a choice in the graph would be a guard on them.
            backend = dispatch.in_graph()
            if backend == "reference":
                return self.reference(call)
            if backend == "cuda":
                raise RuntimeError(dispatch.NO_CUDA_IN_GRAPH)
            y = self._registered_forward(*self._flat(call), backend)
            return y[0] if self.hides else y
        return self._run(call, dispatch.decide(self.problem(self.likeness(call), call, x.device), node=False))

    def _run(self, call, decision) -> torch.Tensor:
        if decision.backend == "reference":
            return self.reference(call)
        tensors = [getattr(call, name) for name in self.names]
        if torch.is_grad_enabled():
            needs = {n for n, t in zip(self.names, tensors, strict=True) if t is not None and t.requires_grad}
            reads = self.reads(call, needs & set(self.own)) if needs else ()
            check_kept(**{self.label(call, n): getattr(call, n) for n in reads if n != "hidden"})
        return _Node.apply(self, call, decision, *tensors)

    def likeness(self, call) -> dict:
        tensors = ((name, getattr(call, name)) for name in self.names)
        return {name: None if t is None else (t.shape, t.dtype) for name, t in tensors}

    # ------------------------------------------------------------------------------------------------------ checks

    def check_inputs(self, call, shapes) -> None:
        """Checks all that the ops' inputs have in common. shapes(): checks those, once each is known to be a tensor."""
        given = [(self.label(call, i.name), i, getattr(call, i.name)) for i in self.inputs]
        for name, declared, tensor in given:
            if tensor is None and declared.optional:
                continue
            if not isinstance(tensor, torch.Tensor):
                what = "a torch.Tensor or None" if declared.optional else "a torch.Tensor"
                raise TypeError(f"{name} must be {what}, got {type(tensor).__name__}")
            check_dense(name, tensor)
        x_name, _, x = given[0]
        parameters = [(name, tensor) for name, declared, tensor in given if declared.parameter and tensor is not None]
        for name, tensor in ((x_name, x), *parameters):
            if tensor.dtype not in FLOATING:
                floating = dtype_names(FLOATING)
                raise TypeError(f"{name} must be floating point ({floating}), got {dtype_names((tensor.dtype,))}")
        check_memory(x_name, x)
        shapes()
        first_name, first = parameters[0]
        mixed = {x.dtype, torch.float32} if x.dtype != torch.float64 else {torch.float64}
        for name, declared, tensor in given[1:]:
            if tensor is None:
                continue
            if tensor is first:
                allowed, why = mixed, f"{x_name}'s dtype or float32"
            elif declared.parameter:
                allowed, why = {first.dtype}, f"{first_name}'s dtype"
            else:
                allowed, why = {x.dtype}, f"{x_name}'s dtype"
            if tensor.dtype not in allowed:
                raise TypeError(f"{name} must have {why} ({dtype_names(allowed)}), got {dtype_names((tensor.dtype,))}")
            if tensor.device != x.device:
                raise ValueError(f"{name} must be on {x_name}'s device ({x.device}), got {tensor.device}")
            check_memory(name, tensor)
            check_beside(name, tensor, x, x_name)

    # -------------------------------------------------------------------------------------------------- backward

    def save(self, ctx, call, hidden, needs_input_grad) -> None:
        """Keeps of a call what backward reads; of its controls, tensors as saved ones."""
        needed = zip(self.names, needs_input_grad, strict=True)
        ctx.needs = self.reached(call, {name for name, need in needed if need and name in self.own})
        ctx.passes = self.passing is not None and needs_input_grad[self.names.index(self.passing)]
        ctx.like = self.likeness(call)
        reads = self.reads(call, ctx.needs) if ctx.needs else set()
        tensors, kept = {}, {}
        for name in self.names:
            kept[name] = None
            if name in reads:
                tensors[name] = getattr(call, name)
        for control in self.controls:
            value = getattr(call, control.name)
            if isinstance(value, torch.Tensor):
                kept[control.name] = None
                if ctx.needs:
                    tensors[control.name] = value
        ctx.call = replace(call, **kept)
        if "hidden" in reads:
            tensors["hidden"] = hidden
        ctx.slots = tuple(tensors)
        ctx.save_for_backward(*tensors.values())

    def saved(self, ctx):
        """(the call, what is hidden) that `save` kept."""
        tensors = dict(zip(ctx.slots, saved_tensors(ctx, ctx.slots), strict=True))
        hidden = tensors.pop("hidden", None)
        return replace(ctx.call, **tensors), hidden

    def _gradients(self, dy, call, hidden, like, needs, decision) -> dict[str, torch.Tensor]:
        if autocasts(dy.device.type):  # backward() called inside autocast; forward settled the types
            with torch.autocast(dy.device.type, enabled=False):
                return self._gradients(dy, call, hidden, like, needs, decision)
        grads = self.backward(dy, call, hidden, like, needs, decision)
        return {name: grads[name].contiguous() for name in self.own if name in needs}

    def differentiate(self, ctx, dy, gradients) -> tuple:
        """Gradients of all inputs. gradients(dy, call, hidden): those of ctx.needs, by name."""
        if dy is None or not (ctx.needs or ctx.passes):
            return (None,) * len(self.names)
        check_derivative(self.name)  # it would be differentiated without what is hidden
        found = {}
        if ctx.needs:
            call, hidden = self.saved(ctx)
            dy = resolved(dy)
            found = gradients(dy, call, hidden)
        if ctx.passes:
            found[self.passing] = dy
        return tuple(found.get(name) for name in self.names)

    # ----------------------------------------------------------------------------------------- registered operations

    def _register(self) -> None:
        """Defines <name>_fwd and <name>_bwd with kernels, fakes and the autograd of the first, for whatever traces."""
        controls = ", ".join(control.schema for control in self.controls)
        inputs = ", ".join(f"Tensor{'?' if i.optional else ''} {i.name}" for i in self.inputs)
        maybe = ", ".join(f"Tensor? {name}" for name in self.names)
        result = "(Tensor, Tensor)" if self.hides else "Tensor"
        LIBRARY.define(f"{self.name}_fwd({inputs}, {controls}, str backend) -> {result}", tags=self.tags)
        # sizes, dims: the shapes of all inputs, one after the other, and the length of each, -1 for an absent one;
        # dtype: of the parameters. needs: in the order of `own`.
        LIBRARY.define(
            f"{self.name}_bwd(Tensor dy, {maybe}, Tensor? hidden, SymInt[] sizes, int[] dims, ScalarType dtype, "
            f"{controls}, str backend, bool[] needs) -> Tensor[]",
            tags=self.tags,
        )
        self._registered_forward = getattr(torch.ops.peft_fused, f"{self.name}_fwd").default
        self._registered_backward = getattr(torch.ops.peft_fused, f"{self.name}_bwd").default
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(f"{self.name}_fwd", self._forward_op, key)
            LIBRARY.impl(f"{self.name}_bwd", self._backward_op, key)
        forward = f"peft_fused::{self.name}_fwd"
        torch.library.register_fake(forward, self._forward_fake, lib=LIBRARY)
        torch.library.register_fake(f"peft_fused::{self.name}_bwd", self._backward_fake, lib=LIBRARY)
        torch.library.register_autograd(forward, self._traced_backward, setup_context=self._traced_setup, lib=LIBRARY)

    def _flat(self, call) -> list:
        """The columns of the schema that a call has."""
        flat = [getattr(call, name) for name in self.names]
        for control in self.controls:
            value = getattr(call, control.name)
            if not control.tensor:
                flat.append(value)
            elif isinstance(value, torch.Tensor):
                flat += [1.0 if control.kind == "float" else 1, value]
            else:
                flat += [float(value) if control.kind == "float" else value, None]
        return flat

    def call_of(self, flat):
        """The call of the columns of a schema."""
        values = iter(flat)
        fields = {name: next(values) for name in self.names}
        for control in self.controls:
            fields[control.name] = value = next(values)
            if control.tensor:
                tensor = next(values)
                fields[control.name] = value if tensor is None else tensor
        return self.Call(**fields)

    def _decide_in_graph(self, backend: str, like: dict, call, device) -> "dispatch.Decision":
        """What a traced call runs on, without the C++ node: so that it is the same in the backward."""
        problem = self.problem(like, call, device)
        return dispatch.decide(problem, node=False, backend=None if backend == "auto" else backend)

    def _forward_op(self, *columns):
        *flat, backend = columns
        call = self.call_of(flat)
        like = self.likeness(call)
        y, hidden = self.forward(call, self._decide_in_graph(backend, like, call, flat[0].device))
        if not self.hides:
            return y
        # A graph does not know the backend, of which some hide fewer columns.
        missing = self.output(like, call)[1][0] - hidden.shape[1]
        return y, F.pad(hidden, (0, missing)) if missing else hidden

    def _backward_op(self, dy, *columns):
        call, hidden, like, needs, backend = self._backward_columns(dy, columns)
        decision = self._decide_in_graph(backend, like, call, dy.device)
        return list(self._gradients(dy, call, hidden, like, needs, decision).values())

    def split_backward(self, columns):
        """(call, hidden, shape of every input by name, None for an absent one, dtype of the parameters, names of the
        needed gradients, backend) of the columns of <name>_bwd behind dy."""
        n = len(self.names)
        tensors, (hidden, sizes, dims, dtype) = columns[:n], columns[n : n + 4]
        *controls, backend, needs = columns[n + 4 :]
        sizes = iter(sizes)
        shapes = (torch.Size([next(sizes) for _ in range(n)]) if n >= 0 else None for n in dims)
        needed = {name for name, need in zip(self.own, needs, strict=True) if need}
        call = self.call_of([*tensors, *controls])
        return call, hidden, dict(zip(self.names, shapes, strict=True)), dtype, needed, backend

    def _backward_columns(self, dy, columns):
        call, hidden, shapes, dtype, needs, backend = self.split_backward(columns)
        like = {
            i.name: shapes[i.name] and (shapes[i.name], dtype if i.parameter else dy.dtype) for i in self.inputs
        }  # fmt: skip
        return call, hidden, like, needs, backend

    def _forward_fake(self, *columns):
        call = self.call_of(columns[:-1])
        x = columns[0]
        outputs, hidden = self.output(self.likeness(call), call)
        y = x.new_empty(*x.shape[:-1], outputs)
        if not self.hides:
            return y
        m = 1
        for size in x.shape[:-1]:  # Size.numel() would fix a symbolic number of rows
            m = m * size
        return y, x.new_empty(m, hidden[0], dtype=hidden[1])

    def _backward_fake(self, dy, *columns):
        _, _, like, needs, _ = self._backward_columns(dy, columns)
        return [dy.new_empty(like[name][0], dtype=like[name][1]) for name in self.own if name in needs]

    def _traced_setup(self, ctx, inputs, output) -> None:
        *flat, ctx.backend = inputs
        ctx.set_materialize_grads(False)
        needs = ctx.needs_input_grad[: len(self.names)]
        self.save(ctx, self.call_of(flat), output[1] if self.hides else None, needs)

    def _traced_backward(self, ctx, dy, *_):
        def gradients(dy, call, hidden):
            tensors, controls = self._split_columns(call)
            shapes = [like and like[0] for like in ctx.like.values()]
            sizes = [size for shape in shapes if shape is not None for size in shape]
            dims = [-1 if shape is None else len(shape) for shape in shapes]
            dtype = next(ctx.like[i.name][1] for i in self.inputs if i.parameter and ctx.like[i.name])
            needs = [name in ctx.needs for name in self.own]
            found = self._registered_backward(
                dy, *tensors, hidden, sizes, dims, dtype, *controls, ctx.backend, needs
            )  # fmt: skip
            return dict(zip((name for name in self.own if name in ctx.needs), found, strict=True))

        columns = 1 + sum(2 if control.tensor else 1 for control in self.controls)
        return (*self.differentiate(ctx, dy, gradients), *(None,) * columns)

    def _split_columns(self, call):
        flat = self._flat(call)
        return flat[: len(self.names)], flat[len(self.names) :]


class _Node(torch.autograd.Function):
    """An op without the C++ node: what eager mode runs when the extension is missing or has no node for a call.

    forward takes ctx, because torch inspects the signature of a separate setup_context on every call.
    """

    @staticmethod
    def forward(ctx, op, call, decision, *tensors):
        y, hidden = op.forward(call, decision)
        ctx.set_materialize_grads(False)
        ctx.op, ctx.decision = op, decision
        op.save(ctx, call, hidden, ctx.needs_input_grad[3:])
        return y

    @staticmethod
    def backward(ctx, dy):
        op = ctx.op

        def gradients(dy, call, hidden):
            return op._gradients(dy, call, hidden, ctx.like, ctx.needs, ctx.decision)

        return None, None, None, *op.differentiate(ctx, dy, gradients)


def _flat(arguments):
    for value in arguments:
        if isinstance(value, tuple | list):
            yield from value
        else:
            yield value


def _resolved(value):
    return tuple(map(resolved, value)) if isinstance(value, tuple | list) else resolved(value)
