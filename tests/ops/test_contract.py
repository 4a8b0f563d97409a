"""What every op has to keep, on both autograd nodes of this machine's CPU: an op joins by its entry in `ops.cases`.

What is particular to an op stands in its own file; Triton's kernels in tests/triton_kernels, and those of a GPU in
test_gpu.py.
"""

import functools
import itertools
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import peft_fused
from peft_fused.ops import dispatch, native
from peft_fused.ops.accuracy import mutations, unseen, wrong
from peft_fused.ops.cases import DTYPES, OPS

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
NODES = [
    pytest.param(True, id="cpp", marks=pytest.mark.skipif(native.module is None, reason=native.why_missing or "-")),
    pytest.param(False, id="python"),
]
every_op = pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
every_type = pytest.mark.parametrize("types", DTYPES, ids=lambda types: "+".join(str(t)[6:] for t in types))


@pytest.fixture(params=NODES)
def node(request):
    with peft_fused.use_backend("torch", native=request.param):
        yield request.param


def cases_of(op, types, most=60_000):
    """Its calls on inputs of at most so many numbers."""
    found = [case for case in op.cases(op.name, *types, "cpu") if case.input.numel() <= most]
    assert found
    return [case for case in found if case.input.shape[-1] <= 1000]


def small(op, dtype=F32, adapter_dtype=None):
    return cases_of(op, (dtype, adapter_dtype or dtype), 8_000)


def rich(op, *types):
    """The small call of which most tensors are trained."""
    return max(small(op, *types), key=lambda case: len(case.wrt))


def leaves(case):
    return [case.tensors[name] for name in case.wrt]


def of_leaves(fn, case):
    """fn of the case's leaves alone."""
    return lambda *tensors: fn(**{**case.tensors, **dict(zip(case.wrt, tensors, strict=True))}, **case.options)


def dy_of(case):
    return torch.randn(*case.input.shape[:-1], case.outputs, dtype=case.input.dtype)


def results(fn, case, dy, **tensors):
    """y and the gradients of the case's leaves, or of what stands in their places."""
    tensors = case.tensors | tensors
    y = fn(**tensors, **case.options)
    return [y.detach(), *torch.autograd.grad(y, [tensors[name] for name in case.wrt], dy)]


def controls(case):
    """Tensors among its options, by name."""
    flat = {}
    for name, value in case.options.items():
        values = value if isinstance(value, tuple) else (value,)
        flat |= {f"{name} {i}": v for i, v in enumerate(values) if isinstance(v, torch.Tensor)}
    return flat


def with_leading(case, shape):
    """The same rows under other leading sizes, or none of them."""
    of_rows = {name for name in case.tensors if case.tensors[name] is case.input or name in ("add", "residual")}
    return {
        name: t[: torch.Size(shape).numel()].detach().reshape(*shape, t.shape[-1]).requires_grad_(t.requires_grad)
        for name, t in case.tensors.items()
        if name in of_rows and t is not None
    }


# --------------------------------------------------------------------------------------------------------------- right


@every_op
def test_gradcheck_of_the_reference(op):
    for case in small(op, F64):
        if "frozen" not in case.options:  # it leaves out gradients that there are
            assert torch.autograd.gradcheck(of_leaves(op.reference, case), leaves(case), fast_mode=True), case.name


@every_op
def test_gradcheck(op, node):
    for case in small(op, F64):
        if "frozen" not in case.options:
            assert torch.autograd.gradcheck(of_leaves(op.fn, case), leaves(case), fast_mode=True), case.name


@every_op
@every_type
def test_error_is_at_most_twice_pytorchs(op, types, node, poisoned):
    for case in cases_of(op, types):
        assert not wrong(case)


@every_op
@every_type
def test_defects_do_not_pass(op, types, node):
    case = op.control(op.name, *types, "cpu")
    assert len(mutations(case)) > 1 and not unseen(case)


@every_op
def test_any_subset_may_be_frozen(op, node, poisoned):
    case = rich(op, F64)
    dy = dy_of(case)
    want = dict(zip(case.wrt, results(op.reference, case, dy)[1:], strict=True))
    for size in range(1, len(case.wrt) + 1):
        for names in itertools.combinations(case.wrt, size):
            tensors = {name: case.tensors[name].detach().requires_grad_(name in names) for name in case.wrt}
            of_leaves(op.fn, case)(*tensors.values()).backward(dy)
            for name, tensor in tensors.items():
                if name in names:
                    torch.testing.assert_close(tensor.grad, want[name])
                else:
                    assert tensor.grad is None, (names, name)


# --------------------------------------------------------------------------------------------------- shapes and strides


@every_op
def test_leading_dimensions(op, node):
    for case in small(op, F64):
        m, dy = len(case.input), dy_of(case)
        want = results(op.fn, case, dy)
        shapes = [(m, 1), (1, m, 1), *([(2, m // 2)] if m % 2 == 0 else ()), *([()] if m == 1 else ())]
        for shape in shapes:
            got = results(op.fn, case, dy.reshape(*shape, -1), **with_leading(case, shape))
            assert got[0].shape == (*shape, case.outputs)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a.reshape(b.shape), b)


@every_op
@pytest.mark.parametrize("shape", [(0,), (2, 0), (2, 0, 3)], ids=str)
def test_no_tokens_give_no_gradient_whatever_the_parameters_hold(op, shape, node):
    for case in small(op):
        empty = with_leading(case, shape)
        rest = {name: torch.full_like(t, float("inf")) for name, t in case.tensors.items() if t is not None}
        rest = {name: t.requires_grad_(name in case.wrt) for name, t in rest.items() if name not in empty}
        y, *grads = results(op.fn, case, torch.zeros(*shape, case.outputs), **rest, **empty)
        assert y.shape == (*shape, case.outputs)
        assert not any(grad.any() for grad in grads), case.name


@every_op
def test_strides_of_any_kind(op, node):
    """Gaps between the numbers, matrices that lie transposed, an expanded gradient."""
    layouts = (
        lambda t: torch.stack([t, t], -1)[..., 0],
        lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
        lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
    )
    for case in small(op, F64):
        dy = torch.ones(case.outputs, dtype=F64).expand(len(case.input), -1)
        want = results(op.fn, case, dy.contiguous())
        for layout in layouts:
            tensors = {
                name: t if t is None else layout(t.detach()).requires_grad_(t.requires_grad)
                for name, t in case.tensors.items()
            }
            torch.testing.assert_close(results(op.fn, case, dy, **tensors), want)


@every_op
def test_meta_tensors_have_the_shape_alone(op, node):
    for case in small(op):
        if not controls(case):
            tensors = {name: t if t is None else t.to("meta") for name, t in case.tensors.items()}
            y = op.fn(**tensors, **case.options)
            assert (y.shape, y.device.type) == ((len(case.input), case.outputs), "meta")


# ------------------------------------------------------------------------------------- what backward keeps and repeats


@every_op
def test_inputs_and_outputs_keep_to_themselves(op, node):
    """Neither inputs nor saved tensors are written to, and the output may be changed in place by the next layer."""
    for case in small(op):
        dy, before = dy_of(case), {name: t.detach().clone() for name, t in case.tensors.items() if t is not None}
        want = results(op.fn, case, dy)
        y = case.call(op.fn)
        y.add_(1.0)
        for a, b in zip(torch.autograd.grad(y, leaves(case), dy), want[1:], strict=True):
            assert torch.equal(a, b), "two runs"
        assert torch.equal(y.detach() - 1, want[0] + 1 - 1)
        for name, value in before.items():
            assert torch.equal(case.tensors[name], value), name


@every_op
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_plain_gradients(op, use_reentrant, node):
    """Dropout draws its seed from torch's generator, which both kinds of checkpointing replay."""
    for case in small(op):
        case.options.pop("seed", None)
        torch.manual_seed(11)
        want = torch.autograd.grad(case.call(op.fn).square().sum(), leaves(case))
        torch.manual_seed(11)
        y = checkpoint(of_leaves(op.fn, case), *leaves(case), use_reentrant=use_reentrant)
        y.square().sum().backward()
        for leaf, grad in zip(leaves(case), want, strict=True):
            assert torch.equal(leaf.grad, grad), case.name


@every_op
@pytest.mark.parametrize("saved", ["mm", "_fwd", "nothing"])
@pytest.mark.parametrize("types", DTYPES[:2], ids=["fp32", "bf16+fp32"])
def test_selective_checkpointing_gives_the_plain_gradients(op, types, saved, node):
    """Whatever the policy keeps: it sees the op as one operation, none of whose intermediate results it could keep."""
    seen = set()

    def policy(context, operation, *args, **kwargs):
        seen.add(str(operation))
        return CheckpointPolicy.MUST_SAVE if saved in str(operation) else CheckpointPolicy.PREFER_RECOMPUTE

    case = rich(op, *types)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    block = lambda *tensors: of_leaves(op.fn, case)(*tensors).sin()  # noqa: E731
    want = torch.autograd.grad(block(*leaves(case)).sum(), leaves(case))
    y = checkpoint(block, *leaves(case), use_reentrant=False, context_fn=contexts)
    for got, plain in zip(torch.autograd.grad(y.sum(), leaves(case)), want, strict=True):
        assert (got - plain).abs().max() <= 0.01 * plain.abs().max()  # two nodes, two orders of rounding
    assert any(name.startswith("peft_fused.") for name in seen) and not any("mm" in name for name in seen)


@every_op
def test_a_control_changed_before_backward_is_no_silent_error(op, node):
    """A tensor read again in backward must be the one of the forward, or autograd must object."""
    changed = 0
    for case in small(op):
        for name, control in controls(case).items():
            dy, value = dy_of(case), control.clone()
            y = case.call(op.fn)
            want = torch.autograd.grad(y, leaves(case), dy, retain_graph=True)
            control.fill_(1 if not torch.equal(control, torch.ones_like(control)) else 2)
            try:
                got = torch.autograd.grad(y, leaves(case), dy)
            except RuntimeError as error:
                assert "modified by an inplace operation" in str(error)
            else:
                assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), (case.name, name)
            control.copy_(value)
            changed += 1
    assert changed


@every_op
def test_no_second_derivative_without_saying_so(op, node):
    case = rich(op)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(case.call(op.fn).sum(), [case.input], create_graph=True)
    with peft_fused.use_backend("reference"):
        torch.autograd.grad(case.call(op.fn).square().sum(), leaves(case), create_graph=True)


# ----------------------------------------------------------------------------------------- modes, traces and autocast


@every_op
def test_arithmetic_is_counted(op, node):
    import peft_fused.ops.flops  # noqa: F401

    case = rich(op)
    with FlopCounterMode(display=False) as counter:
        y = case.call(op.fn)
        forward = counter.get_total_flops()
        y.sum().backward()
    assert 0 < forward < counter.get_total_flops() <= 4 * forward


@every_op
def test_compile_is_one_graph_and_values_do_not_recompile(op):
    for case in small(op):
        if not controls(case):
            continue
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(op.fn, backend=counter, fullgraph=True)
        for change in (torch.Tensor.contiguous, lambda control: control.fill_(1)):
            for control in controls(case).values():
                change(control)
            got, want = (torch.autograd.grad(case.call(fn).sum(), leaves(case)) for fn in (compiled, op.reference))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
        assert counter.frame_count == 1, case.name


@every_op
def test_compile_takes_any_number_of_rows_and_any_scale(op):
    case = rich(op)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op.fn, backend=counter, fullgraph=True)
    options = {name: value for name, value in case.options.items() if name != "scale"}
    for rows in (3, 4, 7, 12, 19):
        tensors = case.tensors | with_leading(case, (rows,))
        torch.testing.assert_close(compiled(**tensors, **options), op.fn(**tensors, **options))
    assert counter.frame_count == 2, "one for the first number of rows, one for all others"
    for dynamic in (None, True):
        torch._dynamo.reset()
        compiled = torch.compile(op.fn, backend="eager", fullgraph=True, dynamic=dynamic)
        for scale in (0.5, 0.7, 0.9):
            options["scale"] = scale
            torch.testing.assert_close(
                compiled(**case.tensors, **options), op.fn(**case.tensors, **options), rtol=1e-4, atol=1e-4
            )


class Recorder(TorchDispatchMode):
    """Notes the registered operations that run, with their arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "peft_fused":
            self.seen.append((function, args))
        return function(*args, **kwargs or {})


@every_op
def test_opcheck(op):
    """Of forward and backward, on the arguments with which they run."""
    every = small(op)
    for case in (rich(op), rich(op, *DTYPES[1]), next(case for case in every if controls(case)), every[-1]):
        with Recorder() as recorder:
            case.call(op.fn).sum().backward()
        (forward, columns), (backward, backward_columns) = recorder.seen
        wanted = {t.data_ptr() for t in leaves(case)}
        columns = [
            t.detach().requires_grad_(t.data_ptr() in wanted) if isinstance(t, torch.Tensor) else t for t in columns
        ]
        torch.library.opcheck(forward, tuple(columns))
        torch.library.opcheck(
            backward, tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in backward_columns)
        )


@every_op
def test_a_compiled_call_keeps_the_backend_it_was_traced_with(op):
    case = rich(op)
    y = torch.compile(op.fn, backend="aot_eager", fullgraph=True)(**case.tensors, **case.options)
    with peft_fused.use_backend("reference"):
        y.sum().backward()
    assert all(leaf.grad is not None for leaf in leaves(case))


@every_op
def test_autocast_is_that_of_linear(op, node):
    for case in small(op):
        with torch.autocast("cpu", dtype=BF16):
            y = case.call(op.fn)
        assert y.dtype == BF16
        truth = case.to(F64).call(op.reference)
        assert (y.double() - truth).norm() <= 2e-2 * truth.norm(), case.name
        y.float().sum().backward()
        assert all(leaf.grad.dtype == F32 for leaf in leaves(case))


@every_op
def test_backward_inside_autocast_keeps_its_types(op, node):
    for case in small(op):
        dy = dy_of(case)
        y = case.call(op.fn)
        want = torch.autograd.grad(y, leaves(case), dy, retain_graph=True)
        with torch.autocast("cpu", dtype=BF16):
            got = torch.autograd.grad(y, leaves(case), dy)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), case.name


# ------------------------------------------------------------------------------------------------------------ dispatch


@every_op
def test_a_forced_backend_that_cannot_run_says_why(op, every_backend):
    case = rich(op, F64)
    assert dispatch.decide(op.problem(case)).backend == "torch"
    with peft_fused.use_backend("triton"), pytest.raises(RuntimeError) as error:
        case.call(op.fn)
    assert "float64" in str(error.value) and "CUDA device" in str(error.value)
    compiled = torch.compile(op.fn, backend="aot_eager")
    with peft_fused.use_backend("triton"), pytest.raises(RuntimeError, match="float64"):
        compiled(**case.tensors, **case.options)
    with peft_fused.use_backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
        case.call(op.fn)


def test_the_ops_run_without_importing_triton():
    """On the CPU, without PEFT, whose transformers import it."""
    code = (
        "import importlib.util, sys, torch; found = importlib.util.find_spec;"
        "importlib.util.find_spec = lambda name, package=None: None if name == 'peft' else found(name, package);"
        "import peft_fused; from peft_fused.ops.cases import OPS;"
        "[op.control(op.name, torch.float32, torch.float32, 'cpu').call(op.fn) for op in OPS.values()];"
        "assert not {'peft', 'transformers', 'triton'} & set(sys.modules), 'imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
