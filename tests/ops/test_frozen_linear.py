"""Linear layers that nothing trains, by oneDNN: torch's results, and torch's own layer where it is to run."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import peft_fused
from peft_fused.ops import dispatch
from peft_fused.ops.frozen_linear import frozen_linear, why_not

ONEDNN = "mkldnn::_linear_pointwise"
pytestmark = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")),
    reason="torch has no oneDNN with this product",
)


@pytest.fixture(autouse=True)
def faster(monkeypatch):
    """A CPU on which oneDNN is the faster library, from products of this size on."""
    monkeypatch.setattr(dispatch, "_onednn_beats_blas", lambda: True)
    monkeypatch.setattr(dispatch, "ONEDNN_LEAST", 1000)


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def worst(found, truth):
    return ((found.double() - truth).abs().max() / truth.abs().max()).item()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("transposed", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (50, 64), (3, 5, 64), (0, 64)], ids=str)
def test_results_are_torchs_to_rounding(shape, transposed, bias):
    x, weight = drawn(*shape).requires_grad_(), drawn(64, 96).t() if transposed else drawn(96, 64)
    b, dy = drawn(96) if bias else None, drawn(*shape[:-1], 96)
    y = frozen_linear(x, weight, b)
    if not x.numel():
        assert y is None  # torch's own
        return
    (dx,) = torch.autograd.grad(y, x, dy)
    theirs = F.linear(x, weight, b)
    truth = F.linear(x.double(), weight.double(), b if b is None else b.double()).detach()
    for ours, plain, exact in (
        (y, theirs, truth),
        (dx, torch.autograd.grad(theirs, x, dy)[0], dy.double() @ weight.double()),
    ):
        assert ours.shape == plain.shape and ours.stride() == plain.stride()
        # oneDNN adds up in one chain, BLAS in parts.
        assert worst(ours, exact) <= 2 * worst(plain, exact) + 4 * torch.finfo(torch.float32).eps
    with torch.no_grad():
        assert torch.equal(frozen_linear(x, weight, b), y)


def test_it_is_onednn_forward_and_backward():
    x, weight = drawn(50, 64).requires_grad_(), drawn(96, 64)
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        frozen_linear(x, weight).sum().backward()  # the gradient has strides of zero
    names = [event.name for event in recorded.events()]
    assert names.count(ONEDNN) == 2 and not {"aten::mm", "aten::addmm"} & set(names)
    torch.testing.assert_close(x.grad, torch.ones(50, 96) @ weight)


@pytest.mark.parametrize("view", [lambda t: t[:, ::2], lambda t: t.t(), lambda t: t[::3]], ids=["columns", "t", "rows"])
def test_any_layout_of_x(view):
    x = view(drawn(128, 128))
    weight = drawn(96, x.shape[1])
    torch.testing.assert_close(frozen_linear(x, weight), F.linear(x, weight))


def left(x, weight, bias, what):
    reason = why_not(x, weight, bias)
    assert reason is not None and what in reason
    assert frozen_linear(x, weight, bias) is None


def test_what_is_left_to_torch():
    x, weight, bias = drawn(50, 64), drawn(96, 64), drawn(96)
    assert why_not(x, weight, bias) is None
    left(x.bfloat16(), weight, bias, "x is torch.bfloat16")
    left(x, weight.bfloat16(), bias, "not in fp32")
    left(x, weight, bias.double(), "not in fp32")
    left(x.to("meta"), weight, bias, "not on a CPU")
    left(x[:0], weight, bias, "not the faster library")
    left(x, weight[:, :32], bias, "are no linear layer's")
    left(x, weight, bias[:-1], "are no linear layer's")
    left(x, drawn(96, 128)[:, ::2], bias, "not dense")
    left(x, weight.clone().requires_grad_(), bias, "trained")
    left(x, weight, bias.clone().requires_grad_(), "trained")
    with torch.no_grad():
        assert why_not(x, weight.clone().requires_grad_(), bias) is None  # evaluation
    with torch.autocast("cpu", torch.bfloat16):
        left(x, weight, bias, "not in fp32")
    with torch.backends.mkldnn.flags(enabled=False):
        left(x, weight, bias, "not the faster library")
    with peft_fused.use_backend("reference"):
        left(x, weight, bias, "the reference backend is forced")
    torch.func.vmap(lambda row: left(row, weight, bias, "dispatch of its own") or row)(x.unsqueeze(0))


def test_a_cpu_on_which_mkl_is_fast(monkeypatch):
    monkeypatch.setattr(dispatch, "_onednn_beats_blas", lambda: False)
    left(drawn(50, 64), drawn(96, 64), None, "not the faster library")


def test_its_gradient_has_no_derivative():
    x = drawn(50, 64).requires_grad_()
    with pytest.raises(RuntimeError, match="the frozen_linear op has no second derivative"):
        torch.autograd.grad(frozen_linear(x, drawn(96, 64)).square().sum(), x, create_graph=True)


def test_its_result_may_be_changed_in_place():
    for shape in ((50, 64), (2, 25, 64)):
        x, weight = drawn(*shape).requires_grad_(), drawn(96, 64)
        y = frozen_linear(x, weight).mul_(2)
        y.sum().backward()
        torch.testing.assert_close(x.grad, (2 * torch.ones(*shape[:-1], 96)) @ weight)


def test_a_weight_that_was_changed_before_backward_is_an_error():
    x, weight = drawn(50, 64).requires_grad_(), drawn(96, 64)
    y = frozen_linear(x, weight)
    weight.add_(1)
    with pytest.raises(RuntimeError, match="changed in place after the forward pass"):
        y.sum().backward()
