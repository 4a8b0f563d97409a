"""accelerate's offloading of a model that has adapters: hooks bring a module's parameters when the module is called."""

from functools import partial

import contract
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_fused

LORA = "accelerated lora"
METHODS = {LORA: lambda: LoraConfig(init_lora_weights=False, target_modules=["0", "2"])} | {
    variant.name: partial(
        variant.config, target_modules=["1" if "target_modules" in variant.options else each for each in ("0", "2")],
        init_weights=False,
    )
    for variant in contract.VARIANTS
}  # fmt: skip
ADDITIVE = [LORA, *map(str, contract.ADDITIVE)]
WRITES_BASE = [v.name for v in contract.VARIANTS if v.method.writes_base]
KEEPS_BASE = [name for name in METHODS if name not in (LORA, *WRITES_BASE)]
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
    if method == LORA:
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
    assert (expected - without).abs().max() > 1e-2 or method in WRITES_BASE
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


@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize("method", KEEPS_BASE)
def test_an_adapter_made_for_an_offloaded_model_is_the_one_of_the_model_at_hand(method, how, tmp_path):
    expected = adapted(method)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))
    OFFLOADS[how](base, str(tmp_path))
    model = get_peft_model(base, METHODS[method]()).eval()
    close(model, expected(X).detach())
    with model.disable_adapter(), expected.disable_adapter():
        close(model, expected(X).detach())
    for each in (model, expected):
        each.train()(X).square().sum().backward()
    grads = [[p.grad for p in each.parameters() if p.requires_grad] for each in (model, expected)]
    assert len(grads[0]) == len(grads[1]) > 0
    for found, grad in zip(*grads, strict=True):
        assert (found - grad).norm() < 1e-5 * grad.norm() or (not grad.any() and not found.any())
    if method in ADDITIVE:
        close(model.eval().merge_and_unload(), expected.eval()(X).detach())


def test_rosa_says_that_an_offloaded_weight_has_no_values():
    base = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))
    cpu_offload(base, execution_device=CPU)
    with pytest.raises(ValueError, match=r"target module '0': the weight has no values .*offloaded"):
        get_peft_model(base, METHODS["rosa"]())
    assert type(base[0]) is nn.Linear


def test_a_second_rosa_adapter_is_loaded_beside_an_offloaded_one(tmp_path):
    model = adapted("rosa")
    expected = model(X).detach()
    model.save_pretrained(tmp_path)
    cpu_offload(model, execution_device=CPU)
    model.load_adapter(tmp_path, "second")
    for name in ("second", "default"):
        model.set_adapter(name)
        close(model, expected)


def test_a_hook_of_several_hooks_says_where_a_module_runs():
    base = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 16))
    cpu_offload(base, execution_device=CPU)
    for module in (base[0], base[2]):
        add_hook_to_module(module, ModelHook(), append=True)
    model = get_peft_model(base, METHODS["dylora"]()).eval()
    assert {p.device for p in model.parameters() if p.requires_grad} == {CPU}
    assert model(X).isfinite().all()


@pytest.mark.parametrize("method", [name for name in ADDITIVE if name != LORA])
def test_disabling_merged_adapters_of_an_offloaded_model(method):
    model = adapted(method)
    with torch.no_grad(), model.disable_adapter():
        without = model(X)
    cpu_offload(model, execution_device=CPU)
    model.merge_adapter()
    with model.disable_adapter():
        close(model, without)
