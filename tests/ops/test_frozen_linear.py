"""Linear layers that nothing trains, by oneDNN: torch's results, and torch's own layer where it is to run."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import peft_fused
from peft_fused.ops import dispatch
from peft_fused.ops.frozen_linear import against_layer, against_now, frozen_linear

ONEDNN = "mkldnn::_linear_pointwise"
pytestmark = pytest.mark.usefixtures("onednn_is_faster")


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


def reason(x, weight, bias):
    return against_layer(weight, bias, x.shape[:-1].numel()) or against_now(weight, bias)


def left(x, weight, bias, what):
    found = reason(x, weight, bias)
    assert found is not None and what in found
    assert frozen_linear(x, weight, bias) is None


class Strict(torch.Tensor):
    """A weight that knows no operation but those that its own library makes."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function.__name__ == "__get__":
            return super().__torch_function__(function, types, args, kwargs or {})
        raise NotImplementedError(function)


def test_layers_that_are_left_to_torch():
    x, weight, bias = drawn(50, 64), drawn(96, 64), drawn(96)
    assert reason(x, weight, bias) is None
    left(x, weight.bfloat16(), bias, "not the faster library")
    left(x, weight, bias.double(), "its bias is torch.float64 [96]")
    left(x, weight, bias[:-1], "its bias is torch.float32 [95]")
    left(x[:0], weight, bias, "not the faster library")
    left(x, drawn(96, 128)[:, ::2], bias, "no dense matrix")
    left(x, drawn(2, 96, 64), None, "no dense matrix")
    left(x, weight.to("meta"), bias, "not in the memory of a CPU")
    left(x, weight.to_sparse_csr(), bias, "not in the memory of a CPU")
    left(x, weight.as_subclass(Strict), bias, "no plain tensor")
    left(x, weight, bias.as_subclass(Strict), "no plain tensor")
    left(x, None, None, "no plain tensor")


def test_circumstances_in_which_torch_runs():
    x, weight, bias = drawn(50, 64), drawn(96, 64), drawn(96)
    trained = weight.clone().requires_grad_()
    left(x, trained, bias, "trained")
    left(x, weight, bias.clone().requires_grad_(), "trained")
    with torch.no_grad():
        assert reason(x, trained, bias) is None  # evaluation
    with torch.autocast("cpu", torch.bfloat16):
        left(x, weight, bias, "autocast is on")
    with torch.backends.mkldnn.flags(enabled=False):
        left(x, weight, bias, "not the faster library")
    with peft_fused.use_backend("reference"):
        left(x, weight, bias, "the reference backend is forced")
    torch.func.vmap(lambda row: left(row, weight, bias, "has to see torch's own") or row)(x.unsqueeze(0))


@pytest.mark.parametrize(
    "x",
    [
        drawn(50, 64).bfloat16(), drawn(50, 64).to("meta"), drawn(50, 64).to_sparse(), drawn(50, 64).to_mkldnn(),
        drawn(50, 32), torch.tensor(1.0), drawn(50, 64).as_subclass(Strict), [1.0], drawn(50, 64).to_sparse_csr(),
    ],
    ids=["bf16", "meta", "sparse", "mkldnn", "narrower", "0-d", "subclass", "list", "csr"],
)  # fmt: skip
def test_inputs_that_are_torchs_affair(x):
    assert frozen_linear(x, drawn(96, 64), drawn(96)) is None


def test_forward_mode():
    x, weight = drawn(50, 64), drawn(96, 64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        left(dual, weight, None, "has to see torch's own")


def test_what_was_decided_forward_holds_backward():
    x, weight = drawn(50, 64).requires_grad_(), drawn(96, 64)
    y = frozen_linear(x, weight)
    with torch.backends.mkldnn.flags(enabled=False):
        y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(50, 96) @ weight)


def test_a_cpu_on_which_mkl_is_fast(monkeypatch):
    monkeypatch.setattr(dispatch, "_onednn_beats_blas", lambda: False)
    left(drawn(50, 64), drawn(96, 64), None, "not the faster library")


def test_second_derivatives():
    weight, dy = drawn(96, 64), drawn(50, 96)

    def second(layer):
        x = drawn(50, 64).requires_grad_()
        (dx,) = torch.autograd.grad(layer(x.tanh(), weight).square(), x, dy, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    torch.testing.assert_close(second(frozen_linear), second(F.linear))


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


@pytest.mark.parametrize("bias", [drawn(192)[::2], drawn(1).expand(96)], ids=["stride 2", "stride 0"])
def test_a_bias_of_any_stride(bias):
    x, weight = drawn(50, 64), drawn(96, 64)
    torch.testing.assert_close(frozen_linear(x, weight, bias), F.linear(x, weight, bias))
    A, B = drawn(4, 4096), torch.zeros(96, 4)
    wide, x = drawn(96, 4096), drawn(50, 4096)  # large enough for oneDNN in the extension
    y = peft_fused.ops.lowrank_linear(x, wide, bias, A, B)
    torch.testing.assert_close(y, F.linear(x, wide, bias), rtol=1e-3, atol=1e-3)


def test_a_nested_x_is_torchs_affair():
    assert frozen_linear(torch.nested.nested_tensor([drawn(3, 64), drawn(2, 64)]), drawn(96, 64)) is None
