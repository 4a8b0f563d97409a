"""What the C++ node launches is what Python launches, launch for launch: see launches.py. That Python's launches are
right, the interpreter shows.

CPU tensors stand for the device's. Both nodes run the same calls. Of a launch are compared the kernel and how it is
specialised, the grid, the threads, the shared memory and the bytes of every argument, a pointer by tensor and offset.
"""

import os
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from launches import recording
from peft_fused.triton_kernels import compiled, lowrank
from peft_fused.triton_kernels.dropout import dropout_threshold
from peft_fused.triton_kernels.lowrank_plan import LowRankProblem, plan_lowrank
from peft_fused.triton_kernels.problem import H200
from rule import BF16, FP32, TYPES
from torch.utils._python_dispatch import TorchDispatchMode

import peft_fused
from peft_fused.ops import cases, native
from peft_fused.ops.cases import make_bottleneck, make_lowrank
from peft_fused.ops.lowrank import LowRankCall

pytestmark = pytest.mark.skipif(native.module is None, reason="the C++ extension is not built")


@pytest.fixture
def to_list():
    native.module.send_triton_launches("list")
    yield
    native.module.triton_launches()
    native.module.send_triton_launches("driver")


class Names:
    """Names of tensors by their addresses, which stay alive: the inputs', and of others the order of appearance."""

    def __init__(self, inputs):
        self.known = {t.untyped_storage().data_ptr(): name for name, t in inputs.items() if t is not None}
        self.others = 0

    def of(self, tensor) -> tuple:
        start = tensor.untyped_storage().data_ptr()
        if start not in self.known:
            self.known[start] = self.others
            self.others += 1
        return self.known[start], tensor.data_ptr() - start


def from_python(launch, names) -> tuple:
    arguments = []
    for name, kind in launch.compilation.signature.items():
        value = launch.arguments[name]
        if kind == "constexpr":
            continue
        if isinstance(value, torch.Tensor):
            arguments.append(names.of(value))
        else:
            arguments.append(struct.pack({"i32": "i", "i64": "q", "fp32": "f"}[kind], value))
    threads = 32 * launch.compilation.options.num_warps
    return launch.compilation.name, launch.function, launch.grid, threads, 16 * launch.function, arguments


def from_cpp(launch, names, recorder) -> tuple:
    function, grid, threads, shared, stream, arguments, tensors = launch
    compilation = recorder.compilations[function - 1]
    kinds = [kind for kind in compilation.signature.values() if kind != "constexpr"]
    tensors, found = iter(tensors), []
    for kind, value in zip(kinds, arguments, strict=True):
        if not kind.startswith("*"):
            found.append(value)
            continue
        tensor = next(tensors)
        assert struct.unpack("Q", value) == (tensor.data_ptr(),)
        found.append(names.of(tensor))
    assert stream == 0
    return compilation.name, function, grid, threads, shared, found


class Recorded(TorchDispatchMode):
    """In which a call is one registered operation, as in a traced graph."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def launched(case, dy) -> tuple[list, list, list]:
    """What a call and its backward launch by Python, by the C++ node, and by C++ as a registered operation; with one
    compiler for all."""
    fn = cases.OPS[case.op].fn
    inputs = {**case.tensors, **{n: v for n, v in case.options.items() if isinstance(v, torch.Tensor)}, "dy": dy}
    with recording(cpp=True) as recorder:
        found = []
        for cpp, mode in ((False, nullcontext), (True, nullcontext), (True, Recorded)):
            recorder.launches.clear()
            native.module.triton_launches()
            with peft_fused.use_backend("triton", native=cpp):
                with mode():
                    y = case.call(fn)
                gradients = torch.autograd.grad(y, [case.tensors[name] for name in case.wrt], dy)
            by_python, by_cpp = recorder.launches, native.module.triton_launches()
            assert bool(by_python) != bool(by_cpp) == cpp, "one side launches, the other does not"
            names = Names(inputs)
            found.append(
                [from_cpp(one, names, recorder) for one in by_cpp] or [from_python(one, names) for one in by_python]
            )
            del y, gradients
    return found


def all_cases():
    for op in ("lowrank_linear", "lowrank", "bottleneck"):
        for name, types in TYPES.items():
            for i, case in enumerate(cases.OPS[op].cases(op, *types, "cpu")):
                yield pytest.param(case, id=f"{op}-{name}-{i}")
    for name in ("bf16", "bf16-fp32", "fp32"):
        # Large enough to be shared out to planes; of ranks that take two passes; by all options at once.
        for i, (sizes, options) in enumerate(
            (
                ((256, 2048, 1024, 16), {}),
                ((300, 1024, 2048, 8), {"dropout_p": 0.1, "seed": 5, "uv": True}),
                ((300, 512, 768, 64), {"dropout_p": 0.1, "seed": 5}),
                ((300, 512, 768, 200), {"experts": (3, 2), "expert": (torch.tensor(1), torch.tensor(0)), "uv": True}),
                ((300, 512, 768, 8), {"wrt": ("A", "B")}),
                ((300, 512, 768, 8), {"wrt": ("x", "B"), "uv": True}),
                ((300, 512, 768, 8), {"wrt": ("x",)}),
                ((300, 512, 768, 8), {"wrt": ("bias", "B")}),
                ((300, 512, 768, 8), {"wrt": ("bias", "u"), "uv": True}),
                ((300, 512, 768, 40), {"wrt": ("x", "A", "weight"), "strided": True}),
            )
        ):
            dtype, adapter = TYPES[name]
            case = make_lowrank("lowrank_linear", *sizes, dtype=dtype, adapter_dtype=adapter, **options)
            yield pytest.param(case, id=f"large-{name}-{i}")
        dtype, adapter = TYPES[name]
        for i, (sizes, options) in enumerate(
            (
                ((512, 768, 768, 16), {"experts": (4, 4), "expert": torch.tensor([0, 3])}),
                ((512, 768, 3072, 200), {"experts": (4, None), "expert": torch.tensor(2), "wrt": ("h", "up")}),
                ((96, 64, 64, 8), {"experts": (3, 2), "expert": (torch.tensor([0, 2, 1]), torch.tensor([1, 0]))}),
                ((96, 64, 64, 8), {"wrt": ("up_bias",)}),
                ((96, 64, 64, 8), {"wrt": ("down_bias",), "activation": "swish"}),
                ((96, 64, 64, 8), {"wrt": ("h",), "activation": "identity"}),
            )
        ):
            case = make_bottleneck(*sizes, dtype=dtype, adapter_dtype=adapter, **options)
            yield pytest.param(case, id=f"bottleneck-large-{name}-{i}")


@pytest.mark.parametrize("case", all_cases())
def test_launch_for_launch(case, to_list):
    dy = torch.ones(*case.input.shape[:-1], case.outputs, dtype=case.input.dtype)
    by_python, by_node, by_operation = launched(case, dy)
    for one, other, third in zip(by_python, by_node, by_operation, strict=True):
        assert one == other == third


def planned(m, n, k, x, adapter, *more, **options):
    """Plan of a problem on an H200."""
    types = (str(t.dtype).removeprefix("torch.") for t in (x, adapter))
    return plan_lowrank(LowRankProblem(m, n, k, *types, "cpu", H200, *more, **options))


def compared(inputs, by_python, by_cpp, plan, types) -> int:
    """How many kernels by_python() launches, of which by_cpp(the node's plan) launches the same ones. Both give tensors
    by name, or None."""
    names = [str(dtype).removeprefix("torch.") for dtype in types]
    problem = LowRankProblem(1, 1, 1, *names, "cpu", H200, 1, False, False)

    def kinds(results):
        return {name: t if t is None else (t.dtype, t.shape) for name, t in results.items()}

    with recording(cpp=True) as recorder:
        one, other = by_python(), by_cpp(compiled.for_node(native.module, problem, plan))
        assert kinds(one) == kinds(other)
        names = Names(inputs), Names(inputs)
        launches = [from_python(launch, names[0]) for launch in recorder.launches]
        assert launches == [from_cpp(launch, names[1], recorder) for launch in native.module.triton_launches()]
    return len(launches)


@pytest.mark.parametrize("types", ["bf16", "bf16-fp32", "fp32"])
@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("r", [5, 16, 40])
def test_launch_for_launch_of_a_given_s(types, weight, r, to_list):
    m, n, k = 300, 1024, 512
    dtype, adapter = TYPES[types]
    t = {"x": torch.ones(m, k, dtype=dtype), "W": torch.ones(n, k, dtype=dtype), "B": torch.ones(n, r, dtype=adapter)}
    t |= {"S": torch.ones(m, max(r, 16), dtype=adapter), "u": torch.ones(r, dtype=adapter)}
    t |= {"kept": torch.ones(m, lowrank.padded_rank(r), dtype=adapter), "dy": torch.ones(m, n, dtype=dtype)}
    call = LowRankCall(t["x"], t["W"] if weight else None, None, None, None, t["B"], t["u"], S=t["S"])
    plan = planned(m, n, k, t["x"], t["B"], r, False, weight, given=True)

    def by_python():
        y, S = lowrank.lowrank_fwd(call, plan=plan)
        return {"y": y, "kept": S, **lowrank.lowrank_bwd(t["dy"], call, t["kept"], needs=needs, plan=plan)}

    def by_cpp(node):
        y, S = node.forward(call)
        return {"y": y, "kept": S, **node.backward(t["dy"], call, t["kept"], needs)}

    for needs, launches in (({"S", "B", "u"}, 4), ({"S", "B"}, 3), ({"S"}, 2), ({"B"}, 3), (set(), 1)):
        two_passes = {"S", "B"} <= needs and plan.grad_b is None
        needs |= {"x"} if weight else set()
        assert compared(t, by_python, by_cpp, plan, (dtype, adapter)) == launches + two_passes


SHARED = [
    ((8, 16), 0.0, {}),
    ((16, 16, 16), 0.0, {"rows": 4096}),
    ((16, 5, 8), 0.1, {}),
    ((40, 40, 8, 33), 0.1, {}),
    ((40, 40), 0.0, {"onto": False, "strided": True}),
    ((8, 8, 8), 0.1, {"undefined": (1,)}),
    ((8, 8, 8), 0.0, {"undefined": (0, 2), "needs": (False, True, True)}),
    ((8, 8, 8), 0.1, {"need_x": False, "needs": (True, False, True)}),
    ((16, 16), 0.1, {"needs": (False, False), "strided": True}),
    ((16,), 0.1, {}),
    ((16, 8), 0.0, {"undefined": (0, 1)}),
]


@pytest.mark.parametrize("types", ["bf16", "bf16-fp32", "fp32"])
@pytest.mark.parametrize(("sizes", "p", "options"), SHARED, ids=str)
def test_launch_for_launch_of_members(sizes, p, options, types, to_list):
    """Of the product that projections share, forward and backward."""
    given = {"rows": 300, "onto": True, "strided": False, "undefined": (), "need_x": True}
    given |= {"needs": (True,) * len(sizes)}
    m, has_onto, strided, undefined, need_x, needs = (given | options).values()
    k, (dtype, adapter), threshold = 1032, TYPES[types], dropout_threshold(p)

    def ones(*shape, of):
        return torch.ones(shape[::-1], dtype=of).t() if strided else torch.ones(shape, dtype=of)

    factors = [ones(r, k, of=adapter) for r in sizes]
    x, onto = ones(m, k, of=dtype), ones(m, k, of=dtype) if has_onto else None
    seeds = torch.arange(len(sizes)) if threshold else None
    R = lowrank.padded_rank(max(sizes))
    grads = [None if i in undefined else torch.ones(m, R, dtype=adapter) for i in range(len(sizes))]
    plan = planned(m, k, k, x, factors[0], max(sizes), threshold > 0, True, members=len(sizes))
    assert len(sizes) == 1 or plan.forward == "shared_shrink"
    assert plan.shrink.splits == 1 if m == 4096 else plan.shrink.splits > 1 or max(sizes) > 16

    def named(S, found):
        dx, of_factors = found
        return {f"S{i}": one for i, one in enumerate(S)} | {"x": dx} | dict(enumerate(of_factors))

    def by_python():
        S = lowrank.shared_shrink_fwd(x, factors, threshold=threshold, seeds=seeds, plan=plan)
        more = dict(onto=onto, threshold=threshold, seeds=seeds, need_x=need_x, needs=needs, plan=plan)
        return named(S, lowrank.shared_shrink_bwd(grads, x, factors, **more))

    def by_cpp(node):
        S = node.shared_forward(x, factors, threshold, seeds)
        return named(S, node.shared_backward(grads, x, factors, onto, threshold, seeds, need_x, needs))

    inputs = {"x": x, "onto": onto, "seeds": seeds} | {f"A{i}": A for i, A in enumerate(factors)}
    inputs |= {f"dS{i}": dS for i, dS in enumerate(grads)}
    of_factors = any(one and dS is not None for one, dS in zip(needs, grads, strict=True))
    backward = need_x + 2 * of_factors if undefined != (0, 1) else 0
    assert compared(inputs, by_python, by_cpp, plan, (dtype, adapter)) == 1 + backward


@pytest.fixture
def tf32_allowed():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


OF_FP32 = [
    ("lowrank_linear", "fp32"),
    ("lowrank_linear", "fp16-fp32"),
    ("bottleneck", "fp32"),
    ("bottleneck", "bf16-fp32"),
]


@pytest.mark.parametrize(("op", "types"), OF_FP32)
def test_a_precision_that_pytorch_may_use_is_passed_on(op, types, to_list, tf32_allowed):
    """Whoever lets PyTorch's fp32 products use tf32 gets that here too, where a product is one of fp32."""
    case = cases.OPS[op].control(op, *TYPES[types], "cpu")
    dy = torch.ones(*case.input.shape[:-1], case.outputs, dtype=case.input.dtype)
    by_python, by_node, by_operation = launched(case, dy)
    assert by_python == by_node == by_operation
    with recording(cpp=True) as recorder, peft_fused.use_backend("triton"):
        torch.autograd.grad(case.call(cases.OPS[op].fn), [case.tensors[name] for name in case.wrt], dy)
    words = {value for one in recorder.compilations for value in one.constants.values() if isinstance(value, str)}
    assert "tf32" in words and "tf32x3" not in words


def test_a_wrong_argument_shows(to_list, monkeypatch):
    """A control: a scale that differs by one bit is another argument of every launch that has it."""
    case = make_lowrank("lowrank_linear", 70, 64, 96, 8, dtype=BF16, adapter_dtype=FP32)
    dy = torch.ones(70, 96, dtype=BF16)
    by_python, *_ = launched(case, dy)
    _, by_cpp, _ = launched(case.with_options(scale=2.0 + 2**-22), dy)
    different = [one[0] for one, other in zip(by_python, by_cpp, strict=True) if one != other]
    assert different == [f"lowrank_kernels.{name}_kernel" for name in ("expand", "grad_b", "reduce")]


def test_once_compiled_python_neither_compiles_nor_launches(to_list):
    """Whatever the controls of a further call are."""
    make = lambda **options: make_lowrank("lowrank_linear", 70, 64, 96, 8, dtype=BF16, adapter_dtype=FP32, **options)  # noqa: E731
    dy = torch.ones(70, 96, dtype=BF16)

    def step(case):
        y = case.call(cases.OPS[case.op].fn)
        torch.autograd.grad(y, [case.tensors[name] for name in case.wrt], dy)

    with recording(cpp=True) as recorder, peft_fused.use_backend("triton"):
        step(make(rank=8, dropout_p=0.1, seed=1))
        compiled = len(recorder.compilations)
        for rank, scale, p in ((3, 0.25, 0.5), (5, 16, 2**-16), (1, 1, 0.1)):
            step(make(rank=rank, scale=scale, dropout_p=p, seed=rank))
        assert compiled == len(recorder.compilations) and not recorder.launches
    assert len(native.module.triton_launches()) == 4 * 5


# Whatever is compiled is the kernel of this number.
BY_A_DRIVER = """
import sys
import torch
sys.path.append(sys.argv[2])
from launches import recording
from rule import BF16, FP32, TYPES
import peft_fused
from peft_fused.ops import lowrank_adapter
from peft_fused.triton_kernels import compiled

compile_kernel = compiled.compile_kernel
compiled.compile_kernel = lambda *arguments: (int(sys.argv[1]), *compile_kernel(*arguments)[1:])
x, A, B = torch.randn(70, 64), torch.randn(8, 64), torch.randn(96, 8)
with recording(cpp=True), peft_fused.use_backend("triton"):
    print("x at", hex(x.data_ptr()), flush=True)
    for _ in range(2):
        lowrank_adapter(x, A, B)
"""


@pytest.fixture(scope="module")
def with_driver(tmp_path_factory):
    """Runs BY_A_DRIVER with a driver that prints."""
    folder = tmp_path_factory.mktemp("driver")
    source, library = Path(__file__).with_name("driver.c"), folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)

    def run(function: int):
        environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
        command = [sys.executable, "-P", "-c", BY_A_DRIVER, str(function), str(Path(__file__).parent)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    return run


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_driver_is_given_what_it_needs(with_driver):
    """A thread without a context gets the device's, once; then the driver launches what was decided."""
    child = with_driver(7)
    assert child.returncode == 0, child.stderr[-2000:]
    at, *lines = child.stdout.splitlines()
    address = int(at.split()[-1], 16)
    assert lines[0] == "retain"
    launched = [
        f"launch 7 grid {programs} 1 1 block 128 1 1 shared {shared} stream 0"
        for programs, shared in ((2, 16), (4, 32))
    ]
    assert [line.partition(" first")[0] for line in lines[1:]] == launched * 2
    assert lines[1].endswith(f"first {address:#x} rows 70")


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_the_drivers_error_is_told(with_driver):
    child = with_driver(13)
    said = "RuntimeError: peft_fused: lowrank_kernels.shrink_kernel: CUDA_ERROR_OF_A_TEST"
    assert child.returncode == 1 and said in child.stderr


def test_threads_share_what_is_compiled(to_list):
    case = make_lowrank("lowrank_linear", 70, 64, 96, 8, dtype=BF16, adapter_dtype=FP32, wrt=())
    with recording(cpp=True) as recorder, peft_fused.use_backend("triton"), ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(case.call, cases.OPS[case.op].fn) for _ in range(40)]:
            done.result()
        # Threads that come to a kernel at the same time may each compile it.
        assert 2 <= len(recorder.compilations) <= 2 * 4 and not recorder.launches
    assert len(native.module.triton_launches()) == 80
