"""All ops on a CUDA device: every backend by the 2x rule, and the promises that only a GPU can break."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch._inductor import config as inductor
from torch.utils.checkpoint import checkpoint

import peft_fused
from peft_fused.ops import dispatch
from peft_fused.ops.accuracy import mutations, unseen, wrong
from peft_fused.ops.cases import DTYPES, OPS, make_bottleneck, make_lowrank, make_structured, structured_cases
from peft_fused.ops.dropout import dropout_threshold, keep_mask
from peft_fused.ops.structured.engine import STRUCTURES

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
BACKENDS = ("torch", "triton", "cuda")
# Of what is no measured error: several roundings, as a share of the largest number.
TOLERANCE = {F32: 1e-4, F16: 1e-2, BF16: 5e-2}

LOWRANK = ("lowrank_linear", "lowrank")
DROPPING = (*LOWRANK, *STRUCTURES)
# What may change from step to step without a new kernel or graph: values in turn. "routed" has an expert per group of
# rows.
SCALE, SEED, EXPERT = [1.5, 0.5, 3.0], [3, -7, 2**40], [0, 2, 1]
CONTROLS = {
    **{name: {"scale": SCALE, "rank": [7, 2, 5], "expert": EXPERT, "seed": SEED} for name in LOWRANK},
    "bottleneck": {"scale": SCALE, "expert": EXPERT},
    "bottleneck, routed": {"scale": SCALE, "expert": [[0, 1, 2, 0], [2, 2, 2, 2], [1, 0, 0, 1]]},
    **{name: {"scale": SCALE, "seed": SEED} for name in STRUCTURES},
}
# Odd, and with convolutions that all have length 192, which then share what is compiled.
SIZES = {"toeplitz": (155, 38), "kronecker": (7, 8, 5, 11), "ldr": (2, 93)}


def ids(types):
    return "+".join(str(t).removeprefix("torch.") for t in dict.fromkeys(types))


every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_type = pytest.mark.parametrize("types", DTYPES, ids=ids)
# One for each kind of operands that kernels are written for.
some_types = pytest.mark.parametrize("types", [(F32, F32), (BF16, BF16), (BF16, F32)], ids=ids)
every_name = pytest.mark.parametrize("name", CONTROLS)


def entry(name):
    return OPS[name.split(",")[0]]


def call(name, m=67, types=(F32, F32), device=DEVICE, dropout_p=0.2, **options):
    """A case of m rows, four times as many of the bottleneck, of the delta alone. B is not zero."""
    common = dict(dtype=types[0], adapter_dtype=types[1], device=device, **options)
    if name in LOWRANK:
        return make_lowrank(name, m, 93, 83, 7, experts=(3, 3), uv=True, base=False, dropout_p=dropout_p, **common)
    if name in STRUCTURES:
        return make_structured(name, m, *SIZES.get(name, (93,)), dropout_p=dropout_p, **common)
    if name == "bottleneck":
        return make_bottleneck(4 * m, 93, 83, 7, experts=(3, 3), **common)
    return OPS[name].control(name, *types, device)


def seeded(name):
    return {"seed": torch.tensor(3, device=DEVICE)} if name in DROPPING else {}


def cases_of(name, types):
    """Of a convolution every case takes seconds to compile: few lengths, and few cases of types that share the rest."""
    if name not in STRUCTURES or name == "kronecker":
        return list(OPS[name].cases(name, *types, DEVICE))
    cases = structured_cases(name, *types, DEVICE, sizes=(2, 97, 4096) if types == (F32, F32) else (97,))
    if types in ((F32, F32), (BF16, F32)):
        return list(cases)
    return [case for case in cases if "97" in case.name or "dropout" in case.name]


def live(controls):
    """(controls as tensors on the device, a function that gives them the values of another turn)."""
    table = {name: torch.tensor(values, device=DEVICE) for name, values in controls.items()}
    tensors = {name: values[0].clone() for name, values in table.items()}

    def turn(i):
        for name, tensor in tensors.items():
            tensor.copy_(table[name][i])

    return tensors, turn


def reasons(name, backend, case):
    return dispatch.why_not(backend, entry(name).problem(case))


def skip_unless(name, backend, case):
    if against := reasons(name, backend, case):
        pytest.skip("; ".join(against))


def step_of(name, backend, case, function=None):
    """A function that returns y and all gradients of a case."""
    inputs = [case.tensors[n] for n in case.wrt]
    dy = torch.randn(*case.input.shape[:-1], case.outputs, generator=torch.Generator().manual_seed(5))
    dy = dy.to(case.input)

    def step():
        with peft_fused.use_backend(backend):
            y = case.call(function or entry(name).fn)
        return [y.detach(), *torch.autograd.grad(y, inputs, dy.to(y))]

    return step


def assert_agree(found, expected, tolerance):
    assert len(found) == len(expected)
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        if b.numel():
            error, most = (a.double() - b.double()).abs().max().item(), b.double().abs().max().item()
            assert error <= tolerance * most, f"{'gradient' if i else 'output'} {i}: {error:.3g} of {most:.3g}"


def assert_agrees_with_float64(name, case, found, tolerance):
    """The reference runs on the host, so that nothing of it is the device's."""
    host = lambda value: value.cpu() if isinstance(value, torch.Tensor) else value  # noqa: E731
    tensors, options = ({n: host(v) for n, v in part.items()} for part in (case.tensors, case.options))
    exact = replace(case, tensors=tensors, options=options).to(torch.float64)
    expected = step_of(name, "reference", exact, entry(name).reference)()
    assert_agree([tensor.cpu() for tensor in found], expected, tolerance)


# ----------------------------------------------------------------------------------------------------- right or wrong


def test_uninitialised_memory_is_poisoned_and_products_run(poisoned):
    assert torch.empty(7, device=DEVICE).isnan().all()
    a = torch.ones(8, 8, device=DEVICE)
    assert torch.equal(a @ a, 8 * a)


@every_backend
@every_type
@pytest.mark.parametrize("name", OPS)
def test_error_is_at_most_twice_pytorchs(name, types, backend, poisoned):
    cases = cases_of(name, types)
    runnable = [case for case in cases if not reasons(name, backend, case)]
    if not runnable:
        skip_unless(name, backend, cases[0])
    with peft_fused.use_backend(backend):
        assert not [text for case in runnable for text in wrong(case)]


@every_backend
@every_type
@pytest.mark.parametrize("name", OPS)
def test_defects_do_not_pass(name, types, backend):
    case = call(name, types=types, **seeded(name))
    skip_unless(name, backend, case)
    assert mutations(case)
    with peft_fused.use_backend(backend):
        assert not unseen(case)


@every_backend
@pytest.mark.parametrize("sizes", [(4097, 768, 768, 8), (1024, 4096, 4096, 16), (511, 1024, 3072, 64)], ids=str)
def test_sizes_of_real_layers(sizes, backend):
    case = make_lowrank("lowrank_linear", *sizes, dtype=BF16, device=DEVICE, base=False)
    skip_unless("lowrank_linear", backend, case)
    with peft_fused.use_backend(backend):
        assert not wrong(case)


def check_rows(name, backend, types, m):
    """With dropout and without, where kernels may be others."""
    for dropout_p in (0.0, 0.2) if name in DROPPING else (0.0,):
        case = call(name, m, types, dropout_p=dropout_p, **seeded(name))
        skip_unless(name, backend, case)
        assert_agrees_with_float64(name, case, step_of(name, backend, case)(), TOLERANCE[types[0]])


@every_backend
@some_types
@every_name
def test_no_row_and_one_row(name, types, backend):
    for m in (0, 1):
        check_rows(name, backend, types, m)


@pytest.mark.sanitize
@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "torch"])
@some_types
@every_name
def test_every_kernel_on_few_rows(name, types, backend):
    check_rows(name, backend, types, 67)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@every_type
@every_name
def test_the_automatic_choice_runs(name, types, autocast):
    case = call(name, types=types, **live(CONTROLS[name])[0])
    step = step_of(name, None, case)
    with torch.autocast(DEVICE, BF16, enabled=autocast):
        found = step()
    assert_agrees_with_float64(name, case, found, TOLERANCE[BF16 if autocast else types[0]])


@pytest.mark.parametrize("backend", ["torch", "cuda"])
@every_name
def test_controls_of_other_types_are_the_same(name, backend):
    """The Triton kernels' own tests have theirs."""
    controls, _ = live({n: values for n, values in CONTROLS[name].items() if n != "seed"})
    other = {n: t.to(torch.float64 if t.is_floating_point() else torch.int32) for n, t in controls.items()}
    cases = [call(name, **options, **seeded(name)) for options in (controls, other)]
    skip_unless(name, backend, cases[0])
    expected, found = (step_of(name, backend, case)() for case in cases)
    assert_agree(found, expected, TOLERANCE[F32])


@every_backend
@some_types
@every_name
def test_two_runs_are_bitwise_equal(name, types, backend):
    case = call(name, 1000, types, **live(CONTROLS[name])[0])
    skip_unless(name, backend, case)
    step = step_of(name, backend, case)
    first = step()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, step(), strict=True))


# ----------------------------------------------------------------------------------------------------------- dropout


@cache
def identity(name, n, dtype):
    """What makes an op return drop(x), of n features."""
    eye = torch.eye(n, dtype=dtype, device=DEVICE)
    unit = eye[0].clone()
    if name == "lowrank_linear":
        return dict(weight=torch.zeros_like(eye), bias=None, A=eye, B=eye)
    if name == "kronecker":
        return dict(A=eye[:8, :8].contiguous(), B=eye[: n // 8, : n // 8].contiguous())
    names = ("A", "B") if name == "lowrank" else [p for p in STRUCTURES[name].names if p not in (None, "factor")]
    return dict.fromkeys(names, {"lowrank": eye, "ldr": unit[None]}.get(name, unit))


def masks(name, backend, x, **options):
    """(mask of the forward, mask of the backward) of an op on ones."""
    with peft_fused.use_backend(backend):
        y = entry(name).fn(x, **identity(name, x.shape[1], x.dtype), dropout_p=0.3, **options)
    return y.abs() > 0.5, torch.autograd.grad(y, x, torch.ones_like(y))[0].abs() > 0.5


def ones(name, backend, m=300, n=64, dtype=F32):
    x = torch.ones(m, n, dtype=dtype, device=DEVICE, requires_grad=True)
    skip_unless(name, backend, call(name, types=(dtype, dtype)))
    return x


@some_types
@pytest.mark.parametrize("name", [*LOWRANK, "bottleneck", "bottleneck, routed"])
def test_launched_from_cpp_is_launched_by_python(name, types):
    """The same kernels on the same arguments: equal bits, from the C++ node and from Triton's own launcher."""
    if not dispatch.native_allowed():
        pytest.skip("needs the C++ extension")
    case = call(name, types=types, **live(CONTROLS[name])[0], **seeded(name))
    skip_unless(name, "triton", case)
    fn, found = entry(name).fn, []
    for native in (True, False):
        with peft_fused.use_backend("triton", native=native):
            y = case.call(fn)
        found.append([y.detach(), *torch.autograd.grad(y, [case.tensors[n] for n in case.wrt], torch.ones_like(y))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@every_backend
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", DROPPING)
def test_dropout_mask_is_exact(name, dtype, backend):
    x = ones(name, backend, dtype=dtype)
    for seed in (0, -1, 2**40 + 3):
        keep = keep_mask(torch.tensor(seed), *x.shape, dropout_threshold(0.3)).to(DEVICE)
        for mask in masks(name, backend, x, seed=torch.tensor(seed, device=DEVICE)):
            assert torch.equal(mask, keep)


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@every_backend
@pytest.mark.parametrize("name", DROPPING)
def test_a_recomputed_forward_drops_the_same(name, backend, reentrant):
    x = ones(name, backend)

    def function(x):
        with peft_fused.use_backend(backend):
            return entry(name).fn(x, **identity(name, x.shape[1], x.dtype), dropout_p=0.3)

    seen = []
    for _ in range(2):
        x.grad = None
        y = checkpoint(function, x, use_reentrant=reentrant)
        torch.randn(7, device=DEVICE)  # whatever else is drawn until then
        y.sum().backward()
        assert torch.equal(y.abs() > 0.5, x.grad.abs() > 0.5)
        seen.append(y.abs() > 0.5)
    assert not torch.equal(*seen)


@every_backend
@pytest.mark.parametrize("name", DROPPING)
def test_every_replay_of_a_cuda_graph_draws_a_mask(name, backend, capture):
    x = ones(name, backend)
    replay, (forward, backward) = capture(lambda: masks(name, backend, x))
    seen = []
    for _ in range(3):
        replay()
        assert torch.equal(forward, backward)
        assert 0.6 < forward.float().mean() < 0.8
        seen.append(forward.clone())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


@every_backend
def test_rows_of_every_block_are_dropped_by_their_number(backend):
    """Where x is worked on in blocks of rows; with ones for A and B, dx is the mask."""
    m, k, p = 300, 1 << 16, 0.3
    x, seed = torch.ones(m, k, device=DEVICE, requires_grad=True), torch.tensor(5, device=DEVICE)
    case = make_lowrank("lowrank", 1, k, 1, 1, device=DEVICE, dropout_p=p)
    skip_unless("lowrank", backend, case)
    A, B = torch.ones(1, k, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    with peft_fused.use_backend(backend):
        y = OPS["lowrank"].fn(x, A, B, dropout_p=p, seed=seed)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    keep = keep_mask(seed.cpu(), m, k, dropout_threshold(p)).to(DEVICE)
    assert torch.equal(dx > 0.5, keep)
    torch.testing.assert_close(y[:, 0], keep.sum(1) / (1 - dropout_threshold(p) / 65536), rtol=5e-4, atol=0)


# -------------------------------------------------------------------------------------- the host, graphs and compilers


def test_waiting_for_the_device_is_noticed(no_sync):
    one = torch.ones((), device=DEVICE)
    for waits in (one.item, one.cpu, lambda: torch.tensor(1, device=DEVICE), lambda: one.nonzero()):
        with pytest.raises(RuntimeError, match="synchronizing"), no_sync():
            waits()
    assert torch.cuda.get_sync_debug_mode() == 0


@every_backend
@some_types
@every_name
def test_no_host_sync_in_a_step(name, types, backend, no_sync):
    controls, turn = live(CONTROLS[name])
    controls.pop("seed", None)  # the op draws one
    case = call(name, types=types, **controls)
    skip_unless(name, backend, case)

    def step():
        with peft_fused.use_backend(backend):
            case.call(entry(name).fn).float().square().mean().backward()

    step()
    with no_sync():
        turn(1)
        step()


@every_backend
@some_types
@every_name
def test_a_cuda_graph_replays_with_other_data_and_controls(name, types, backend, capture):
    controls, turn = live(CONTROLS[name])
    case = call(name, types=types, **controls)
    skip_unless(name, backend, case)
    step = step_of(name, backend, case)
    replay, found = capture(step)
    for i in range(3):
        turn(i)
        with torch.no_grad():
            for tensor in (case.tensors[n] for n in case.wrt):
                tensor.mul_(0.9 + 0.2 * torch.rand_like(tensor))
        replay()
        assert_agree(found, step(), TOLERANCE[types[0]])


@some_types
@every_name
def test_values_do_not_recompile(name, types, compilations):
    """Neither 50 numbers of rows, of one power of two, nor any rank, expert, scale, seed or probability."""
    number = call(name, types=types)
    skip_unless(name, "triton", number)
    controls, turn = live(CONTROLS[name])

    def run(m, **options):
        step_of(name, "triton", call(name, m, types, **options))()

    def numbers(i):
        return {n: values[i] if n != "seed" else controls[n] for n, values in CONTROLS[name].items()}

    run(600, **controls)
    if name != "bottleneck, routed":
        run(600, **numbers(0))
    before = compilations()
    assert before > 0
    for i, m in enumerate((*range(528, 1025, 32), *range(513, 1024, 15))):
        turn(i % 3)
        run(m, **controls)
        if name != "bottleneck, routed":
            run(m, **numbers(i % 3))
    for rank in range(1, 8) if name in LOWRANK else ():
        controls["rank"].fill_(rank)
        run(600, **controls)
        run(600, **numbers(0) | {"rank": rank})
    for percent in (1, 50, 99) if name in DROPPING else ():
        run(600, dropout_p=percent / 100, **controls)
    assert compilations() == before


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("name", ["lowrank_linear", "bottleneck, routed", "circulant", "kronecker"])
def test_compiles_into_one_graph_for_all_values(name, mode):
    """Also where inductor captures CUDA graphs."""
    controls, turn = live(CONTROLS[name])
    case = call(name, **controls)
    function = torch.compile(lambda **k: entry(name).fn(**k) * 2, fullgraph=True, mode=mode)
    compiled, plain = (step_of(name, None, case, f) for f in (function, lambda **k: entry(name).fn(**k) * 2))
    with inductor.patch(compile_threads=1):  # no pool of processes for each one that runs tests
        assert_agree(compiled(), plain(), TOLERANCE[F32])
    with torch.compiler.set_stance("fail_on_recompile"):
        for i in (1, 2, 0, 1):
            turn(i)
            assert_agree(compiled(), plain(), TOLERANCE[F32])


# ------------------------------------------------------------------------------------------------- streams and devices


@every_backend
@every_name
def test_works_on_the_current_stream(name, backend):
    """Inputs appear on a stream of their own, late: whatever runs on another one sees them as they were before."""
    case = call(name, **live(CONTROLS[name])[0])
    skip_unless(name, backend, case)
    step = step_of(name, backend, case)
    expected = step()
    late = [tensor for tensor in case.tensors.values() if tensor is not None]
    values = [tensor.detach().clone() for tensor in late]
    with torch.no_grad():
        torch._foreach_zero_(late)
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            for tensor, value in zip(late, values, strict=True):
                tensor.copy_(value)
        found = step()
    side.synchronize()
    assert_agree(found, expected, TOLERANCE[F32])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@every_backend
@every_name
def test_works_on_a_device_that_is_not_the_current_one(name, backend):
    case = call(name, device=f"{DEVICE}:1", dropout_p=0.0)
    skip_unless(name, backend, case)
    found = step_of(name, backend, case)()
    assert all(tensor.device == case.input.device for tensor in found)
    assert_agrees_with_float64(name, case, found, TOLERANCE[F32])
