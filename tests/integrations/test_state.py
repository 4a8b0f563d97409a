"""Saving and loading at any step of a schedule: adapters, state dicts, averages, copies; for every method."""

import copy
import json
import warnings

import contract
import pytest
import torch
import torch.distributed.checkpoint as dcp
from contract import IDS, TOTAL, adapted, logits, midway, net, train, trainable
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import peft_fused
from peft_fused import copy_adapter, on_step

STEPS = [0, 5, TOTAL]
STATEFUL = contract.only(lambda v: v.method.tuner.tuner_layer_cls.state_names)
STATELESS = contract.only(lambda v: v not in STATEFUL)


# ------------------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("steps", STEPS)
def test_an_adapter_of_any_step_loads_bit_for_bit(variant, steps, dtype, tmp_path):
    model = train(adapted(variant, net(dtype)), steps)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    prefix = variant.method.tuner.prefix
    assert stored and all(f".{prefix}" in key for key in stored)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == variant.method.name.upper()
    state, expected = model.state_dict(), logits(model)
    for low_cpu_mem_usage in (False, True):
        options = dict(low_cpu_mem_usage=low_cpu_mem_usage)
        loaded = PeftModel.from_pretrained(net(dtype), tmp_path, is_trainable=True, **options).eval()
        assert contract.same(loaded.state_dict(), state) and torch.equal(logits(loaded), expected)
        assert trainable(loaded) == trainable(model)
        was, now = (each.peft_config["default"].to_dict() for each in (model, loaded))
        assert {key for key in was if was[key] != now[key]} <= {"auto_mapping", "base_model_name_or_path"}
        with loaded.disable_adapter():
            assert torch.equal(logits(loaded), logits(net(dtype)))
        inference = PeftModel.from_pretrained(net(dtype), tmp_path, **options).eval()
        assert not trainable(inference)
        torch.testing.assert_close(logits(inference), expected)
        assert on_step(inference, step=0) == len(contract.layers(model)) * (variant.method.schedule is not None)
        # Beside another adapter, and into one that has gone on.
        other = train(adapted(variant, net(dtype), **seeded(variant)), 3)
        before = logits(other)
        other.load_adapter(tmp_path, "other", is_trainable=True, **options)
        assert torch.equal(logits(other), before) and not torch.equal(before, expected)
        other.set_adapter("other")
        assert torch.equal(logits(other), expected)
        assert {name.replace(".other.", ".default.") for name in trainable(other)} == trainable(model)
        other.set_adapter("default")
        other.load_adapter(tmp_path, "default", is_trainable=True, **options)
        assert torch.equal(logits(other), expected) and trainable(other) == trainable(model)


def seeded(variant, seed=9):
    """An adapter that draws otherwise, where the method draws."""
    return {"seed": seed} if hasattr(variant.config(), "seed") else {}


@pytest.mark.parametrize("steps", STEPS)
def test_transformers_loads_it(variant, steps, tmp_path):
    model = train(adapted(variant), steps)
    model.save_pretrained(tmp_path)
    native = net()
    native.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(native.eval()), logits(model))
    assert contract.same(contract.base_weights(native), contract.base_weights(model))
    assert on_step(native, step=0) == len(contract.layers(native)) * (variant.method.schedule is not None)


def test_state_dict_helpers_round_trip(variant):
    model = midway(variant)
    saved = contract.copied(get_peft_model_state_dict(model))
    other = adapted(variant, **seeded(variant))
    set_peft_model_state_dict(other, saved)
    assert torch.equal(logits(other), logits(model)) and trainable(other) == trainable(model)
    assert contract.same(get_peft_model_state_dict(other), saved)


# ---------------------------------------------------------------------------------------------------------- state dicts


def test_buffers_keep_their_shapes(variant):
    model, seen = adapted(variant), []
    shapes = {name: buffer.shape for name, buffer in model.named_buffers()}
    assert not [name for name in shapes if variant.method.tuner.prefix in name]
    train(model, TOTAL, after=lambda: seen.append({name: buffer.shape for name, buffer in model.named_buffers()}))
    assert seen == [shapes] * TOTAL


@pytest.mark.parametrize("steps", [0, 3, 6, TOTAL])
def test_a_state_dict_of_any_step_loads_at_any_other(variant, steps):
    model = train(adapted(variant), steps)
    stored = copy.deepcopy(model.state_dict())
    for other in (adapted(variant, **seeded(variant)), midway(variant)):
        other.load_state_dict(stored)
        assert torch.equal(logits(other), logits(model)) and trainable(other) == trainable(model)
        with other.disable_adapter():
            assert torch.equal(logits(other), logits(net()))


@pytest.mark.parametrize("steps", STEPS)
def test_distributed_checkpoints_of_any_step_load(variant, steps, tmp_path):
    model = train(adapted(variant), steps)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    other = adapted(variant)
    state = other.state_dict()
    if variant.method.writes_base and steps:
        # Its state grows with every draw, which a distributed checkpoint cannot express: it says so, and what it wrote
        # can be loaded whole.
        with pytest.raises((ValueError, dcp.CheckpointException), match="Size mismatch"):
            dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
        dcp_to_torch_save(tmp_path, tmp_path / "whole.pt")
        state = torch.load(tmp_path / "whole.pt")
    else:
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(state)
    torch.testing.assert_close(logits(other), logits(model), atol=1e-6, rtol=1e-5)


def test_a_base_weight_that_is_written_the_same_is_none_of_a_change(variant):
    model = midway(variant)
    expected = logits(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer" in name:
                parameter.copy_(parameter.clone())
    assert torch.equal(logits(model), expected)


def parameters_of(model):
    return contract.copied({name: p for name, p in model.named_parameters() if p.requires_grad})


@pytest.mark.parametrize("variant", STATEFUL, ids=str)
def test_factors_without_their_state_are_refused_before_anything_is_loaded(variant):
    model = train(adapted(variant), 3)
    kept = parameters_of(model)
    train(model, 3, start=3)
    for holder, prefix in (
        (model, ""),
        (model.base_model, "base_model."),
        (model.base_model.model, "base_model.model."),
    ):
        message = rf"{variant.method.name}_state.default._extra_state is missing"
        with contract.unchanged(model), pytest.raises(ValueError, match=message):
            holder.load_state_dict({k.removeprefix(prefix): v for k, v in kept.items()}, strict=False)


@pytest.mark.parametrize("variant", STATELESS, ids=str)
def test_factors_that_mean_the_same_without_state_are_loaded(variant):
    model = train(adapted(variant), 3)
    kept, expected = parameters_of(model), logits(model)
    train(model, 1, start=3)
    model.load_state_dict(kept, strict=False)
    torch.testing.assert_close(logits(model), expected)


# -------------------------------------------------------------------------------------------------- averages and copies


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("variant", contract.only(lambda v: not v.method.writes_base), ids=str)
def test_averaged_models_hold_the_average_of_the_parameters(variant, use_buffers):
    model = adapted(variant)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    expected = {}

    def update():
        averaged.update_parameters(model)
        for name, parameter in model.named_parameters():
            expected[name] = parameter.detach().clone() if name not in expected else (expected[name] + parameter) / 2

    train(model, TOTAL, after=update)
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            parameter.copy_(expected[name])
    torch.testing.assert_close(logits(averaged.eval()), logits(by_hand), atol=1e-5, rtol=1e-4)
    assert (logits(averaged) - logits(model)).abs().max() > 1e-3


@pytest.mark.parametrize("variant", contract.only(lambda v: v.method.writes_base), ids=str)
def test_an_average_of_written_weights_is_right_within_a_draw_and_refused_over_several(variant):
    model = adapted(variant, resample_every=4)
    optimizer = contract.optimizer_of(model)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    train(model, 3, optimizer=optimizer, after=lambda: averaged.update_parameters(model))
    # The factors are what differs, so one layer's change is bilinear in them; the base weights are untouched.
    for name, parameter in averaged.module.named_parameters():
        if "base_layer" in name:
            assert torch.equal(parameter, model.get_parameter(name))
    assert logits(averaged.eval()).isfinite().all()
    train(model, 2, start=3, optimizer=optimizer, after=lambda: averaged.update_parameters(model))
    with pytest.raises(RuntimeError, match=r"averaged over draws.*Average what evaluation uses after merging"):
        logits(averaged.eval())
    assert logits(model).isfinite().all()


def test_a_copied_adapter_computes_and_trains_as_its_source(variant):
    model = train(adapted(variant, modules_to_save=["head"]), 5)
    expected = logits(model)
    model.add_adapter("ref", variant.config(init_weights=False, modules_to_save=["head"]))
    copy_adapter(model, "default", "ref")
    assert torch.equal(logits(model), expected)
    kept = {name: p.data_ptr() for name, p in model.named_parameters() if ".ref." in name}
    train(model, 3, start=5)
    changed = logits(model)
    model.set_adapter("ref")
    torch.testing.assert_close(logits(model), expected, atol=1e-6, rtol=1e-5)
    copy_adapter(model, "default", "ref")
    torch.testing.assert_close(logits(model), changed, atol=1e-6, rtol=1e-5)
    assert kept == {name: p.data_ptr() for name, p in model.named_parameters() if ".ref." in name}
    # From here both train alike.
    train(model, 2, start=8)
    found = logits(model)
    model.set_adapter("default")
    assert not torch.equal(logits(model), found)
    train(model, 2, start=8)
    torch.testing.assert_close(logits(model), found, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_copied_is_named_and_changes_nothing(additive):
    model = midway(additive)
    model.add_adapter("elsewhere", additive.config(target_modules=["first"], init_weights=False))
    model.add_adapter("same", additive.config(init_weights=False, inference_mode=True))
    with contract.unchanged(model):
        for source, target, message in (
            ("nobody", "same", r"source must be one of .* adapters \['default', 'elsewhere', 'same'\], got 'nobody'"),
            ("default", "nobody", "target must be one of"),
            ("default", "elsewhere", "'elsewhere' must be configured as 'default' is, but target_modules differs"),
        ):
            with pytest.raises(ValueError, match=message):
                copy_adapter(model, source, target)
        model.merge_adapter()
        with pytest.raises(ValueError, match="unmerge \\['default'\\] first"):
            copy_adapter(model, "default", "same")
        model.unmerge_adapter()


def test_copying_wants_a_model_with_adapters():
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        copy_adapter(3, "default", "same")
    with pytest.raises(ValueError, match="source must be one of"):
        copy_adapter(net(), "default", "same")


# ---------------------------------------------------------------------------------------------------- other ways to run


def test_distributed_data_parallel_trains_as_one_process_does(variant):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = adapted(variant)
        optimizer = contract.optimizer_of(model)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)  # broadcasts buffers by default
        train(wrapped, TOTAL, optimizer=optimizer)
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(logits(model.eval()), logits(train(adapted(variant), TOTAL)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", contract.only(lambda v: v.method.schedule), ids=str)
def test_a_compiled_model_warns_that_nothing_schedules_it(variant):
    """Compiled forwards are not counted: the first one warns, unless a schedule has set the state before it."""
    torch.compiler.reset()
    model = adapted(variant).train()
    compiled = torch.compile(model, backend="eager")
    with pytest.warns(UserWarning, match="because no schedule sets it"):
        compiled(IDS)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*because no schedule sets it")
        compiled(IDS[:, :4])  # compiled anew, but said already
    torch.compiler.reset()
    model = adapted(variant).train()
    compiled = torch.compile(model, backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*because no schedule sets it")
        for step in range(3):
            optimizer = contract.optimizer_of(model)
            peft_fused.on_step(model, step=step, total_steps=TOTAL, epoch=step, optimizer=optimizer)
            compiled(IDS)
