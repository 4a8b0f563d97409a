import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_fused.layers import DyLoraLinear, RankPolicy
from peft_fused.layers.scheduled import FORWARDS_BEFORE_WARNING
from peft_fused.methods import on_step, set_dylora_rank
from peft_fused.ops.dispatch import use_backend

R, ALPHA = 5, 7.0


def make(**options):
    torch.manual_seed(0)
    layer = DyLoraLinear.from_linear(nn.Linear(12, 9), r=R, alpha=ALPHA, **options)
    nn.init.normal_(layer.lora_B)
    return layer


def dense(layer, x, b, scale=None):
    A, B = layer.lora_A[:b], layer.lora_B[:, :b]
    return x @ layer.weight.T + layer.bias + (ALPHA / b if scale is None else scale) * (x @ A.T) @ B.T


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("b", range(1, R + 1))
def test_forward_delta_and_merge_at_each_rank(b, training):
    layer = make().train(training)
    set_dylora_rank(layer, b)
    x = torch.randn(3, 12)
    torch.testing.assert_close(layer(x), dense(layer, x, b))
    torch.testing.assert_close(layer.delta(), ALPHA / b * layer.lora_B[:, :b] @ layer.lora_A[:b])
    expected = dense(layer, x, b)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)


def test_rslora_scale():
    layer = make(use_rslora=True)
    set_dylora_rank(layer, 4)
    x = torch.randn(3, 12)
    torch.testing.assert_close(layer(x), dense(layer, x, 4, ALPHA / 2))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("b", range(1, R + 1))
def test_gradients_are_those_of_the_truncated_formula(b, frozen):
    layer = make(frozen=frozen)
    set_dylora_rank(layer, b)
    x = torch.randn(3, 12, requires_grad=True)
    layer(x).square().sum().backward()
    got = layer.lora_A.grad, layer.lora_B.grad, x.grad
    layer.lora_A.grad = layer.lora_B.grad = x.grad = None
    dense(layer, x, b).square().sum().backward()
    trained = torch.arange(R) == b - 1 if frozen else torch.arange(R) < b
    expected = layer.lora_A.grad * trained[:, None], layer.lora_B.grad * trained, x.grad
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e)
    assert not got[0][~trained].any() and not got[1][:, ~trained].any()
    assert got[0][b - 1].any()


def test_evaluation_does_not_run_at_the_training_rank():
    layer = make()
    set_dylora_rank(layer, 3)
    x = torch.randn(3, 12)
    step = next(s for s in range(100) if on_step(layer, step=s) and layer.ranks.train_value != 3)
    on_step(layer, step=step)
    torch.testing.assert_close(layer.train()(x), dense(layer, x, layer.ranks.train_value))
    torch.testing.assert_close(layer.eval()(x), dense(layer, x, 3))


def test_ranks_survive_casts_copies_and_pickles():
    layer = make()
    set_dylora_rank(layer, 3)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        copy.deepcopy(layer).to(torch.bfloat16),
        copy.deepcopy(layer).to("meta").to_empty(device="cpu"),
    ):
        ranks = other.ranks
        assert (ranks.train_rank.item(), ranks.eval_rank.item()) == (3, 3)
        # 7 / 3 is not a bfloat16 number: the scale has to stay in fp32.
        assert ranks.train_scale.dtype == ranks.eval_scale.dtype == torch.float32
        assert ranks.eval_scale.item() == ranks.train_scale.item() == torch.tensor(ALPHA / 3).item()


def test_ranks_follow_an_input_to_a_device_that_the_module_was_not_moved_to():
    """As FSDP and DataParallel do, which move parameters and buffers by themselves."""
    layer, x = make(), torch.randn(4, 12)
    set_dylora_rank(layer, 2)
    expected = layer(x)
    layer.ranks.train_rank, layer.ranks.train_scale = (t.to("meta") for t in layer.ranks.controls(True, x))
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    set_dylora_rank(layer, 3)
    assert layer.ranks.train_rank.item() == 3


def test_ranks_are_written_in_place_and_stay_out_of_checkpoints():
    layer, x = make(), torch.randn(4, 12)

    def pointers():
        return [tensor.data_ptr() for tensor in (*layer.ranks.controls(True, x), *layer.ranks.controls(False, x))]

    before = pointers()
    set_dylora_rank(layer, 2)
    on_step(layer, step=1)
    assert before == pointers()
    assert not list(layer.ranks.buffers()), "DDP would write them between a forward pass and its backward"
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B"}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpointing_changes_no_gradient(reentrant, dropout):
    grads = []
    for checkpointed in (False, True):
        layer = make(dropout=dropout)
        on_step(layer, step=2)
        assert layer.ranks.train_value < R
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(3)
        y = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
        y.square().sum().backward()
        grads.append((layer.lora_A.grad, layer.lora_B.grad, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("native", [True, False])
def test_a_rank_changed_before_backward_never_gives_a_wrong_gradient(native):
    layer = make()
    x = torch.randn(3, 12)
    dense(layer, x, R).sum().backward()
    expected = layer.lora_A.grad
    layer.lora_A.grad = None
    with use_backend(None, native=native):
        y = layer(x).sum()
        set_dylora_rank(layer, 2)
        try:
            y.backward()
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)
        else:
            torch.testing.assert_close(layer.lora_A.grad, expected)


def test_compiles_once_for_all_ranks():
    layer = make()
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = torch.randn(3, 12)
    for b in range(1, R + 1):
        set_dylora_rank(layer, b)
        torch.testing.assert_close(compiled(x), dense(layer, x, b))
    assert len(compilations) == 1


def test_training_without_a_schedule_warns_once_per_model():
    models = [nn.Sequential(make(), DyLoraLinear.from_linear(nn.Linear(9, 4), r=2)) for _ in range(2)]
    x = torch.randn(1, 12)
    for model in models:
        with pytest.warns(UserWarning) as caught:
            for _ in range(FORWARDS_BEFORE_WARNING):
                model(x)
            assert not caught
            for _ in range(3):
                model(x)
        assert len(caught) == 1
        assert "PeftFusedCallback" in str(caught[0].message) and "on_step" in str(caught[0].message)


@pytest.mark.filterwarnings("error")
def test_neither_a_schedule_nor_evaluation_warns():
    scheduled, evaluated = make(), make().eval()
    on_step(scheduled, step=0)
    for _ in range(FORWARDS_BEFORE_WARNING + 5):
        scheduled(torch.randn(1, 12))
        evaluated(torch.randn(1, 12))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"r_min": 0}, ValueError, r"r_min must be in 1\.\.256, got 0"),
        ({"r_min": R + 1}, ValueError, r"r_min must be in 1\.\.r = 1\.\.5, got 6"),
        ({"rank_distribution": "normal"}, ValueError, "rank_distribution must be one of 'uniform', 'geometric'"),
        ({"geometric_p": 1.0}, ValueError, r"geometric_p must be in \(0, 1\)"),
        ({"geometric_p": 0.3}, ValueError, "geometric_p is an option of rank_distribution='geometric', got 0.3 with"),
        ({"resample": "epoch"}, ValueError, "resample must be one of"),
        ({"frozen": 1}, TypeError, "frozen must be True or False"),
        ({"strict_frozen": None}, TypeError, "strict_frozen must be True or False"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
    ],
)
def test_bad_policies_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


def test_policy_defaults_are_the_papers():
    assert (RankPolicy().rank_distribution, RankPolicy().geometric_p, RankPolicy().frozen) == ("uniform", 0.15, False)


@pytest.mark.parametrize("b", (1, 2, 3, 4))
def test_the_scale_is_as_exact_as_the_layer(b):
    layer = DyLoraLinear.from_linear(nn.Linear(16, 8).double(), r=4, alpha=16, dtype=torch.float64).eval()
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 16, dtype=torch.float64)
    set_dylora_rank(layer, b)
    expected = layer.base(x) + 16 / b * (x @ layer.lora_A[:b].T @ layer.lora_B[:, :b].T)
    torch.testing.assert_close(layer(x), expected, rtol=1e-14, atol=1e-14)
