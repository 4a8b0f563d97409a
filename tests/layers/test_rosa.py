import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from peft_fused.layers import RosaLinear, SubspacePolicy
from peft_fused.layers.rosa.subspace import check_subspace_rank, draw_directions, split_weight, subspace_rank
from peft_fused.layers.scheduled import FORWARDS_BEFORE_WARNING
from peft_fused.methods import decay_groups
from peft_fused.ops.dispatch import explain

K, N, R = 12, 9, 3
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def linear(dtype=torch.float32, sizes=(K, N)):
    torch.manual_seed(0)
    return nn.Linear(*sizes).to(dtype)


def make(dtype=torch.float32, sizes=(K, N), **options):
    return RosaLinear.from_linear(linear(dtype, sizes), **{"r": R, **options})


@torch.no_grad()
def learn(layer, seed=1):
    """Changes the factors as an optimizer would: by their own size, here."""
    generator = torch.Generator().manual_seed(seed)
    for p in layer.factors():
        p += torch.randn(p.shape, generator=generator, dtype=p.dtype) * p.std()


def truth(layer):
    """B A + W_f in fp64, from what the forward pass computes with."""
    A, B = (p.detach().double() for p in layer.factors())
    return layer.weight_nk().double() + B @ A


def rounding(dtype):
    return torch.finfo(dtype).eps


def test_starts_as_the_pretrained_map_with_directions_of_its_weight_in_the_factors():
    base = linear()
    W0, x = base.weight.detach().clone(), torch.randn(5, K)
    layer = RosaLinear.from_linear(base, r=R, seed=4)
    assert layer.weight is base.weight and layer.bias is base.bias and not base.weight.requires_grad
    torch.testing.assert_close(layer(x), F.linear(x, W0, base.bias))
    A, B = layer.factors()
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"rosa_A.weight", "rosa_B.weight"}
    U, S, V = torch.linalg.svd(W0.double(), full_matrices=False)
    drawn = draw_directions(layer.rosa_state.policy, R, N, 0)
    torch.testing.assert_close((B @ A).double(), U[:, drawn] * S[drawn] @ V[drawn], rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.linalg.svdvals(base.weight)[-R:], torch.zeros(R), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sample", ["random", "window", "top", "bottom"])
def test_splits_put_the_singular_values_where_they_say(sample, dtype):
    W = linear(dtype).weight.detach()
    S = torch.linalg.svdvals(W)
    for split in ("us_v", "sqrt"):
        policy = SubspacePolicy(split, sample, seed=2)
        drawn = draw_directions(policy, R, N, 1)
        A, B = split_weight(W, R, policy, 1)
        assert A.dtype == B.dtype == dtype and A.shape == (R, K) and B.shape == (N, R)
        on_a = S[drawn] ** (2 if split == "us_v" else 1)
        on_b = torch.ones(R, dtype=dtype) if split == "us_v" else S[drawn]
        close = dict(rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(A @ A.T, torch.diag(on_a), **close)
        torch.testing.assert_close(B.T @ B, torch.diag(on_b), **close)
        # What is left has the other singular values.
        left = torch.linalg.svdvals(W - B @ A)
        others = [i for i in range(N) if i not in drawn]
        torch.testing.assert_close(left[: N - R], S[others], **close)


def decomposed(monkeypatch):
    """The smaller sizes of what is given to torch.linalg.svd from here on."""
    sizes, svd = [], torch.linalg.svd

    def counted(A, *args, **kwargs):
        sizes.append(min(A.shape))
        return svd(A, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", counted)
    return sizes


@pytest.mark.parametrize("size", [384, 768])
@pytest.mark.parametrize("spectrum", ["flat", "falling"])
def test_top_directions_of_a_large_weight_are_the_top_ones(monkeypatch, spectrum, size):
    r, policy = 8, SubspacePolicy(sample="top")
    torch.manual_seed(5)
    W = torch.randn(size, size + 40)
    if spectrum == "falling":
        W = W @ torch.diag(0.9 ** torch.arange(size + 40.0))
    U, S, V = torch.linalg.svd(W.double(), full_matrices=False)
    before, sizes = torch.get_rng_state(), decomposed(monkeypatch)
    A, B = split_weight(W, r, policy, 0)
    assert torch.equal(torch.get_rng_state(), before)
    # Whether the whole of it had to be decomposed: the singular values of a normal matrix hardly fall.
    assert (size in sizes) == (spectrum == "flat") and len(sizes) == (2 if spectrum == "flat" else 1)
    again = split_weight(W, r, policy, 3)
    assert torch.equal(A, again[0]) and torch.equal(B, again[1]), "the draw is no draw"
    for mine, exact in ((B, U[:, :r]), (A.T / A.norm(dim=1), V[:r].T)):
        assert torch.linalg.svdvals(mine.double().T @ exact).min() > 1 - 1e-3
    torch.testing.assert_close(A.norm(dim=1).double(), S[:r], rtol=1e-4, atol=0)
    torch.testing.assert_close((B @ A).double(), U[:, :r] * S[:r] @ V[:r], rtol=0, atol=1e-3 * S[0].item())


def test_top_directions_keep_the_function():
    base = linear(sizes=(384, 384))
    x = torch.randn(5, 384)
    y = base(x).detach()
    layer = RosaLinear.from_linear(base, r=R, sample="top")
    torch.testing.assert_close(layer(x), y)
    layer.resample(1)
    torch.testing.assert_close(layer(x), y)


def test_draws_are_subsets_and_functions_of_seed_phase_and_layer():
    n, r, most = 400, 3, 8
    for sample in ("random", "window"):
        policy = SubspacePolicy(sample=sample)
        drawn = [draw_directions(policy, r, most, phase) for phase in range(n)]
        assert drawn == [draw_directions(policy, r, most, phase) for phase in range(n)]
        assert all(sorted(set(d)) == d and len(d) == r and d[0] >= 0 and d[-1] < most for d in drawn)
        counts = torch.tensor([i for d in drawn for i in d]).bincount(minlength=most)
        if sample == "random":
            assert (counts - n * r / most).abs().max() < 45  # three standard deviations of a binomial
            assert len(set(map(tuple, drawn))) == math.comb(most, r)
        else:
            starts = {d[0] for d in drawn}
            assert starts == set(range(most - r + 1)), "the last window, with the smallest direction, is drawn too"
            assert all(d == list(range(d[0], d[0] + r)) for d in drawn)
        other = [draw_directions(SubspacePolicy(sample=sample, seed=1), r, most, phase) for phase in range(n)]
        assert other != drawn
        assert [draw_directions(policy, r, most, phase, "model.q") for phase in range(n)] != drawn
    for sample, expected in (("top", [0, 1, 2]), ("bottom", [5, 6, 7])):
        assert all(draw_directions(SubspacePolicy(sample=sample), r, most, p) == expected for p in range(5))
    assert draw_directions(SubspacePolicy(), most, most, 0) == list(range(most))


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("sizes", [(K, N), (60, 40)])
def test_forward_and_gradients_are_the_formula_before_and_after_a_draw(sizes, conv1d):
    base = linear(torch.float64, sizes)
    if conv1d:
        conv = Conv1D(sizes[1], sizes[0]).double()
        conv.weight.data.copy_(base.weight.T)
        conv.bias.data.copy_(base.bias)
        base = conv
    W0 = (base.weight.T if conv1d else base.weight).detach().clone()
    layer = RosaLinear.from_linear(base, r=R)
    for phase in range(3):
        learn(layer, phase)
        total = W0 + layer.delta()
        x = torch.randn(2, 5, sizes[0], dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(layer(x), F.linear(x, total, base.bias))
        torch.testing.assert_close(truth(layer), total)
        layer(x).square().sum().backward()
        dense = total.requires_grad_()
        y = F.linear(x.detach().requires_grad_(), dense, base.bias)
        y.square().sum().backward()
        A, B = layer.factors()
        torch.testing.assert_close(A.grad, B.T @ dense.grad)
        torch.testing.assert_close(B.grad, dense.grad @ A.T)
        torch.testing.assert_close(x.grad, 2 * y @ dense)
        A.grad = B.grad = None
        layer.resample(phase + 1)
    assert (layer.delta() - (total - W0)).abs().max() < 1e-12


@pytest.mark.parametrize("sizes", [(K, N), (80, 70)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_draws_without_learning_never_add_up(dtype, sizes):
    base = linear(dtype, sizes)
    W0, pointer = base.weight.detach().clone(), base.weight.data_ptr()
    layer = RosaLinear.from_linear(base, r=R)
    drawn = set()
    for phase in range(1, 11):
        layer.resample(phase)
        drawn.add(layer.rosa_state.digest())
        # One rounding of W_f, whose entries are as large as W0's or smaller, and one of the factors.
        step = rounding(dtype) * W0.abs().max().item() + 4 * rounding(torch.float32) * (dtype != torch.float64)
        assert (truth(layer) - W0.double()).abs().max() <= step
        assert not layer.delta().any()
    assert len(drawn) > 7 and base.weight.data_ptr() == pointer
    state = layer.rosa_state
    assert len(state.P) == len(state.dense) == 0
    layer.merge()
    assert torch.equal(base.weight, W0)


@pytest.mark.parametrize("adapter", [None, "base"])
@pytest.mark.parametrize("sizes", [(K, N), (80, 70)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_learned_over_many_phases_is_kept_to_fp32_rounding(dtype, sizes, adapter):
    base = linear(dtype, sizes)
    W0 = base.weight.detach().clone()
    layer = RosaLinear.from_linear(base, r=R, dtype=dtype if adapter else None)
    expected, forms = W0.double(), set()
    for phase in range(1, 9):
        A0, B0 = (p.detach().double() for p in map(torch.clone, layer.factors()))
        learn(layer, phase)
        A, B = (p.detach().double() for p in layer.factors())
        expected = expected + B @ A - B0 @ A0
        layer.resample(phase)
        state = layer.rosa_state
        forms.add((len(state.P) > 0, len(state.dense) > 0))
        assert (len(state.P), len(state.dense)) == (0, sizes[1]) or len(state.P) == 2 * R * phase
        assert state.P.numel() + state.Q.numel() < W0.numel() or len(state.P) == 0
        scale = expected.abs().max().item()
        state_rounding = rounding(torch.float64 if dtype == torch.float64 else torch.float32)
        assert (W0.double() + layer.delta().double() - expected).abs().max() <= 10 * phase * state_rounding * scale
        # What the layer computes with has one rounding to the dtype of its weight more.
        assert (truth(layer) - expected).abs().max() <= (10 * phase * state_rounding + rounding(dtype)) * scale
    assert len(forms) == (2 if sizes[0] == 80 else 1), "the larger weight keeps factors until a dense one is smaller"
    layer.merge()
    dense = (W0.double() + layer.rosa_state.total_change(*(p.detach() for p in layer.factors()))).to(dtype)
    assert torch.equal(base.weight, dense)
    layer.restore()
    assert torch.equal(base.weight, W0)


def test_the_accumulated_change_is_not_the_cancellation_of_large_products():
    """Control: B A - B0 A0 in fp32, as written, would lose a small change beside a large weight."""
    layer = make(sizes=(60, 40))
    A, B = layer.factors()
    A0, B0 = A.detach().clone(), B.detach().clone()
    with torch.no_grad():
        A += 1e-7 * torch.randn_like(A)
    exact = B.detach().double() @ (A.detach().double() - A0.double())
    naive = (B @ A).detach() - B0 @ A0
    assert (naive - exact).abs().max() > 1e-2 * exact.abs().max()
    layer.resample(1)
    assert (layer.delta() - exact).abs().max() < 1e-6 * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_unmerge_and_restore_are_exact(dtype):
    layer = make(dtype)
    learn(layer)
    layer.resample(1)
    learn(layer, 2)
    x = torch.randn(4, K).to(dtype)
    before, frozen = layer(x), layer.weight.detach().clone()
    layer.merge()
    close = dict(rtol=0, atol=40 * rounding(dtype)) if dtype.itemsize < 4 else {}
    torch.testing.assert_close(layer(x), before, **close)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    for call, message in ((layer.merge, "merged already"), (lambda: layer.resample(2), "unmerge")):
        with pytest.raises(RuntimeError, match=message):
            call()
    layer.unmerge()
    assert torch.equal(layer.weight, frozen) and torch.equal(layer(x), before)
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    layer.restore()
    torch.manual_seed(0)
    assert torch.equal(layer.weight, nn.Linear(K, N).weight.to(dtype)) and not layer.schedule_members()
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    for call in (layer.merge, lambda: layer.resample(2)):
        with pytest.raises(RuntimeError, match="ends the layer's use"):
            call()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_equal_and_independent(copied):
    layer = make()
    learn(layer)
    layer.resample(1)
    other, x = copied(layer), torch.randn(3, K)
    assert torch.equal(other(x), layer(x))
    learn(other)
    other.resample(2)
    assert not torch.equal(other(x), layer(x)) and (other.rosa_state.phase, layer.rosa_state.phase) == (2, 1)
    other.restore()
    torch.manual_seed(0)
    assert torch.equal(other.weight, nn.Linear(K, N).weight) and not torch.equal(layer.weight, other.weight)


def trained(**options):
    layer = make(**options)
    for phase in (1, 2):
        learn(layer, phase)
        layer.resample(phase)
    learn(layer, 3)
    return layer


@pytest.mark.parametrize("sizes", [(K, N), (80, 70)])
def test_a_state_dict_restores_everything_in_place(sizes):
    layer = trained(sizes=sizes)
    saved = copy.deepcopy(layer.state_dict())
    assert set(saved) == {"weight", "bias", "rosa_A.weight", "rosa_B.weight", STATE}
    assert all(t.is_floating_point() for t in saved.values())
    other, x = make(sizes=sizes), torch.randn(3, sizes[0])
    pointer = other.weight.data_ptr()
    other.load_state_dict(saved)
    assert other.weight.data_ptr() == pointer
    assert torch.equal(other(x), layer(x)) and torch.equal(other.delta(), layer.delta())
    # Without the base weight too, as an adapter is stored.
    other = make(sizes=sizes)
    other.load_state_dict({k: t for k, t in saved.items() if k.startswith("rosa")}, strict=False)
    assert torch.equal(other.weight, layer.weight) and torch.equal(other(x), layer(x))
    for each in (layer, other):
        each.resample(3)
    assert torch.equal(layer.weight, other.weight) and torch.equal(layer.factors()[0], other.factors()[0])
    other.restore()
    torch.manual_seed(0)
    assert torch.equal(other.weight, nn.Linear(*sizes).weight)


def test_a_state_dict_of_another_pretrained_weight_brings_that_weight():
    layer = trained()
    saved, x = copy.deepcopy(layer.state_dict()), torch.randn(3, K)
    torch.manual_seed(9)
    other = RosaLinear.from_linear(nn.Linear(K, N), r=R)
    other.load_state_dict(saved)
    torch.testing.assert_close(other(x), layer(x))
    other.restore()
    torch.manual_seed(0)
    torch.testing.assert_close(other.weight, nn.Linear(K, N).weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_pretrained_weight_a_few_roundings_away_is_another_one(dtype):
    saved = make(dtype, sizes=(80, 70))
    with torch.no_grad():
        base = linear(dtype, (80, 70))
        base.weight *= 1 + 4 * rounding(dtype)
    given = RosaLinear.from_linear(base, r=R)
    intended = given._pretrained.values.double() - saved._pretrained.values.double()
    saved.load_state_dict(given.state_dict())
    if dtype != torch.float64:  # whose remainder is computed no more exactly than it is kept
        assert torch.equal(saved.weight, given.weight)
    # W0 out of the rounded remainder: what is lost is half a rounding of that, and of the result.
    largest = base.weight.abs().max().double()
    lost = (saved._pretrained.values.double() - given._pretrained.values.double()).abs().max()
    assert lost <= 2 * rounding(dtype) * largest < intended.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_computed_on_another_device_is_the_same_one(dtype):
    layer = trained(dtype=dtype)
    W0, saved = layer._pretrained.values.clone(), copy.deepcopy(layer.state_dict())
    weight = saved["weight"]
    # One rounding off, up or down, and none next to zero.
    weight += weight.sign() * torch.finfo(dtype).eps / 2 * weight.abs() * torch.tensor([1.0, -1.0]).repeat(K // 2)
    layer.load_state_dict(saved)
    assert torch.equal(layer._pretrained.values, W0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved_as", ["merged", "restored"])
@pytest.mark.parametrize("loaded_as", ["frozen", "merged"])
def test_a_state_dict_of_a_merged_or_restored_layer_is_read_as_one(saved_as, loaded_as, dtype):
    layer = trained(dtype=dtype)
    reference = copy.deepcopy(layer)
    getattr(layer, {"merged": "merge", "restored": "restore"}[saved_as])()
    other = make(dtype)
    W0 = other._pretrained.values.clone()
    if loaded_as == "merged":
        other.merge()
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    assert torch.equal(other._pretrained.values, W0)
    if loaded_as == "merged":
        other.unmerge()
    assert torch.equal(other.weight, reference.weight)
    x = torch.randn(3, K).to(dtype)
    assert torch.equal(other(x), reference(x))


@pytest.mark.parametrize("call", ["merge", "unmerge", "restore", "resample"])
def test_a_change_between_forward_and_backward_is_autograds_error(call):
    first, layer = nn.Linear(K, K), trained()
    if call == "unmerge":
        layer.merge()
    loss = layer(first(torch.randn(2, K))).square().sum()
    loss.backward(retain_graph=True)
    getattr(layer, call)(*((3,) if call == "resample" else ()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    layer(first(torch.randn(2, K))).square().sum().backward()


STATE = "rosa_state._extra_state"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[:3], r"must have at least 4 numbers, got 3"),
        (lambda t: t.view(1, -1), "must be a vector"),
        (lambda t: t[:-1], r"must have 175 numbers for r = 3 on \[9, 12\], got 174"),
        (lambda t: t.index_fill(0, torch.tensor([20]), torch.nan), "values that are not finite"),
        (lambda t: t.index_fill(0, torch.tensor([0]), 0.5), r"starts with \[0\.5, 0\.0, 0\.0, 1\.0\]"),
        (lambda t: t.index_fill(0, torch.tensor([0]), -1.0), r"starts with \[-1\.0, 0\.0"),
        (lambda t: t.index_fill(0, torch.tensor([1]), -0.5), r"starts with \[2\.0, -0\.5"),
        (lambda t: t.long(), r"must be a vector of floating-point numbers, got .* of torch\.int64"),
        (lambda t: t.index_fill(0, torch.tensor([2]), 2.0), "no phase, start, and form of a change"),
        (lambda t: t.index_fill(0, torch.tensor([3]), 2.0), "no phase, start, and form of a change"),
        (lambda t: t.index_fill(0, torch.tensor([3]), 0.0), "must have 67 numbers"),
    ],
)
def test_a_state_that_cannot_be_is_refused(change, message):
    layer = make()
    before = layer.rosa_state.get_extra_state()
    saved = trained().state_dict()
    with pytest.raises(ValueError, match=message):
        layer.load_state_dict(saved | {STATE: change(saved[STATE])})
    assert torch.equal(layer.rosa_state.get_extra_state(), before)


def test_missing_state_is_missed():
    saved = {k: t for k, t in make().state_dict().items() if k != STATE}
    for strict in (True, False):
        layer = trained()
        before = copy.deepcopy(layer.state_dict())
        with pytest.raises(ValueError, match=r"has rosa_A.weight, but rosa_state\._extra_state is missing"):
            layer.load_state_dict(saved, strict=strict)
        assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())


def test_the_state_stays_wide_and_on_the_host():
    layer = trained()
    digest, change = layer.rosa_state.digest(), layer.rosa_state.dense
    layer.to(torch.bfloat16)
    assert layer.rosa_state.dense is change and layer.rosa_state.digest() == digest
    assert not list(layer.rosa_state.buffers()), "DDP would send them at every forward pass"
    layer.merge()
    layer.restore()
    torch.manual_seed(0)
    assert torch.equal(layer.weight, nn.Linear(K, N).weight.to(torch.bfloat16))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_no_gradient(reentrant):
    grads = []
    for checkpointed in (False, True):
        layer = trained()
        x = torch.randn(4, K, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
        y.square().sum().backward()
        grads.append([p.grad for p in layer.factors()] + [x.grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_compiles_once_for_all_draws():
    layer, compilations = make(), []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    x = torch.randn(3, K)
    for phase in range(1, 4):
        torch.testing.assert_close(compiled(x), layer(x))
        learn(layer, phase)
        layer.resample(phase)
    assert len(compilations) == 1


def test_bf16_with_fp32_factors_is_as_exact_as_its_weight():
    layer, x = trained(dtype=torch.bfloat16), torch.randn(6, K).bfloat16()
    assert layer.factors()[0].dtype == torch.float32
    exact = F.linear(x.double(), truth(layer), layer.bias.double())
    plain = F.linear(x, truth(layer).bfloat16(), layer.bias).double()
    assert (layer(x).double() - exact).norm() <= 2 * (plain - exact).norm()


def test_explain_names_the_op():
    layer = make()
    assert [path.split(" -> ")[0] for _, path, _ in explain(layer).lines] == ["lowrank_linear"]
    assert layer.explain_route(4)[2] is not None
    layer.merge()
    assert "merged" in str(explain(layer)) and layer.explain_route(4)[2] is None


def test_training_without_a_schedule_warns():
    layer, x = make(), torch.randn(1, K)
    with pytest.warns(UserWarning, match="ROSA has trained in the subspace it started with"):
        for _ in range(FORWARDS_BEFORE_WARNING + 1):
            layer(x)


def test_factors_are_not_decayed():
    model = nn.ModuleList([make(), nn.Linear(2, 2)])
    decayed, spared = decay_groups(model, 0.1)
    assert {id(p) for p in spared["params"]} == {id(p) for p in (*model[0].factors(), model[1].bias)}
    assert [id(p) for p in decayed["params"]] == [id(model[1].weight)]


@pytest.mark.parametrize(("r", "expected"), [(0.5, 4), (0.01, 1), (0.34, 3), (9, 9)])
def test_ranks_as_fractions(r, expected):
    assert make(r=r).factors()[0].shape[0] == expected == subspace_rank(r, K, N)


def test_ranks_as_fractions_are_not_a_rounding_short():
    assert all(subspace_rank(percent / 100, 100, 130) == percent for percent in range(1, 100))
    assert int(0.29 * 100) == 28 and subspace_rank(0.2899, 100, 100) == 28


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 10}, ValueError, r"r must be in 1\.\.9 for a weight of \[9, 12\], got 10"),
        ({"r": 0}, ValueError, r"r must be in 1\.\.256, got 0"),
        ({"r": 1.0}, ValueError, r"r must be an int, or a fraction in \(0, 1\), got 1\.0"),
        ({"r": "8"}, TypeError, "r must be an int, got '8'"),
        ({"split": "v"}, ValueError, "split must be one of 'us_v', 'sqrt', got 'v'"),
        ({"sample": "all"}, ValueError, "sample must be one of 'random', 'window', 'top', 'bottom'"),
        ({"resample_every": "step"}, ValueError, "resample_every must be 'epoch' or a number of steps, got 'step'"),
        ({"resample_every": 0}, ValueError, "resample_every must be at least 1, got 0"),
        ({"resample_every": True}, TypeError, "resample_every must be an int"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"dtype": torch.float16}, ValueError, "dtype must be torch.float32 on a base layer"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    base = linear()
    before = base.weight.detach().clone()
    with pytest.raises(error, match=message):
        RosaLinear.from_linear(base, **{"r": R, **options})
    assert torch.equal(base.weight, before)


def test_bases_that_cannot_be_split_are_refused():
    with pytest.raises(TypeError, match=r"base must be a torch\.nn\.Linear"):
        RosaLinear.from_linear(nn.Embedding(4, 4))
    with pytest.raises(ValueError, match="no values"):
        RosaLinear.from_linear(nn.Linear(9, 9, device="meta"))
    base = linear()
    base.weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="not finite"):
        RosaLinear.from_linear(base, r=R)
    with pytest.raises(ValueError, match=r"got 409 \(r=0\.1 of 4096\)"):
        subspace_rank(0.1, 4096, 4096)
    assert check_subspace_rank("r", 256) == 256
    expanded = nn.Linear(K, K)
    expanded.weight = nn.Parameter(torch.randn(1, K).expand(K, K))
    with pytest.raises(
        ValueError, match=r"base: elements of the weight share memory \(shape \[12, 12\], strides \(0, 1\)"
    ):
        RosaLinear.from_linear(expanded, r=R)
    view = nn.Linear(K, N)
    view.weight = nn.Parameter(torch.randn(N, 2 * K)[:, ::2])
    x = torch.randn(2, K)
    y = view(x).detach()
    torch.testing.assert_close(RosaLinear.from_linear(view, r=R)(x), y)


def pruned(base):
    prune.l1_unstructured(base, "weight", amount=0.5)
    return base


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize(
    "computed",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        pruned,
    ],
)
def test_weights_that_are_computed_from_others_are_refused(computed):
    base = computed(linear()).eval()
    x = torch.randn(2, K)
    y = base(x)
    with pytest.raises(TypeError, match=r"base: the weight of this \w+ is no parameter but computed from others"):
        RosaLinear.from_linear(base, r=R)
    assert torch.equal(base(x), y) and all(p.requires_grad for p in base.parameters())


def test_defaults_are_the_released_codes():
    policy = SubspacePolicy()
    assert (policy.split, policy.sample, policy.resample_every) == ("us_v", "random", "epoch")
