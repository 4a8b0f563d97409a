import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft_fused.layers import AfLoraLinear, FreezingPolicy
from peft_fused.layers.aflora import NOT_FROZEN, AfLoraState
from peft_fused.layers.scheduled import FORWARDS_BEFORE_WARNING
from peft_fused.methods import on_step
from peft_fused.ops.dispatch import use_backend

R, K, N = 5, 12, 9
PARAMETERS = ("lora_A", "lora_B", "lora_d", "lora_b")


def make(base=None, dtype=torch.float32, random=True, **options):
    torch.manual_seed(0)
    base = nn.Linear(K, N).to(dtype) if base is None else base
    layer = AfLoraLinear.from_linear(base, r=R, **options)
    if random:
        nn.init.normal_(layer.lora_d)
        nn.init.normal_(layer.lora_b)
    return layer


def dense(layer, x, scale=1.0):
    A, B, d, b = (getattr(layer, name) for name in PARAMETERS)
    return x @ layer.weight_nk().T + layer.bias + scale * (((x @ A.T) * d) @ B.T) * b


def freeze(layer, *matrices, steps=7):
    for matrix in matrices:
        layer.freezing.freeze(matrix, steps)
        getattr(layer, f"lora_{matrix}").requires_grad_(False)
    return layer


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (7.0, 7.0 / R)])
@pytest.mark.parametrize("transposed", [False, True])
def test_forward_delta_and_merge_are_the_formula(alpha, scale, transposed):
    layer = make(Conv1D(N, K) if transposed else None, alpha=alpha)
    x = torch.randn(3, K)
    expected = dense(layer, x, scale)
    torch.testing.assert_close(layer(x), expected)
    A, B, d, b = (getattr(layer, name) for name in PARAMETERS)
    torch.testing.assert_close(layer.delta(), scale * torch.diag(b) @ B @ torch.diag(d) @ A)
    before = layer.weight.clone()
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_starts_as_nothing_with_random_factors_and_the_papers_vectors():
    layer = make(random=False)
    x = torch.randn(3, K)
    assert torch.equal(layer(x), layer.base(x))
    assert layer.lora_d.eq(0.1).all() and layer.lora_b.eq(0).all()
    for name, fan_in in (("lora_A", K), ("lora_B", R)):
        bound = math.sqrt(6 / fan_in)
        assert 0.8 * bound < getattr(layer, name).abs().max() <= bound
    layer(x).square().sum().backward()
    assert layer.lora_b.grad.any()
    assert not any(getattr(layer, name).grad.any() for name in ("lora_A", "lora_B", "lora_d"))


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("frozen", [(), ("A",), ("B",), ("A", "B")])
def test_gradients_are_those_of_the_formula_in_double(frozen, native):
    layer = freeze(make(alpha=7.0, dtype=torch.float64), *frozen)
    x = torch.randn(4, 3, K, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(4, 3, N, dtype=torch.float64)
    results = []
    for forward in (layer, lambda x: dense(layer, x, 7.0 / R)):
        x.grad = None
        layer.zero_grad()
        with use_backend("torch", native=native):
            y = forward(x)
            y.backward(dy)
        results.append([y, x.grad, *(getattr(layer, name).grad for name in PARAMETERS)])
    for ours, truth in zip(*results, strict=True):
        assert (ours is None) == (truth is None)
        if truth is not None:
            assert truth.abs().max() > 0
            torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    assert [getattr(layer, f"lora_{m}").grad is None for m in "AB"] == [m in frozen for m in "AB"]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("native", [True, False])
def test_the_input_is_dropped_once_a_is_frozen(native, dropout):
    def saved(layer):
        kept = {}
        # Behind another operation, so that x is an activation and no leaf.
        x = torch.randn(64, K, requires_grad=True) * 1.0

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with use_backend("torch", native=native), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(x)
        assert y.requires_grad
        return x.untyped_storage().data_ptr() in kept, sum(t.untyped_storage().nbytes() for t in kept.values())

    layer = make(dropout=dropout)
    with_x, before = saved(layer)
    without_x, after = saved(freeze(layer, "A"))
    assert with_x and not without_x
    assert before - after == 64 * K * 4
    assert saved(freeze(layer, "B")) == (False, after)  # B was never kept for its own gradient's sake


def products(layer):
    """The sizes of the matrix products of a backward pass."""
    x, seen = torch.randn(64, K, requires_grad=True), []
    y = layer(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        y.sum().backward()
    for event in profile.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            seen.append(tuple(map(tuple, event.input_shapes[:2])))
    return seen


def test_no_product_is_computed_for_the_gradient_of_a_frozen_matrix():
    layer = make()
    with use_backend("torch", native=False):
        alive = products(layer)
        a_frozen = products(freeze(layer, "A"))
    of_dA = ((R, 64), (64, K))
    assert of_dA in alive and of_dA not in a_frozen and len(a_frozen) == len(alive) - 1


def test_frozen_from_the_start():
    layer = make(frozen=True)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_d", "lora_b"}
    assert layer.freezing.frozen_at == {"A": 0, "B": 0}
    assert "frozen from the start" in repr(layer)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_gradient(reentrant, dropout):
    grads = []
    for checkpointed in (False, True):
        layer = freeze(make(dropout=dropout), "A")
        x = torch.randn(4, K, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(3)
        y = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
        y.square().sum().backward()
        grads.append((layer.lora_B.grad, layer.lora_d.grad, layer.lora_b.grad, x.grad))
        assert layer.lora_A.grad is None
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_compiles_before_and_after_freezing():
    layer = make()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for frozen in ((), ("A",), ("B",)):
        freeze(layer, *frozen)
        x, grads = torch.randn(3, K, requires_grad=True), []
        for forward in (compiled, layer):
            x.grad = None
            layer.zero_grad()
            forward(x).square().sum().backward()
            grads.append([x.grad, *(getattr(layer, name).grad for name in PARAMETERS)])
        for ours, plain in zip(*grads, strict=True):
            assert (ours is None) == (plain is None)
            if plain is not None:
                torch.testing.assert_close(ours, plain)


def trained(steps=3, **options):
    """A layer in mid-schedule: with statistics, and B frozen."""
    layer = make(t_i=0.0, t_f=0.0, window=2, **options)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        on_step(layer, step=step, total_steps=100, optimizer=optimizer)
        layer(torch.randn(3, K)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return freeze(layer, "B")


def assert_same_state(a, b):
    a, b = a.freezing, b.freezing
    assert (a.frozen_at, a.gradients) == (b.frozen_at, b.gradients)
    assert a.kept.keys() == b.kept.keys() == {"A"} and a.kept["A"][1].any()
    assert all(torch.equal(mine, other) for mine, other in zip(a.kept["A"], b.kept["A"], strict=True))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_holds_the_state(nested, assign):
    layer, fresh = trained(), make(t_i=0.0, t_f=0.0, window=2)
    stored = copy.deepcopy(layer.state_dict())
    assert all(tensor.is_floating_point() for tensor in stored.values())
    if nested:
        stored = {f"0.{key}": tensor for key, tensor in stored.items()}
    (nn.Sequential(fresh) if nested else fresh).load_state_dict(stored, assign=assign)
    assert_same_state(layer, fresh)
    assert fresh.lora_A.requires_grad and not fresh.lora_B.requires_grad
    # Back to a state in which B trains: what is loaded counts, not what was.
    other = make(t_i=0.0, t_f=0.0, window=2)
    layer.load_state_dict(other.state_dict())
    assert layer.lora_B.requires_grad and layer.freezing.frozen_at == {"A": NOT_FROZEN, "B": NOT_FROZEN}
    assert layer.freezing.kept == {}


def test_a_saved_state_has_one_length_which_may_be_cut_to_what_is_in_use():
    lengths = {len(layer.freezing.get_extra_state()) for layer in (make(), trained(), freeze(trained(), "A"))}
    assert lengths == {5 + 3 * (R * K + N * R)}
    layer, fresh = trained(), make(t_i=0.0, t_f=0.0, window=2)
    cut = layer.freezing.unpadded(layer.freezing.get_extra_state())
    assert len(cut) == 5 + 3 * R * K
    fresh.freezing.set_extra_state(cut)
    assert_same_state(layer, fresh)


def changed(**numbers):
    """The state of a layer in mid-schedule with some of the numbers that it starts with changed."""
    state = trained().freezing.get_extra_state()
    for i, number in numbers.items():
        state[("frozen_A", "frozen_B", "gradients", "has_A", "has_B").index(i)] = number
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: torch.zeros(2), "must have at least 5 numbers, got 2"),
        (lambda: torch.zeros(5, 1), "must be a vector of floating-point numbers"),
        (lambda: torch.zeros(5, dtype=torch.float8_e4m3fn), "must be a vector of floating-point numbers.*float8"),
        (lambda: torch.zeros(5, dtype=torch.int64), "must be a vector of floating-point numbers.*int64"),
        (lambda: torch.zeros(5, device="meta"), "must be a vector of floating-point numbers.*meta"),
        (lambda: torch.zeros(5).to_sparse(), "must be a vector of floating-point numbers.*sparse"),
        (lambda: [0.0], r"must be a vector of numbers, got \[0.0\]"),
        (lambda: changed(frozen_A=0.5), "starts with"),
        (lambda: changed(frozen_A=-2), "starts with"),
        (lambda: changed(gradients=-1), "starts with"),
        (lambda: changed(has_B=2), "starts with"),
        (lambda: changed(frozen_A=torch.inf), "not finite"),
        (lambda: changed(frozen_A=3), "statistics of A, which it says is frozen"),
        (lambda: trained().freezing.get_extra_state()[:-1], "numbers for matrices"),
        (lambda: trained().freezing.get_extra_state()[: 5 + 3 * R * K - 1], "numbers for matrices"),
    ],
)
def test_a_state_that_cannot_be_is_refused(state, message):
    stored = trained().state_dict() | {"freezing._extra_state": state()}
    fresh = make()
    before = fresh.freezing.get_extra_state()
    with pytest.raises(ValueError, match=message):
        fresh.load_state_dict(stored)
    assert torch.equal(fresh.freezing.get_extra_state(), before)


def test_state_survives_casts_copies_and_pickles():
    layer = trained()
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer).to(torch.bfloat16),
        copy.deepcopy(layer).double().half(),
    ):
        assert_same_state(layer, other)
        assert {tensor.dtype for tensor in other.freezing.kept["A"]} == {torch.float32}
        assert other.freezing is not layer.freezing
    moved = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    assert moved.freezing.frozen_at == layer.freezing.frozen_at
    assert moved.state_dict()["freezing._extra_state"].tolist()[1] == 7


def test_warns_when_nothing_schedules_it_but_not_what_is_not_trained():
    layer = make()
    with pytest.warns(UserWarning, match="AFLoRA has trained without freezing anything, because no schedule"):
        for _ in range(FORWARDS_BEFORE_WARNING + 1):
            layer(torch.randn(1, K))
    silent = make().requires_grad_(False)
    for _ in range(FORWARDS_BEFORE_WARNING + 1):
        silent(torch.randn(1, K))
    assert silent.freezing.forwards == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_with_fp32_adapter(dtype):
    layer = make(dtype=dtype)
    assert {getattr(layer, name).dtype for name in PARAMETERS} == {torch.float32}
    x = torch.randn(3, K, dtype=dtype)
    truth = copy.deepcopy(layer).double()
    torch.testing.assert_close(layer(x).double(), dense(truth, x.double()), rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"t_i": -1}, ValueError, "t_i must be at least 0, got -1"),
        ({"t_i": 1.5}, ValueError, r"t_i must be a fraction in \[0, 1\] \(float\) or a number of steps"),
        ({"t_f": "half"}, TypeError, "t_f must be a number, got 'half'"),
        ({"t_f": float("nan")}, ValueError, "t_f must be finite"),
        ({"t_i": 0.5, "t_f": 0.6}, ValueError, r"t_i \+ t_f must be at most 1, got 0.5 \+ 0.6"),
        ({"ramp": "linear"}, ValueError, "ramp must be one of 'cubic', 'quadratic', got 'linear'"),
        ({"rule": "best"}, ValueError, "rule must be one of 'paper', 'code', got 'best'"),
        ({"beta1": 1.0}, ValueError, r"beta1 must be in \[0, 1\), got 1.0"),
        ({"beta2": -0.1}, ValueError, r"beta2 must be in \[0, 1\)"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"d_initial": "x"}, TypeError, "d_initial must be a number"),
        ({"frozen": 1}, TypeError, "frozen must be True or False"),
        ({"alpha": float("inf")}, ValueError, "alpha must be finite"),
        ({"dropout": 1.0}, ValueError, "dropout must be in"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_statistics_are_made_on_the_first_gradient_and_dropped_when_frozen():
    state = AfLoraState(R, (K, N), FreezingPolicy(), frozen=False)
    assert state.kept == {} and not list(state.buffers())
    A = torch.randn(R, K, dtype=torch.bfloat16)
    window, *_ = state.statistics("A", A)
    window += 1
    assert state.kept["A"][0].eq(1).all() and state.kept["A"][0].dtype == torch.float32
    state.freeze("A", 3)
    assert state.kept == {} and state.frozen_at == {"A": 3, "B": NOT_FROZEN}
