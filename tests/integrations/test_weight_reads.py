"""Modules that read the weight of an adapted layer instead of calling it get the weight with its adapters."""

import contract
import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_fused.integrations.peft.tuner import FusedLayer

# A norm is not among what is read, and by sequence the experts differ between rows.
LINEAR = contract.only(lambda v: "target_modules" not in v.options and "routing" not in v.options)
ADDITIVE = {v.name: v.config for v in LINEAR if v.additive}
ON_OUTPUT = {v.name: v.config for v in LINEAR if not v.additive}
METHODS = ADDITIVE | ON_OUTPUT
WRITES_BASE = [v.name for v in LINEAR if v.method.writes_base]


class Reader(nn.Module):
    """A projection that is called, or of which only the weight is read."""

    def __init__(self, kind=nn.Linear, dtype=torch.float32):
        super().__init__()
        self.proj = kind(12, 16) if kind is nn.Linear else kind(16, 12)
        nn.init.normal_(self.proj.weight)
        self.to(dtype)
        self.reads = True

    def forward(self, x):
        if not self.reads:
            return self.proj(x)
        weight = self.proj.weight
        return F.linear(x, weight.t() if weight.shape[0] == x.shape[-1] else weight, self.proj.bias)


def reader(method, kind=nn.Linear, dtype=torch.float32, **options):
    torch.manual_seed(0)
    base = Reader(kind, dtype)
    return get_peft_model(base, METHODS[method](target_modules=["proj"], init_weights=False, **options))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("method", ADDITIVE)
def test_a_read_weight_computes_and_trains_as_a_call(method, kind):
    model = reader(method, kind, torch.float64)
    results = []
    for reads in (True, False):
        model.base_model.model.reads = reads
        model.zero_grad()
        y = model(torch.linspace(-1, 1, 60, dtype=torch.float64).view(5, 12))
        y.square().sum().backward()
        results.append((y.detach(), gradients(model)))
    # Adapters are fp32 and the sum of weights is rounded, so this is no closer than that.
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=1e-5)
    changed = model(torch.ones(1, 12, dtype=torch.float64))
    with model.disable_adapter():
        assert (model(torch.ones(1, 12, dtype=torch.float64)) - changed).abs().max() > 1e-3
    for name, grad in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], grad, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", METHODS)
def test_an_untrained_adapter_changes_no_function_that_reads_weights(method, dtype):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0)
    base = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2)}).eval().to(dtype)
    x = torch.randn(3, 6, 32, dtype=dtype)
    padding = torch.tensor([[0] * 6, [0] * 4 + [1] * 2, [0] * 5 + [1]], dtype=torch.bool)
    with torch.no_grad():
        expected = base["encoder"](x, src_key_padding_mask=padding)
        model = get_peft_model(base, METHODS[method](target_modules=["linear1", "linear2"])).eval()
        encoder = model.base_model.model["encoder"]
        found = encoder(x, src_key_padding_mask=padding)
        room = 1e-5 if dtype == torch.float32 else 0.1
        rows = ~padding[:, : found.shape[1]]
        torch.testing.assert_close(found[rows], expected[:, : found.shape[1]][rows], atol=room, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_an_encoder_layer_is_the_same_with_and_without_gradients(method):
    torch.manual_seed(0)
    base = nn.Sequential(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0)).eval()
    x = torch.randn(2, 6, 32)
    untouched = base(x)
    config = METHODS[method](target_modules=["linear1", "linear2"], init_weights=False)
    model = get_peft_model(base, config).eval()
    with torch.no_grad():
        found = model(x)
    torch.testing.assert_close(found, model(x.requires_grad_()).detach(), atol=1e-5, rtol=1e-5)
    assert (found - untouched).abs().max() > 1e-3


@pytest.mark.parametrize("method", ON_OUTPUT)
def test_adapters_that_no_weight_expresses_are_refused_where_their_layer_is_read(method):
    model = reader(method)
    with pytest.raises(RuntimeError, match=r"weight of 'proj' was read.*'default' is of kind 'adapter'"):
        model(torch.ones(2, 12))
    model.base_model.model.reads = False
    assert model(torch.ones(2, 12)).shape == (2, 16)


def test_routes_by_sequence_are_refused_where_their_layer_is_read():
    model = reader("adamix_lora", routing="sequence")
    with pytest.raises(RuntimeError, match="rows of one batch to different experts"):
        model(torch.ones(2, 3, 12))
    assert model.eval()(torch.ones(2, 3, 12)).shape == (2, 3, 16)  # by the merged experts


@pytest.mark.parametrize("method", METHODS)
def test_asking_for_a_type_or_shape_computes_nothing(method, monkeypatch):
    model = reader(method)
    monkeypatch.setattr(FusedLayer, "effective_weight", lambda self: pytest.fail("computed"))
    weight = model.base_model.model.proj.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.device.type, weight.shape) == (torch.float32, "cpu", (16, 12))
    assert weight.size(0) == 16 and weight.is_floating_point() and not weight.is_meta and weight.data.ndim == 2


@pytest.mark.parametrize("method", ADDITIVE)
def test_a_read_weight_cannot_be_written_to(method):
    model = reader(method)
    layer = model.base_model.model.proj
    before = layer.get_base_layer().weight.clone()
    for write in (
        lambda w: w.zero_(),
        lambda w: w.data.fill_(1.0),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.__iadd__(1.0),
        lambda w: setattr(w, "requires_grad", False),
    ):
        with pytest.raises(RuntimeError, match=r"cannot be changed; get_base_layer\(\)\.weight can"), torch.no_grad():
            write(layer.weight)
    assert torch.equal(before, layer.get_base_layer().weight)


@pytest.mark.parametrize("method", METHODS)
def test_without_adapters_in_use_the_weight_is_the_base_layers(method):
    model = reader(method)
    layer = model.base_model.model.proj
    with model.disable_adapter():
        assert layer.weight is layer.get_base_layer().weight
    if method in ADDITIVE:
        model.merge_adapter()
        assert layer.weight is layer.get_base_layer().weight


def test_gradients_that_cannot_reach_the_adapters_are_an_error():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x)
            return x @ weight.t()

        @staticmethod
        def backward(ctx, dy):
            (x,) = ctx.saved_tensors
            return None, dy.t() @ x

    model = reader("dylora")
    y = Product.apply(torch.ones(2, 12), model.base_model.model.proj.weight)
    with pytest.raises(RuntimeError, match="no way to the adapters"):
        y.sum().backward()


@pytest.mark.parametrize("method", ADDITIVE)
def test_modules_that_read_weights_can_be_exported(method):
    model = reader(method).base_model.model.eval()
    x = torch.linspace(-1, 1, 60).view(5, 12)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize("method", METHODS)
def test_mamba_is_refused_where_lora_is(method):
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    model = FalconMambaForCausalLM(FalconMambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))
    names = [name for name, _ in model.named_modules()]
    config = METHODS[method](target_modules=["out_proj"])
    with pytest.raises(ValueError, match=f"{config.fused_type.value}, as LoRA.*'out_proj' is incompatible with Mamba"):
        get_peft_model(model, config)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("method", ADDITIVE)
def test_mamba_is_the_same_where_its_other_projections_are_read(method):
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    torch.manual_seed(0)
    model = FalconMambaForCausalLM(
        FalconMambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4, time_step_rank=4)
    ).eval()
    ids = torch.arange(16).view(2, 8)
    expected = model(ids).logits.detach()
    options = {} if method not in WRITES_BASE else dict(rank_pattern={"dt_proj": 2})
    model = get_peft_model(model, METHODS[method](target_modules=["dt_proj", "x_proj", "in_proj"], **options)).eval()
    logits = model(ids).logits
    torch.testing.assert_close(logits.detach(), expected, atol=1e-4, rtol=1e-4)
    logits.square().sum().backward()
    assert [name for name, grad in gradients(model).items() if grad is None] == []
