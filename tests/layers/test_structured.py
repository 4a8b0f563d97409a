import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft_fused.layers import (
    CirculantLinear,
    CirculantMap,
    KroneckerLinear,
    KroneckerMap,
    LdrLinear,
    LdrMap,
    LoraLinear,
    MapSpec,
    SymmetricToeplitzMap,
    ToeplitzLinear,
    ToeplitzMap,
)
from peft_fused.ops.dispatch import explain
from peft_fused.ops.structured import toeplitz_matmul, toeplitz_tail


def circulant(c):
    i = torch.arange(c.shape[0])
    return c[(i[:, None] - i) % c.shape[0]]


def toeplitz(col, tail):
    lag = torch.arange(len(col))[:, None] - torch.arange(len(tail) + 1)
    return torch.where(lag >= 0, col[lag.clamp(min=0)], torch.cat([col[:1], tail])[(-lag).clamp(min=0)])


def skew(h):
    lag = torch.arange(len(h))[:, None] - torch.arange(len(h))
    return torch.where(lag >= 0, 1, -1) * h[lag % len(h)]


def dense(m):
    """The matrix of a map, entry by entry from its parameters, in float64."""
    p = {name: parameter.double() for name, parameter in m.named_parameters()}
    n, k = m.out_features, m.in_features
    if isinstance(m, CirculantMap):
        c = p["a"] * p["b"] if m.product else p["c"]
        if c.dim() == 3:
            return torch.cat([torch.cat([circulant(block) for block in row], 1) for row in c])
        return circulant(c)[:n, :k]
    if isinstance(m, ToeplitzMap):
        return toeplitz(p["col"], p["tail"])
    if isinstance(m, SymmetricToeplitzMap):
        return toeplitz(p["t"], p["t"][1:]) @ toeplitz(p["s"], p["s"][1:])
    if isinstance(m, KroneckerMap):
        return torch.kron(p["B"], p["A"])
    return sum(circulant(g) @ skew(h) for g, h in zip(p["G"], p["H"], strict=True))


# (class, options, square only)
FORMS = {
    "circulant": (CirculantLinear, {}, False),
    "circulant, one vector": (CirculantLinear, {"product": False}, False),
    "blocks": (CirculantLinear, {"rectangular": "block"}, False),
    "blocks of 3, one vector": (CirculantLinear, {"rectangular": "block", "block_size": 3, "product": False}, False),
    "toeplitz": (ToeplitzLinear, {"structure": "general"}, False),
    "symmetric toeplitz": (ToeplitzLinear, {}, True),
    "kronecker": (KroneckerLinear, {}, False),
    "kronecker, r = 3": (KroneckerLinear, {"r": 3}, False),
    "ldr": (LdrLinear, {"q": 2}, True),
}
SHAPES = [(12, 12), (12, 9), (9, 12)]
CASES = [(form, shape) for form in FORMS for shape in SHAPES if shape == (12, 12) or not FORMS[form][2]]
MAPS = [
    ("circulant", (7, 7)), ("circulant", (5, 8)), ("toeplitz", (1, 5)), ("toeplitz", (5, 1)), ("toeplitz", (7, 5)),
    ("symmetric_toeplitz", (7, 7)), ("kronecker", (7, 5)), ("kronecker", (1, 1)), ("ldr", (7, 7)), ("ldr", (1, 1)),
]  # fmt: skip


def make(form, k=12, n=12, *, base=None, trained=True, **options):
    torch.manual_seed(0)
    cls, own, _ = FORMS[form]
    layer = cls.from_linear(nn.Linear(k, n) if base is None else base, **{**own, **options})
    if trained:
        for parameter in layer.adapter.parameters():
            nn.init.normal_(parameter, std=0.5)
    return layer


@pytest.mark.parametrize(("form", "shape"), CASES)
@pytest.mark.parametrize("make_base", [nn.Linear, lambda k, n: Conv1D(n, k)])
def test_forward_delta_and_merge_are_the_dense_formula(form, shape, make_base):
    base = make_base(*shape)
    layer = make(form, base=base, alpha=1.5)
    scale = 1.5 / layer.adapter.map.r if "kronecker" in form else 1.5
    delta = scale * dense(layer.adapter.map)
    x = torch.randn(2, 5, shape[0])
    torch.testing.assert_close(layer.delta(), delta.float())
    expected = (base(x).double() + x.double() @ delta.T).float()
    torch.testing.assert_close(layer(x), expected)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(base(x), expected)


@pytest.mark.parametrize(("form", "shape"), CASES)
def test_gradients_are_those_of_the_dense_formula(form, shape):
    layer = make(form, base=nn.Linear(*shape, dtype=torch.float64), alpha=2.0)
    assert layer.adapter.factor().dtype == torch.float64
    scale = 2.0 / layer.adapter.map.r if "kronecker" in form else 2.0
    x = torch.randn(6, shape[0], dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.adapter.parameters()]
    got = torch.autograd.grad(layer(x).square().sum(), inputs)
    y = x @ (layer.weight + scale * dense(layer.adapter.map)).T + layer.bias
    for gradient, expected in zip(got, torch.autograd.grad(y.square().sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(("structure", "shape"), MAPS)
def test_maps_of_odd_and_degenerate_sizes(structure, shape):
    m = MapSpec(structure).make(*shape)
    m.reset_parameters(zero=False)
    x, add = torch.randn(3, shape[0]), torch.randn(3, shape[1])
    torch.testing.assert_close(m.delta(), dense(m).float())
    torch.testing.assert_close(m(x, add, scale=0.5), (add + 0.5 * x.double() @ dense(m).T).float())
    m(x).sum().backward()
    assert all(p.grad is not None for p in m.parameters())


@pytest.mark.parametrize(("form", "shape"), CASES)
def test_it_starts_as_nothing_and_can_be_trained(form, shape):
    base = nn.Linear(*shape)
    layer = make(form, base=base, trained=False)
    x = torch.randn(5, shape[0])
    assert layer.weight is base.weight and layer.bias is base.bias
    assert not layer.delta().any() and torch.equal(layer(x), base(x)) and layer.adapter.is_zero()
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        f"adapter.map.{name}" for name, _ in layer.adapter.map.named_parameters()
    }
    layer(x).square().sum().backward()
    grads = {name: p.grad for name, p in layer.adapter.map.named_parameters()}
    assert all(grads[name].abs().max() > 1e-6 for name in layer.adapter.map.zeros)
    layer.adapter.randomize()
    assert layer.delta().abs().max() > 1e-4 and not layer.adapter.is_zero()


# Standard deviation of the parameters that do not start at zero, per kind.
STARTS = [
    ({}, "a", 1.0, 0.02),
    ({"structure": "symmetric_toeplitz"}, "s", 0.02, 0.02),
    ({"structure": "ldr", "q": 2}, "H", 0.02, 0.02),
    # kaiming_uniform(a=sqrt(5)) is uniform within 1 / sqrt(fan_in), here of 4096 / 64.
    ({"structure": "kronecker", "r": 64}, "A", 1 / math.sqrt(3 * 64), 0.02),
    ({"product": False}, None, None, None),
    ({"structure": "toeplitz"}, None, None, None),
]


@pytest.mark.parametrize(("options", "name", "lora", "adapter"), STARTS)
def test_initialisations_are_the_authors(options, name, lora, adapter):
    for kind, std in (("lora", lora), ("adapter", adapter)):
        m = MapSpec(kind=kind, **options).make(4096, 4096)
        random = {key: p for key, p in m.named_parameters() if p.any()}
        assert list(random) == ([name] if name else [])
        if name:
            assert abs(random[name].std().item() / std - 1) < 0.06 and abs(random[name].mean()) < 0.1 * std


@pytest.mark.parametrize(
    ("options", "shape", "count"),
    [
        ({}, (768, 768), 2 * 768),
        ({"product": False}, (768, 3072), 3072),
        ({"rectangular": "block"}, (768, 3072), 2 * 3072),
        ({"rectangular": "block", "block_size": 64, "product": False}, (768, 3072), 768 * 3072 // 64),
        ({"structure": "toeplitz"}, (768, 3072), 768 + 3072 - 1),
        ({"structure": "symmetric_toeplitz"}, (768, 768), 2 * 768),
        ({"structure": "ldr", "q": 3}, (768, 768), 2 * 3 * 768),
        *(({"structure": "kronecker", "r": r}, (768, 3072), 768 + 3072) for r in (None, 1, 8, 24, 768)),
    ],
)
def test_parameter_counts(options, shape, count):
    assert sum(p.numel() for p in MapSpec(**options).make(*shape).parameters()) == count


@pytest.mark.parametrize(("k", "n"), [(768, 768), (36, 24), (24, 36), (64, 16), (7, 5)])
def test_the_default_r_of_kronecker_attains_the_highest_rank(k, n):
    ranks = {}
    for r in range(1, math.gcd(k, n) + 1):
        if k % r == 0 and n % r == 0 and (k < 100 or r in (8, 16, 24, 32, 48)):
            m = KroneckerMap(k, n, r=r)
            ranks[r] = math.prod(torch.linalg.matrix_rank(torch.randn_like(p)).item() for p in m.parameters())
    chosen = KroneckerMap(k, n).r
    assert chosen == min(r for r in ranks if ranks[r] == max(ranks.values()))
    assert (chosen, ranks[chosen]) == (24, 576) or k != 768


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_merge_rounds_once_and_unmerge_is_exact(form, dtype):
    base = nn.Linear(12, 12).to(dtype)
    layer = make(form, base=base)
    assert layer.adapter.factor().dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    before = base.weight.clone()
    expected = (before.to(layer.delta().dtype) + layer.delta()).to(dtype)
    layer.merge()
    assert layer.merged and torch.equal(base.weight, expected) and not torch.equal(base.weight, before)
    x = torch.randn(5, 12, dtype=dtype)
    assert torch.equal(layer(x), base(x))
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    layer.adapter.map.reset_parameters()  # what is put back does not depend on the adapter
    layer.unmerge()
    assert torch.equal(base.weight, before)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision_beside_fp32_parameters(form):
    layer = make(form, base=nn.Linear(12, 12, dtype=torch.bfloat16))
    x = torch.randn(5, 12, dtype=torch.bfloat16)
    y = layer(x)
    y.sum().backward()
    exact = x.double() @ (layer.weight + dense(layer.adapter.map)).T + layer.bias
    assert y.dtype == torch.bfloat16 and layer.adapter.factor().grad.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=2**-7 * exact.abs().max().item())
    narrow = make(form, base=nn.Linear(12, 12, dtype=torch.bfloat16), dtype=torch.bfloat16)
    assert narrow(x).dtype == narrow.adapter.factor().dtype == torch.bfloat16 and narrow.delta().dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
def test_autocast(form):
    layer = make(form)
    x = torch.randn(5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and layer.adapter.factor().grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x), rtol=0, atol=0.02 * layer(x).abs().max().item())


@pytest.mark.parametrize("form", FORMS)
def test_dropout_acts_on_the_adapter_in_training_only(form):
    layer = make(form, dropout=0.5)
    x = torch.randn(64, 12)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), x @ (layer.weight + layer.delta()).T + layer.bias)
    layer.train()
    layer.adapter.map.reset_parameters()
    assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_activation_checkpointing_changes_no_gradient(form, reentrant):
    grads = []
    for checkpointed in (False, True):
        layer = make(form, dropout=0.3)
        x = torch.randn(4, 12, generator=torch.Generator().manual_seed(1)).requires_grad_()
        torch.manual_seed(3)
        y = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
        y.square().sum().backward()
        grads.append([x.grad, *(p.grad for p in layer.adapter.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_compiles_without_graph_breaks(form):
    layer = make(form)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 12)
    torch.testing.assert_close(compiled(x), layer(x))
    got = torch.autograd.grad(compiled(x).square().sum(), list(layer.adapter.parameters()))
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.adapter.parameters()))
    for gradient, other in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_independent(copied):
    layer, x = make("circulant"), torch.randn(3, 12)
    other = copied(layer)
    assert torch.equal(other(x), layer(x))
    nn.init.normal_(other.adapter.map.b)
    assert not torch.equal(other(x), layer(x))


def test_meta_layers_know_their_sizes():
    with torch.device("meta"):
        layer = make("toeplitz", 12, 9, trained=False)
    assert [tuple(p.shape) for p in layer.adapter.parameters()] == [(9,), (11,)] and layer.adapter.is_zero()


def test_explain_says_what_a_forward_call_runs():
    model = nn.Sequential(make("circulant"), make("symmetric toeplitz"), make("kronecker"), make("ldr"))
    lines = explain(model, rows=64).lines
    assert [path.split(" -> ")[0] for _, path, _ in lines] == [
        f"F.linear, then {op} added to it" for op in ("circulant", "toeplitz_product", "kronecker", "ldr")
    ]
    assert all(" -> torch: " in path for _, path, _ in lines)
    problem = model[0].explain_route(64)[2]
    assert (problem.m, problem.n, problem.k, problem.dropout) == (64, 12, 12, False)
    model[0].merge()
    assert explain(model[0]).lines[0][1] == "F.linear" and "merged" in str(explain(model[0]))


@pytest.mark.parametrize(
    ("form", "options", "error", "message"),
    [
        ("circulant", {"product": 1}, TypeError, "product must be True or False"),
        ("circulant", {"rectangular": "crop"}, ValueError, "rectangular must be one of 'pad', 'block', got 'crop'"),
        ("circulant", {"block_size": 4}, ValueError, "block_size must be None unless rectangular is 'block', got 4"),
        ("blocks", {"block_size": 5}, ValueError, "block_size must divide in_features = 12 and .* = 9, got 5"),
        ("blocks", {"block_size": 0}, ValueError, "block_size must be at least 1"),
        ("kronecker", {"r": 4}, ValueError, "r must divide in_features = 12 and out_features = 9, got 4"),
        ("kronecker", {"r": 0}, ValueError, "r must be at least 1, got 0"),
        ("kronecker", {"r": 3.0}, TypeError, "r must be an int"),
        ("ldr", {"q": 0}, ValueError, "q must be at least 1, got 0"),
        ("ldr", {}, ValueError, "'ldr' must be on a square layer, got in_features = 12 and out_features = 9"),
        ("symmetric toeplitz", {}, ValueError, "'symmetric_toeplitz' must be on a square layer"),
        ("toeplitz", {"structure": "skew"}, ValueError, "structure must be one of 'symmetric', 'general', got 'skew'"),
        ("toeplitz", {"alpha": math.inf}, ValueError, "alpha must be finite"),
        ("toeplitz", {"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
        ("toeplitz", {"dtype": torch.float16}, ValueError, "dtype must be torch.float32 on a base layer"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(form, options, error, message):
    base = nn.Linear(12, 9)
    with pytest.raises(error, match=message):
        make(form, base=base, **options)
    assert base.weight.requires_grad and base.bias.requires_grad


@pytest.mark.parametrize("base", [nn.Conv2d(3, 3, 1), nn.Embedding(4, 4), LoraLinear.from_linear(nn.Linear(4, 4))])
def test_other_bases_are_refused(base):
    with pytest.raises(TypeError, match=r"base must be a torch\.nn\.Linear"):
        CirculantLinear.from_linear(base)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "hankel"}, "structure must be one of 'circulant', 'toeplitz'"),
        ({"kind": "prefix"}, "kind must be one of 'lora', 'adapter'"),
        ({"r": 4}, "r is an option of 'kronecker', got 4 with 'circulant'"),
        ({"structure": "ldr", "product": False}, "product is an option of 'circulant', got False with 'ldr'"),
        ({"structure": "kronecker", "q": 2}, "q is an option of 'ldr', got 2 with 'kronecker'"),
    ],
)
def test_options_of_another_structure_are_refused_not_ignored(options, message):
    with pytest.raises(ValueError, match=message):
        MapSpec(**options)


def test_toeplitz_tail_is_toeplitz_without_the_second_corner():
    col, row, x, y = torch.randn(5), torch.randn(7), torch.randn(3, 7), torch.randn(3, 5)
    torch.testing.assert_close(toeplitz_tail(x, col, row[1:]), toeplitz_matmul(x, col, row))
    transposed = toeplitz_tail(y, col, row[1:], add=x, scale=2.0, transposed=True)
    torch.testing.assert_close(transposed, x + 2 * y @ toeplitz(col, row[1:]))
    for wrong, error, message in (
        ((x, col, row), ValueError, r"x must have 8 features \(1 \+ the length of tail\)"),
        ((x, col, row[None]), ValueError, r"tail must have shape \[K - 1\]"),
        ((x, col, None), TypeError, "tail must be a torch.Tensor, got NoneType"),
    ):
        with pytest.raises(error, match=message):
            toeplitz_tail(*wrong)


def test_sizes_are_checked():
    for cls in (CirculantMap, ToeplitzMap, SymmetricToeplitzMap, KroneckerMap, LdrMap):
        with pytest.raises(ValueError, match="in_features must be at least 1, got 0"):
            cls(0, 4)
        with pytest.raises(TypeError, match="out_features must be an int"):
            cls(4, 4.0)
