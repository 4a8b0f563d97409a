"""What a user of the recipe's method can do with it, run by tests/test_recipes.py."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import peft_fused
from peft_fused.integrations.peft.registration import REGISTERED

X = torch.randn(6, 12)


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))


def test_from_get_peft_model_to_a_checkpoint_and_back(tmp_path):
    model = get_peft_model(base(), peft_fused.RampConfig(r=3, warmup=2, target_modules=["0", "2"]))
    start = model(X)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    layer = model.base_model.model[0]
    for step, scale in enumerate((16 / 3 / 2, 16 / 3, 16 / 3)):
        assert peft_fused.on_step(model, step=step, optimizer=optimizer) == 2
        assert layer.ramp_state["default"].scale.item() == pytest.approx(scale)
        model(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = model.eval()(X)
    assert not torch.allclose(trained, start)
    assert [path.split(" ->")[0] for _, path, _ in peft_fused.explain(model).lines] == ["lowrank_linear"] * 2

    model.save_pretrained(tmp_path / "ramp")
    assert PeftModel.from_pretrained(base(), tmp_path / "ramp").eval()(X).equal(trained)
    peft_fused.export_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(base(), tmp_path / "lora").eval()
    assert isinstance(plain.peft_config["default"], LoraConfig)
    torch.testing.assert_close(plain(X), trained)

    model.merge_adapter()
    torch.testing.assert_close(model(X), trained)
    model.unmerge_adapter()
    assert model(X).equal(trained)


def test_tools_and_tests_of_all_methods_have_it():
    method = REGISTERED["ramp"]
    assert method.schedule is not None and method.demo.title == "Ramp"
    for options in method.contract.values():
        assert method.config(target_modules=["0"], **options).r == 4
    assert "RampConfig" in peft_fused.__all__ and peft_fused.layers.RampLinear in method.layers
