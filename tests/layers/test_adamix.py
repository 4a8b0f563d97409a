import copy
import io
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_fused.layers import AdaMixAdapter, AdaMixLinear, RoutePolicy
from peft_fused.layers.adamix.routes import write_eval_routes, write_routes
from peft_fused.layers.scheduled import FORWARDS_BEFORE_WARNING
from peft_fused.methods import on_step, set_adamix_pass, set_adamix_routing

K, N, R, E = 12, 9, 4, 3
CPU = torch.device("cpu")


def make(kind="adapter", dtype=torch.float64, **options):
    torch.manual_seed(0)
    options = {"share_up": False, **options}
    layer = AdaMixLinear.from_linear(nn.Linear(K, N, dtype=dtype), kind=kind, r=R, num_experts=E, alpha=6, **options)
    layer.block.randomize()
    if layer.block.up.bias is not None:
        for bias in (layer.block.down.bias, layer.block.up.bias):
            nn.init.normal_(bias)
    return layer


def route(layer, down, up, second=(0, 0)):
    write_routes([layer.block.routes], [((down, second[0]), (up, second[1]))])


def formula(layer, x, down, up):
    """Written from the paper's equations, for one expert of each side."""
    block = layer.block
    D, U = block.down.weight, block.up.weight
    D, U = D[down] if D.dim() == 3 else D, U[up] if U.dim() == 3 else U
    y = x @ layer.weight.T + layer.bias
    if layer.additive:
        return y + (6 / R) * (x @ D.T) @ U.T
    b, c = block.down.bias, block.up.bias
    b, c = b[down] if b.dim() == 2 else b, c[up] if c.dim() == 2 else c
    return y + F.gelu(y @ D.T + b) @ U.T + c


@pytest.mark.parametrize("kind", ["adapter", "lora"])
@pytest.mark.parametrize("shares", [(False, False), (True, False), (False, True)])
def test_each_route_is_the_formula_with_its_experts_and_trains_them_alone(kind, shares):
    layer = make(kind, share_down=shares[0], share_up=shares[1])
    x = torch.randn(2, 5, K, dtype=torch.float64)
    for down, up in itertools.product(range(E), range(E)):
        route(layer, down, up)
        torch.testing.assert_close(layer(x), formula(layer, x, down, up))
        layer.zero_grad()
        layer(x).square().sum().backward()
        for stack, used in ((layer.block.down, down), (layer.block.up, up)):
            moved = stack.weight.grad.flatten(1 if stack.stacked else 0).any(-1).nonzero().flatten().tolist()
            assert moved == ([used] if stack.stacked else moved) and stack.weight.grad.any()


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_evaluation_averages_the_experts_as_they_are_now(kind):
    layer = make(kind).eval()
    x = torch.randn(5, K, dtype=torch.float64)

    def averaged():
        one = copy.deepcopy(layer)
        one.block.average_()
        return formula(one, x, 0, 0)

    for _ in range(2):  # a kept average would be stale the second time
        torch.testing.assert_close(layer(x), averaged())
        with torch.no_grad():
            for parameter in layer.block.parameters():
                parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("shares", [(True, False), (False, True)])
def test_the_average_of_a_shared_lora_is_the_mean_delta(shares):
    layer = make("lora", share_down=shares[0], share_up=shares[1])
    x = torch.randn(5, K, dtype=torch.float64)
    mean = torch.stack([formula(layer, x, e, e) for e in range(E)]).mean(0)
    torch.testing.assert_close(layer.eval()(x), mean)
    layer.merge()
    torch.testing.assert_close(layer(x), mean)
    layer.unmerge()
    both = make("lora")
    mean = torch.stack([formula(both, x, i, j) for i, j in itertools.product(range(E), range(E))]).mean(0)
    same = torch.stack([formula(both, x, e, e) for e in range(E)]).mean(0)
    torch.testing.assert_close(both.eval()(x), mean)  # of independent routes: the products of all pairs
    assert (both(x) - same).abs().max() > 0.1


def test_the_adapter_form_does_not_merge():
    with pytest.raises(ValueError, match="no dense delta"):
        make("adapter").merge()


@pytest.mark.parametrize("kind", ["adapter", "lora"])
@pytest.mark.parametrize("routing", ["batch", "sequence"])
def test_a_doubled_batch_is_two_passes(kind, routing):
    layer = make(kind, routing=routing)
    x = torch.randn(4, 5, K, dtype=torch.float64)
    on_step(layer, step=4)
    passes = []
    for index in (0, 1):
        set_adamix_pass(layer, index)
        passes.append(layer(x))
    set_adamix_pass(layer, None)
    torch.testing.assert_close(layer(torch.cat([x, x])), torch.cat(passes))
    assert (passes[0] - passes[1]).abs().max() > 0.01
    with pytest.raises(ValueError, match="divisible by 2"):
        layer(x[:3])


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_sequences_are_routed_one_by_one(kind):
    layer = make(kind, routing="sequence")
    x = torch.randn(40, 2, K, dtype=torch.float64)
    on_step(layer, step=0)
    down, up = layer.block.routes.experts(True, 40, CPU)
    expected = torch.stack([formula(layer, one, i, j) for one, i, j in zip(x, down, up, strict=True)])
    torch.testing.assert_close(layer(x), expected)
    counts = torch.bincount(down, minlength=E)
    assert down.dim() == 1 and counts.min() >= 5  # of 40 over 3
    assert not torch.equal(down, up)
    on_step(layer, step=1)
    assert not torch.equal(down, layer.block.routes.experts(True, 40, CPU)[0])


def test_processes_route_their_parts_of_a_batch_as_one_process_would():
    state = make(routing="sequence").block.routes
    on_step(layer := make(routing="sequence"), step=0)
    state = layer.block.routes
    whole = state.experts(True, 10, CPU)[0]
    parts = []
    for state.process in (0, 1):
        parts.append(state.experts(True, 5, CPU)[0])
    assert torch.equal(torch.cat(parts), whole)


def test_routes_follow_an_input_to_a_device_that_the_module_was_not_moved_to():
    """As FSDP and DataParallel do, which move parameters and buffers by themselves."""
    layer, x = make(), torch.randn(4, K, dtype=torch.float64)
    on_step(layer, step=2)
    expected = layer(x)
    routes = layer.block.routes
    routes.routes, routes.eval_routes = routes.routes.to("meta"), routes.eval_routes.to("meta")
    with torch.inference_mode():
        assert torch.equal(layer(x), expected)
    on_step(layer, step=3)
    assert torch.equal(routes.routes, torch.tensor(routes.values))


@pytest.mark.parametrize("kind", ["adapter", "lora"])
@pytest.mark.parametrize("routing", ["batch", "sequence"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("nested", [False, True], ids=["", "nested"])
@pytest.mark.parametrize("index", [0, 1, None])
def test_a_checkpointed_pass_is_repeated_with_its_own_routes(kind, routing, reentrant, nested, index):
    net = nn.Sequential(make(kind, routing=routing), nn.Tanh(), nn.Linear(N, K, dtype=torch.float64), make(kind))
    parameters = [p for p in net.parameters() if p.requires_grad]
    x = torch.randn(4, 3, K, dtype=torch.float64, requires_grad=True)

    def gradients(run):
        on_step(net, step=2)
        set_adamix_pass(net, index)
        loss = run(x).sin().sum()
        set_adamix_pass(net, 0)
        net.zero_grad()
        with ThreadPoolExecutor(1) as other:  # as backward runs on a GPU
            other.submit(loss.backward).result()
        return [parameter.grad for parameter in parameters]

    def inner(x):
        x = checkpoint(net[:2], x, use_reentrant=reentrant)
        return checkpoint(net[2:], x, use_reentrant=reentrant)

    plain = gradients(net)
    repeated = gradients(lambda x: checkpoint(inner if nested else net, x, use_reentrant=reentrant))
    assert all(torch.equal(a, b) for a, b in zip(plain, repeated, strict=True))
    on_step(net, step=2)
    routes = net[0].block.routes
    assert routes.values[0][0] != routes.values[0][1]  # or the test would show nothing


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_checkpointed_passes_are_refused(reentrant):
    layer = make()
    on_step(layer, step=0)
    x = torch.randn(4, K, dtype=torch.float64, requires_grad=True)
    first = checkpoint(layer, x, use_reentrant=reentrant)
    set_adamix_pass(layer, 1)
    second = checkpoint(layer, x, use_reentrant=reentrant)
    set_adamix_pass(layer, 0)
    with pytest.raises(RuntimeError, match="consistency_doubled"):
        (first + second).sum().backward()
    on_step(layer, step=1)
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
def test_new_routes_before_the_backward_of_a_checkpointed_pass_are_an_error(reentrant):
    layer = make()
    on_step(layer, step=0)
    x = torch.randn(4, K, dtype=torch.float64, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    on_step(layer, step=1)
    with pytest.raises(RuntimeError, match="before the backward"):
        y.sum().backward()


def test_the_block_starts_as_the_identity_and_experts_as_told():
    base = nn.Linear(K, N)
    x = torch.randn(3, K)
    for kind, init in itertools.product(("adapter", "lora"), ("independent", "identical")):
        layer = AdaMixLinear.from_linear(base, kind=kind, r=R, num_experts=E, expert_init=init)
        torch.testing.assert_close(layer(x), base(x))
        first, second = layer.block.down.weight[:2]
        assert torch.equal(first, second) == (init == "identical")
        assert layer.block.down.weight.shape == (E, R, N if kind == "adapter" else K)


def test_one_expert_is_a_plain_adapter():
    layer = AdaMixLinear.from_linear(nn.Linear(K, N), r=R, num_experts=1, share_up=False)
    assert layer.block.down.weight.shape == (R, N) and layer.block.up.weight.shape == (N, R)
    x = torch.randn(3, K)
    torch.testing.assert_close(layer(x), layer.eval()(x))


def test_random_evaluation_uses_the_draw_asked_for():
    layer = make().eval()
    x = torch.randn(3, K, dtype=torch.float64)
    merged, seen = layer(x), set()
    for index in range(8):
        set_adamix_routing(layer, "random", index=index)
        values = layer.block.routes.eval_values
        torch.testing.assert_close(layer(x), formula(layer, x, *values))
        seen.add(values)
    assert len(seen) > 2
    set_adamix_routing(layer, "merged")
    torch.testing.assert_close(layer(x), merged)


def test_compiles_once_for_all_routes():
    layer = make(dtype=torch.float32)
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = torch.randn(3, K)
    for down, up in itertools.product(range(E), range(E)):
        route(layer, down, up)
        torch.testing.assert_close(compiled(x), formula(layer, x, down, up))
    assert len(compilations) == 1


def test_routes_survive_copies_moves_and_casts():
    layer = make(dtype=torch.float32)
    on_step(layer, step=5)
    values = layer.block.routes.values
    moved = copy.deepcopy(layer).to(torch.bfloat16)
    assert moved.block.routes.values == values and moved.block.routes.routes.dtype == torch.int64
    assert torch.equal(moved.block.routes.routes, torch.tensor(values))
    meta = copy.deepcopy(layer).to("meta").to_empty(device="cpu")
    assert torch.equal(meta.block.routes.routes, torch.tensor(values))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.load(buffer, weights_only=False).block.routes.values == values
    assert not any("route" in key for key in layer.state_dict())


@pytest.mark.parametrize("strict", [False, True])
def test_unrouted_experts_move_by_momentum_unless_strict(strict):
    layer = make(strict_experts=strict)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(3, K, dtype=torch.float64)
    stray = 0
    for step in range(6):
        on_step(layer, step=step, optimizer=optimizer)
        before = layer.block.down.weight.detach().clone()
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = (layer.block.down.weight != before).flatten(1).any(1).nonzero().flatten().tolist()
        used = layer.block.routes.values[0][0]
        assert used in moved
        stray += moved != [used]
    assert stray == (0 if strict else stray) and (strict or stray > 0)
    if strict:
        with pytest.raises(ValueError, match="pass optimizer="):
            on_step(layer, step=9)


def test_training_without_a_schedule_warns():
    layer, alone = make(), AdaMixLinear.from_linear(nn.Linear(K, N), num_experts=1, share_up=False)
    x = torch.randn(1, K, dtype=torch.float64)
    for _ in range(FORWARDS_BEFORE_WARNING):
        layer(x)
        alone(x.float())  # has nothing to draw
    with pytest.warns(UserWarning, match="same experts.*PeftFusedCallback"):
        layer(x)


@pytest.mark.parametrize("kind", ["adapter", "lora"])
def test_explains_itself(kind):
    from peft_fused import explain

    layer = make(kind, dtype=torch.float32)
    text = str(explain(layer))
    assert ("lowrank_linear" if kind == "lora" else "F.linear, then bottleneck") in text
    set_adamix_pass(layer, None)
    assert "bottleneck" in str(explain(layer)) and "2 groups" in explain(layer).lines[0][1] + str(
        layer.explain_route(8)[2].describe()
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_experts": 0}, ValueError, "num_experts must be at least 1, got 0"),
        ({"num_experts": 2.0}, TypeError, "num_experts must be an int"),
        ({"num_experts": 2000}, ValueError, r"num_experts must be in 1\.\.1024"),
        ({"share_down": True}, ValueError, "share_down and share_up must not both be True with num_experts=4"),
        ({"share_down": 1}, TypeError, "share_down must be True or False"),
        ({"routing": "token"}, ValueError, "routing must be one of 'batch', 'sequence', got 'token'"),
        ({"strict_experts": True, "routing": "sequence"}, ValueError, "strict_experts needs routing='batch'"),
        ({"kind": "prefix"}, ValueError, "kind must be one of"),
        ({"activation": "softmax"}, ValueError, "activation must be one of 'gelu'"),
        ({"expert_init": "zero"}, ValueError, "expert_init must be one of"),
        ({"r": 0}, ValueError, r"r must be in 1\.\.256, got 0"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\)"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        AdaMixLinear.from_linear(nn.Linear(4, 4), **options)


def test_dropout_acts_in_training_only():
    block = AdaMixAdapter(8, 2, RoutePolicy(1), dropout=0.5)
    block.randomize()
    h = torch.randn(4, 8)
    assert not torch.equal(block(h), block(h))
    assert torch.equal(block.eval()(h), block(h))
    write_eval_routes([block.routes], [None])
