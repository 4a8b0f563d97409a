"""Products of several factors with an input that they share, and the low-rank op given such a product, on the CPU."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import peft_fused
from peft_fused.ops import dispatch, lowrank_adapter, lowrank_linear, native
from peft_fused.ops.accuracy import judge
from peft_fused.ops.shared_shrink import is_spent, shared_shrink, shared_shrink_reference

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
TYPES = {
    "fp32": (F32, F32),
    "bf16": (BF16, BF16),
    "fp16": (F16, F16),
    "bf16+fp32": (BF16, F32),
    "fp16+fp32": (F16, F32),
}
NODES = [
    pytest.param(True, id="cpp", marks=pytest.mark.skipif(native.module is None, reason=native.why_missing or "-")),
    pytest.param(False, id="python"),
]
both_nodes = pytest.mark.parametrize("cpp", NODES)
K = 72


def make(dtype, adapter_dtype, ranks=(8, 5, 16), shape=(3, 61), need_x=True):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, K, generator=generator, dtype=F64).to(dtype).requires_grad_(need_x)
    factors = [torch.randn(r, K, generator=generator, dtype=F64).to(adapter_dtype).requires_grad_() for r in ranks]
    return x, factors


def drawn(count, seed=5):
    """The seeds that as many calls of their own would draw."""
    torch.manual_seed(seed)
    return torch.stack([torch.randint(0, 2**63 - 1, (), dtype=torch.int64) for _ in range(count)])


def shared(x, factors, p=0.0, seed=5):
    torch.manual_seed(seed)
    found = shared_shrink(x, factors, dropout_p=p, out_features=64)
    assert found is not None
    return found


def results(S, x, x_of_layers, factors):
    """S and the gradients, those of all factors in one; x has one more, as layers give it, where it is an output."""
    draws = torch.Generator().manual_seed(9)
    dS = [torch.randn(s.shape, generator=draws, dtype=F64).to(s.dtype) for s in S]
    leaves = [x, *factors] if x.requires_grad else factors
    outputs, grads = [*S], dS
    if x.requires_grad:
        outputs, grads = [x_of_layers, *S], [torch.randn(x.shape, generator=draws, dtype=F64).to(x.dtype), *dS]
    found = torch.autograd.grad(outputs, leaves, grads)
    together = {"S": [s.detach() for s in S], "A": found[-len(factors) :]}
    if x.requires_grad:
        together["x"] = found[:1]
    return {name: torch.cat([t.flatten() for t in tensors]).double() for name, tensors in together.items()}


def verdicts(x, factors, p, call):
    seeds = drawn(len(factors)) if p else None

    def plain(dtype, adapter_dtype):
        wide = x.detach().to(dtype).requires_grad_(x.requires_grad)
        own = [A.detach().to(adapter_dtype).requires_grad_() for A in factors]
        return results(shared_shrink_reference(wide, own, dropout_p=p, seeds=seeds), wide, wide, own)

    x_of_layers, *S = call()
    got = results(S, x, x_of_layers, factors)
    dtypes = {"S": factors[0].dtype, "x": x.dtype, "A": factors[0].dtype}
    return judge([got], [plain(x.dtype, factors[0].dtype)], [plain(F64, F64)], dtypes)


@both_nodes
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("need_x", [True, False])
def test_rule(types, p, cpp, need_x):
    x, factors = make(*TYPES[types], need_x=need_x)
    with peft_fused.use_backend("torch", native=cpp):
        found = verdicts(x, factors, p, lambda: shared(x, factors, p))
    assert [v.name for v in found if not v.ok] == []


@both_nodes
@pytest.mark.parametrize("types", ["fp32", "bf16+fp32"])
def test_the_rule_sees_wrong_seeds_and_wrong_factors(types, cpp):
    x, factors = make(*TYPES[types], ranks=(8, 8, 8))
    with peft_fused.use_backend("torch", native=cpp):
        for changed in (lambda: shared(x, factors, 0.3, seed=6), lambda: shared(x, [A * 1.02 for A in factors], 0.3)):
            assert {v.name for v in verdicts(x, factors, 0.3, changed) if not v.ok} >= {"S"}


@both_nodes
def test_rows_in_blocks(cpp, monkeypatch):
    """More rows than a block of those that are converted or dropped out has."""
    x, factors = make(BF16, F32, shape=(7500,))
    with peft_fused.use_backend("torch", native=cpp):
        assert [v.name for v in verdicts(x, factors, 0.3, lambda: shared(x, factors, 0.3)) if not v.ok] == []


@both_nodes
def test_many_rows(cpp, monkeypatch):
    """Of so many that x could be worked on in blocks, sums over the rows are as exact as of few."""
    monkeypatch.setitem(globals(), "K", 8192)
    x, factors = make(BF16, BF16, ranks=(2, 3), shape=(3200,))
    with peft_fused.use_backend("torch", native=cpp):
        assert [v.name for v in verdicts(x, factors, 0.0, lambda: shared(x, factors)) if not v.ok] == []


@both_nodes
def test_many_ranks(cpp, monkeypatch):
    """dx adds up the ranks of all factors, in no longer chains than the sum of their products has."""
    monkeypatch.setitem(globals(), "K", 512)
    x, factors = make(F32, F32, ranks=(64,) * 6, shape=(512,))
    with peft_fused.use_backend("torch", native=cpp):
        assert [v.name for v in verdicts(x, factors, 0.0, lambda: shared(x, factors)) if not v.ok] == []


@both_nodes
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_one_column(p, cpp, monkeypatch):
    """Its stride is of no meaning."""
    monkeypatch.setitem(globals(), "K", 1)
    x, factors = make(F32, F32, shape=(16,))
    with peft_fused.use_backend("torch", native=cpp):
        x_of_layers, *S = shared(x, factors, p)
        dx = torch.ones(16).as_strided((16, 1), (1, 7))
        got = torch.autograd.grad([x_of_layers, *S], x, [dx, *map(torch.ones_like, S)])[0]
        x_of_layers, *S = shared(x, factors, p)
        want = torch.autograd.grad([x_of_layers, *S], x, [torch.ones(16, 1), *map(torch.ones_like, S)])[0]
    assert torch.equal(got, want)


@both_nodes
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_gradcheck(p, cpp):
    x, factors = make(F64, F64, ranks=(2, 3), shape=(4,))
    seeds = drawn(2)

    def layers(x, *factors):
        x_of_layers, *S = shared(x, factors, p)
        return (*S, x_of_layers * 2)

    with peft_fused.use_backend("torch", native=cpp):
        assert torch.autograd.gradcheck(layers, (x, *factors))
    assert torch.autograd.gradcheck(
        lambda x, *factors: tuple(shared_shrink_reference(x, factors, dropout_p=p, seeds=seeds)), (x, *factors)
    )


@both_nodes
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_any_part_of_the_gradients(p, cpp):
    """Of x, and of each factor, from any of the outputs that have a gradient."""
    x, factors = make(F64, F64)
    seeds = drawn(3)
    with peft_fused.use_backend("torch", native=cpp):
        for used in itertools.chain.from_iterable(itertools.combinations(range(4), n) for n in (1, 2, 3)):
            found = shared(x, factors, p)
            want = [x, *shared_shrink_reference(x, factors, dropout_p=p, seeds=seeds)]
            got = torch.autograd.grad(sum(found[i].square().sum() for i in used), [x, *factors], allow_unused=True)
            true = torch.autograd.grad(sum(want[i].square().sum() for i in used), [x, *factors], allow_unused=True)
            for mine, its in zip(got, true, strict=True):
                assert (mine is None) == (its is None)
                if its is not None:
                    torch.testing.assert_close(mine, its)


@both_nodes
def test_trained_in_part(cpp):
    x, factors = make(F64, F64, need_x=False)
    factors[1].requires_grad_(False)
    with peft_fused.use_backend("torch", native=cpp):
        x_of_layers, *S = shared(x, factors)
        assert x_of_layers is x
        sum(s.sum() for s in S).backward()
    assert factors[1].grad is None and factors[0].grad is not None and factors[2].grad is not None


@both_nodes
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (1, 1, 3)])
def test_any_number_of_rows(shape, cpp):
    x, factors = make(F32, F32, shape=shape)
    with peft_fused.use_backend("torch", native=cpp):
        x_of_layers, *S = shared(x, factors, 0.2)
        (x_of_layers.sum() + sum(s.sum() for s in S)).backward()
    assert [s.shape for s in S] == [(torch.Size(shape).numel(), r) for r in (8, 5, 16)]
    assert x.grad.shape == x.shape and all(A.grad.shape == A.shape for A in factors)


@both_nodes
def test_a_gradient_that_somebody_keeps_stays_as_it_is(cpp):
    """dx' is added to in place, but only where it is nobody else's."""
    x, factors = make(F32, F32)
    kept = torch.ones_like(x)
    with peft_fused.use_backend("torch", native=cpp):
        x_of_layers, *S = shared(x, factors)
        torch.autograd.grad([x_of_layers, *S], x, [kept, *map(torch.ones_like, S)])
    assert kept.eq(1).all()


@both_nodes
def test_gradients_of_factors_have_memory_of_their_own(cpp):
    x, factors = make(F32, F32)
    with peft_fused.use_backend("torch", native=cpp):
        sum(s.sum() for s in shared(x, factors)[1:]).backward()
    assert len({A.grad.untyped_storage().data_ptr() for A in factors}) == 3
    assert all(A.grad.untyped_storage().nbytes() == A.numel() * 4 for A in factors)


@both_nodes
def test_x_is_kept_once(cpp):
    x, factors = make(F32, F32)
    kept = []
    with peft_fused.use_backend("torch", native=cpp):
        keep = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
        with keep:
            shared(x, factors, 0.1)
    names = {t.data_ptr(): name for name, t in zip("xabc", (x, *factors), strict=True)}
    assert sorted(names.get(t.data_ptr(), str(tuple(t.shape))) for t in kept) == ["(3,)", "a", "b", "c", "x"]


@both_nodes
def test_refuses_a_second_derivative_and_sees_changes_in_place(cpp):
    x, factors = make(F32, F32)
    with peft_fused.use_backend("torch", native=cpp):
        y = shared(x, factors)[1].sum()
        with pytest.raises(RuntimeError, match="the shared_shrink op has no second derivative"):
            torch.autograd.grad(y, x, create_graph=True)
        y = shared(x, factors)[1].sum()
        with torch.no_grad():
            x.mul_(2)
        with pytest.raises(RuntimeError, match="was changed in place"):
            y.backward()


@both_nodes
def test_is_spent(cpp):
    x, factors = make(F32, F32)
    with peft_fused.use_backend("torch", native=cpp):
        _, first, second, _ = shared(x, factors)
        assert not is_spent(first)
        first.sum().backward()
        assert is_spent(second)
        with torch.no_grad():
            assert not is_spent(shared(x, factors)[1])


def test_what_records_gets_nothing():
    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            return op(*args, **(kwargs or {}))

    x, factors = make(F32, F32)
    with Nothing():
        assert shared_shrink(x, factors, out_features=64) is None
    assert shared_shrink(x._neg_view(), factors, out_features=64) is None
    with peft_fused.use_backend("reference"):
        assert shared_shrink(x, factors, out_features=64) is None


@both_nodes
@pytest.mark.parametrize("adapter_dtype", [F32, BF16])
def test_autocast(adapter_dtype, cpp):
    """x is taken in the type that autocast makes of it, factors in fp32 stay."""
    x, factors = make(F32, adapter_dtype)
    with peft_fused.use_backend("torch", native=cpp):
        for _ in range(2):
            with torch.autocast("cpu", dtype=BF16):
                x_of_layers, *S = shared(x, factors)
            assert x_of_layers.dtype == BF16 and all(s.dtype == adapter_dtype for s in S)
            got = torch.autograd.grad(sum(s.float().sum() for s in S) + x_of_layers.float().sum(), [x, *factors])
            half = x.detach().bfloat16().requires_grad_()
            found, *want = shared(half, factors)
            true = torch.autograd.grad(sum(s.float().sum() for s in want) + found.float().sum(), [half, *factors])
            assert all(torch.equal(a, b) for a, b in zip(S, want, strict=True))
            assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, true, strict=True))


# ---------------------------------------------------------------------------------------------- the op, given S


def layer(dtype, adapter_dtype, r=8, n=20):
    draws = torch.Generator().manual_seed(3)
    weight, bias, B = (torch.randn(*shape, generator=draws, dtype=F64) for shape in ((n, K), (n,), (n, r)))
    return weight.to(dtype), bias.to(dtype), B.to(adapter_dtype).requires_grad_()


@both_nodes
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("types", ["fp32", "bf16", "bf16+fp32"])
@pytest.mark.parametrize("with_weight", [True, False])
def test_two_halves_are_the_whole(types, p, cpp, with_weight):
    """Bit for bit but for sums in another order: by the rule, with the whole op in float64 as the truth."""

    def run(dtype, adapter_dtype, halves):
        x, (A,) = make(*TYPES[types], ranks=(8,))
        x, A = (t.detach().to(d).requires_grad_() for t, d in ((x, dtype), (A, adapter_dtype)))
        weight, bias, B = (t.detach().to(t.dtype) for t in layer(*TYPES[types]))
        weight, bias, B = weight.to(dtype), bias.to(dtype), B.to(adapter_dtype).requires_grad_()
        torch.manual_seed(5)
        taken, given = x, {"dropout_p": p}
        if halves:
            taken, S = shared_shrink(x, [A], dropout_p=p, out_features=20)
            given = {"S": S}
        factor = None if halves else A
        if with_weight:
            y = lowrank_linear(taken, weight, bias, factor, B, scale=1.5, **given)
        else:
            y = lowrank_adapter(taken, factor, B, scale=1.5, **given)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=F64).to(*TYPES[types][:1])
        found = torch.autograd.grad(y, [x, A, B], dy.to(y.dtype))
        return {n: t.double() for n, t in zip(("y", "x", "A", "B"), (y.detach(), *found), strict=True)}

    with peft_fused.use_backend("torch", native=cpp):
        got, plain = run(*TYPES[types], halves=True), run(*TYPES[types], halves=False)
        truth = run(F64, F64, halves=False)
    dtypes = dict(zip("yxAB", (*TYPES[types][:1] * 2, *TYPES[types][1:] * 2), strict=True))
    assert [v for v in judge([got], [plain], [truth], dtypes) if not v.ok] == []


@both_nodes
@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("uv", [True, False])
@pytest.mark.parametrize("columns", [8, 16])
def test_gradcheck_given_S(with_weight, uv, columns, cpp):
    x, _ = make(F64, F64, shape=(3,))
    weight, bias, B = layer(F64, F64)
    S = torch.zeros(3, columns, dtype=F64)
    S[:, :8] = torch.randn(3, 8, dtype=F64)
    u, v = (torch.randn(n, dtype=F64, requires_grad=True) if uv else None for n in (8, 20))

    def call(x, S, B, *more):
        u, v = more or (None, None)
        if with_weight:
            return lowrank_linear(x, weight, bias, None, B, S=S, u=u, v=v, scale=0.7)
        return lowrank_adapter(x, None, B, S=S, u=u, v=v, scale=0.7)

    inputs = x, S.requires_grad_(), B, *((u, v) if uv else ())
    with peft_fused.use_backend("torch", native=cpp):
        y = call(*inputs)
        found = torch.autograd.grad(y.sum(), inputs, allow_unused=True)
        if columns == 8:
            assert torch.autograd.gradcheck(call, inputs)
    with peft_fused.use_backend("reference"):
        want = call(*inputs)
        true = torch.autograd.grad(want.sum(), inputs, allow_unused=True)
    torch.testing.assert_close(y, want)
    for got, its in zip(found, true, strict=True):
        if its is None:
            assert got is None or not got.any()
        else:
            torch.testing.assert_close(got, its)


def test_given_S_stands_for_what_made_it():
    x, (A,) = make(F32, F32, ranks=(8,), shape=(3,))
    weight, bias, B = layer(F32, F32)
    S = torch.randn(3, 8)
    for wrong, told in (
        ({"A": A}, "A must be None where S is given"),
        ({"rank": 2}, "rank must be None where S is given"),
        ({"rank": torch.tensor(2)}, "rank must be None where S is given"),
        ({"dropout_p": 0.1}, "dropout_p must be 0 where S is given"),
        ({"seed": 3}, "seed must be None where S is given"),
        ({"frozen": True}, "frozen must be False where S is given"),
        ({"S": torch.randn(4, 8)}, r"S must have shape \[M, r\] = \[3, 8\], or 16 columns, got \[4, 8\]"),
        ({"S": torch.randn(3, 9)}, r"S must have shape \[M, r\] = \[3, 8\], or 16 columns, got \[3, 9\]"),
        ({"S": torch.randn(1, 3, 8)}, "S must have shape"),
        ({"B": torch.randn(20, 0)}, "B must have 1 to 256 columns"),
    ):
        given = {"A": None, "B": B, "S": S, **wrong}
        with pytest.raises(ValueError, match=told):
            lowrank_linear(x, weight, bias, given.pop("A"), given.pop("B"), **given)
    with pytest.raises(TypeError, match="S must have B"):
        lowrank_linear(x, weight, bias, None, B, S=S.bfloat16())
    with pytest.raises(TypeError, match="S must be"):
        lowrank_linear(x, weight, bias, None, B, S=[S])
    with pytest.raises(TypeError, match="A must be"):
        lowrank_linear(x, weight, bias, None, B)


def test_given_S_is_one_operation_for_what_records():
    x, _ = make(F32, F32, shape=(3,))
    weight, bias, B = layer(F32, F32)
    S = torch.randn(3, 16).requires_grad_()

    def call(x, S):
        return lowrank_linear(x, weight, bias, None, B, S=S, scale=2.0)

    want = call(x, S)
    true = torch.autograd.grad(want.sum(), [x, S, B])
    got = torch.compile(call, backend="aot_eager", fullgraph=True)(x, S)
    torch.testing.assert_close(got, want)
    for mine, its in zip(torch.autograd.grad(got.sum(), [x, S, B]), true, strict=True):
        torch.testing.assert_close(mine, its)


def test_decisions_are_forgotten_with_the_others():
    x, factors = make(F32, F32)
    shared(x, factors)
    with peft_fused.use_backend("reference"):
        assert shared_shrink(x, factors, out_features=64) is None
    shared(x, factors)
    assert dispatch.forced() is None
