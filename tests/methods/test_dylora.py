from collections import Counter

import pytest
import torch
from torch import nn

from peft_fused.layers import DyLoraLinear, LoraLinear, RankPolicy
from peft_fused.methods import draw_rank, evaluate_dylora_ranks, on_step, set_dylora_rank


def model(r=(6, 6), **options):
    torch.manual_seed(0)
    layers = [DyLoraLinear.from_linear(nn.Linear(8, 8), r=rank, **options) for rank in r]
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    return nn.Sequential(*layers)


def train_ranks(net):
    return [layer.ranks.train_rank.item() for layer in net]


def eval_ranks(net):
    return [layer.ranks.eval_rank.item() for layer in net]


def test_one_draw_serves_all_layers_and_depends_on_seed_and_step_only():
    nets = [model(), model(), model(seed=1)]
    seen = [[], [], []]
    for step in range(40):
        for net, ranks in zip(nets, seen, strict=True):
            assert on_step(net, step=step) == 2
            assert len(set(train_ranks(net))) == 1
            ranks.append(train_ranks(net)[0])
    assert seen[0] == seen[1] != seen[2]
    on_step(nets[0], step=7)
    assert train_ranks(nets[0])[0] == seen[0][7]
    assert set(seen[0]) == set(range(1, 7))
    scales = [layer.ranks.train_scale.item() for layer in nets[0]]
    assert scales == pytest.approx([16 / seen[0][7]] * 2)


def test_draws_follow_the_policy():
    n = 6000
    uniform = Counter(draw_rank(RankPolicy(r_min=3), 8, step) for step in range(n))
    geometric = Counter(draw_rank(RankPolicy(r_min=3, rank_distribution="geometric"), 8, step) for step in range(n))
    weights = [0.85**k for k in range(6)]
    for b in range(3, 9):
        assert uniform[b] == pytest.approx(n / 6, rel=0.15)
        assert geometric[b] == pytest.approx(n * weights[b - 3] / sum(weights), rel=0.15)
    assert uniform.total() == geometric.total() == sum(uniform[b] for b in range(3, 9))


def test_micro_batches_draw_anew_only_if_asked():
    per_step, per_micro = model(), model(resample="micro")
    seen = {"step": set(), "micro": set()}
    for micro in range(20):
        on_step(per_step, step=3, micro=micro)
        on_step(per_micro, step=3, micro=micro)
        seen["step"].add(train_ranks(per_step)[0])
        seen["micro"].add(train_ranks(per_micro)[0])
    assert len(seen["step"]) == 1 and len(seen["micro"]) > 3


def test_smaller_layers_are_clipped():
    net = model(r=(6, 2))
    drawn = set()
    for step in range(50):
        on_step(net, step=step)
        first, second = train_ranks(net)
        drawn.add(first)
        assert second == min(first, 2)
    assert drawn == set(range(1, 7))
    set_dylora_rank(net, 5)
    assert eval_ranks(net) == [5, 2]


def test_set_rank_sets_both_and_the_schedule_overrides_training_only():
    net = model()
    set_dylora_rank(net, 4)
    assert train_ranks(net) == eval_ranks(net) == [4, 4]
    step = next(s for s in range(100) if draw_rank(RankPolicy(), 6, s) != 4)
    on_step(net, step=step)
    assert eval_ranks(net) == [4, 4] and train_ranks(net) == [draw_rank(RankPolicy(), 6, step)] * 2
    set_dylora_rank(net, None)
    assert train_ranks(net) == eval_ranks(net) == [6, 6]


def test_evaluate_ranks_evaluates_each_and_restores():
    net = model()
    set_dylora_rank(net, 3)
    on_step(net, step=5)
    before = train_ranks(net), eval_ranks(net), [layer.ranks.used for layer in net]
    net[1].eval()
    x = torch.randn(2, 8)
    results = evaluate_dylora_ranks(net, lambda m: (m.training, m(x)))
    assert list(results) == list(range(1, 7))
    for b, (training, y) in results.items():
        set_dylora_rank(net, b)
        assert not training and torch.equal(y, net(x))
        set_dylora_rank(net, 3)
        on_step(net, step=5)
    assert (net[0].training, net[1].training) == (True, False)
    with pytest.raises(ZeroDivisionError):
        evaluate_dylora_ranks(net, lambda m: 1 / 0, [2])
    assert (train_ranks(net), eval_ranks(net)) == before[:2]
    assert list(evaluate_dylora_ranks(net, lambda m: None, [5, 1])) == [5, 1]


def test_bad_ranks_and_models_are_named():
    net = model()
    for rank in (0, 7):
        with pytest.raises(ValueError, match=rf"rank must be in 1\.\.6, got {rank}"):
            set_dylora_rank(net, rank)
    with pytest.raises(TypeError, match="rank must be an int"):
        set_dylora_rank(net, 2.0)
    with pytest.raises(ValueError, match=r"ranks must be in 1\.\.6"):
        evaluate_dylora_ranks(net, lambda m: None, [1, 9])
    with pytest.raises(ValueError, match="no DyLoRA layers"):
        set_dylora_rank(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="adapter_name must be one of"):
        set_dylora_rank(net, 1, adapter_name="other")
    net[0].merge()
    with pytest.raises(ValueError, match="unmerge it first"):
        set_dylora_rank(net, 1)


def test_on_step_counts_members_and_checks_its_arguments():
    assert on_step(nn.Sequential(LoraLinear.from_linear(nn.Linear(2, 2), r=1)), step=0) == 0
    with pytest.raises(ValueError, match="step must be at least 0"):
        on_step(model(), step=-1)
    with pytest.raises(TypeError, match="micro must be an int"):
        on_step(model(), step=0, micro=0.5)
    with pytest.raises(TypeError, match="optimizer must be"):
        on_step(model(), step=0, optimizer="adam")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        on_step([], step=0)


class Wrapped(torch.optim.Optimizer):
    """As accelerate's: an Optimizer by inheritance that holds the one that steps."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self):
        self.optimizer.step()


def run(strict, frozen, micros=1, wrap=False, make=torch.optim.AdamW, steps=8):
    """Yields (ranks used, factors before, factors after, state before, state after) of each step of a training run."""
    net = model(r=(6,), strict_frozen=strict, frozen=frozen, resample="micro")
    layer = net[0]
    inner = make([layer.lora_A, layer.lora_B])
    optimizer = Wrapped(inner) if wrap else inner
    snapshot = lambda: {  # noqa: E731
        (i, name): t.clone()
        for i, p in enumerate((layer.lora_A, layer.lora_B))
        for name, t in {"p": p.detach(), **inner.state.get(p, {})}.items()
        if isinstance(t, torch.Tensor) and t.shape == p.shape
    }
    for step in range(steps):
        used = set()
        for micro in range(micros):
            on_step(net, step=step, micro=micro, optimizer=optimizer)
            used.add(layer.ranks.train_value)
            net(torch.randn(4, 8)).square().sum().backward()
        before = snapshot()
        optimizer.step()
        inner.zero_grad()
        yield used, before, snapshot()


ADAM = [
    lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("micros", [1, 2])
@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("make", [*ADAM, lambda p: torch.optim.SGD(p, lr=1e-5, momentum=0.9, weight_decay=0.1)])
def test_strict_keeps_untrained_rows_and_their_state(frozen, micros, wrap, make):
    for used, before, after in run(True, frozen, micros, wrap, make):
        live = torch.zeros(6, dtype=torch.bool)
        for b in used:
            live[b - 1 if frozen else slice(0, b)] = True
        for (i, name), tensor in after.items():
            old = before.get((i, name), torch.zeros_like(tensor))
            rows = (lambda t: t) if i == 0 else (lambda t: t.T)
            assert torch.equal(rows(tensor)[~live], rows(old)[~live])
            assert (rows(tensor)[live] != rows(old)[live]).any(dim=1).all()


def test_without_strict_momentum_and_decay_move_untrained_rows():
    moved = 0
    for used, before, after in run(False, False, make=ADAM[0]):
        b = max(used)
        moved += (before[0, "p"][b:] != after[0, "p"][b:]).sum().item()
    assert moved > 0


def test_strict_needs_the_optimizer_that_has_the_parameters():
    net = model(strict_frozen=True)
    with pytest.raises(ValueError, match="pass optimizer= to on_step"):
        on_step(net, step=0)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match="not among the optimizer's"):
        on_step(net, step=0, optimizer=other)


def test_hooks_are_installed_once():
    net = model(strict_frozen=True)
    optimizer = torch.optim.SGD(net.parameters())
    hooks = []
    for step in range(3):
        on_step(net, step=step, optimizer=optimizer)
        hooks.append((len(optimizer._optimizer_step_post_hooks), len(optimizer._optimizer_step_pre_hooks)))
    assert hooks[0][0] > 0 and len(set(hooks)) == 1
