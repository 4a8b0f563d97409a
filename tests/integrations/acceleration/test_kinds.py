"""A further kind of adapter is an `AcceleratedLayer` and a `Kind`: here PEFT's VeRA, as far as a test needs it."""

import copy
import pickle

import pytest
import torch
from accelerated import FP32, Net, error, first, known, pair
from peft import VeraConfig, get_peft_model
from peft.tuners.vera.layer import Linear as VeraLinear
from peft.tuners.vera.layer import VeraLayer
from torch import nn

from peft_fused.integrations.peft.acceleration import accelerate, kinds, restore
from peft_fused.integrations.peft.acceleration.layer import AcceleratedLayer, AdapterStep
from peft_fused.ops import dispatch, lowrank_adapter
from peft_fused.ops.lowrank import lowrank_problem


class VeraStep(AdapterStep):
    """y + b * (B (d * (A x))): with the diagonals taken into A and B, one low-rank op."""

    __slots__ = ("A", "B")
    name = "lowrank"

    def __init__(self, A, B):
        self.A, self.B = A, B

    def run(self, x, y):
        return lowrank_adapter(x, self.A, self.B, add=y)

    def problem(self, x):
        return lowrank_problem(x, self.A, self.B, has_weight=False, dropout=False)


class AcceleratedVera(AcceleratedLayer):
    def adapter_step(self, name, x):
        if name not in self.vera_lambda_d:
            return None
        if self.vera_lambda_d[name].dtype != x.dtype:
            return "its vectors are of another type than x"
        A, B = self.vera_A[name][:, : self.in_features], self.vera_B[name][: self.out_features]
        return VeraStep(self.vera_lambda_d[name][:, None] * A, self.vera_lambda_b[name][:, None] * B)


VERA = kinds.Kind(
    name="VeRA",
    layer=VeraLayer,
    op="lowrank",
    linear_op=None,
    fused={"peft.tuners.vera.layer.Linear": AcceleratedVera},
    why_not=lambda layer: "too wide for this test" if layer.out_features > 1000 else None,
)


@pytest.fixture
def registered():
    kinds.register(VERA)
    yield
    del kinds.KINDS[VeraLayer]


def vera(model=None):
    model = get_peft_model(model or Net(), VeraConfig(r=4, target_modules=["first"], d_initial=0.5))
    with torch.no_grad():
        first(model).vera_lambda_b["default"].normal_()
    return model


@pytest.fixture
def models(registered):
    """(PEFT model, accelerated copy)."""
    reference = vera()
    fused = copy.deepcopy(reference)
    report = accelerate(fused)
    assert report.swapped == ["base_model.model.first"] and not report.slower
    assert "1 of 1 VeRA layers swapped" in str(report)
    return reference, fused


def test_it_computes_what_peft_does(models):
    x = torch.randn(5, 24)
    found = []
    for model in models:
        y = model(x)
        y.square().sum().backward()
        layer = first(model)
        found.append([y.detach(), layer.vera_lambda_b["default"].grad, layer.vera_lambda_d["default"].grad])
    for theirs, ours in zip(*found, strict=True):
        assert error(ours, theirs) <= FP32
    reference, fused = models
    with reference.disable_adapter(), fused.disable_adapter():
        assert torch.equal(fused(x), reference(x))
        assert error(fused(x), found[0][0]) > 0.01


def test_explain_names_it(models):
    reference, fused = models
    ((name, path, _),) = dispatch.explain(fused, rows=64).lines
    assert name == "base_model.model.first"
    assert path.startswith("base layer called as a module, then lowrank -> torch: ")
    ((_, path, against),) = dispatch.explain(reference).lines
    assert path == "PEFT's own forward" and against == ("lowrank: peft_fused.accelerate has not been called on it",)


def test_it_leaves_to_peft_what_it_does_not_compute(models):
    _, fused = models
    first(fused).vera_lambda_d["default"].data = first(fused).vera_lambda_d["default"].data.double()
    ((_, path, against),) = dispatch.explain(fused).lines
    assert path == "PEFT's own forward"
    assert against == ("lowrank: adapter 'default': its vectors are of another type than x",)


def test_restore_gives_the_class_back(models):
    _, fused = models
    assert type(first(fused)).__name__ == "FusedVeraLinear"
    assert restore(fused) == ["base_model.model.first"]
    assert type(first(fused)) is VeraLinear


def test_copies_stay_fused(models):
    _, fused = models
    x = torch.randn(3, 24)
    twin = pickle.loads(pickle.dumps(fused))
    assert type(first(twin)) is type(first(fused)) and torch.equal(twin(x), fused(x))


def test_a_layer_that_it_refuses_is_reported(registered):
    model = vera(nn.ModuleDict({"first": nn.Linear(8, 1001)}))
    with pytest.warns(UserWarning, match="0 of 1 VeRA layers swapped"):
        report = accelerate(model)
    assert report.skipped == {"base_model.model.first": "too wide for this test"}


def test_a_report_of_several_kinds(registered):
    report = accelerate(nn.ModuleDict({"lora": pair()[0], "vera": vera()}))
    assert "3 of 3 LoRA and VeRA layers swapped" in str(report)
    with pytest.warns(UserWarning, match="the model has no LoRA .*or VeRA layers"):
        accelerate(Net())


def test_without_its_registration_peft_keeps_it():
    with pytest.warns(UserWarning, match=f"the model has no {known()} layers"):
        accelerate(vera())


def test_a_kind_for_the_same_layers_is_refused(registered):
    with pytest.raises(ValueError, match="VeraLayer is the layer of VeRA already"):
        kinds.register(VERA)
