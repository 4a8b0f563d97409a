"""Shared by all tests: seeds, poisoned uninitialised memory, the skip of GPU tests with its reason, and their tools."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

# A graph that an earlier run has cached knows the shapes that the ops' outputs had then.
os.environ |= {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}

import torch


def pytest_configure(config):
    # On CUDA, what `poisoned` switches on warns of every product by cuBLAS.
    for message in ("Deterministic behavior was enabled", ".* does not have a deterministic implementation"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}:UserWarning")


def pytest_collection_modifyitems(items):
    # Single tests that take a minute start first, so that no process is left alone with one; ahead-of-time compiles
    # come last: they fill the processes evenly, and are reached last when something simpler is broken.
    items.sort(key=lambda item: ("aot" in item.keywords) - (item.path.name == "test_interpreter.py"))
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """--dist loadfile: tests of a file run in one process and share its fixtures, but those that share nothing."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::", 1)[0]
            return nodeid if Path(file).name.startswith(("test_aot", "test_interpreter")) else file

    return ByFile(config, log)


def pytest_terminal_summary(terminalreporter):
    """A table of what the compiled Triton kernels take, by kernel: the worst of each resource, and how many have each
    instruction. See triton_kernels/aot.py."""
    tables = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        for name, value in getattr(report, "user_properties", ()):
            if name == "aot" and report.when == "call":
                title, kernel, resources = value
                tables.setdefault(title, {}).setdefault(kernel, []).append(resources)
    for title, kernels in sorted(tables.items()):
        terminalreporter.write_line(f"\n{title}")
        terminalreporter.write_line(
            "kernel       configurations  registers  spilled bytes  shared KiB  wgmma  tcgen05  mma.sync"
        )
        for kernel, found in sorted(kernels.items()):
            registers, stack, shared = (max(r[field] for r in found) for field in ("registers", "stack", "shared"))
            wgmma, tcgen05, mma = (sum(r[field] > 0 for r in found) for field in ("wgmma", "tcgen05", "mma"))
            terminalreporter.write_line(
                f"{kernel:12} {len(found):14} {registers:10} {stack:14} {shared / 1024:11.1f} {wgmma:6} {tcgen05:8} "
                f"{mma:9}"
            )


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def compiled_anew():
    """What a test compiles does not count against the limit of recompilations of the next."""
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(autouse=True)
def finished(request):
    """What a test left to do on the GPU fails in that test, not in the next one. A lost CUDA context would fail all
    others of the process: xdist starts another process, and without xdist the run ends."""
    yield
    if not request.node.get_closest_marker("gpu"):
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        told = f"{request.node.nodeid} lost the CUDA context: {error}"
        if "PYTEST_XDIST_WORKER" not in os.environ:
            pytest.exit(told, returncode=1)
        os.write(2, told.encode())
        os._exit(1)


@pytest.fixture
def poisoned():
    """Uninitialised memory holds NaN, in C++ too: an element that nobody wrote shows.

    Only warning, because torch takes cuBLAS for deterministic by an environment variable alone, read at the first
    product of the process.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture
def one_thread():
    """Threads only slow down models as small as those of most tests, and a forked process has no others."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def every_backend(monkeypatch):
    """use_backend takes any backend, as on a machine that has them all; what speaks against a problem still does."""
    from peft_fused.ops import dispatch

    monkeypatch.setattr(dispatch, "unusable", lambda *arguments: [])


@contextmanager
def _no_sync():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def no_sync():
    """A context in which whatever makes the host wait for the GPU raises RuntimeError."""
    return _no_sync


def _capture(step):
    # First by hand, on another stream as CUDA graphs want it: nothing may be compiled or copied to the device in one.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    return graph.replay, found


@pytest.fixture
def capture():
    """Captures step() as a CUDA graph: (a function that replays it, the tensors that step returned, then new ones)."""
    return _capture


@pytest.fixture
def compilations():
    """() -> how many variants of this package's Triton kernels the process has compiled."""
    from peft_fused.triton_kernels import bottleneck_kernels, kronecker_kernels, lowrank_kernels, structured_kernels

    modules = (bottleneck_kernels, kronecker_kernels, lowrank_kernels, structured_kernels)
    kernels = [value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")]
    for kernel in kernels:  # what another test has compiled would hide what this one does
        kernel.device_caches.clear()
    return lambda: sum(len(caches[0]) for kernel in kernels for caches in kernel.device_caches.values())


@pytest.fixture
def decided(monkeypatch):
    """run() -> the problems that the ops decide on while it runs, in order."""
    from peft_fused.ops import dispatch

    decide = dispatch.decide

    def problems(run):
        found = []

        def recorded(problem, **options):
            found.append(problem)
            return decide(problem, **options)

        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "decide", recorded)
            dispatch.forget()
            run()
        return found

    return problems


@pytest.fixture
def onednn_is_faster(monkeypatch):
    """A CPU on which oneDNN is the faster library, from small products on. The extension keeps its own choice."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("torch has no oneDNN with this product")
    from peft_fused.ops import dispatch

    monkeypatch.setattr(dispatch, "_onednn_beats_blas", lambda: True)
    monkeypatch.setattr(dispatch, "ONEDNN_LEAST", 1 << 12)
