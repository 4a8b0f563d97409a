"""What a schedule keeps beside the parameters: averaged, copied, saved and loaded at any step, for every method."""

import copy
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import GPT2Config, GPT2LMHeadModel

import peft_fused
from peft_fused import copy_adapter, on_step

IDS = torch.arange(2, 20).reshape(2, 9)
TARGETS = dict(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
CONFIGS = {
    "dylora": lambda **o: peft_fused.DyLoraConfig(r=3, **TARGETS, **o),
    "surm": lambda **o: peft_fused.SurmConfig(**TARGETS, **o),
    "adamix": lambda **o: peft_fused.AdaMixConfig(kind="lora", r=3, **TARGETS, **o),
    "aflora": lambda **o: peft_fused.AfLoraConfig(
        r=3, frozen_modules=[], t_i=0.2, t_f=0.2, window=1, **TARGETS, **o
    ),
    "rosa": lambda **o: peft_fused.RosaConfig(r=2, resample_every=4, **TARGETS, **o),
}  # fmt: skip
TOTAL = 10


def base():
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=24, n_layer=2, n_head=2, vocab_size=50, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return GPT2LMHeadModel(config).eval()


def adapted(method, **options):
    torch.manual_seed(1)
    return get_peft_model(base(), CONFIGS[method](**options))


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def train(model, steps, start=0, optimizer=None, after=lambda: None):
    optimizer = optimizer or optimizer_of(model)
    model.train()
    for step in range(start, start + steps):
        on_step(model, step=step, total_steps=TOTAL, optimizer=optimizer)
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("method", CONFIGS)
def test_buffers_keep_their_shapes(method):
    model = adapted(method)
    shapes = {name: buffer.shape for name, buffer in model.named_buffers()}
    assert not [name for name in shapes if method in name]
    seen = []
    train(model, TOTAL, after=lambda: seen.append({name: buffer.shape for name, buffer in model.named_buffers()}))
    assert seen == [shapes] * TOTAL


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("method", [name for name in CONFIGS if name != "rosa"])
def test_averaged_models_hold_the_average_of_the_parameters(method, use_buffers):
    model = adapted(method)
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


def test_an_average_of_rosa_is_right_within_a_draw_and_refused_over_several():
    model = adapted("rosa")
    optimizer = optimizer_of(model)
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


@pytest.mark.parametrize("method", CONFIGS)
def test_a_base_weight_that_is_written_the_same_is_none_of_a_change(method):
    model = train(adapted(method), 5)
    expected = logits(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "base_layer" in name:
                parameter.copy_(parameter.clone())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("steps", [0, 3, 6, TOTAL])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_state_dict_of_any_step_loads_at_any_other(method, steps):
    model = train(adapted(method), steps)
    stored = copy.deepcopy(model.state_dict())
    for other in (adapted(method), train(adapted(method), 5)):
        other.load_state_dict(stored)
        torch.testing.assert_close(logits(other.eval()), logits(model), atol=1e-6, rtol=1e-5)
        trains = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {name for name, p in other.named_parameters() if p.requires_grad} == trains


@pytest.mark.parametrize("steps", [0, 5, TOTAL])
@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_of_any_step_loads_by_peft_and_by_transformers(method, steps, tmp_path):
    model = train(adapted(method), steps)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), tmp_path).eval()), expected)
    other = base()
    other.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(other.eval()), expected)


def test_a_finished_aflora_checkpoint_has_no_statistics(tmp_path):
    train(adapted("aflora"), TOTAL).save_pretrained(tmp_path)
    states = [t for key, t in load_file(tmp_path / "adapter_model.safetensors").items() if "aflora_state" in key]
    assert [len(state) for state in states] == [5] * 4


@pytest.mark.parametrize("method", CONFIGS)
def test_distributed_data_parallel_trains_as_one_process_does(method):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = adapted(method)
        optimizer = optimizer_of(model)
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)  # broadcasts buffers by default
        train(wrapped, TOTAL, optimizer=optimizer)
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(logits(model.eval()), logits(train(adapted(method), TOTAL)), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("steps", [0, 5, TOTAL])
@pytest.mark.parametrize("method", CONFIGS)
def test_distributed_checkpoints_of_any_step_load(method, steps, tmp_path):
    model = train(adapted(method), steps)
    dcp.save(model.state_dict(), checkpoint_id=tmp_path, no_dist=True)
    other = adapted(method)
    state = other.state_dict()
    if method == "rosa" and steps:
        # Its state grows with every draw, which a distributed checkpoint cannot express: it says so, and what it wrote
        # can be loaded whole.
        with pytest.raises((ValueError, dcp.CheckpointException), match="Size mismatch"):
            dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
        dcp_to_torch_save(tmp_path, tmp_path / "whole.pt")
        state = torch.load(tmp_path / "whole.pt")
    else:
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    other.load_state_dict(state)
    torch.testing.assert_close(logits(other.eval()), logits(model), atol=1e-6, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------- parameters alone


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("method", ["aflora", "rosa"])
def test_factors_without_their_state_are_refused_before_anything_is_loaded(method):
    model = train(adapted(method), 3)
    kept = trainable(model)
    train(model, 3, start=3)
    before = copy.deepcopy(model.state_dict())
    for holder, prefix in (
        (model, ""),
        (model.base_model, "base_model."),
        (model.base_model.model, "base_model.model."),
    ):
        with pytest.raises(ValueError, match=rf"{method}_state.default._extra_state is missing"):
            holder.load_state_dict({k.removeprefix(prefix): v for k, v in kept.items()}, strict=False)
        after = model.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("method", ["dylora", "surm", "adamix"])
def test_factors_that_mean_the_same_without_state_are_loaded(method):
    model = train(adapted(method), 3)
    kept, expected = trainable(model), logits(model)
    train(model, 1, start=3)
    model.load_state_dict(kept, strict=False)
    torch.testing.assert_close(logits(model), expected)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_copied_adapter_computes_and_trains_as_its_source(method):
    model = adapted(method, modules_to_save=["lm_head"])
    train(model, 5)
    if method == "dylora":
        peft_fused.set_dylora_rank(model, 2, adapter_name="default")
    expected = logits(model)
    model.add_adapter("ref", CONFIGS[method](modules_to_save=["lm_head"]))
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


def test_what_cannot_be_copied_is_named_and_changes_nothing():
    model = train(adapted("rosa"), 5)
    model.add_adapter("other", peft_fused.RosaConfig(r=3, **TARGETS))
    model.add_adapter("same", CONFIGS["rosa"](inference_mode=True))
    before = copy.deepcopy(model.state_dict())
    for source, target, message in (
        ("nobody", "same", r"source must be one of the model's adapters \['default', 'other', 'same'\], got 'nobody'"),
        ("default", "nobody", "target must be one of"),
        ("default", "other", "target 'other' must be configured as 'default' is, but r, resample_every differs"),
    ):
        with pytest.raises(ValueError, match=message):
            copy_adapter(model, source, target)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge \\['default'\\] first"):
        copy_adapter(model, "default", "same")
    model.unmerge_adapter()
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        copy_adapter(3, "default", "same")
    with pytest.raises(ValueError, match="source must be one of"):
        copy_adapter(base(), "default", "same")


# ------------------------------------------------------------------------------------------------- a forgotten schedule


@pytest.mark.parametrize("method", [name for name in CONFIGS if name != "surm"])
def test_a_compiled_model_warns_that_nothing_schedules_it(method):
    """Compiled forwards are not counted: the first one warns, unless a schedule has set the state before it."""
    torch.compiler.reset()
    model = adapted(method).train()
    compiled = torch.compile(model, backend="eager")
    with pytest.warns(UserWarning, match="because no schedule sets it"):
        compiled(input_ids=IDS)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*because no schedule sets it")
        compiled(input_ids=IDS[:, :5])  # compiled anew, but said already
    torch.compiler.reset()
    model = adapted(method).train()
    compiled = torch.compile(model, backend="eager")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*because no schedule sets it")
        for step in range(3):
            on_step(model, step=step, total_steps=TOTAL, optimizer=optimizer_of(model))
            compiled(input_ids=IDS)


@pytest.mark.parametrize("method", CONFIGS)
def test_copies_made_in_inference_mode_compute_the_same(method):
    model = train(adapted(method), 5)
    expected = logits(model)
    with torch.inference_mode():
        assert torch.equal(copy.deepcopy(model)(input_ids=IDS).logits, expected)
