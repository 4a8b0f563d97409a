"""Which backend a problem gets on a GPU, told without one: the choice looks at descriptions of problems alone."""

from itertools import product

import pytest
import torch
from peft_fused.triton_kernels.plan import Problem

import peft_fused
from peft_fused.layers import LoRALinear
from peft_fused.ops import dispatch, lowrank_linear, lowrank_linear_reference, native
from peft_fused.ops.structured.plan import StructuredProblem


@pytest.fixture
def gpu(monkeypatch):
    """A GPU as far as the choice of a backend goes, with everything built."""
    dispatch._why_not.cache_clear()
    monkeypatch.setattr(dispatch, "_gpu", lambda device: ("a GPU", 132, (9, 0)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(native, "module", native.module or object())
    monkeypatch.setattr(native, "has_cuda", lambda: True)
    yield
    dispatch._why_not.cache_clear()


def problems():
    types = [(t, a) for t in ("float32", "bfloat16", "float16") for a in dict.fromkeys((t, "float32"))]
    for m, n, r, (dtype, adapter), dropout, weight in product(
        (1, 4096), (64, 4096), (8, 128), types, (False, True), (False, True)
    ):
        yield Problem(m, n, n, r, dtype, adapter, "cuda", "a GPU", 132, dropout, weight)


def test_the_cuda_node_is_chosen_for_what_it_takes_unforced(gpu):
    """csrc/autograd/lowrank.cpp declines mixed types where nobody forces it."""
    chosen = {problem: dispatch.choose(problem) for problem in problems()}
    assert set(chosen.values()) == {"cuda", "triton"}
    assert all(problem.dtype == problem.adapter_dtype for problem, name in chosen.items() if name == "cuda")


def test_explain_tells_the_same_choice_and_the_node_that_hosts_it(gpu):
    for problem in problems():
        node = "C++" if dispatch.choose(problem) == "cuda" else "Python"
        assert dispatch.path_of(problem).startswith(f"{dispatch.choose(problem)}: {node} autograd node")
        with peft_fused.use_backend("torch"):
            assert dispatch.path_of(problem).startswith("torch: Python autograd node")


def test_without_the_native_node_its_kernels_are_not_chosen(gpu):
    small = Problem(16, 64, 64, 8, "bfloat16", "bfloat16", "cuda", "a GPU", 132, False, True)
    circulant = StructuredProblem(
        "circulant", 4096, 3072, 3072, (3072,), "float32", "float32", "cuda", "a GPU", 132, False, False
    )
    for problem in (small, circulant):
        assert dispatch.choose(problem) == "cuda"
        with peft_fused.use_backend(None, native=False):
            assert dispatch.choose(problem) == "triton"
            assert any("native=False" in reason for reason in dispatch.why_not("cuda", problem))
    with pytest.raises(RuntimeError, match=r"nothing can run on 'cuda'.*native=False"):
        peft_fused.use_backend("cuda", native=False)


@pytest.mark.parametrize(
    ("change", "backend", "reason"),
    [
        (lambda m: m.setattr(torch.cuda, "is_available", lambda: False), "triton", "torch sees no CUDA device; Triton"),
        (lambda m: m.setattr(torch.cuda, "is_available", lambda: False), "cuda", "torch sees no CUDA device; CUDA"),
        (lambda m: m.setattr(dispatch, "_gpu", lambda device: ("old", 80, (7, 5))), "triton", "capability 7.5"),
        (lambda m: m.setattr(dispatch, "_gpu", lambda device: ("old", 80, (7, 5))), "cuda", "capability 7.5"),
        (lambda m: m.setattr(dispatch, "_triton_missing", lambda: "it is missing"), "triton", "it is missing"),
        (lambda m: m.setattr(native, "has_cuda", lambda: False), "cuda", "without CUDA kernels"),
        (lambda m: m.setattr(native, "module", None), "cuda", "C.. extension: "),
    ],
)  # fmt: skip
def test_a_backend_on_which_nothing_can_run_is_refused_at_once(gpu, monkeypatch, change, backend, reason):
    with peft_fused.use_backend(backend):
        assert dispatch.forced() == backend
    change(monkeypatch)
    for other in ("reference", "torch", None):
        with peft_fused.use_backend(other), pytest.raises(RuntimeError, match=f"on '{backend}'.*{reason}"):
            peft_fused.use_backend(backend)
        assert dispatch.forced() is None


def test_under_the_interpreter_triton_needs_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dispatch, "_triton_missing", lambda: "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with peft_fused.use_backend("triton"):
        assert dispatch.forced() == "triton"


def test_what_the_cuda_node_declines_runs_elsewhere(monkeypatch):
    """Half-precision factors with u or v, which the description of a problem does not tell."""
    x, weight, A, B = (torch.randn(*size) for size in ((5, 6), (7, 6), (2, 6), (7, 2)))
    monkeypatch.setattr(dispatch, "choose", lambda problem: "cuda")
    with peft_fused.use_backend(None, native=False):
        y = lowrank_linear(x, weight, None, A, B)
    torch.testing.assert_close(y, lowrank_linear_reference(x, weight, None, A, B))


def test_equal_layers_are_explained_in_one_line():
    layers = [LoRALinear.from_linear(torch.nn.Linear(8, 8)) for _ in range(40)]
    text = str(peft_fused.explain(torch.nn.Sequential(*layers, LoRALinear.from_linear(torch.nn.Linear(8, 4)))))
    assert text.startswith("41 equal [0, 1, 2, ...]: lowrank_linear -> ") and text.count("lowrank_linear ->") == 1
