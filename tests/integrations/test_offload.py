"""accelerate's offloading of a model that has adapters: hooks bring a module's parameters when the module is called."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_fused

TARGETS = dict(target_modules=["0", "2"])
RANDOM = dict(init_weights=False, **TARGETS)
ADDITIVE = {
    "lora": lambda: LoraConfig(init_lora_weights=False, **TARGETS),
    "dylora": lambda: peft_fused.DyLoraConfig(r=4, **RANDOM),
    "surm": lambda: peft_fused.SurmConfig(**RANDOM),
    "kronecker": lambda: peft_fused.SurmConfig(structure="kronecker", **RANDOM),
    "adamix": lambda: peft_fused.AdaMixConfig(kind="lora", **RANDOM),
    "aflora": lambda: peft_fused.AfLoraConfig(frozen_modules=[], **RANDOM),
    "rosa": lambda: peft_fused.RosaConfig(r=4, **RANDOM),
}
METHODS = ADDITIVE | {
    "surm adapter": lambda: peft_fused.SurmConfig(kind="adapter", **RANDOM),
    "adamix adapter": lambda: peft_fused.AdaMixConfig(**RANDOM),
    "adamix norm": lambda: peft_fused.AdaMixConfig(position="pfeiffer", target_modules=["1"], init_weights=False),
}
CPU = torch.device("cpu")
OFFLOADS = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: disk_offload(model, folder, execution_device=CPU),
    "both": lambda model, folder: dispatch_model(
        model, {f"base_model.model.{i}": place for i, place in enumerate(("cpu", "disk", "disk"))},
        main_device="cpu", offload_dir=folder, force_hooks=True,
    ),
}  # fmt: skip
X = torch.linspace(-1, 1, 64).view(4, 16)


def adapted(method):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))
    model = get_peft_model(base, METHODS[method]())
    if method == "lora":
        peft_fused.accelerate(model)
    return model.eval()


def close(model, expected):
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("how", OFFLOADS)
@pytest.mark.parametrize("method", METHODS)
def test_an_offloaded_model_computes_what_it_did(method, how, tmp_path):
    model = adapted(method)
    with torch.no_grad():
        expected = model(X)
        with model.disable_adapter():
            without = model(X)
    assert (expected - without).abs().max() > 1e-2 or method in ("rosa", "aflora")
    OFFLOADS[how](model, str(tmp_path))
    assert any(p.is_meta for name, p in model.named_parameters() if "base_layer" not in name)
    close(model, expected)
    with model.disable_adapter():
        close(model, without)
    close(model, expected)
    assert any(p.is_meta for name, p in model.named_parameters() if "base_layer" not in name)


@pytest.mark.parametrize("how", OFFLOADS)
@pytest.mark.parametrize("method", ADDITIVE)
def test_an_offloaded_model_merges(method, how, tmp_path):
    model = adapted(method)
    expected = model(X).detach()
    OFFLOADS[how](model, str(tmp_path))
    model.merge_adapter()
    close(model, expected)
    model.unmerge_adapter()
    close(model, expected)
    close(model.merge_and_unload(), expected)


def test_rosa_says_that_it_cannot_draw_anew_for_offloaded_weights():
    model = adapted("rosa").train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    expected = model(X).detach()
    cpu_offload(model, execution_device=CPU)
    with pytest.raises(ValueError, match="not among the optimizer's"):
        peft_fused.on_step(model, step=1, epoch=1, optimizer=optimizer)
    (member,) = model.base_model.model[0].schedule_members()
    with pytest.raises(RuntimeError, match=r"cannot draw new factors of '0'.*offloading"):
        member.resample(1, None)
    close(model, expected)
