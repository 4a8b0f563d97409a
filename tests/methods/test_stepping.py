import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_fused.integrations.peft.registration import REGISTERED
from peft_fused.layers import AdaMixLinear, DyLoraLinear
from peft_fused.methods import check_sync, on_step
from peft_fused.methods.schedule import SCHEDULES, Schedule


class Member:
    method = "recorder"

    def choices(self):
        return ("nothing",)


class Layer(nn.Linear):
    def schedule_members(self):
        return [Member()]


class Recorder(Schedule):
    def __init__(self):
        self.calls = []

    def before_step(self, members, step):
        self.calls.append(("before", step.step, step.micro, step.total_steps, step.epoch, len(members)))

    def gradients_ready(self, members, step):
        self.calls.append(("ready", step.step, self.parameter.grad is not None, self.parameter.detach().sum().item()))

    def after_step(self, members, step):
        self.calls.append(("after", step.step, self.parameter.grad is not None, self.parameter.detach().sum().item()))


@pytest.fixture
def recorder(monkeypatch):
    method = Recorder()
    monkeypatch.setitem(SCHEDULES, "recorder", method)
    return method


def test_a_method_is_called_before_when_gradients_are_ready_and_after(recorder):
    model = nn.Sequential(Layer(2, 1), Layer(1, 1))
    recorder.parameter = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    start = model[0].weight.detach().sum().item()
    for micro in (0, 1):
        assert on_step(model, step=3, micro=micro, total_steps=9, epoch=1, optimizer=optimizer) == 2
        model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    end = model[0].weight.detach().sum().item()
    assert recorder.calls == [
        ("before", 3, 0, 9, 1, 2), ("before", 3, 1, 9, 1, 2), ("ready", 3, True, start), ("after", 3, True, end),
    ]  # fmt: skip
    assert start != end


def test_a_step_that_nobody_announced_or_that_a_scaler_skips_is_none_of_the_schedules(recorder):
    model = Layer(2, 1)
    recorder.parameter = model.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    on_step(model, step=0, optimizer=optimizer)
    on_step(model, step=0, optimizer=optimizer)  # the first was skipped
    optimizer.step()
    optimizer.step()
    assert [call[0] for call in recorder.calls] == ["before", "before", "ready", "after"]


def test_an_optimizer_and_a_model_can_be_let_go(recorder):
    import gc
    import weakref

    model = Layer(2, 1)
    recorder.parameter = model.weight
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters())
    on_step(model, step=0, optimizer=optimizer)
    optimizer.step()
    kept = weakref.ref(model)
    del model, recorder.parameter
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step": -1}, ValueError, "step must be at least 0, got -1"),
        ({"step": 0.5}, TypeError, "step must be an int"),
        ({"step": 0, "micro": -1}, ValueError, "micro must be at least 0"),
        ({"step": 0, "epoch": -1}, ValueError, "epoch must be at least 0"),
        ({"step": 0, "total_steps": "9"}, TypeError, "total_steps must be an int"),
        ({"step": 0, "optimizer": "adam"}, TypeError, "optimizer must be a torch.optim.Optimizer"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        on_step(AdaMixLinear.from_linear(nn.Linear(2, 2)), **arguments)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        on_step("model", step=0)


def partitioned(model: nn.Module) -> nn.Module:
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id = number  # as DeepSpeed marks what ZeRO-3 owns
    return model


def test_zero3_is_refused_and_the_model_left_alone():
    layer = partitioned(DyLoraLinear.from_linear(nn.Linear(4, 4), r=2))
    with pytest.raises(NotImplementedError, match="DeepSpeed ZeRO-3 is not supported"):
        on_step(layer, step=0)
    model = partitioned(nn.Sequential(nn.Linear(4, 4)))
    before = copy.deepcopy(model)
    for method in REGISTERED.values():
        with pytest.raises(NotImplementedError, match="ZeRO-3"):
            get_peft_model(model, method.config(target_modules=["0"]))
        assert str(model) == str(before)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_check_sync_of_a_single_process_says_nothing():
    check_sync(DyLoraLinear.from_linear(nn.Linear(4, 4), r=2))
    check_sync(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        check_sync("model")
