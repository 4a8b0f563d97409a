"""Adapters on bitsandbytes' 4-bit and 8-bit layers, on a CPU: training, saving, loading, and merging before and after
inference, in which bitsandbytes packs 4-bit weights where the CPU multiplies in bf16.
"""

import contextlib
from functools import partial

import contract
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import peft_fused
from peft_fused.integrations.peft.quantised import is_packed

bnb = pytest.importorskip("bitsandbytes").nn
TARGETS = dict(target_modules=["0", "2"])
WRITES_BASE = contract.only(lambda v: v.method.writes_base)
# Every variant that a registration names for linear layers.
METHODS = {
    "lora": lambda **o: LoraConfig(r=4, init_lora_weights=o.pop("init_weights", False), **TARGETS, **o),
    "circulant": partial(peft_fused.SurmConfig, **TARGETS),
} | {v.name: partial(v.config, **TARGETS) for v in contract.ADDITIVE if v not in WRITES_BASE}
ADAPTERS = {v.name: partial(v.config, **TARGETS) for v in contract.ON_OUTPUT if "target_modules" not in v.options}
KINDS = ("4bit", "4bit nested", "8bit")


def linear(kind, n, k):
    if kind == "8bit":
        return bnb.Linear8bitLt(k, n, has_fp16_weights=False).to("cpu")  # which quantises it
    nested = kind == "4bit nested"
    layer = bnb.Linear4bit(k, n, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=nested)
    layer.weight = layer.weight._quantize(torch.device("cpu"))
    return layer


def base(kind):
    torch.manual_seed(0)
    model = nn.Sequential(linear(kind, 128, 64), nn.Tanh(), linear(kind, 64, 128))
    setattr(model, "is_loaded_in_8bit" if kind == "8bit" else "is_loaded_in_4bit", True)
    return model


def adapted(method, kind, **options):
    torch.manual_seed(1)
    return accelerated(get_peft_model(base(kind), (METHODS | ADAPTERS)[method](**{"init_weights": False, **options})))


def accelerated(model):
    if isinstance(model.peft_config["default"], LoraConfig):
        assert len(peft_fused.accelerate(model).swapped) == 2
    return model


def batch():
    return torch.randn(8, 64, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)


def infer(model):
    with torch.no_grad():
        return model.eval()(batch()).float()


def error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS | ADAPTERS)
def test_trains_saves_and_loads(method, kind, tmp_path):
    model = adapted(method, kind).train()
    y = model(batch())
    y.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert any(parameter.grad.any() for parameter in model.parameters() if parameter.requires_grad)
    expected = infer(model)
    with model.disable_adapter():
        assert error(infer(model), expected) > 0.01
    model.save_pretrained(tmp_path)
    assert error(infer(accelerated(PeftModel.from_pretrained(base(kind), tmp_path))), expected) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_the_same_before_and_after_inference(kind):
    """In every block of it: their scales are far apart here."""
    model = adapted("dylora", kind)
    layer = model.base_model.model[2]
    weight = torch.randn(64, 128) * torch.logspace(-2, 2, 64)[:, None] * torch.logspace(0, 1, 128)
    layer.set_base_weight(weight)
    before = layer.get_base_weight().float()
    infer(model)
    after = layer.get_base_weight().float()
    # Packing rounds the scales to bf16; scales that are quantised themselves are quantised once more.
    of_rows = (after - before).norm(dim=1) / before.norm(dim=1)
    assert of_rows.max() < (0.5 if kind == "4bit nested" else 2**-8)
    assert error(after, before) < 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_merges_the_same_before_and_after_inference(method, kind):
    model = adapted(method, kind)
    model.merge_adapter()  # before any forward pass
    merged = infer(model)
    model = adapted(method, kind)
    model.merge_adapter()
    model.unmerge_adapter()
    unmerged = infer(model)
    model = adapted(method, kind)
    expected = infer(model)
    if kind != "8bit" and torch.cpu._is_avx512_bf16_supported():
        assert is_packed(model.base_model.model[0].get_base_layer())
    # What quantising again loses, and no more than that after inference: packed weights taken for others are 1.4 off.
    lost = error(merged, expected)
    assert lost < 0.2
    model.merge_adapter()
    found = infer(model)
    assert error(found, merged) < 0.05 and error(found, expected) < 1.2 * lost + 0.01
    model.unmerge_adapter()
    # LoRA's is PEFT's, which subtracts and quantises once more; ours puts the old layer back.
    assert error(infer(model), expected) <= 1.2 * error(unmerged, expected)
    assert error(unmerged, expected) == 0 or method == "lora"
    if method != "lora":
        assert error(infer(model.merge_and_unload()), merged) < 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_merging_an_untrained_adapter_after_inference_changes_next_to_nothing(method, kind):
    model = adapted(method, kind, init_weights=True)
    expected = infer(model)
    model.merge_adapter()
    assert error(infer(model), expected) < 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", WRITES_BASE, ids=str)
def test_what_writes_to_the_weights_is_refused_by_name(variant, kind):
    model = base(kind)
    with pytest.raises(TypeError, match=r"target module '0': the weight of this Linear.* is quantised"):
        get_peft_model(model, variant.config(**TARGETS))
    assert type(model[0]).__module__.startswith("bitsandbytes")


@pytest.mark.parametrize("method", ADAPTERS)
def test_adapters_on_the_output_are_not_merged(method):
    model = adapted(method, "4bit")
    expected = infer(model)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()
    assert torch.equal(infer(model), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS | ADAPTERS)
def test_gradients_are_the_same_after_an_evaluation(method, kind):
    """Packed in evaluation, a layer of bitsandbytes returns no gradient for its input. That of the first layer here
    comes through the second, adapted or, with a model of our methods in training mode, not.
    """
    targets = [dict(target_modules=["0", "2"])] + [dict(target_modules=["0"])] * (method != "lora")
    for target in targets:
        grads = []
        for evaluated in (False, True):
            torch.manual_seed(1)
            config = (METHODS | ADAPTERS)[method](init_weights=False)
            config.target_modules = set(target["target_modules"])
            model = get_peft_model(base(kind), config)
            if method == "lora":
                peft_fused.accelerate(model)
            if evaluated:
                infer(model)
            model.train()(batch()).float().square().sum().backward()
            grads.append([p.grad for p in model.parameters() if p.requires_grad])
        for after, before in zip(*grads, strict=True):
            assert (after is None) == (before is None)
            assert before is None or error(after.float(), before.float()) < 0.05
        assert any(grad is not None and grad.any() for grad in grads[0])


@pytest.mark.parametrize("method", METHODS | ADAPTERS)
@pytest.mark.parametrize("disabled", [False, True])
def test_adapted_layers_pass_gradients_on_in_evaluation_too(method, disabled):
    model = adapted(method, "4bit").eval()
    x, grads = batch(), []
    for evaluated in (False, True):
        if evaluated:
            infer(model)
        leaf = x.clone().requires_grad_()
        with model.disable_adapter() if disabled else contextlib.nullcontext():
            model(leaf).float().square().sum().backward()
        grads.append(leaf.grad.float())
    assert grads[0].any() and error(grads[1], grads[0]) < 0.05


def test_evaluating_every_rank_in_training_leaves_no_layer_packed():
    torch.manual_seed(1)
    model = get_peft_model(base("4bit"), peft_fused.DyLoraConfig(r=2, target_modules=["0"], init_weights=False)).train()
    peft_fused.evaluate_dylora_ranks(model, infer)
    assert model.training and not is_packed(model.base_model.model[2])


def test_a_scripted_module_may_stand_beside_quantised_ones():
    model = base("4bit")
    model[1] = torch.jit.script(nn.Tanh())
    get_peft_model(model, METHODS["dylora"]()).train().eval().merge_adapter()
