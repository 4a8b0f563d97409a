"""What `accelerate` and `explain` tell of a model's layers."""

import warnings

import pytest
import torch
from accelerate.hooks import add_hook_to_module
from accelerated import CountCalls, Net, first, known, names, pair
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import nn

import peft_fused
from peft_fused.integrations.peft.acceleration import accelerate, restore
from peft_fused.layers import LoraLinear
from peft_fused.ops import dispatch, native


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(8, 8)
        self.dora = nn.Linear(8, 8)
        self.embed = nn.Embedding(5, 8)
        self.conv = nn.Conv2d(3, 4, 1)
        self.attention = nn.MultiheadAttention(8, 2)
        self.parallel = nn.Linear(8, 8)
        self.replaced = nn.Linear(8, 8)
        self.parallel._hf_tp_plan = "colwise"


def test_report_lists_every_layer():
    targets = ["plain", "embed", "conv", "attention", "replaced", "dora"]
    model = get_peft_model(Zoo(), LoraConfig(r=2, target_modules=targets, exclude_modules=["dora"]))
    inner = model.base_model.model
    for name in ("parallel", "dora"):
        layer = PeftLinear(getattr(inner, name), "default", LoraConfig(use_dora=name == "dora"), r=2, lora_alpha=2)
        setattr(inner, name, layer)
    add_hook_to_module(inner.replaced, CountCalls())
    report = accelerate(inner)
    assert report.swapped == ["plain"]
    assert not report.already and not report.slower
    expected = {
        "dora": "LoRA variant: DoraLinearVariant",
        "embed": "lora.layer.Embedding has no fused form",
        "conv": "lora.layer.Conv2d has no fused form",
        "attention": "lora.layer.MultiheadAttention has no fused form",
        "attention.base_layer.out_proj": "output projection",
        "parallel": "tensor parallel",
        "replaced": "its forward was replaced",
    }
    assert report.skipped.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in report.skipped[name]
        assert reason in str(report) and name in str(report)
    assert "1 of 8 LoRA layers swapped" in str(report)
    assert "left to PEFT: 7" in str(report)
    assert type(inner.dora) is PeftLinear and type(inner.replaced) is PeftLinear


def test_a_model_without_lora_warns():
    with pytest.warns(UserWarning, match=f"the model has no {known()} layers, nothing to swap"):
        report = accelerate(Net())
    assert (report.swapped, report.already, report.skipped, report.slower) == ([], [], {}, {})
    assert known().startswith("LoRA") and f"the model has no {known()} layers" in str(report)
    assert restore(Net()) == []


def test_a_model_whose_lora_stays_with_peft_warns():
    dora = get_peft_model(Net(), LoraConfig(r=4, target_modules=["first"], use_dora=True))
    with pytest.warns(UserWarning, match="0 of 1 LoRA layers swapped"):
        accelerate(dora)


def test_layers_of_our_own_are_already_fused():
    own = get_peft_model(Net(), peft_fused.DyLoraConfig(r=4, target_modules=["first", "second"]))
    with pytest.warns(UserWarning) as caught:
        report = accelerate(own)
    assert report.own == ["base_model.model.first", "base_model.model.second"]
    (warning,) = caught
    assert warning.filename == __file__
    names = "base_model.model.first, base_model.model.second"
    assert str(warning.message) == str(report)
    assert str(report) == (
        f"peft_fused.accelerate: 2 layers of peft_fused's own methods [{names}] are already fused, there is nothing to "
        "swap"
    )


def test_layers_of_our_own_beside_accelerated_ones_are_no_fault():
    mixed = nn.Sequential(LoraLinear.from_linear(nn.Linear(4, 4)), pair()[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "1 layers of peft_fused's own methods [0] are already fused" in str(accelerate(mixed))
        assert not accelerate(mixed).swapped  # nor has a second call, which has nothing to do


def test_the_report_says_what_the_lack_of_the_extension_costs(monkeypatch):
    _, fused = pair()
    monkeypatch.setattr(native, "module", native.module or object())
    assert "C++ extension" not in str(accelerate(fused))
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "why_missing", "not built")
    monkeypatch.setattr(native, "not_built", True)
    report = str(accelerate(fused))
    assert f"without the C++ extension (not built), which means {native.COST}" in report
    assert "pip install --no-build-isolation ." in report


def test_explain_names_every_layer(every_backend):
    _, fused = pair()
    lines = dispatch.explain(fused, rows=64).lines
    assert [name for name, _, _ in lines] == names(fused)
    for _, path, against in lines:
        assert path.startswith("lowrank_linear -> torch: ") and any(why.startswith("triton: ") for why in against)
    assert str(dispatch.explain(fused)).count("not triton") == 1  # once for all layers that it is true of


def test_explain_knows_of_a_backend_that_cannot_run_it(every_backend):
    with dispatch.use_backend("triton"):
        assert "triton is forced and cannot run it" in str(dispatch.explain(pair()[1]))


def test_explain_asks_for_the_number_of_rows():
    layer = first(pair()[1])
    path, reasons, problem = layer.explain_route(rows=77)
    assert (path, reasons) == ("lowrank_linear", []) and (problem.m, problem.k, problem.n) == (77, 24, 40)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("alpha", [8, 1e6])
def test_explain_describes_the_very_call_that_forward_makes(alpha, autocast, decided):
    """A scale beyond the range of fp16 keeps it off the C++ node, as it keeps the call."""
    _, fused = pair(Net(torch.float16), autocast_adapter_dtype=False, lora_alpha=alpha)
    layer = first(fused)
    x = layer.typical_input(4)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (run,) = decided(lambda: layer(x))
        _, _, told = layer.explain_route(4)
        assert told == run and run.huge_scale == (alpha > 8 and not autocast)
        in_python = type(layer(x).grad_fn).__name__ == "_NodeBackward"
        assert in_python == (run.huge_scale or native.module is None)
        assert f"torch: {'Python' if in_python else 'C++'} autograd node" in dispatch.path_of(told)


def test_explain_names_the_layers_that_are_not_accelerated():
    reference, fused = pair()
    lines = dispatch.explain(reference).lines
    assert [(name, path) for name, path, _ in lines] == [(name, "PEFT's own forward") for name in names(fused)]
    assert "accelerate has not been called" in lines[0][2][0]
