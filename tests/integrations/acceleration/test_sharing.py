"""Accelerated layers that receive the same tensor share one pass over it, and only where that changes nothing."""

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
import torch.utils.checkpoint
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel

import peft_fused
from peft_fused.integrations.peft.acceleration import accelerate, restore, sharing
from peft_fused.ops import native

from .accelerated import assert_same, error, llama, logits, randomise, results

NODES = [
    pytest.param(True, id="cpp", marks=pytest.mark.skipif(native.module is None, reason=native.why_missing or "-")),
    pytest.param(False, id="python"),
]
SUM = 3e-6  # of sums in another order, in fp32


class Attention(nn.Module):
    """q, k, v on one input, o on another of the same width; `between` is done to the input before k runs. An input
    that nothing has made gets a graph, as that of a layer in a model has one."""

    def __init__(self, dtype=torch.float32, width=24):
        super().__init__()
        for name, n in (("q", width), ("k", width // 2), ("v", width // 2), ("o", width)):
            setattr(self, name, nn.Linear(width, n, dtype=dtype))
        self.between = None

    def forward(self, x):
        if x.is_leaf and torch.is_grad_enabled():
            x = x * 1
        q = self.q(x)
        if self.between is not None:
            self.between(self, x)
        k, v = self.k(x), self.v(x)
        return self.o(torch.tanh(q * (k * v).repeat(*[1] * (x.dim() - 1), 2)))


def adapted(net=None, p=0.0, targets=("q", "k", "v", "o"), **kwargs):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=p, target_modules=list(targets), **kwargs)
    return randomise(get_peft_model(net or Attention(), config)).train()


def both(net=None, **kwargs):
    """(a model whose layers run alone, its copy whose layers share)."""
    alone = adapted(net, **kwargs)
    shares = copy.deepcopy(alone)
    accelerate(alone, group=False)
    accelerate(shares)
    return alone, shares


def attention(model):
    return next(module for module in model.modules() if isinstance(module, Attention))


def data(*shape, dtype=torch.float32, width=24):
    return torch.randn(*(shape or (2, 5)), width, generator=torch.Generator().manual_seed(1)).to(dtype)


def live(*shape, **kwargs):
    return data(*shape, **kwargs).requires_grad_()


@pytest.fixture
def passes(monkeypatch):
    """Number of factors of each shared pass that is taken."""
    taken, shared_shrink = [], sharing.shared_shrink

    def counted(x, factors, **kwargs):
        found = shared_shrink(x, factors, **kwargs)
        if found is not None:
            taken.append(len(factors))
        return found

    monkeypatch.setattr(sharing, "shared_shrink", counted)
    return taken


@pytest.fixture
def taken(monkeypatch):
    """Whether each offer that a layer looked at was of use to it."""
    found, give = [], sharing._Offer.give

    def given(offer, step, x):
        found.append(give(offer, step, x))
        assert found[-1] == (step.shared is not None)
        return found[-1]

    monkeypatch.setattr(sharing._Offer, "give", given)
    return found


def run(model, x, seed=3, forward=None):
    torch.manual_seed(seed)
    return results(model, x, forward)


# ------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("cpp", NODES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_changes_no_number(dtype, p, cpp, passes, taken):
    """Masks are those of layers that run alone; sums have another order."""
    alone, shares = both(Attention(dtype), p=p)
    x = data(3, 7, dtype=dtype)
    with peft_fused.use_backend(None, native=cpp):
        want = run(alone, x)
        assert_same(run(shares, x), want, tolerance=0)  # who shares is seen in the first forward
        assert passes == []
        for _ in range(2):
            got = run(shares, x)
            bound = {torch.float32: SUM, torch.bfloat16: 1.6e-2, torch.float64: 1e-14}[dtype]
            assert_same(got, want, bound)
    assert passes == [3, 3] and taken == [True] * 4


def test_bf16_is_no_less_exact_than_alone():
    alone, shares = both(Attention(torch.bfloat16))
    exact = copy.deepcopy(alone).double()
    x = data(64, dtype=torch.bfloat16)
    truth, mine = run(exact, x.double()), run(alone, x)
    run(shares, x)
    for name, tensor in run(shares, x).items():
        assert error(tensor, truth[name]) <= 1.3 * error(mine[name], truth[name]) + 2**-9, name


def test_a_llama(passes):
    model = randomise(get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear")))
    reference = copy.deepcopy(model)
    report = accelerate(model)
    assert [[name.rsplit(".", 1)[1] for name in group] for group in report.groups] == [
        ["q_proj", "k_proj", "v_proj", "o_proj"],
        ["gate_proj", "up_proj"],
    ] * 2
    assert "groups of siblings: 4 [base_model.model.model.layers.0.self_attn: q_proj, k_proj, v_proj, o_proj]" in str(
        report
    )
    x = torch.randn(2, 6, 32)
    for _ in range(3):
        assert_same(results(model, x, logits), results(reference, x, logits))
    assert passes == [3, 2, 3, 2] * 2
    text = str(peft_fused.explain(model))
    assert "its input has no graph" not in text
    assert "6 equal" in text and "one pass over the input of q_proj, k_proj, v_proj" in text
    assert "one pass over the input of gate_proj, up_proj" in text
    assert "not shared_shrink: no sibling received the same input in the last forward pass" in text


def test_another_model_and_names_that_nobody_knows(passes):
    config = BertConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=30, vocab_size=20)
    base = BertModel(config).eval()
    model = randomise(get_peft_model(base, LoraConfig(r=4, target_modules=["query", "key", "value"])))
    accelerate(model)
    ids = torch.arange(8).reshape(2, 4)
    alone = model(ids).last_hidden_state
    torch.testing.assert_close(model(ids).last_hidden_state, alone)
    assert passes == [3]  # the input of the first layer has no graph, as nothing before it is trained

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(24, 5), nn.Linear(24, 5)

        def forward(self, x):
            return self.right(x) - self.left(x)

    alone, shares = both(Odd(), targets=("left", "right"))
    passes.clear()
    for _ in range(2):
        found = [run(model, data(), forward=lambda model, x: model(x + 0)) for model in (shares, alone)]
        assert_same(*found, SUM)
    assert passes == [2]


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_the_reference_is_peft(p):
    """Of masks that differ, what PEFT's are is not known here: without dropout, the numbers are PEFT's."""
    model = adapted(p=p).train(p == 0)
    reference = copy.deepcopy(model)
    accelerate(model)
    for _ in range(2):
        assert_same(run(model, data()), run(reference, data()))


def test_masks_of_siblings_are_independent(passes):
    _, shares = both(p=0.5)
    seen = []
    for name in "qkv":
        layer = getattr(attention(shares), name)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            A.copy_(torch.eye(4, 24))
            B.copy_(torch.eye(len(B), 4))
        layer.get_base_layer().weight.data.zero_(), layer.get_base_layer().bias.data.zero_()
        layer.register_forward_hook(lambda _, __, y: seen.append(y[..., :4].ne(0)))
    x = torch.ones(4000, 24, requires_grad=True)
    shares(x), seen.clear()
    shares(x)
    assert passes == [3]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(seen[one].float().mean() - 0.5) < 0.02
        assert abs((seen[one] == seen[other]).float().mean() - 0.5) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype, passes, taken):
    """As alone, on the same device; the kernels' own tests know the truth."""
    alone, shares = (model.to("cuda") for model in both(Attention(dtype, width=256)))
    x = data(3, 100, dtype=dtype, width=256).to("cuda")
    want = run(alone, x)
    for _ in range(3):
        assert_same(run(shares, x), want, {torch.float32: 1e-5, torch.bfloat16: 1.6e-2}[dtype])
    assert passes == [3, 3] and taken == [True] * 4


# --------------------------------------------------------------------------------------------------- what is switched


def test_group_false(passes):
    model = adapted()
    assert accelerate(model, group=False).groups == []
    model(live()), model(live())
    assert passes == []
    assert "not shared_shrink: accelerate was called with group=False" in str(peft_fused.explain(model))
    assert len(accelerate(model).groups) == 1  # and back
    model(live()), model(live())
    assert passes == [3]
    accelerate(model, group=False)
    model(live())
    assert passes == [3]
    restore(model)
    assert not any(sharing.SIBLING in vars(module) for module in model.modules())
    with pytest.raises(TypeError, match="accelerate: group must be True or False, got int"):
        accelerate(model, group=1)


def test_explain_tells_what_was_shared():
    _, shares = both(p=0.3)

    def explained(name):
        return "\n".join(line for line in str(peft_fused.explain(getattr(attention(shares), name))).splitlines()[:2])

    for name in "qkvo":
        first = "not shared_shrink: which siblings receive the same input is seen in the first forward pass"
        assert first in explained(name)
    shares(live())
    for name in "qkv":
        assert "q, k, v received the same input in the last forward pass, and share it from the next on" in explained(
            name
        )
    shares(live())
    for name in "qkv":
        assert "one pass over the input of q, k, v" in explained(name)
    assert "no sibling received the same input in the last forward pass" in explained("o")
    attention(shares).k.eval()
    shares(live())
    for name in "qv":
        assert "one pass over the input of q, v" in explained(name)
    assert "not shared_shrink: it was not as q had foreseen it" in explained("k")
    shares.eval()
    with torch.inference_mode():
        shares(live())
    assert "in the last forward pass it could not be shown safe" in explained("q")


def test_a_second_call_keeps_what_is_known(passes):
    _, shares = both()
    shares(live())
    accelerate(shares)
    shares(live())
    assert passes == [3]


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_share_among_themselves(way, passes):
    alone, shares = both()
    shares(live()), shares(live())
    if way == "deepcopy":
        copied = copy.deepcopy(shares)
    else:
        file = io.BytesIO()
        torch.save(shares, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    families = [vars(attention(model).q)[sharing.SIBLING].family for model in (shares, copied)]
    assert families[0] is not families[1]
    with torch.no_grad():
        for parameter in shares.parameters():
            parameter.zero_()
    passes.clear()
    for _ in range(2):
        assert_same(run(copied, data()), run(alone, data()), SUM)
    assert passes == [3]


# ------------------------------------------------------------------------------------------- what cannot be shown safe


def learned(model, **kwargs):
    run(model, data(), **kwargs)
    model.zero_grad()
    return model


def test_an_input_that_is_changed_between(taken):
    """PEFT's graph would not survive this with gradients; without, the layers see the new values."""
    alone, shares = both()
    learned(shares)
    for model in (alone, shares):
        attention(model).between = lambda _, x: x.mul_(-2)
    taken.clear()
    with torch.no_grad():
        want = alone(live())
        torch.testing.assert_close(shares(live()), want)
    assert taken == []


def test_a_factor_that_is_changed_between(taken):
    alone, shares = both()
    learned(shares)

    def change(module, x):
        with torch.no_grad():
            module.k.lora_A["default"].weight.mul_(-2)
            module.v.lora_A["default"].weight = nn.Parameter(module.v.lora_A["default"].weight * 3)

    for model in (alone, shares):
        attention(model).between = change
    taken.clear()
    torch.testing.assert_close(shares(live()), alone(live()))
    assert taken == [False, False]


def test_grad_mode_that_changes_between(taken):
    alone, shares = both()
    learned(shares)

    def off(module, x):
        torch.set_grad_enabled(False)

    for model in (alone, shares):
        attention(model).between = off
        with torch.enable_grad():
            model.found = model(live())
    taken.clear()
    assert not shares.found.requires_grad and taken == []
    torch.testing.assert_close(shares.found, alone.found)


def test_in_inference_mode_nothing_is_shared(passes):
    """Changes of such a tensor are not counted."""
    alone, shares = both()
    learned(shares)
    with torch.inference_mode():
        torch.testing.assert_close(shares(live()), alone(live()), rtol=0, atol=0)
    assert passes == []


def test_without_gradients_it_is_shared(passes):
    alone, shares = both()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(shares(live()), alone(live()))
    assert passes == [3, 3]


def test_dropout_that_is_switched(passes, taken):
    alone, shares = both(p=0.4)
    learned(shares)
    for train in (False, True, False):
        alone.train(train), shares.train(train)
        assert_same(run(shares, data()), run(alone, data()), SUM)
    assert taken == [True] * 6


def test_dropout_of_one_layer_alone(taken):
    alone, shares = both(p=0.4)
    learned(shares)
    for model in (alone, shares):
        attention(model).k.eval()
    taken.clear()
    assert_same(run(shares, data()), run(alone, data()), SUM)
    assert taken == [False, True]


@pytest.mark.parametrize("where", ["lora_A", "lora_dropout", "layer", "base", "x"])
def test_hooks_are_called(where):
    alone, shares = both()
    learned(shares)
    calls = []
    for model in (alone, shares):
        k = attention(model).k
        module = {"lora_A": k.lora_A["default"], "lora_dropout": k.lora_dropout["default"], "base": k.base_layer}.get(
            where, k
        )
        if where == "x":
            module.register_full_backward_hook(lambda *_: calls.append(1))
        else:
            module.register_forward_pre_hook(lambda _, args: calls.append(1) or (args[0] * 2,))
    assert_same(run(shares, data()), run(alone, data()), SUM)
    assert len(calls) == 2


def test_adapters_that_differ(passes):
    def mixed(model):
        model.add_adapter("other", LoraConfig(r=2, lora_alpha=3, target_modules=["q", "k", "v", "o"]))
        model.base_model.set_adapter(["default", "other"])
        return randomise(model)

    torch.manual_seed(2)
    alone = mixed(adapted())
    shares = copy.deepcopy(alone)
    accelerate(alone, group=False), accelerate(shares)
    for _ in range(2):
        assert_same(run(shares, data()), run(alone, data()), SUM)
    assert passes == [6]
    for model in (alone, shares):
        attention(model).k.set_adapter("other")
        attention(model).v.set_adapter("default")
        attention(model).q.set_adapter("other")
    assert_same(run(shares, data()), run(alone, data()), SUM)
    assert passes == [6, 3]
    for model in (alone, shares):
        attention(model).k.enable_adapters(False)
    assert_same(run(shares, data()), run(alone, data()), SUM)
    assert passes == [6, 3, 2]
    names = {"adapter_names": ["default", "other"]}
    with torch.no_grad():
        alone.eval(), shares.eval()
        torch.testing.assert_close(shares(data(), **names), alone(data(), **names))
    assert passes == [6, 3, 2]


def switched(passes, prepare=lambda down: None, **kwargs):
    """A pass was foreseen for three layers; then comes another adapter, with which k is PEFT's, and its product is
    nobody's."""
    torch.manual_seed(2)
    alone = adapted()
    alone.add_adapter("other", LoraConfig(r=4, target_modules=["q", "k", "v", "o"], **kwargs))
    shares = copy.deepcopy(randomise(alone))
    for model in (alone, shares):
        prepare(attention(model).k.lora_A["other"])
    accelerate(alone, group=False), accelerate(shares)
    learned(shares)
    for model in (alone, shares):
        model.set_adapter("other")
    for _ in range(2):
        assert_same(run(shares, data()), run(alone, data()), SUM)
    assert passes == [2, 2]


def test_a_rank_that_is_left_to_peft(passes, taken):
    switched(passes, rank_pattern={"k": 300})
    assert taken == [True] * 2


def test_a_hook_that_writes_to_the_factor(passes):
    def normalise(down, _):
        with torch.no_grad():
            down.weight.div_(down.weight.norm())

    switched(passes, lambda down: down.register_forward_pre_hook(normalise))


def test_a_sibling_that_a_leader_calls(passes):
    """By a hook of its base layer, which differentiates what it gets: it must not use up the leader's pass."""
    alone, shares = both()
    learned(shares)
    for model in (alone, shares):
        q, k = attention(model).q, attention(model).k

        def hook(_, args, y, k=k):
            return y + torch.autograd.grad(k(args[0]).sum(), k.lora_A["default"].weight)[0].norm()

        q.base_layer.register_forward_hook(hook)
    for _ in range(2):
        assert_same(run(shares, data()), run(alone, data()), SUM)
    assert passes[0] == 3


def test_merged_layers(passes):
    alone, shares = both()
    learned(shares)
    for model in (alone, shares):
        attention(model).k.merge()
    torch.testing.assert_close(shares(live()), alone(live()))
    assert passes == [2]


def test_trained_in_part(passes):
    for trained in ("q", "k", "none"):
        alone, shares = both()
        learned(shares)
        for model in (alone, shares):
            model.requires_grad_(False)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(f".{trained}.lora_" in name)
        for need_x in (True, False):
            found = []
            for model in (alone, shares):
                x = data().requires_grad_(need_x)
                y = model(x)
                if y.requires_grad:
                    y.sum().backward()
                found.append({"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters()})
                model.zero_grad()
            assert {n: t is None for n, t in found[0].items()} == {n: t is None for n, t in found[1].items()}
            assert_same(*({n: t for n, t in one.items() if t is not None} for one in found[::-1]), SUM)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("leaf", [True, False])
def test_layers_with_a_backward_each(together, leaf, passes):
    """What is made together is freed together, so layers on an input without a graph run alone: each may be
    differentiated by itself, after all have run or before the next does."""
    alone, shares = both()
    learned(shares)
    passes.clear()
    found = []
    for model in (alone, shares):
        x = data().requires_grad_(leaf)
        losses = []
        for name in "qkv":
            losses.append(getattr(attention(model), name)(x).square().sum())
            if not together:
                losses[-1].backward()
        for loss in losses if together else ():
            loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_same(found[1], found[0], tolerance=0)
    assert passes == [] and "its input has no graph" in str(peft_fused.explain(shares))


@pytest.mark.parametrize("kept", [True, False])
def test_layers_whose_backward_runs_in_between(kept, taken):
    """The same on an input whose graph keeps nothing. kept: whether the graph of the first, and the offer with it,
    still lives."""
    alone, shares = both()
    learned(shares)
    found = []
    taken.clear()
    for model in (alone, shares):
        x, losses = live() + 0, []
        for name in "qkv":
            losses.append(getattr(attention(model), name)(x).square().sum())
            losses[-1].backward()
            if not kept:
                losses.clear()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_same(found[1], found[0], SUM)
    assert taken == [False, False] * kept


def test_a_second_backward_says_what_to_do():
    shares = learned(both()[1])
    for retain in (True, False):
        x = live() + 0
        q, k = (getattr(attention(shares), name)(x).sum() for name in "qk")
        q.backward(retain_graph=retain)
        if retain:
            k.backward()
        else:
            with pytest.raises(RuntimeError, match="layers that share their input are differentiated in one backward"):
                k.backward()


def test_an_input_that_is_used_again(passes):
    """The same tensor in two forward passes, as tests and samplers have it."""
    alone, shares = both()
    leaf = live()
    x = leaf + 0
    for model in (alone, shares):
        leaf.grad = None
        for _ in range(3):
            model(x).sum().backward()
        model.found = leaf.grad
    assert error(shares.found, alone.found) < SUM and passes == [3, 3]


def outputs(model, x):
    """What q, k and v answer in a forward pass."""
    seen = {}

    def see(name):
        return getattr(attention(model), name).register_forward_hook(lambda _, __, y: seen.update({name: y}))

    hooks = [see(name) for name in "qkv"]
    model(x)
    [hook.remove() for hook in hooks]
    return seen


def test_gradients_of_outputs_one_by_one():
    alone, shares = both()
    learned(shares)
    for name in "qkv":
        found = []
        for model in (alone, shares):
            x = live()
            inputs = [x, getattr(attention(model), name).lora_A["default"].weight]
            found.append(torch.autograd.grad(outputs(model, x)[name].square().sum(), inputs))
        assert all(error(a, b) < SUM for a, b in zip(*found, strict=True))


def kept_gradients(y):
    """[(gradient, what it was)] of all nodes below y, as their hooks see them in a backward pass."""
    kept, nodes, seen = [], [y.grad_fn], set()

    def keep(grads, _):
        kept.extend((grad, grad.clone()) for grad in grads if grad is not None)

    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            node.register_hook(keep)
            nodes += [each for each, _ in node.next_functions]
    return kept


def test_a_gradient_that_a_hook_keeps():
    """What a layer gives as the gradient of x is added to in place, unless somebody holds it."""
    alone, shares = both()
    learned(shares)
    found = []
    for model in (alone, shares):
        x = data().requires_grad_()
        y = model(x * 1)
        kept = kept_gradients(y)
        y.sum().backward()
        assert len(kept) > 8 and all(torch.equal(now, then) for now, then in kept)
        found.append(x.grad)
    assert error(*found) < SUM


def test_threads_have_their_own(passes):
    alone, shares = both()
    learned(shares)
    want = {seed: alone(live(seed)).detach() for seed in range(2, 8)}
    wrong = []

    def work(seed):
        for _ in range(20):
            if not torch.allclose(shares(live(seed)), want[seed], atol=1e-5):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in want]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert wrong == [] and passes


def test_autocast(passes, taken):
    alone, shares = both(Attention())
    for _ in range(2):
        found = []
        for model in (alone, shares):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found.append(run(model, data()))
        assert_same(found[1], found[0], 2e-2)
    assert passes == [3]
    for model in (alone, shares):
        attention(model).between = lambda _, x: torch.set_autocast_enabled("cpu", False)
    found = []
    for model in (alone, shares):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(model(live()))
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-2)
    assert taken == [True, True]  # of the first half


def test_compiled(passes):
    alone, shares = both()
    learned(shares)
    compiled = torch.compile(shares, backend="aot_eager")
    assert_same(run(compiled._orig_mod, data(), forward=lambda _, x: compiled(x)), run(alone, data()), SUM)
    assert passes == []


# -------------------------------------------------------------------------------------------------------- checkpointing


def checkpointed(use_reentrant, part=None):
    """A forward of a model that is checkpointed whole, or whose layer of that name is."""

    def whole(model, x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=use_reentrant)

    def of_part(model, x):
        layer = getattr(attention(model), part)
        forward = layer.forward
        layer.forward = lambda x: torch.utils.checkpoint.checkpoint(forward, x, use_reentrant=use_reentrant)
        try:
            return model(x)
        finally:
            del layer.forward

    return whole if part is None else of_part


@pytest.mark.parametrize("cpp", NODES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("part", [None, "q", "k", "v"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant, part, p, cpp, passes):
    alone, shares = both(p=p)
    forward = checkpointed(use_reentrant, part)
    with peft_fused.use_backend(None, native=cpp):
        for _ in range(4):
            assert_same(run(shares, data(), forward=forward), run(alone, data(), forward=forward), SUM)
    if part is None and not (use_reentrant and p):  # from the second on, in a forward and when it is repeated
        assert passes == [3] * 6
    elif part is None:  # masks are drawn by each
        assert passes == []


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("parts", ["", "q", "k", "qk", "kv", "qkv"])
@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_of_one_input(use_reentrant, leaf, parts, p):
    """The input of a checkpoint is that of the layers themselves. parts: those that have one of their own; none: one
    for all."""
    alone, shares = both(p=p)

    def qkv(model, x):
        layers = [getattr(attention(model), name) for name in "qkv"]
        if not parts:
            together = torch.utils.checkpoint.checkpoint(
                lambda x: torch.cat([layer(x) for layer in layers], -1), x, use_reentrant=use_reentrant
            )
            return together
        return torch.cat(
            [
                torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant) if name in parts else layer(x)
                for name, layer in zip("qkv", layers, strict=True)
            ],
            -1,
        )

    for seed in range(4):
        found = []
        for model in (alone, shares):
            x = live()
            torch.manual_seed(seed)
            y = qkv(model, x if leaf else x + 0)
            y.square().sum().backward()
            found.append({"x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
            model.zero_grad()
        assert_same(found[1], found[0], SUM)


def test_what_is_learned_between_a_forward_and_its_checkpointed_backward(passes):
    """Two forwards, then the backward of both, as contrastive losses have it: both run a second time as the first."""
    alone, shares = both()
    forward = checkpointed(False)
    found = []
    for model in (alone, shares):
        x = data().requires_grad_()
        for _ in range(3):
            a, b = forward(model, x), forward(model, x * 2)
            (a * b).sum().backward()
        found.append({"x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_same(found[1], found[0], SUM)
    assert passes == [3] * 8


def test_a_plan_that_changes_between_a_forward_and_its_checkpointed_backward():
    alone, shares = both()
    for model in (alone, shares):
        x = data().requires_grad_()
        for _ in range(2):
            y = checkpointed(False)(model, x)
            with torch.no_grad():  # another order of calls
                for name in "vkqo":
                    getattr(attention(model), name)(data())
            y.sum().backward()
        model.found = x.grad
    assert error(shares.found, alone.found) < SUM


def test_reentrant_checkpointing_repeats_the_masks_of_two_forwards():
    """With what draws between the layers, too: which of them shares is learned between the first pass and its
    repetition."""
    alone, shares = both(p=0.3)
    for model in (alone, shares):
        attention(model).between = lambda _, x: torch.rand(())
    forward = checkpointed(True)
    found = []
    for model in (alone, shares):
        x = live()
        torch.manual_seed(1)
        for _ in range(3):
            a, b = forward(model, x), forward(model, x * 2)
            (a * b).sum().backward()
        found.append({"x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert_same(found[1], found[0], SUM)


def identity(tensor):
    return tensor


@pytest.mark.parametrize(
    "hooks", [(identity, identity), (torch.Tensor.clone, torch.Tensor.clone)], ids=["own", "built-in"]
)
def test_hooks_that_live_for_ever(hooks, passes):
    """What is kept under them may be made again at any time, as far as one can see: the plan stays as it was."""
    alone, shares = both()
    for _ in range(5):
        found = []
        for model in (alone, shares):
            with torch.autograd.graph.saved_tensors_hooks(*hooks):
                found.append(run(model, data()))
        assert_same(found[1], found[0], tolerance=0)
    assert passes == []
    assert len(vars(attention(shares).q)[sharing.SIBLING].frames) <= 1


def test_a_factor_that_is_trained_from_now_on(taken):
    alone, shares = both()
    for model in (alone, shares):
        attention(model).k.lora_A.requires_grad_(False)
    learned(shares)
    taken.clear()
    for model in (alone, shares):
        attention(model).between = lambda module, _: module.k.lora_A.requires_grad_(True)
        model(live()).sum().backward()
    weights = [attention(model).k.lora_A["default"].weight.grad for model in (alone, shares)]
    assert error(*weights[::-1]) < SUM and taken == [False, True]


def test_tensors_that_are_offloaded(passes):
    alone, shares = both()
    for _ in range(3):
        found = []
        for model in (alone, shares):
            with torch.autograd.graph.save_on_cpu():
                found.append(run(model, data()))
        assert_same(found[1], found[0], SUM)
    assert passes == [3, 3]


def test_selective_checkpointing_sees_each_layer(passes):
    alone, shares = both()
    learned(shares)
    seen = []

    def policy(ctx, op, *args, **kwargs):
        seen.append(op)
        return torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    def forward(model, x):
        context = lambda: torch.utils.checkpoint.create_selective_checkpoint_contexts(policy)  # noqa: E731
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False, context_fn=context)

    assert_same(run(shares, data(), forward=forward), run(alone, data(), forward=forward), SUM)
    assert passes == [] and seen.count(torch.ops.peft_fused.lowrank_fwd.default) >= 8


# --------------------------------------------------------------------------------------------------------------- memory


def test_a_frozen_factor_keeps_nothing_for_the_others():
    _, shares = both()
    learned(shares)
    attention(shares).q.lora_A.requires_grad_(False)
    x = live() * 1
    reference = weakref.ref(x)
    y = attention(shares).q(x)
    del x
    assert reference() is None and y.requires_grad


def only_q(model, x):
    """A forward that breaks the plan: k and v do not come."""
    return attention(model).q(x)


def alive(tensor_ref):
    gc.collect()
    return tensor_ref() is not None


@pytest.mark.parametrize("cpp", NODES)
@pytest.mark.parametrize("forward", [only_q, lambda model, x: model(x)], ids=["broken", "whole"])
def test_nothing_keeps_x_longer_than_the_layers_alone(forward, cpp):
    """Of the graph's life; after backward; where no graph is recorded. gc.collect() apart, no cycle has to be found."""
    alone, shares = both()
    learned(shares)
    gc.disable()
    with peft_fused.use_backend(None, native=cpp):
        for model in (alone, shares):
            x = data().requires_grad_() * 1
            reference = weakref.ref(x)
            y = forward(model, x)
            del x
            assert reference() is not None  # for dA
            y.sum().backward()
            assert reference() is None
            del y

            x = data() * 1
            reference = weakref.ref(x)
            y = forward(model, x)
            del x, y
            assert reference() is None

            with torch.no_grad():
                x = data() * 1
                reference = weakref.ref(x)
                forward(model, x)
                del x
                assert reference() is None
    gc.enable()


def test_a_product_goes_with_x_where_no_graph_is_recorded(monkeypatch):
    _, shares = both()
    learned(shares)
    made, shared_shrink = [], sharing.shared_shrink

    def watched(*args, **kwargs):
        found = shared_shrink(*args, **kwargs)
        made.extend(weakref.ref(S) for S in found[1:])
        return found

    monkeypatch.setattr(sharing, "shared_shrink", watched)
    with torch.no_grad():
        x = data()
        only_q(shares, x)
        assert [S() is not None for S in made] == [False, True, True]
        del x
        assert [S() is not None for S in made] == [False, False, False]


def test_a_failing_layer_leaves_nothing_behind():
    _, shares = both()
    learned(shares)

    def fail(module, x):
        raise MemoryError("here")

    attention(shares).between = fail
    x = data().requires_grad_() * 1
    reference = weakref.ref(x)
    with pytest.raises(MemoryError):
        shares(x)
    del x
    assert not alive(reference)
    attention(shares).between = None
    shares(live())


def test_modules_are_not_kept():
    _, shares = both()
    learned(shares)
    reference = weakref.ref(attention(shares).q)
    del shares
    assert not alive(reference)
