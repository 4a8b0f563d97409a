import copy

import pytest
import torch
from torch import nn

from peft_fused.layers import RosaLinear, SubspacePolicy
from peft_fused.layers.rosa.subspace import draw_directions, split_weight
from peft_fused.methods import decay_groups, on_step, phase_of
from peft_fused.methods.schedule import Step

SIZES = ((12, 9), (9, 12))
OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
}


def model(resample_every=2, **options):
    torch.manual_seed(0)
    options = dict(r=3, resample_every=resample_every) | options
    layers = [RosaLinear.from_linear(nn.Linear(*size), layer=i, **options) for i, size in enumerate(SIZES)]
    return nn.Sequential(*layers, nn.Linear(12, 2))


def trained_parameters(net):
    return [p for p in net.parameters() if p.requires_grad]


def adam(net):
    return OPTIMIZERS["AdamW"](trained_parameters(net))


def phases(net):
    return [layer.rosa_state.phase for layer in net[:2]]


def backward(net, step, micro=0):
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(100 * step + micro))
    net(x).square().sum().backward()


def train(net, optimizer, steps, micros=1, **given):
    for step in steps:
        for micro in range(micros):
            on_step(net, step=step, micro=micro, optimizer=optimizer, **given)
            backward(net, step, micro)
        optimizer.step()
        optimizer.zero_grad()


def snapshot(net):
    return {key: tensor.clone() for key, tensor in net.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_phases_count_steps_or_epochs():
    by_step, by_epoch = SubspacePolicy(resample_every=3), SubspacePolicy()
    assert [phase_of(by_step, Step(s)) for s in range(7)] == [0, 0, 0, 1, 1, 1, 2]
    assert [phase_of(by_epoch, Step(s, epoch=s // 5)) for s in (0, 4, 5, 12)] == [0, 0, 1, 2]
    with pytest.raises(ValueError, match="epoch must be passed to on_step"):
        phase_of(by_epoch, Step(0))
    with pytest.raises(ValueError, match="epoch must be passed to on_step"):
        on_step(model("epoch"), step=0)


def test_draws_happen_when_due_once_and_keep_the_function():
    net = model()
    optimizer, x = adam(net), torch.randn(5, 12)
    seen = []
    for step in range(6):
        before = net(x).detach()
        assert on_step(net, step=step, optimizer=optimizer) == 2
        torch.testing.assert_close(net(x), before)
        seen.append(phases(net))
        after = snapshot(net)
        for micro in (0, 1, 2):
            on_step(net, step=step, micro=micro, optimizer=optimizer)
        assert equal(after, snapshot(net)), "a second call, and those of micro-batches, draw nothing"
        backward(net, step)
        optimizer.step()
    assert seen == [[0, 0], [0, 0], [1, 1], [1, 1], [2, 2], [2, 2]]


def test_what_is_drawn_is_the_function_of_seed_phase_and_layer_applied_to_the_trained_weight():
    net = model(seed=5)
    optimizer = adam(net)
    train(net, optimizer, range(2))
    weights = [layer.weight.double() + (layer.factors()[1] @ layer.factors()[0]).double() for layer in net[:2]]
    on_step(net, step=2, optimizer=optimizer)
    drawn = set()
    for i, (layer, W) in enumerate(zip(net[:2], weights, strict=True)):
        directions = draw_directions(SubspacePolicy(resample_every=2, seed=5), 3, 9, 1, i)
        drawn.add(tuple(directions))
        A, B = layer.factors()
        U, S, V = torch.linalg.svd(W, full_matrices=False)
        torch.testing.assert_close(
            (B @ A).double(), U[:, directions] * S[directions] @ V[directions], rtol=0, atol=1e-4
        )
        torch.testing.assert_close(B.T @ B, torch.eye(3), rtol=0, atol=1e-5)
    assert len(drawn) == 2
    other = model(seed=6)
    assert not torch.equal(other[0].factors()[0], model(seed=5)[0].factors()[0])


def test_micro_batches_past_the_first_never_draw():
    net = model()
    on_step(net, step=2, micro=1, optimizer=adam(net))
    assert phases(net) == [0, 0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_forgets_the_factors_and_nothing_else(name):
    net = model()
    net[2].weight.register_hook(lambda g: g + 1)
    optimizer = OPTIMIZERS[name](trained_parameters(net))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    initial = copy.deepcopy(optimizer.state_dict()["state"])
    train(net, optimizer, range(2))
    scheduler.step()
    for p in trained_parameters(net):
        p.grad = torch.ones_like(p)
    factors = [p for layer in net[:2] for p in layer.factors()]
    before = {id(p): {k: copy.copy(v) for k, v in optimizer.state[p].items()} for p in trained_parameters(net)}
    rate, identities = optimizer.param_groups[0]["lr"], [id(p) for p in trained_parameters(net)]
    on_step(net, step=2, optimizer=optimizer)
    assert [id(p) for p in trained_parameters(net)] == identities and optimizer.param_groups[0]["lr"] == rate
    for i, p in enumerate(trained_parameters(net)):
        if any(p is f for f in factors):
            assert p.grad is None
            state = optimizer.state[p]
            if name == "Adagrad":
                assert state["step"] == 0 and torch.equal(state["sum"], torch.full_like(p, 0.1))
                assert state.keys() == initial[i].keys()
            else:
                assert not state
        else:
            assert p.grad is not None
            assert all(
                torch.equal(torch.as_tensor(v), torch.as_tensor(optimizer.state[p][k]))
                for k, v in before[id(p)].items()
            )
    # The next step is that of an optimizer that has never seen the factors.
    fresh_net = copy.deepcopy(net)
    fresh = OPTIMIZERS[name](trained_parameters(fresh_net))
    fresh.param_groups[0]["lr"] = rate
    for each, opt in ((net, optimizer), (fresh_net, fresh)):
        opt.zero_grad()
        backward(each, 2)
        opt.step()
    for mine, theirs in zip(net[:2], fresh_net[:2], strict=True):
        for p, q in zip(mine.factors(), theirs.factors(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_lbfgs_forgets_its_history_which_is_of_all_parameters():
    def closure(optimizer, each):
        def compute():
            optimizer.zero_grad()
            loss = each(x).square().mean()
            loss.backward()
            return loss

        return compute

    def lbfgs(each):
        # Its state is that of the first parameter, here none of ROSA's.
        return torch.optim.LBFGS(reversed(trained_parameters(each)), lr=0.1, max_iter=3)

    x, net = torch.randn(8, 12), model()
    optimizer = lbfgs(net)
    for step in range(2):
        on_step(net, step=step, optimizer=optimizer)
        optimizer.step(closure(optimizer, net))
    assert optimizer.state[net[2].bias]["old_dirs"]
    on_step(net, step=2, optimizer=optimizer)
    assert not optimizer.state
    fresh_net = copy.deepcopy(net)
    fresh = lbfgs(fresh_net)
    for each, opt in ((net, optimizer), (fresh_net, fresh)):
        opt.step(closure(opt, each))
    assert equal(snapshot(net), snapshot(fresh_net))


def test_a_draw_between_forward_and_backward_is_autograds_error():
    net = model()
    loss = net(torch.randn(8, 12)).square().sum()
    on_step(net, step=2, optimizer=adam(net))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    backward(net, 2)


class Wrapped(torch.optim.Optimizer):
    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.state, self.param_groups = {}, []


def test_a_wrapped_optimizer_is_reset():
    net = model()
    optimizer = adam(net)
    train(net, optimizer, range(2))
    assert all(optimizer.state[p] for p in net[0].factors())
    on_step(net, step=2, optimizer=Wrapped(Wrapped(optimizer)))
    assert not any(optimizer.state[p] for p in net[0].factors()) and optimizer.state[net[2].weight]


def test_refusals_come_before_anything_is_changed():
    net = model()
    optimizer = adam(net)
    train(net, optimizer, range(2))
    before = snapshot(net)
    with pytest.raises(ValueError, match="pass optimizer= to on_step"):
        on_step(net, step=2)
    with pytest.raises(ValueError, match="not among the optimizer's"):
        on_step(net, step=2, optimizer=adam(net[:1]))
    net[1].merge()
    merged = snapshot(net)
    with pytest.raises(ValueError, match="merged into the base weights"):
        on_step(net, step=2, optimizer=optimizer)
    assert equal(snapshot(net), merged)
    net[1].unmerge()
    assert equal(snapshot(net), before) and phases(net) == [0, 0]
    on_step(net, step=1)
    on_step(net, step=2, optimizer=optimizer)
    assert phases(net) == [1, 1]


@pytest.mark.parametrize("step", [0, 1])
def test_a_foreign_optimizer_is_refused_at_the_first_call(step):
    """At step 0, and where a run is resumed; not an epoch later, when a draw is due."""
    net = model()
    before = snapshot(net)
    flat = torch.optim.SGD([nn.Parameter(torch.cat([p.flatten() for p in trained_parameters(net)]))], lr=0.1)
    for optimizer in (flat, adam(net[:1])):
        with pytest.raises(ValueError, match=r"not among the optimizer's.*flattened"):
            on_step(model(), step=step, optimizer=optimizer)
    on_step(net, step=step, optimizer=adam(net))
    for p in net[1].parameters():
        p.requires_grad_(False)
    on_step(net, step=0, optimizer=adam(net[:1]))
    assert equal(snapshot(net), before)


def test_frozen_factors_are_left_alone():
    net = model()
    for p in net[0].factors():
        p.requires_grad_(False)
    on_step(net, step=2, optimizer=adam(net))
    assert phases(net) == [0, 1]
    for p in net.parameters():
        p.requires_grad_(False)
    on_step(net, step=4)
    assert phases(net) == [0, 1]


def test_skipped_phases_are_not_made_up_for():
    net = model()
    on_step(net, step=9, optimizer=adam(net))
    assert phases(net) == [4, 4]
    A, B = split_weight(net[0].weight + net[0].factors()[1] @ net[0].factors()[0], 3, net[0].rosa_state.policy, 4, 0)
    torch.testing.assert_close(net[0].factors()[1] @ net[0].factors()[0], B @ A, rtol=0, atol=1e-4)


@pytest.mark.parametrize("every", [2, "epoch"])
@pytest.mark.parametrize("at", [3, 4])
def test_a_resumed_run_equals_the_straight_one_bit_for_bit(at, every):
    """Stopped within a phase, and right before a draw."""

    def run(net, optimizer, steps):
        for step in steps:
            train(net, optimizer, [step], micros=2, epoch=step // 2)

    straight = model(every)
    optimizer = adam(straight)
    run(straight, optimizer, range(at))
    saved = copy.deepcopy(straight.state_dict()), copy.deepcopy(optimizer.state_dict())
    run(straight, optimizer, range(at, 9))

    resumed = model(every)
    optimizer_of_resumed = adam(resumed)
    resumed.load_state_dict(saved[0])
    optimizer_of_resumed.load_state_dict(saved[1])
    # As the Trainer's callback does before the first step.
    on_step(resumed, step=at, epoch=at // 2, optimizer=optimizer_of_resumed)
    run(resumed, optimizer_of_resumed, range(at, 9))
    assert phases(straight) == phases(resumed) == [4, 4]
    assert equal(snapshot(straight), snapshot(resumed))


def test_another_run_goes_on_from_the_phase_it_finds():
    net = model()
    train(net, adam(net), range(5))
    assert phases(net) == [2, 2]
    saved = copy.deepcopy(net.state_dict())
    again = model()
    again.load_state_dict(saved)
    optimizer = adam(again)
    seen = []
    for step in range(5):
        on_step(again, step=step, optimizer=optimizer)
        on_step(again, step=step, optimizer=optimizer)
        seen.append(phases(again)[0])
        backward(again, step)
        optimizer.step()
        optimizer.zero_grad()
    assert seen == [2, 2, 3, 3, 4]
    # Resumed in the middle of that second run.
    third = model()
    third.load_state_dict(again.state_dict())
    on_step(third, step=5, optimizer=adam(third))
    assert phases(third) == [4, 4]
    on_step(third, step=6, optimizer=adam(third))
    assert phases(third) == [5, 5]


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_a_run_goes_on_from_its_phase_whatever_its_first_epoch(epoch):
    """Loops that count epochs from 1, and those that go on counting where the run before ended."""
    net = model("epoch")
    optimizer, seen = adam(net), []

    def steps(net, optimizer, first, last):
        for step in range(first, last):
            for _ in range(2):  # as at the start of a Trainer's run
                on_step(net, step=step, epoch=epoch + step // 2, optimizer=optimizer)
            backward(net, step)
            optimizer.step()
            seen.append(phases(net)[0])

    steps(net, optimizer, 0, 6)
    assert seen == [0, 0, 1, 1, 2, 2]
    again = model("epoch")
    again.load_state_dict(net.state_dict())
    seen.clear()
    steps(again, adam(again), 0, 5)
    assert seen == [2, 2, 3, 3, 4]
    # Resumed in the middle of that run.
    third = model("epoch")
    third.load_state_dict(again.state_dict())
    seen.clear()
    steps(third, adam(third), 5, 7)
    assert seen == [4, 5]


@pytest.mark.parametrize("split", ["us_v", "sqrt"])
def test_training_by_subspaces_reaches_what_one_subspace_cannot(split):
    """A change of full rank, learned three directions at a time."""
    torch.manual_seed(0)
    losses = {}
    target = torch.randn(9, 12) / 3
    x = torch.randn(200, 12)
    for every in (10_000, 40):
        torch.manual_seed(1)
        net = nn.Sequential(
            RosaLinear.from_linear(nn.Linear(12, 9, bias=False), r=3, resample_every=every, split=split)
        )
        y = x @ (net[0].weight + net[0].factors()[1] @ net[0].factors()[0] + target).detach().T
        optimizer = torch.optim.AdamW(decay_groups(net, 0.1), lr=0.02)
        for step in range(600):
            on_step(net, step=step, optimizer=optimizer)
            loss = (net(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses[every] = loss.item()
    assert losses[40] < 0.05 * losses[10_000]


def test_choices_name_what_processes_must_agree_on():
    nets = [model(), model(), model(seed=1)]
    a, b, c = ([member.choices() for layer in net[:2] for member in layer.schedule_members()] for net in nets)
    assert a == b != c
    nets[1][0].resample(1)
    assert a != [member.choices() for layer in nets[1][:2] for member in layer.schedule_members()]
