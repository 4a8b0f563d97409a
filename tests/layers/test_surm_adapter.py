import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft_fused.layers import SurmAdapter, SurmAdapterLinear
from peft_fused.layers.surm.adapter import MODULES
from peft_fused.ops.dispatch import explain

STRUCTURES = {
    "circulant": {},
    "toeplitz": {},
    "symmetric_toeplitz": {},
    "kronecker": {"r": 3},
    "ldr": {"q": 2},
}
ZERO_AT_ZERO = [name for name in MODULES if name not in ("sigmoid", "softplus")]


def make(structure="circulant", n=12, **options):
    torch.manual_seed(0)
    adapter = SurmAdapter(n, structure, **{**STRUCTURES[structure], **options})
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=0.5)
    return adapter


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_forward_and_gradients_are_the_formula(structure, alpha):
    adapter = make(structure, alpha=alpha, dtype=torch.float64)
    scale = 1.0 if alpha is None else alpha / 3 if structure == "kronecker" else alpha
    h = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    inputs = [h, *adapter.parameters()]
    expected = h + nn.functional.gelu(scale * h @ adapter.map.delta().T) + adapter.beta
    got = adapter(h)
    torch.testing.assert_close(got, expected)
    grads = torch.autograd.grad(got.square().sum(), inputs)
    for gradient, other in zip(grads, torch.autograd.grad(expected.square().sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("activation", ZERO_AT_ZERO)
def test_it_starts_as_the_identity_and_can_be_trained(structure, activation):
    adapter = SurmAdapter(12, structure, activation=activation, **STRUCTURES[structure])
    h = torch.randn(5, 12)
    assert torch.equal(adapter(h), h) and adapter.is_zero()
    adapter(h).square().sum().backward()
    starts = [adapter.beta, *(getattr(adapter.map, name) for name in adapter.map.zeros)]
    assert all(p.grad.any() for p in starts)
    adapter.randomize()
    assert not torch.equal(adapter(h), h) and not adapter.is_zero()


def test_the_bias_alone_makes_it_no_identity():
    adapter = SurmAdapter(12)
    nn.init.ones_(adapter.beta)
    h = torch.randn(5, 12)
    assert not adapter.is_zero() and torch.equal(adapter(h), h + 1)


@pytest.mark.parametrize("name", ["sigmoid", "softplus"])
def test_activations_that_are_not_zero_at_zero_have_to_be_asked_for(name):
    with pytest.raises(ValueError, match=f"activation must be 0 at 0.*got '{name}'; allow_nonidentity=True"):
        SurmAdapter(12, activation=name)
    adapter, h = SurmAdapter(12, activation=name, allow_nonidentity=True), torch.randn(5, 12)
    torch.testing.assert_close(adapter(h), h + MODULES[name]()(torch.zeros(())))


def test_modules_as_activations():
    h = torch.randn(5, 12)
    adapter = make(activation=nn.PReLU(12))
    expected = h + adapter.activation(h @ adapter.map.delta().T) + adapter.beta
    torch.testing.assert_close(adapter(h), expected)
    with pytest.raises(ValueError, match="activation must be 0 at 0"):
        SurmAdapter(12, activation=nn.Hardsigmoid())
    with pytest.raises(ValueError, match="activation must not have derivative 0 at 0"):
        SurmAdapter(12, activation=nn.ReLU())
    with pytest.raises(ValueError, match="activation must keep the shape"):
        SurmAdapter(12, activation=nn.GLU())


@pytest.mark.parametrize("make_base", [nn.Linear, lambda k, n: Conv1D(n, k)])
def test_on_the_output_of_a_linear_layer(make_base):
    base = make_base(7, 12)
    layer = SurmAdapterLinear.from_linear(base, "kronecker", r=2, activation="tanh")
    x = torch.randn(4, 7)
    assert layer.weight is base.weight and not base.weight.requires_grad and torch.equal(layer(x), layer.base(x))
    layer.adapter.randomize()
    h = base(x)
    torch.testing.assert_close(layer(x), h + torch.tanh(h @ layer.adapter.map.delta().T) + layer.adapter.beta)
    weight = base.weight.clone()
    with pytest.raises(ValueError, match="no dense delta: its non-linear block"):
        layer.merge()
    assert not layer.merged and torch.equal(base.weight, weight)
    path = explain(layer, rows=64).lines[0][1]
    assert path.startswith("F.linear, then kronecker, activation and bias on its output -> torch: ")
    assert layer.explain_route(64)[2].k == 12


def test_half_precision_beside_fp32_parameters_and_autocast():
    layer = SurmAdapterLinear.from_linear(nn.Linear(12, 12, dtype=torch.bfloat16))
    layer.adapter.randomize()
    x = torch.randn(5, 12, dtype=torch.bfloat16)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.adapter.beta.dtype == torch.float32 and layer.adapter.beta.grad.any()
    adapter, h = make(), torch.randn(5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        got = adapter(h)
    assert got.dtype == h.dtype  # the residual keeps its type
    torch.testing.assert_close(got, adapter(h), rtol=0, atol=0.02 * adapter(h).abs().max().item())


def test_dropout_acts_in_training_only():
    adapter, h = make(dropout=0.5), torch.randn(64, 12)
    assert not torch.equal(adapter(h), adapter(h))
    adapter.eval()
    torch.testing.assert_close(adapter(h), h + nn.functional.gelu(h @ adapter.map.delta().T) + adapter.beta)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_gradient(reentrant):
    grads = []
    for checkpointed in (False, True):
        adapter = make(dropout=0.3)
        h = torch.randn(4, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(3)
        y = checkpoint(adapter, h, use_reentrant=reentrant) if checkpointed else adapter(h)
        y.square().sum().backward()
        grads.append([h.grad, *(p.grad for p in adapter.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_compiles_without_graph_breaks():
    adapter, h = make("toeplitz"), torch.randn(5, 12)
    torch.testing.assert_close(torch.compile(adapter, backend="aot_eager", fullgraph=True)(h), adapter(h))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_independent(copied):
    adapter, h = make(), torch.randn(3, 12)
    other = copied(adapter)
    assert torch.equal(other(h), adapter(h))
    nn.init.zeros_(other.beta)
    assert not torch.equal(other(h), adapter(h))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"n": 0}, ValueError, "n must be at least 1, got 0"),
        ({"structure": "hankel"}, ValueError, "structure must be one of"),
        ({"structure": "ldr", "q": 0}, ValueError, "q must be at least 1, got 0"),
        ({"structure": "kronecker", "r": 5}, ValueError, "r must divide in_features = 12"),
        ({"r": 3}, ValueError, "r is an option of 'kronecker'"),
        ({"activation": "swiglu"}, ValueError, "activation must be one of 'gelu', .*, got 'swiglu'"),
        ({"activation": torch.tanh}, TypeError, r"activation must be one of 'gelu', .* or a torch\.nn\.Module"),
        ({"allow_nonidentity": 1}, TypeError, "allow_nonidentity must be True or False"),
        ({"alpha": float("nan")}, ValueError, "alpha must be finite"),
        ({"dropout": 1.0}, ValueError, "dropout must be in"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        SurmAdapter(**{"n": 12, **options})


def test_an_activation_may_work_in_place():
    adapter = SurmAdapter(6, activation=nn.SiLU(inplace=True))
    h = torch.randn(3, 6, requires_grad=True)
    adapter(h).sum().backward()
    assert torch.isfinite(h.grad).all()
