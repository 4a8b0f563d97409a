import copy
import math
from unittest import mock

import pytest
import torch
from torch import nn

from peft_fused.layers import AfLoraLinear, DyLoraLinear, FreezingPolicy
from peft_fused.methods import freezing_fraction, freezing_history, on_step

SIZES = ((6, 5), (5, 7), (7, 6))
R = 2


def model(sizes=SIZES, **options):
    torch.manual_seed(0)
    defaults = dict(t_i=2, t_f=0.25, window=4)
    layers = [AfLoraLinear.from_linear(nn.Linear(*size), r=R, **{**defaults, **options}) for size in sizes]
    for layer in layers:
        nn.init.normal_(layer.lora_b)
    return nn.Sequential(*layers)


def trainable(net):
    return [p for p in net.parameters() if p.requires_grad]


def matrices(net):
    """{(layer, "A" or "B"): parameter}"""
    return {(i, m): getattr(layer, f"lora_{m}") for i, layer in enumerate(net) for m in "AB"}


def gradient(step, layer, matrix, shape):
    """One of its own for every step and matrix: steady for A, in bursts for B, whose |gradient| is less on average."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(step * 100 + layer * 10 + "AB".index(matrix)))
    if matrix == "A":
        return 1.0 + layer / 8 + 0.01 * noise
    return (3.0 + layer / 8) * noise * ((step // 4 + layer) % 3 == 0)


def drive(net, total, steps=None, start=0, optimizer=None, grad=gradient, before=lambda step: None):
    optimizer = optimizer or torch.optim.SGD(trainable(net), lr=0.0)
    for step in range(start, total if steps is None else start + steps):
        on_step(net, step=step, total_steps=total, optimizer=optimizer)
        for (i, m), p in matrices(net).items():
            if p.requires_grad:
                p.grad = grad(step, i, m, p.shape)
        before(step)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def alive(net):
    return {key for key, p in matrices(net).items() if p.requires_grad}


# ----------------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(
    ("ramp", "share"), [("cubic", lambda x: 1 - (1 - x) ** 3), ("quadratic", lambda x: 1 - (1 - x**2))]
)
@pytest.mark.parametrize(("t_i", "t_f"), [(0.1, 0.5), (20, 100), (0.1, 100), (0, 0), (0.0, 1.0), (60, 140)])
def test_freezing_fraction_is_the_formula(ramp, share, t_i, t_f):
    policy, total = FreezingPolicy(t_i=t_i, t_f=t_f, ramp=ramp), 200
    start = t_i * total if isinstance(t_i, float) else t_i
    final = t_f * total if isinstance(t_f, float) else t_f
    fractions = [freezing_fraction(policy, t, total) for t in range(total)]
    for t, fraction in enumerate(fractions):
        if t <= start:
            expected = 0
        elif t > total - final:
            expected = 1
        else:
            expected = share((t - start) / (total - start - final))
        assert fraction == pytest.approx(expected, abs=1e-12)
    assert fractions == sorted(fractions) and fractions[0] == 0.0
    if final:
        assert fractions[-1] == 1.0


def test_trainable_parameters_averaged_over_the_papers_runs():
    """DeBERTaV3-base, r = 4: 138.3k over 10 epochs and 124.6k over 20, of which 83,232 in the vectors."""
    d, ffn, layers, r = 768, 3072, 12, 4
    in_ffn = layers * 2 * (d * r + ffn * r)
    vectors = layers * (6 * r + 4 * d + ffn + d)
    assert (in_ffn, vectors) == (368640, 83232)
    policy = FreezingPolicy(t_i=100, t_f=0.7)  # an epoch of 100 steps
    for epochs, expected in ((10, 138344), (20, 124612)):
        total = 100 * epochs
        shares = [1 - freezing_fraction(policy, t, total) for t in range(1, total + 1)]
        assert round(vectors + in_ffn * sum(shares) / total) == expected


def test_the_ends_of_the_run_are_exact():
    policy = FreezingPolicy(t_i=39, t_f=0.7)  # RTE in the paper: 20 epochs of 39 steps
    assert freezing_fraction(policy, 39, 780) == 0.0 < freezing_fraction(policy, 40, 780)
    assert freezing_fraction(policy, 233, 780) < 1.0 == freezing_fraction(policy, 235, 780)


@pytest.mark.parametrize(("t_i", "t_f"), [(60, 0.5), (0.5, 60), (50, 51)])
def test_a_run_too_short_is_named(t_i, t_f):
    with pytest.raises(ValueError, match=r"t_i \+ t_f must be at most total_steps = 100, got t_i="):
        freezing_fraction(FreezingPolicy(t_i=t_i, t_f=t_f), 3, 100)
    net = model(t_i=t_i, t_f=t_f)
    with pytest.raises(ValueError, match="at most total_steps = 100"):
        on_step(net, step=0, total_steps=100, optimizer=torch.optim.SGD(trainable(net)))


# ------------------------------------------------------------------------------------------------------------- scores


def statistics_in_double(steps, window, beta1, beta2, key, shape, grad=gradient):
    """(sum of the window, mean, change) after that many steps, as the recursion is written."""
    mean = change = torch.zeros(shape, dtype=torch.float64)
    seen = []
    for step in range(steps):
        if step % window == 0 and seen:
            I = torch.stack(seen).mean(0)  # noqa: E741
            mean = beta1 * mean + (1 - beta1) * I
            change = beta2 * change + (1 - beta2) * (I - mean).abs()
            seen = []
        g = grad(step, *key, shape)
        seen.append(torch.zeros(shape, dtype=torch.float64) if g is None else g.double().abs())
    return torch.stack(seen).sum(0), mean, change


@pytest.mark.parametrize("steps", [1, 4, 5, 11, 23])
def test_statistics_are_the_recursion(steps):
    net = model(t_i=1000, t_f=0, beta1=0.7, beta2=0.9)
    drive(net, 2000, steps)
    for (i, m), p in matrices(net).items():
        state = net[i].freezing
        truth = statistics_in_double(steps, 4, 0.7, 0.9, (i, m), p.shape)
        for found, expected in zip(state.kept[m], truth, strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-12)
        assert state.gradients == (steps - 1) % 4 + 1


def test_a_matrix_without_a_gradient_has_the_gradient_zero():
    def grad(step, i, m, shape):
        return None if (i, m) == (1, "A") and step % 3 else gradient(step, i, m, shape)

    net = model(t_i=1000, t_f=0)
    drive(net, 2000, 11, grad=grad)
    truth = statistics_in_double(11, 4, 0.85, 0.95, (1, "A"), net[1].lora_A.shape, grad)
    for found, expected in zip(net[1].freezing.kept["A"], truth, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-12)


def test_a_step_that_is_skipped_does_not_count():
    """As a loss scaler skips it: on_step is called, the optimizer is not."""
    net, other = model(t_i=1000, t_f=0), model(t_i=1000, t_f=0)
    drive(net, 2000, 6)
    optimizer = torch.optim.SGD(trainable(other), lr=0.0)
    drive(other, 2000, 3, optimizer=optimizer)
    on_step(other, step=3, total_steps=2000, optimizer=optimizer)
    assert other[0].freezing.gradients == 3
    drive(other, 2000, 2, start=4, optimizer=optimizer)
    assert other[0].freezing.gradients == 2
    I = torch.stack([gradient(s, 0, "A", (R, 6)).abs() for s in range(3)]).mean(0)  # noqa: E741
    torch.testing.assert_close(other[0].freezing.kept["A"][1], 0.15 * I)
    assert not torch.equal(other[0].freezing.kept["A"][1], net[0].freezing.kept["A"][1])


def test_accumulated_gradients_enter_once():
    net = model(t_i=1000, t_f=0)
    optimizer = torch.optim.SGD(trainable(net), lr=0.0)
    x = torch.randn(2, 4, 6)
    for micro in range(2):
        on_step(net, step=0, micro=micro, total_steps=2000, optimizer=optimizer)
        net(x[micro]).square().sum().backward()
    expected = {key: p.grad.abs() for key, p in matrices(net).items()}
    optimizer.step()
    for (i, m), grad in expected.items():
        assert net[i].freezing.gradients == 1 and grad.any()
        torch.testing.assert_close(net[i].freezing.kept[m][0], grad)


# ---------------------------------------------------------------------------------------------------------- decisions


def statistics_of(net, step, keys):
    """[(key, (mean, change))] as they are when a step's decision falls."""
    p = net[0].freezing.policy
    shapes = {key: matrices(net)[key].shape for key in sorted(keys)}
    return [(k, statistics_in_double(step + 1, p.window, p.beta1, p.beta2, k, shapes[k])[1:]) for k in shapes]


def test_the_paper_rule_freezes_the_least_scores_in_step_with_the_ramp():
    net, total, left, checked, otherwise = model(t_i=20), 80, [], 0, 0
    keys = list(matrices(net))

    def before(step):
        left.append(alive(net))

    drive(net, total, before=before)
    left.append(alive(net))
    policy = net[0].freezing.policy
    for step in range(total):
        share = freezing_fraction(policy, step, total)
        decides = share == 1 or (share > 0 and step % 4 == 0)
        wanted = math.floor(share * len(keys)) if decides else len(keys) - len(left[step])
        gone = left[step] - left[step + 1]
        assert len(left[step + 1]) == len(keys) - wanted and left[step + 1] <= left[step]
        if gone and share < 1:
            statistics = statistics_of(net, step, left[step])
            for score in ("product", "mean"):
                by = {key: (mean * change if score == "product" else mean).mean() for key, (mean, change) in statistics}
                least = max(by[key] for key in gone) < min(by[key] for key in left[step + 1])
                assert least or score == "mean"
                otherwise += not least
            checked += 1
    # By mean |gradient| alone, or another mutation of the score, the choice is another one.
    assert checked >= 3 and otherwise and len(left[60]) == 1 and not left[61]


def test_the_code_rule_freezes_what_is_below_the_quantile_of_the_elements():
    net, total, left, gone_at = model(rule="code"), 80, [], []
    drive(net, total, before=lambda step: left.append(alive(net)))
    left.append(alive(net))
    policy = net[0].freezing.policy
    for step in range(total):
        share = freezing_fraction(policy, step, total)
        expected = set()
        if share == 1:
            expected = left[step]
        elif share > 0 and step % 4 == 0 and left[step]:
            scores = {key: mean * change for key, (mean, change) in statistics_of(net, step, left[step])}
            elements = sorted(torch.cat([s.flatten() for s in scores.values()]).tolist())
            nth = int(share * len(elements))
            expected = {key for key, s in scores.items() if nth and s.mean().item() < elements[nth - 1]}
        assert left[step] - left[step + 1] == expected
        if expected:
            gone_at.append((step, len(expected)))
    # Not the paper's rule: everything is gone before its ramp ends, several at a time.
    assert not left[-1] and gone_at[-1][0] < 50 and max(count for _, count in gone_at) > 1


def test_ties_are_broken_by_order():
    net = model(t_i=0, t_f=0.0)
    zero = lambda step, i, m, shape: torch.zeros(shape)  # noqa: E731
    drive(net, 400, 60, grad=zero)
    steps = [at for layer in net for at in layer.freezing.frozen_at.values()]
    frozen = [at for at in steps if at > 0]
    assert len(frozen) == 2 and steps[:2] == frozen == sorted(frozen)


def test_only_decisions_synchronise_with_the_host_and_only_once():
    net, total = model(), 80
    reads = []

    def counting(original):
        def read(tensor, *args):
            reads.append(original.__name__)
            return original(tensor, *args)

        return read

    optimizer = torch.optim.SGD(trainable(net), lr=0.0)
    policy = net[0].freezing.policy
    for step in range(total):
        reads.clear()
        frozen = len(alive(net))
        patches = [mock.patch.object(torch.Tensor, n, counting(getattr(torch.Tensor, n))) for n in ("tolist", "item")]
        with patches[0], patches[1]:
            drive(net, total, 1, start=step, optimizer=optimizer)
        share = freezing_fraction(policy, step, total)
        decides = 0 < share < 1 and step % 4 == 0
        changed = frozen - len(alive(net))
        assert len(reads) == 1 if decides and changed else len(reads) <= decides


# ---------------------------------------------------------------------------------------------------------- freezing


@pytest.mark.parametrize("optimizer_cls", [torch.optim.AdamW, torch.optim.SGD])
def test_what_is_frozen_never_moves_again_and_leaves_nothing_behind(optimizer_cls):
    net = model(t_f=0.5)
    momentum = {"momentum": 0.9} if optimizer_cls is torch.optim.SGD else {}
    optimizer = optimizer_cls(trainable(net), lr=1e-2, weight_decay=0.1, **momentum)
    values, x = {}, torch.randn(8, 6)
    for step in range(80):
        on_step(net, step=step, total_steps=80, optimizer=optimizer)
        vectors = [p.detach().clone() for layer in net for p in (layer.lora_d, layer.lora_b)]
        net(x).square().sum().backward()
        optimizer.step()
        for (i, m), p in matrices(net).items():
            if p.requires_grad:
                assert optimizer.state[p]
                continue
            assert p.grad is None and p not in optimizer.state
            assert all(p is not q for group in optimizer.param_groups for q in group["params"])
            assert m not in net[i].freezing.kept
            assert torch.equal(values.setdefault((i, m), p.detach().clone()), p)
        now = [p for layer in net for p in (layer.lora_d, layer.lora_b)]
        assert all(not torch.equal(a, b) for a, b in zip(vectors, now, strict=True))
        optimizer.zero_grad()
    assert len(values) == 6


def test_the_step_at_which_it_is_frozen_is_still_made():
    net = model(t_i=0, t_f=1.0)
    before = {key: p.detach().clone() for key, p in matrices(net).items()}
    drive(net, 10, 3, optimizer=torch.optim.SGD(trainable(net), lr=1.0))
    for (i, m), p in matrices(net).items():
        torch.testing.assert_close(p, before[i, m] - gradient(0, i, m, p.shape) - gradient(1, i, m, p.shape))
        assert net[i].freezing.frozen_at[m] == 2


def test_a_thaw_by_hand_lasts_until_the_next_step():
    net = model(t_i=0, t_f=1.0)
    optimizer = drive(net, 10, 3)
    net.requires_grad_(True)
    on_step(net, step=3, total_steps=10, optimizer=optimizer)
    assert not alive(net) and all(layer.lora_d.requires_grad for layer in net)


def test_frozen_from_the_start_is_outside_the_schedule():
    net = model()
    for name in "AB":
        net[1].freezing.frozen_at[name] = 0
        getattr(net[1], f"lora_{name}").requires_grad_(False)
    drive(net, 80)
    assert net[1].freezing.frozen_at == {"A": 0, "B": 0}
    steps = sorted(at for i in (0, 2) for at in net[i].freezing.frozen_at.values())
    expected = []
    for step in range(80):  # four matrices, not six, are shared out over the ramp
        share = freezing_fraction(net[0].freezing.policy, step, 80)
        if share == 1 or (share > 0 and step % 4 == 0):
            expected += [step + 1] * (math.floor(share * 4) - len(expected))
    assert steps == expected


def test_adapters_that_do_not_train_keep_their_state():
    net = model()
    net.requires_grad_(False)
    assert on_step(net, step=5) == 3  # neither total_steps nor an optimizer is asked for
    drive(net, 20, optimizer=torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.0))
    assert all(layer.freezing.frozen_at == {"A": -1, "B": -1} for layer in net)
    assert not any(layer.lora_A.requires_grad for layer in net)


def test_policies_have_schedules_of_their_own():
    early, late = model(t_i=0, t_f=1.0)[:1], model(t_i=1.0, t_f=0.0)[1:]
    net = nn.Sequential(*early, *late)
    drive(net, 40)
    assert alive(net) == {(1, "A"), (1, "B"), (2, "A"), (2, "B")}


@pytest.mark.parametrize("rule", ["paper", "code"])
@pytest.mark.parametrize("at", [6, 18, 31])
def test_a_resumed_run_equals_the_straight_one(at, rule):
    x = torch.randn(40, 8, 6)

    def run(net, optimizer, start, stop):
        for step in range(start, stop):
            on_step(net, step=step, total_steps=40, optimizer=optimizer)
            (net(x[step]) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh():
        return model(t_f=0.3, window=3, rule=rule)

    def adam(net):
        return torch.optim.AdamW(trainable(net), lr=1e-2, weight_decay=0.1)

    straight = fresh()
    optimizer = adam(straight)
    run(straight, optimizer, 0, at)
    stored = copy.deepcopy((straight.state_dict(), optimizer.state_dict()))
    run(straight, optimizer, at, 40)

    resumed = fresh()
    resumed.load_state_dict(stored[0])
    optimizer = adam(resumed)
    optimizer.load_state_dict(stored[1])
    run(resumed, optimizer, at, 40)
    a, b = straight.state_dict(), resumed.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert freezing_history(straight) == freezing_history(resumed)
    assert len({freezing.step for freezing in freezing_history(straight)}) > 1


# ------------------------------------------------------------------------------------------------- what does not work


def test_half_precision_adapters_have_statistics_in_fp32():
    net = nn.Sequential(AfLoraLinear.from_linear(nn.Linear(6, 5).bfloat16(), dtype=torch.bfloat16, t_i=99, t_f=0))
    assert net[0].lora_A.dtype == torch.bfloat16
    drive(net, 200, 3, grad=lambda step, i, m, shape: torch.full(shape, [256.0, 1.0, 1.0][step]).bfloat16())
    assert net[0].freezing.kept["A"][0].eq(258.0).all()  # in bf16 it stays 256
    drive(net, 200, 12, start=3, grad=lambda *a: gradient(*a).bfloat16())
    assert net[0].freezing.kept["A"][1].any() and net[0].freezing.kept["A"][1].dtype == torch.float32


def test_what_the_schedule_needs_is_asked_for():
    net = model()
    optimizer = torch.optim.SGD(trainable(net))
    with pytest.raises(ValueError, match="pass total_steps= to on_step"):
        on_step(net, step=0, optimizer=optimizer)
    with pytest.raises(ValueError, match="pass optimizer= to on_step"):
        on_step(net, step=0, total_steps=10)
    other = torch.optim.SGD([net[0].lora_b])
    with pytest.raises(ValueError, match="not among the optimizer's"):
        on_step(net, step=0, total_steps=10, optimizer=other)
    assert not net[0].freezing.scheduled and len(alive(net)) == 6


@pytest.mark.parametrize(
    "options", [{}, {"find_unused_parameters": True}, {"find_unused_parameters": True, "static_graph": True}]
)
def test_distributed_data_parallel_has_to_find_unused_parameters(options):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        net = model(t_f=0.5)
        wrapped = nn.parallel.DistributedDataParallel(net, **options)
        optimizer = torch.optim.SGD(trainable(net), lr=1e-3)
        if options.keys() != {"find_unused_parameters"}:
            with pytest.raises(ValueError, match="find_unused_parameters=True"):
                on_step(wrapped, step=0, total_steps=40, optimizer=optimizer)
            return
        for step in range(40):
            on_step(wrapped, step=step, total_steps=40, optimizer=optimizer)
            wrapped(torch.randn(4, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not alive(net)
    finally:
        torch.distributed.destroy_process_group()


def test_sharded_parameters_choose_as_whole_ones_do():
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        runs = []
        for sharded in (False, True):
            net, x = model(t_f=0.3), torch.randn(40, 8, 6, generator=torch.Generator().manual_seed(1))
            if sharded:
                for layer in net:
                    fully_shard(layer, mesh=mesh)
                fully_shard(net, mesh=mesh)
            optimizer = torch.optim.AdamW(trainable(net), lr=1e-2)
            for step in range(40):
                on_step(net, step=step, total_steps=40, optimizer=optimizer)
                net(x[step]).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                if sharded and step == 3:
                    assert net[0].lora_A.full_tensor().shape == (R, 6)
                    assert hasattr(net[0].freezing.kept["A"][0], "full_tensor")
                    state = net.state_dict()["0.freezing._extra_state"]
                    assert not hasattr(state, "full_tensor") and state[5:].any()
            runs.append((freezing_history(net), [getattr(p, "full_tensor", lambda p=p: p)() for p in net.parameters()]))
        (history, a), (sharded_history, b) = runs
        assert history == sharded_history and len({freezing.step for freezing in history}) > 2
        for ours, plain in zip(b, a, strict=True):
            torch.testing.assert_close(ours, plain)
        net = model(rule="code")
        fully_shard(net, mesh=mesh)
        with pytest.raises(ValueError, match="rule must be 'paper' for sharded parameters"):
            on_step(net, step=0, total_steps=40, optimizer=torch.optim.SGD(trainable(net)))
    finally:
        torch.distributed.destroy_process_group()


def test_history():
    net = model(t_f=0.5)
    assert [tuple(f) for f in freezing_history(net)] == [(str(i), m, None) for i in range(3) for m in "AB"]
    drive(net, 80)
    history = freezing_history(net, adapter_name="default")
    assert [f.step for f in history] == [at for layer in net for at in layer.freezing.frozen_at.values()]
    assert all(f.step > 0 for f in history)
    with pytest.raises(ValueError, match=r"adapter_name must be one of \['default'\], got 'other'"):
        freezing_history(net, adapter_name="other")
    with pytest.raises(ValueError, match="no AFLoRA layers"):
        freezing_history(DyLoraLinear.from_linear(nn.Linear(4, 4)))
    with pytest.raises(TypeError, match=r"model must be a torch\.nn.Module, got str"):
        freezing_history("model")


# ------------------------------------------------------------------------------------------------------- loss scaling


class FusedUnderScaler(torch.optim.SGD):
    """What GradScaler makes of a fused optimizer: it is stepped in any case, and told what it has to do itself."""

    found_inf = grad_scale = None

    def step(self, closure=None):
        pass


@pytest.mark.parametrize("rule", ["paper", "code"])
def test_scaled_and_skipped_steps_of_a_fused_optimizer_change_no_score(rule):
    plain = model(rule=rule)
    drive(plain, 40)
    net = model(rule=rule)
    optimizer = FusedUnderScaler(trainable(net), lr=0.1)
    attempt = step = 0
    while step < 40:
        on_step(net, step=step, total_steps=40, optimizer=optimizer)
        overflow = attempt % 5 == 2
        scale = 2.0**14 if step < 20 else 2.0**10
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(float(overflow)), torch.tensor(scale)
        for (i, m), p in matrices(net).items():
            if p.requires_grad:
                p.grad = gradient(step, i, m, p.shape) * (math.inf if overflow else scale)
        optimizer.step()
        optimizer.zero_grad()
        attempt, step = attempt + 1, step + (not overflow)
    assert freezing_history(net) == freezing_history(plain)
    assert len({at for _, _, at in freezing_history(net)}) > 1


def test_a_state_that_brings_back_what_the_optimizer_was_relieved_of_is_told():
    net = model()
    optimizer = drive(net, 40, steps=3)
    early = copy.deepcopy(net.state_dict())
    drive(net, 40, steps=30, start=3, optimizer=optimizer)
    assert len(alive(net)) < 6
    net.load_state_dict(early)
    assert len(alive(net)) == 6
    with pytest.raises(ValueError, match="not among the optimizer's"):
        on_step(net, step=3, total_steps=40, optimizer=optimizer)


def test_statistics_that_are_not_finite_are_refused():
    net = model()
    drive(net, 40, steps=9)
    state = net.state_dict()
    state["0.freezing._extra_state"][5] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        model().load_state_dict(state)
