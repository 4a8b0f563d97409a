"""What lies in memory, and what does not: lazy bits, freed storage, tensors that hold no numbers yet or none at all."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import peft_fused
from peft_fused.ops import lowrank_linear, structured
from peft_fused.ops.cases import OPS, make_bottleneck, make_lowrank, make_structured

both_nodes = pytest.mark.parametrize("native", [True, False], ids=["node", "python"])


def negative(t):
    """The values of t as a view with the negative bit: what lies in memory is -t."""
    return torch._neg_view(-t)


def calls():
    """One call of every op with all its tensors, dropout and tensors for its controls where it has them."""
    index = torch.tensor
    drops = dict(dropout_p=0.3, seed=index(1234567), scale=torch.tensor(1.5))
    yield make_lowrank("lowrank_linear", 9, 12, 10, 4, uv=True, rank=index(3), **drops)
    yield make_lowrank("lowrank_linear", 9, 12, 10, 4, adapter_dtype=torch.float32, dtype=torch.bfloat16, **drops)
    yield make_lowrank("lowrank", 9, 12, 10, 4, experts=(3, 2), expert=(index(2), index(1)), frozen=True, **drops)
    yield make_bottleneck(
        8, 12, 10, 4, experts=(3, 2), expert=(index([2, 0]), index(1)), residual="other", scale=index(1.5)
    )
    yield make_structured("circulant", 9, 12, factor=True, add=True, **drops)
    yield make_structured("circulant", 9, 12, add=True, transposed=True, **drops)
    yield make_structured("skew_circulant", 9, 12, add=True, **drops)
    yield make_structured("toeplitz", 9, 12, 10, add=True, **drops)
    yield make_structured("toeplitz_product", 9, 12, add=True, **drops)
    yield make_structured("kronecker", 9, 3, 4, 2, 5, add=True, **drops)
    yield make_structured("ldr", 9, 2, 12, add=True, **drops)
    # Enough rows and features for a transform where a few go to a dense product.
    yield make_structured("circulant", 160, 384, add=True, **drops)


CASES = {f"{i} {case.op}": case for i, case in enumerate(calls())}
each_case = pytest.mark.parametrize("name", CASES)


def run(case, tensors, options, dy):
    y = OPS[case.op].fn(**tensors, **options)
    grads = torch.autograd.grad(y, [case.tensors[name] for name in case.wrt], dy, allow_unused=True)
    return {"y": y.detach(), **dict(zip(case.wrt, grads, strict=True))}


@both_nodes
@each_case
def test_a_lazy_tensor_counts_as_its_values(name, native):
    """Everything at once, then each alone: arguments, controls, seed and the gradient that backward gets."""
    case = CASES[name]
    dy = torch.randn(*case.input.shape[:-1], case.outputs).to(case.input.dtype)
    lazily = lambda value: negative(value) if isinstance(value, torch.Tensor) else value  # noqa: E731
    with peft_fused.use_backend(None, native=native):
        want = run(case, case.tensors, case.options, dy)
        changed = {"dy": (case.tensors, case.options, negative(dy))}
        everywhere = [{key: lazily(value) for key, value in part.items()} for part in (case.tensors, case.options)]
        everywhere[1] |= {
            key: tuple(map(lazily, value)) for key, value in case.options.items() if isinstance(value, tuple)
        }
        changed["all"] = (*everywhere, negative(dy))
        for position, part in enumerate((case.tensors, case.options)):
            for key in part:
                both = [case.tensors, case.options]
                both[position] = part | {key: everywhere[position][key]}
                changed[key] = (*both, dy)
        for key, call in changed.items():
            for part, value in run(case, *call).items():
                assert (value is None) == (want[part] is None)
                if value is not None:
                    # Another layout of the same values may be added up in another order.
                    torch.testing.assert_close(value, want[part], msg=lambda text, at=(key, part): f"{at}: {text}")


@both_nodes
def test_zeros_without_memory_are_zeros(native):
    case = CASES["0 lowrank_linear"]
    zeros = torch._efficientzerotensor(*case.input.shape)
    with peft_fused.use_backend(None, native=native):
        want = run(case, case.tensors, case.options, torch.zeros(9, 10))
        got = run(case, case.tensors, case.options, torch._efficientzerotensor(9, 10))
        assert all(torch.equal(got[part], want[part]) for part in want)
        y, like = (lowrank_linear(**case.tensors | {"x": x}, **case.options) for x in (zeros, torch.zeros(9, 12)))
        assert torch.equal(y, like)


def freed(t):
    t = t.detach().clone()
    t.untyped_storage().resize_(0)
    return t


def cut(t):
    t = t.detach().clone()
    t.untyped_storage().resize_(t.untyped_storage().nbytes() - 1)
    return t


def nested(t):
    return torch.nested.nested_tensor([t.detach(), t.detach()])


def fake(t):
    return FakeTensorMode().from_tensor(t.detach())


REFUSED = {
    "freed": (freed, "must lie in memory.*freed or is too small"),
    "cut": (cut, "must lie in memory.*freed or is too small"),
    "sparse": (lambda t: t.detach().to_sparse(), r"must be a dense \(strided\) tensor, got layout torch.sparse_coo"),
    "nested": (nested, r"must be a dense \(strided\) tensor, got layout nested"),
    "uninitialised": (
        lambda t: torch.nn.UninitializedParameter(dtype=t.dtype), "must be initialised, got an UninitializedParameter",
    ),
    "fake": (fake, "must be a plain tensor beside a plain (x|h), got a FakeTensor|must be a fake tensor beside a fake"),
}  # fmt: skip


@both_nodes
@pytest.mark.parametrize("kind", REFUSED)
@each_case
def test_what_holds_no_numbers_is_named(name, kind, native):
    case, (change, told) = CASES[name], REFUSED[kind]
    with peft_fused.use_backend(None, native=native):
        for key, tensor in case.tensors.items():
            if tensor is not None:
                # Beside a fake x it is the others that are of the wrong kind.
                named = r"\w+" if kind == "fake" else key
                with pytest.raises((TypeError, ValueError), match=rf"^{named} ({told})"):
                    OPS[case.op].fn(**case.tensors | {key: change(tensor)}, **case.options)
        for key, value in case.options.items():
            if isinstance(value, torch.Tensor) and kind in ("freed", "sparse"):
                with pytest.raises(ValueError, match=rf"^{key} ({told})"):
                    OPS[case.op].fn(**case.tensors, **case.options | {key: change(value)})


@both_nodes
@each_case
def test_inference_tensors_serve_where_backward_does_not_read_them(name, native):
    case = CASES[name]
    for key, tensor in case.tensors.items():
        if tensor is None:
            continue
        with torch.inference_mode():
            made = tensor.clone()
        with peft_fused.use_backend(None, native=native):
            with torch.no_grad():
                OPS[case.op].fn(**case.tensors | {key: made}, **case.options)
            with torch.inference_mode():
                OPS[case.op].fn(**case.tensors | {key: made}, **case.options)
            reads = key not in ("add", "bias", "residual", "down_bias", "up_bias")
            if not reads:
                OPS[case.op].fn(**case.tensors | {key: made}, **case.options)
                continue
            with pytest.raises(ValueError, match=rf"^{key} must not be an inference tensor where backward reads it"):
                OPS[case.op].fn(**case.tensors | {key: made}, **case.options)


@both_nodes
def test_memory_freed_between_forward_and_backward_is_named(native):
    for op, name, tensors in (
        (lowrank_linear, "A", dict(x=(5, 6), weight=(7, 6), A=(2, 6), B=(7, 2))),
        (structured.kronecker_matmul, "A" if native else "p", dict(x=(5, 6), A=(2, 3), B=(4, 2))),
    ):
        leaves = {key: torch.randn(*shape, requires_grad=True) for key, shape in tensors.items()}
        extra = {"bias": None} if op is lowrank_linear else {}
        with peft_fused.use_backend(None, native=native):
            y = op(**leaves, **extra)
            leaves["A"].untyped_storage().resize_(0)
            with pytest.raises(ValueError, match=f"^{name} must lie in memory"):
                y.sum().backward()


@both_nodes
@pytest.mark.parametrize("other", [torch.empty(0, dtype=torch.int64), torch.tensor(3, dtype=torch.int32)], ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if "seed" in CASES[name].options])
def test_a_seed_that_is_none_any_more_is_named(name, other, native):
    case, seed = CASES[name], torch.tensor(5)
    with peft_fused.use_backend("torch", native=native):
        y = OPS[case.op].fn(**case.tensors, **{**case.options, "seed": seed})
        seed.data = other
        with pytest.raises(ValueError, match="seed must be a 0-d int64 tensor on cpu, got"):
            y.sum().backward()


def test_a_map_by_its_tail_names_the_tail():
    x, col = torch.randn(2, 6), torch.randn(3)
    for tail, error, told in (
        (torch.randn(5, dtype=torch.float64), TypeError, "tail must have col's dtype"),
        (torch.randn(5).to("meta"), ValueError, "tail must be on x's device"),
        (torch.randn(5).to_sparse(), ValueError, "tail must be a dense"),
        (torch.ones(5, dtype=torch.int64), TypeError, "tail must be floating point"),
    ):
        with pytest.raises(error, match=told):
            structured.toeplitz_tail(x, col, tail)


@pytest.mark.parametrize("value", [torch.tensor(True), torch.ones(2, dtype=torch.bool), 1, None, "yes"])
def test_transposed_is_a_bool(value):
    for case in CASES.values():
        if case.op in ("circulant", "skew_circulant", "toeplitz", "toeplitz_product", "kronecker", "ldr"):
            with pytest.raises(TypeError, match=r"^transposed must be True or False"):
                OPS[case.op].fn(**case.tensors, **case.options | {"transposed": value})


@both_nodes
@each_case
def test_scale_is_finite_in_the_type_of_the_sums(name, native):
    case = CASES[name]
    with peft_fused.use_backend(None, native=native):
        for scale in (1e39, torch.tensor(-1e39, dtype=torch.float64), -(10**400)):
            with pytest.raises(ValueError, match=r"^scale must be (at most 3\.4028e\+38 in size|finite), got"):
                OPS[case.op].fn(**case.tensors, **case.options | {"scale": scale})
        doubles = case.to(torch.float64)
        assert OPS[case.op].fn(**doubles.tensors, **doubles.options | {"scale": 1e39}).isfinite().all()


def test_a_base_product_needs_its_weight():
    with pytest.raises(TypeError, match=r"^weight must be a torch.Tensor, got None: lowrank is the op without a base"):
        lowrank_linear(torch.ones(4, 6), None, None, torch.ones(3, 6), torch.ones(5, 3))
