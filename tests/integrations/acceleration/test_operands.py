"""What the operations do not take: base layers that have to be called, and adapters and inputs that go to PEFT."""

import copy
import logging

import peft
import pytest
import torch
from accelerate.hooks import add_hook_to_module
from accelerated import (
    FP32,
    CountCalls,
    Net,
    Tagged,
    assert_same,
    config,
    error,
    explained,
    first,
    pair,
    randomise,
    results,
    same,
)  # fmt: skip
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrize

from peft_fused.integrations.peft.acceleration import accelerate


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def hook(layer):
    layer.base_layer.register_forward_hook(lambda module, args, output: output * 1.5)


def accelerate_hook(layer):
    add_hook_to_module(layer.base_layer, CountCalls())


def subclass(layer):
    layer.base_layer.__class__ = Shifted


def tensor_subclass(layer):
    weight = layer.base_layer.weight.detach().as_subclass(Tagged)
    layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)


def parametrization(layer):
    parametrize.register_parametrization(layer.base_layer, "weight", Doubled())


every_change = pytest.mark.parametrize("change", [hook, accelerate_hook, subclass, tensor_subclass, parametrization])


@every_change
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("lora_bias", [False, True])
def test_an_unusual_base_is_called_as_a_module(change, when, lora_bias, calls):
    reference = randomise(get_peft_model(Net(), config(lora_bias=lora_bias, target_modules=["first"])))
    fused = copy.deepcopy(reference)
    bare = reference(torch.ones(1, 24))
    if when == "after":
        accelerate(fused)
    for model in (reference, fused):
        change(first(model))
    if when == "before":
        accelerate(fused)
    CountCalls.seen = 0
    same(fused, reference)
    assert calls == ["lowrank_adapter"]
    assert CountCalls.seen == (2 if change is accelerate_hook else 0)
    if change not in (accelerate_hook, tensor_subclass):
        assert error(reference(torch.ones(1, 24)), bare) > 0.01  # the change matters


@every_change
def test_an_unusual_base_is_reported(change):
    _, fused = pair(target_modules=["first"])
    change(first(fused))
    path, reasons = explained(first(fused))
    assert path == "base layer called as a module, then lowrank"
    assert len(reasons) == 1 and reasons[0].startswith("lowrank_linear: the base ")
    report = accelerate(fused)
    assert report.slower == {"base_model.model.first": reasons[0]}
    assert reasons[0] in str(report)


def test_a_base_that_answers_in_its_own_type():
    """Quantised layers may; PEFT then gives the sum in that type."""

    class Upcast(nn.Linear):
        def forward(self, x):
            return super().forward(x).double()

    reference, fused = pair(target_modules=["first"])
    for model in (reference, fused):
        first(model).base_layer.__class__ = Upcast
    x = torch.randn(3, 24)
    ours, truth = first(fused)(x), first(reference)(x)
    assert ours.dtype == truth.dtype == torch.float64
    assert error(ours, truth) <= FP32


def test_a_base_under_autocast_keeps_its_type():
    class Fp32(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return super().forward(x)

    reference, fused = pair(target_modules=["first"])
    for model in (reference, fused):
        first(model).base_layer.__class__ = Fp32
    x = torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        ours, truth = first(fused)(x), first(reference)(x)
    assert ours.dtype == truth.dtype == torch.float32
    assert error(ours, truth) < 0.01


def on_lora_A(layer):
    layer.lora_A["default"].register_forward_hook(lambda module, args, output: output * 1.5)
    return "carries hooks"


def on_lora_B(layer):
    layer.lora_B["default"].register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    return "carries hooks"


def on_dropout(layer):
    layer.lora_dropout["default"].register_forward_hook(lambda module, args, output: output * 1.5)
    return "carries hooks"


def backward_hook(layer):
    layer.lora_B["default"].register_full_backward_hook(lambda module, grads, outputs: (grads[0] * 1.5,))
    return "carries hooks"


def backward_pre_hook(layer):
    layer.lora_B["default"].register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 1.5,))
    return "carries hooks"


def replaced_forward(layer):
    inner = layer.lora_A["default"]
    inner.forward = lambda x: nn.functional.linear(x, inner.weight) * 1.5
    return "replaced forward"


def parametrized_A(layer):
    parametrize.register_parametrization(layer.lora_A["default"], "weight", Doubled())
    return "ParametrizedLinear"


def other_dropout(layer):
    layer.lora_dropout["default"] = nn.Hardtanh()
    return "lora_dropout is Hardtanh"


def inplace_dropout(layer):
    layer.lora_dropout["default"] = nn.Dropout(0.0, inplace=True)
    return "inplace=True"


def full_dropout(layer):
    layer.lora_dropout["default"] = nn.Dropout(1.0)
    return "Dropout(p=1.0"


def tagged_A(layer):
    weight = 1.5 * layer.lora_A["default"].weight.detach()
    layer.lora_A["default"].weight = nn.Parameter(weight.as_subclass(Tagged))
    return "its weights are Tagged and Parameter"


def biased_A(layer):
    layer.lora_A["default"] = nn.Linear(24, 4)
    return "lora_A has a bias"


def half_adapter(layer):
    layer.lora_A.bfloat16()
    layer.lora_B.bfloat16()
    return "it is torch.bfloat16, x torch.float32"


def high_rank(layer):
    layer.lora_A["default"].weight = nn.Parameter(torch.randn(257, 24) / 16)
    layer.lora_B["default"].weight = nn.Parameter(torch.randn(40, 257) / 16)
    return "rank is 257"


def trained_scale(layer):
    layer.scaling["default"] = torch.tensor(1.5, requires_grad=True)
    return "neither a number nor a constant"


CHANGES = [
    on_lora_A, on_lora_B, on_dropout, backward_hook, backward_pre_hook, replaced_forward, parametrized_A,
    other_dropout, inplace_dropout, full_dropout, tagged_A, biased_A, half_adapter, high_rank, trained_scale,
]  # fmt: skip  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_peft_computes_what_the_operations_do_not(change, calls):
    reference, fused = pair(target_modules=["first"])
    x = torch.randn(4, 24)
    before = results(reference, x)
    for model in (reference, fused):
        torch.manual_seed(4)
        change(first(model))
    truth = results(reference, x)
    assert_same(results(fused, x), truth, tolerance=0)
    assert not calls
    if change is not inplace_dropout:
        assert any(truth[key].shape != before[key].shape or error(truth[key], before[key]) > 1e-3 for key in before)


@pytest.mark.parametrize("change", CHANGES)
def test_what_peft_computes_is_said_once(change, caplog):
    _, fused = pair(target_modules=["first"])
    reason = change(first(fused))
    path, reasons = explained(first(fused))
    assert path == "PEFT's own forward" and reason in reasons[0]
    with caplog.at_level(logging.WARNING, "peft_fused"):
        for _ in range(2):
            fused(torch.randn(4, 24))
    (said,) = [record.getMessage() for record in caplog.records]
    assert reason in said


def test_global_hooks_see_every_module(calls):
    reference, fused = pair(target_modules=["first"])
    x = torch.randn(2, 24)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda child, args, output: seen.append(child))
    try:
        assert torch.equal(fused(x), reference(x))
        assert first(fused).lora_A["default"] in seen and first(fused).base_layer in seen
        assert "global module hooks" in explained(first(fused))[1][0]
    finally:
        handle.remove()
    assert not calls
    same(fused, reference)
    assert calls == ["lowrank_linear"]


def test_mismatched_types_raise_as_in_peft(calls):
    reference, fused = pair(Net(torch.bfloat16))
    x = torch.randn(2, 24)
    for model in (reference, fused):
        with pytest.raises(RuntimeError, match="dtype"):
            first(model)(x)
    for model in (reference, fused):
        with peft.helpers.disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="dtype"):
            first(model)(x.bfloat16())
    assert not calls


def test_a_bias_of_another_type_raises_as_in_peft(calls):
    for model in pair(target_modules=["first"]):
        first(model).base_layer.bias.data = first(model).base_layer.bias.data.double()
        with pytest.raises(RuntimeError, match="dtype"):
            first(model)(torch.randn(2, 24))
    assert calls == []


def test_factors_of_two_types_raise_as_in_peft(calls):
    for model in pair(target_modules=["first"]):
        first(model).lora_B.double()
        with pytest.raises(RuntimeError, match="dtype"):
            first(model)(torch.randn(2, 24))
    assert calls == []


def test_float64_adapters_under_autocast_go_to_peft(calls):
    reference, fused = pair(target_modules=["first"])
    x = torch.randn(4, 24)
    outputs = []
    for model in (reference, fused):
        first(model).lora_A.double()
        first(model).lora_B.double()
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(first(model)(x))
    assert torch.equal(*outputs)
    assert not calls


def test_integer_and_subclass_inputs_go_to_peft():
    _, fused = pair()
    layer = first(fused)
    assert "x is torch.int64; the fused" in explained(layer, torch.ones(1, 24, dtype=torch.int64))[1][0]
    assert "Tagged" in explained(layer, torch.ones(1, 24).as_subclass(Tagged))[1][0]
    assert "meta" in explained(layer, torch.ones(1, 24, device="meta"))[1][0]
    assert explained(layer, torch.ones(1, 24)) == ("lowrank_linear", [])


def test_torch_func_transforms_go_to_peft(calls):
    reference, fused = pair()
    x = torch.randn(3, 24)

    def gradients(model):
        parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        return torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)

    assert_same(gradients(fused), gradients(reference), tolerance=0)
    assert not calls


def test_functional_calls_stay_fused(calls):
    reference, fused = pair()
    x = torch.randn(3, 24)
    parameters = {name: p.detach() * 2 for name, p in fused.named_parameters()}
    ours, truth = (torch.func.functional_call(model, parameters, (x,)) for model in (fused, reference))
    assert error(ours, truth) <= FP32
    assert calls == ["lowrank_linear"] * 2


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torch_jit_traces_peft(calls):
    reference, fused = pair()
    traced = torch.jit.trace(fused, torch.randn(4, 24), check_trace=False)
    x = torch.randn(7, 24)
    assert torch.equal(traced(x), reference(x))
    assert not calls


@pytest.mark.parametrize("leaves", [False, True], ids=["whole", "leaves"])
def test_fsdp2(one_rank, leaves, calls):
    from torch.distributed.fsdp import fully_shard

    reference, fused = pair(target_modules=["first"])
    if leaves:
        for leaf in (first(fused).lora_A["default"], first(fused).lora_B["default"]):
            fully_shard(leaf, mesh=one_rank)
    fully_shard(fused, mesh=one_rank)
    x = torch.randn(3, 24)
    fused(x).sum().backward()
    reference(x).sum().backward()
    for name in ("lora_A", "lora_B"):
        ours, truth = (getattr(first(model), name)["default"].weight.grad for model in (fused, reference))
        assert error(ours.full_tensor(), truth) <= FP32
    assert calls == ([] if leaves else ["lowrank_linear"])
    if leaves:
        assert "FSDPLinear" in explained(first(fused), x)[1][0]


def test_sharded_parameters_go_to_peft(one_rank, calls):
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

    _, fused = pair(target_modules=["first"])
    distribute_module(first(fused), one_rank)
    layer = first(fused)
    x = distribute_tensor(torch.randn(3, 24), one_rank, [Replicate()])
    assert layer(x).full_tensor().shape == (3, 40)
    assert "DTensor" in explained(layer, x)[1][0]
    assert not calls
