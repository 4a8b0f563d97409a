"""The structured ops: one contract for all of them, the 2x rule on every backend of this machine, and bad input.

The oracles are dense matrices written down entry by entry, in float64, apart from the package's own code.
"""

import pytest
import torch
from peft_fused.triton_kernels.problem import Gpu

import peft_fused
from peft_fused.ops import native, structured
from peft_fused.ops.dropout import dropout_threshold, keep_mask
from peft_fused.ops.structured import engine, fft, maps, materialized
from peft_fused.ops.structured.engine import STRUCTURES
from peft_fused.ops.structured.plan import StructuredProblem, fft_lengths, plan_structured

OPS = {kind: getattr(structured, f"{kind}_matmul") for kind in STRUCTURES}
REFERENCES = {kind: getattr(structured, f"{kind}_matmul_reference") for kind in STRUCTURES}
NODES = [True, False] if native.module is not None else [False]
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


def circulant_matrix(c):
    n = c.shape[0]
    return torch.stack([torch.stack([c[(i - j) % n] for j in range(n)]) for i in range(n)])


def skew_matrix(h):
    n = h.shape[0]
    rows = [[h[i - j] if i >= j else -h[n + i - j] for j in range(n)] for i in range(n)]
    return torch.stack([torch.stack(row) for row in rows])


def toeplitz_matrix(col, row):
    n, k = col.shape[0], row.shape[0]
    rows = [[col[i - j] if i >= j else row[j - i] for j in range(k)] for i in range(n)]
    return torch.stack([torch.stack(row) for row in rows])


def matrix(kind, p, q=None):
    """Dense truth, differentiable."""
    if kind == "circulant":
        return circulant_matrix(p)
    if kind == "skew_circulant":
        return skew_matrix(p)
    if kind == "toeplitz":
        return toeplitz_matrix(p, q)
    if kind == "toeplitz_product":
        return toeplitz_matrix(q, q) @ toeplitz_matrix(p, p)
    if kind == "kronecker":
        return torch.kron(q, p)
    return sum(circulant_matrix(g) @ skew_matrix(h) for g, h in zip(p, q, strict=True))


def parameters(kind, n, dtype=F64):
    normal = lambda *shape: torch.randn(*shape, dtype=dtype).requires_grad_()  # noqa: E731
    shapes = {
        "circulant": [(n,)],
        "skew_circulant": [(n,)],
        "toeplitz": [(n,), (n + 3,)],
        "toeplitz_product": [(n,), (n,)],
        "kronecker": [(n, 3), (2, n + 1)],
        "ldr": [(2, n), (2, n)],
    }[kind]
    return [normal(*shape) for shape in shapes]


@pytest.fixture(params=NODES, ids=lambda native: "C++" if native else "Python")
def node(request):
    with peft_fused.use_backend(None, native=request.param):
        yield request.param


@pytest.mark.parametrize("rows", [3, 700])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 22])
@pytest.mark.parametrize("kind", OPS)
def test_output_and_gradients_are_those_of_the_dense_matrix(kind, n, rows, node):
    parts = parameters(kind, n)
    M = matrix(kind, *parts)
    x = torch.randn(rows, M.shape[1], dtype=F64, requires_grad=True)
    add = torch.randn(rows, M.shape[0], dtype=F64, requires_grad=True)
    y = OPS[kind](x, *parts, add=add, scale=0.7)
    truth = add + 0.7 * x @ M.mT
    torch.testing.assert_close(y, truth, rtol=1e-10, atol=1e-10)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, add, *parts], dy)
    expected = torch.autograd.grad(truth, [x, add, *parts], dy)
    for grad, true in zip(found, expected, strict=True):
        torch.testing.assert_close(grad, true, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(REFERENCES[kind](x, *parts, add=add, scale=0.7), truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [1, 6, 97, 128])
@pytest.mark.parametrize("kind", OPS)
def test_contract_of_a_linear_map(kind, n, node):
    """<y, M x> = <M^T y, x>; dx is the transposed map; the dense form of the transpose is the transposed dense form."""
    op, parts = OPS[kind], parameters(kind, n)
    inputs, outputs = (parts[1].shape[0], n) if kind == "toeplitz" else (n, n)
    if kind == "kronecker":
        inputs, outputs = 3 * (n + 1), 2 * n
    M = structured.dense(op, inputs, *parts)
    assert M.shape == (outputs, inputs)
    torch.testing.assert_close(structured.dense(op, outputs, *parts, transposed=True), M.mT, rtol=1e-9, atol=1e-9)
    x = torch.randn(5, inputs, dtype=F64, requires_grad=True)
    y = torch.randn(5, outputs, dtype=F64)
    out = op(x, *parts)
    back = op(y, *parts, transposed=True)
    torch.testing.assert_close((y * out).sum(), (back * x).sum())
    torch.testing.assert_close(torch.autograd.grad(out, x, y)[0], back, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("circulant", 4, torch.ones(4)), "op must be an op of peft_fused.ops.structured, .* got 'circulant'"),
        ((structured.circulant_matmul, 4), "parameters must be the op's, .* got none"),
        ((structured.toeplitz_matmul, 4, torch.ones(4), [1.0]), "parameters must be the op's, .* got Tensor, list"),
    ],
)
def test_dense_names_what_is_wrong(arguments, message):
    with pytest.raises(TypeError, match=message):
        structured.dense(*arguments)


@pytest.mark.parametrize("rectangle", [(9, 4), (4, 9), (1, 9), (9, 1), (150, 100)])
def test_rectangular_circulant_pads_or_crops(rectangle, node):
    n_in, n_out = rectangle
    c = torch.randn(max(rectangle), dtype=F64, requires_grad=True)
    M = circulant_matrix(c)[:n_out, :n_in]
    x = torch.randn(300, n_in, dtype=F64, requires_grad=True)
    y = structured.circulant_matmul(x, c, out_features=n_out)
    torch.testing.assert_close(y, x @ M.mT)
    dy = torch.randn_like(y)
    for grad, true in zip(torch.autograd.grad(y, [x, c], dy), torch.autograd.grad(x @ M.mT, [x, c], dy), strict=True):
        torch.testing.assert_close(grad, true, rtol=1e-9, atol=1e-9)
    back = structured.circulant_matmul(dy, c, out_features=n_in, transposed=True)
    torch.testing.assert_close(back, dy @ M)


@pytest.mark.parametrize("factored", [False, True])
def test_block_circulant(factored, node):
    c = torch.randn(3, 2, 5, dtype=F64, requires_grad=True)
    factor = torch.randn(3, 2, 5, dtype=F64, requires_grad=True) if factored else None
    whole = c if factor is None else c * factor
    M = torch.cat([torch.cat([circulant_matrix(block) for block in row], 1) for row in whole], 0)
    x = torch.randn(7, 10, dtype=F64, requires_grad=True)
    y = structured.circulant_matmul(x, c, factor=factor)
    torch.testing.assert_close(y, x @ M.mT)
    leaves = [t for t in (x, c, factor) if t is not None]
    dy = torch.randn_like(y)
    for grad, true in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(x @ M.mT, leaves, dy), strict=True):
        torch.testing.assert_close(grad, true)
    torch.testing.assert_close(structured.circulant_matmul(dy, c, factor=factor, transposed=True), dy @ M)


def test_symmetric_toeplitz_is_one_vector_twice(node):
    t = torch.randn(9, dtype=F64, requires_grad=True)
    x = torch.randn(4, 9, dtype=F64)
    y = structured.toeplitz_matmul(x, t, t)
    M = toeplitz_matrix(t, t)
    torch.testing.assert_close(M, M.mT)
    torch.testing.assert_close(y, x @ M.mT)
    dy = torch.randn_like(y)
    torch.testing.assert_close(*(torch.autograd.grad(out, t, dy)[0] for out in (y, x @ M.mT)))


def test_the_corner_is_the_columns(node):
    col, row = torch.randn(4, dtype=F64), torch.randn(6, dtype=F64, requires_grad=True)
    x = torch.randn(3, 6, dtype=F64)
    y = structured.toeplitz_matmul(x, col, row)
    moved = row.detach().clone()
    moved[0] += 5
    torch.testing.assert_close(y, structured.toeplitz_matmul(x, col, moved), rtol=0, atol=0)
    y.sum().backward()
    assert row.grad[0] == 0 and (row.grad[1:] != 0).all()


def test_low_displacement_rank():
    """rank(Z_1 W - W Z_-1) is at most the number of terms, which is what the structure is named after."""
    G, H = torch.randn(2, 2, 8, dtype=F64)
    W = structured.dense(structured.ldr_matmul, 8, G, H)
    shift = torch.diag(torch.ones(7, dtype=F64), -1)
    cyclic, negacyclic = shift.clone(), shift.clone()
    cyclic[0, -1], negacyclic[0, -1] = 1, -1
    assert torch.linalg.matrix_rank(cyclic @ W - W @ negacyclic) == 2
    assert torch.linalg.matrix_rank(W) == 8


@pytest.mark.parametrize("n", [64, 384, 1000])
@pytest.mark.parametrize("kind", OPS)
def test_large_half_precision_rows_stay_finite(kind, n, node):
    """Entries of 1e4, whose transforms are far beyond fp16's 65504, with a map that keeps the answer in range."""
    parts = [p.detach() for p in parameters(kind, n if kind != "kronecker" else 8)]
    inputs = {"toeplitz": n + 3, "kronecker": 27}.get(kind, n)
    bound = 1e4 * structured.dense(OPS[kind], inputs, *parts).sum(1).abs().max()
    # The map is linear in the first parameter, a Toeplitz map in both together.
    parts = [p * (3e4 / bound) if i == 0 or kind == "toeplitz" else p for i, p in enumerate(parts)]
    parts = [p.half() for p in parts]
    x = torch.full((3, inputs), 1e4).half()
    y = OPS[kind](x, *parts)
    exact = x.double() @ structured.dense(OPS[kind], inputs, *(p.double() for p in parts)).mT
    assert exact.abs().max() < 65504
    torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=60)


@pytest.mark.parametrize("sizes", [(100.0, 1e3, 1e-3), (1e-4, 1e-3, 1.0)])
def test_the_scale_does_not_leave_the_range_of_half_factors(sizes, node):
    """A times the scale over- or underflows fp16 here, while output and gradients are ordinary numbers."""
    factor, scale, rows = sizes
    A, B = (factor * torch.randn(4, 4)).half().requires_grad_(), torch.randn(4, 4).half().requires_grad_()
    x = (rows * torch.randn(8, 16)).half().requires_grad_()
    y, exact = structured.kronecker_matmul(x, A, B, scale=scale), x.double() @ torch.kron(B, A).double().mT * scale
    least = 2.0**-24  # fp16's smallest number
    torch.testing.assert_close(y.double(), exact, rtol=2e-2, atol=max(least, 1e-2 * exact.abs().max().item()))
    dy = torch.ones_like(y) / scale
    found = torch.autograd.grad(y, [x, A, B], dy)
    for grad, true in zip(found, torch.autograd.grad(exact, [x, A, B], dy.double()), strict=True):
        torch.testing.assert_close(grad, true, rtol=2e-2, atol=1e-2 * true.abs().max().item())


@pytest.mark.parametrize("kind", OPS)
def test_dense_form_is_exact_under_autocast(kind):
    parts = parameters(kind, 12, F32)
    inputs = {"toeplitz": 15, "kronecker": 39}.get(kind, 12)
    with torch.autocast("cpu", torch.bfloat16):
        M = structured.dense(OPS[kind], inputs, *parts)
    torch.testing.assert_close(M, matrix(kind, *parts), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", OPS)
def test_dropout_is_the_mask_of_the_seed(kind, node):
    parts = parameters(kind, 12)
    M = matrix(kind, *parts)
    x = torch.randn(9, M.shape[1], dtype=F64, requires_grad=True)
    y = OPS[kind](x, *parts, dropout_p=0.4, seed=77)
    threshold = dropout_threshold(0.4)
    keep = keep_mask(torch.tensor(77), 9, M.shape[1], threshold) * (65536 / (65536 - threshold))
    torch.testing.assert_close(y, (x * keep) @ M.mT)
    dy = torch.randn_like(y)
    for grad, true in zip(
        torch.autograd.grad(y, [x, *parts], dy), torch.autograd.grad((x * keep) @ M.mT, [x, *parts], dy), strict=True
    ):
        torch.testing.assert_close(grad, true)
    torch.manual_seed(3)
    first = OPS[kind](x, *parts, dropout_p=0.4)
    torch.manual_seed(3)
    assert torch.equal(first, OPS[kind](x, *parts, dropout_p=0.4))
    assert not torch.equal(first, OPS[kind](x, *parts, dropout_p=0.4))


@pytest.mark.parametrize("rows", [2, 600])
@pytest.mark.parametrize("kind", OPS)
def test_only_what_is_needed_is_computed_and_saved(kind, rows, node):
    parts = [p.detach() for p in parameters(kind, 16, F32)]
    M = matrix(kind, *parts)
    x, add = torch.randn(rows, M.shape[1]), torch.randn(rows, M.shape[0])
    for wanted in ("x", "p", "q", "add"):
        if wanted == "q" and len(parts) == 1:
            continue
        tensors = {"x": x, "add": add, "p": parts[0], "q": parts[-1]}
        leaf = tensors[wanted].clone().requires_grad_()
        tensors[wanted] = leaf
        args = [tensors["p"]] if len(parts) == 1 else [tensors["p"], tensors["q"]]
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            y = OPS[kind](tensors["x"], *args, add=tensors["add"])
        keeps_x = any(t.data_ptr() == x.data_ptr() and t.shape == x.shape for t in saved)
        assert keeps_x == (wanted in "pq"), wanted
        dy = torch.randn_like(y)
        truth = tensors["add"] + tensors["x"] @ matrix(kind, *args).mT
        torch.testing.assert_close(
            torch.autograd.grad(y, leaf, dy)[0], torch.autograd.grad(truth, leaf, dy)[0], rtol=1e-4, atol=1e-3
        )


# ------------------------------------------------------------------------------------------- plans and the dense form


def problem(kind, m, n, k, sizes, dtype="float32", device="cpu", **more):
    return StructuredProblem(m, n, k, dtype, dtype, device, Gpu(), kind, sizes, False, **more)


def test_plan_chooses_the_method():
    small, large = (problem("circulant", 2048, n, n, (n,)).plan for n in (64, 768))
    assert small.method == "dense" and large == plan_structured(problem("circulant", 2048, 768, 768, (768,)))
    assert (large.method, large.length) == ("fft", 768)
    assert problem("circulant", 2048, 1009, 1009, (1009,)).plan.length == 2025  # a prime is padded, to 7-smooth
    assert problem("toeplitz", 2048, 768, 768, (768, 768)).plan.length == 1536  # not the next power of two, 2048
    assert problem("kronecker", 1, 6, 6, (2, 3, 3, 2)).plan.method == "gemm"
    with pytest.raises(ValueError, match="hankel"):
        plan_structured(problem("hankel", 1, 1, 1, (1,)))


def test_the_dense_form_on_a_gpu_is_chosen_by_arithmetic():
    """Where two GEMMs and the matrix cost less than one and a half convolutions of the kernels' length."""

    def method(m, n, k=None, dtype="bfloat16"):
        kind, sizes = ("circulant", (n,)) if k is None else ("toeplitz", (n, k))
        return problem(kind, m, n, k or n, sizes, dtype, "cuda").plan.method

    assert [method(4096, n) for n in (768, 1024, 1536, 1792, 2048, 3072, 4096)] == ["dense"] * 4 + ["fft"] * 3
    assert method(4096, 2304) == "dense", "a length of 4,096 points, for fewer columns"
    assert method(4096, 2048, 2048) == "dense" and method(4096, 3072, 768) == "dense", "a Toeplitz map is longer"
    assert method(1, 768) == "dense" and method(1, 2048) == "fft", "of few rows, the matrix costs more than the product"
    assert [method(4096, n, dtype="float32") for n in (128, 129)] == ["dense", "fft"]
    assert method(4096, 128, dtype="float64") == "fft" and method(4096, 5000, 5000) == "fft"


def test_the_gradient_of_the_vectors_is_by_triton_where_it_runs(monkeypatch):
    """Beside a dense matrix, in 16-bit types, unless plain torch is asked for: when the forward is decided."""
    ran, x, c = [], torch.randn(4, 8).bfloat16(), torch.randn(8, requires_grad=True)
    for module in (engine.kernels, engine.fft):
        name = module.__name__.rsplit(".", 1)[-1]
        monkeypatch.setattr(
            module, "backward", lambda *args, name=name, **options: ran.append(name) or (None, 0 * c, None)
        )
    monkeypatch.setattr(materialized, "work_dtype", lambda x, p: x.dtype)  # as on a GPU

    def forward():
        return structured.circulant_matmul(x, c).sum()

    against = engine.dispatch._against
    with peft_fused.use_backend(None, native=False):
        forward().backward()
        monkeypatch.setattr(engine.dispatch, "_against", lambda b, p: () if b == "triton" else against(b, p))
        engine.dispatch.forget()
        forward().backward()
    with peft_fused.use_backend("torch", native=False):
        y = forward()
    y.backward()
    engine.dispatch.forget()
    assert ran == ["fft", "kernels", "fft"]


def test_a_product_takes_its_factor():
    a, b = torch.randn(5, 7, dtype=F64), torch.randn(7, 3, dtype=F64)
    for scale in (0.7, torch.tensor(0.7)):
        torch.testing.assert_close(materialized._product(a, b, scale), 0.7 * a @ b)
    # On another device the sum that it is added to is not read.
    assert materialized._product(a.to("meta"), b.to("meta"), 0.7).shape == (5, 3)


def test_a_cuda_problem_is_explained_without_a_gpu():
    cuda = problem("circulant", 4096, 4096, 4096, (4096,), "bfloat16", "cuda")
    assert cuda.preference()[0] == "triton"
    too_long = problem("toeplitz", 4096, 9000, 9000, (9000, 9000), "bfloat16", "cuda")
    assert "8192" in too_long.limits("cuda")[0] and too_long.limits("triton")
    assert "torch.fft" in problem("circulant", 1, 6, 4, (3, 2, 2), device="cuda").limits("triton")[0]


@pytest.mark.parametrize("kind", ["circulant", "skew_circulant", "toeplitz"])
@pytest.mark.parametrize("n", [1, 5, 8])
def test_dense_and_fft_agree(kind, n):
    p = torch.randn(n, dtype=F64)
    q = torch.randn(n + 1, dtype=F64) if kind == "toeplitz" else None
    k = n + 2 if kind == "toeplitz" else n
    M = maps.dense(kind, p, q, n, k)
    x, dy = torch.randn(6, k, dtype=F64), torch.randn(6, n, dtype=F64)
    length = fft_lengths(kind, maps.sizes_of(kind, p.shape, q if q is None else q.shape)).torch
    options = dict(kind=kind, scale=1.0, threshold=0, seed=None, length=length)
    y = fft.forward(x, p, q, None, n=n, transposed=False, **options)
    torch.testing.assert_close(y, x @ M.mT)
    _, dp, dq = fft.backward(dy, x, p, q, k=k, needs=(True, True, q is not None), **options)
    folded = maps.fold_dense(kind, dy.mT @ x, p, q)
    torch.testing.assert_close(dp, folded[0])
    if q is not None:
        torch.testing.assert_close(dq, folded[1])


class TestDenseCache:
    """The matrix of trained vectors is made once per optimizer step, and never used when it is out of date."""

    def call(self, c):
        return structured.circulant_matmul(torch.eye(8), c)

    def made(self, monkeypatch):
        count = []
        make = maps.dense
        monkeypatch.setattr(maps, "dense", lambda *args: count.append(1) or make(*args))
        return count

    def test_once_per_step(self, monkeypatch, node):
        count, c = self.made(monkeypatch), torch.nn.Parameter(torch.randn(8))
        for _ in range(3):
            self.call(c)
        assert len(count) == 1
        optimizer = torch.optim.SGD([c], lr=0.1)
        self.call(c).square().sum().backward()
        optimizer.step()
        y = self.call(c)
        assert len(count) == 2
        torch.testing.assert_close(y, circulant_matrix(c).mT)

    @pytest.mark.parametrize("write", ["data", "swap", "inference"])
    def test_writes_that_versions_do_not_show(self, write, node):
        c = torch.nn.Parameter(torch.randn(8))
        self.call(c)
        if write == "data":
            c.data.mul_(3)
        elif write == "swap":
            c.data = torch.randn(8)
        else:
            with torch.inference_mode():
                c.copy_(torch.randn(8))
        torch.testing.assert_close(self.call(c), circulant_matrix(c.detach()).mT)

    def test_a_temporary_second_parameter(self, monkeypatch, node):
        """Its successor may have its id, its memory and its version; on a GPU values are not compared."""
        monkeypatch.setattr(torch, "equal", lambda a, b: True)
        c, x = torch.nn.Parameter(torch.randn(8)).requires_grad_(False), torch.eye(8)
        for value in range(5):
            factor = torch.full((8,), float(value))
            torch.testing.assert_close(structured.circulant_matmul(x, c, factor=factor), value * circulant_matrix(c).mT)
            del factor
        for value in range(5):
            row = torch.full((8,), float(value))
            torch.testing.assert_close(structured.toeplitz_matmul(x, c, row), toeplitz_matrix(c, row).mT)
            del row

    def test_meta(self):
        c, x = torch.nn.Parameter(torch.empty(8, device="meta")), torch.empty(4, 8, device="meta")
        for _ in range(2):
            assert structured.circulant_matmul(x, c).shape == (4, 8)

    def test_it_goes_with_the_parameter(self):
        c = torch.nn.Parameter(torch.randn(8))
        self.call(c)
        assert c in materialized._made
        before = len(materialized._made)
        del c
        assert len(materialized._made) == before - 1


# ------------------------------------------------------------------------------------------------------------ bad input

X = torch.randn(2, 6)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda s: s.circulant_matmul(X, torch.randn(5)), ValueError, r"x must have 6|x must have 5 features"),
        (lambda s: s.circulant_matmul(X, torch.randn(0)), ValueError, r"c must have shape .* got \[0\]"),
        (lambda s: s.circulant_matmul(X, torch.randn(2, 3)), ValueError, r"c must have shape"),
        (lambda s: s.circulant_matmul(X, torch.randn(5), out_features=4), ValueError, r"max\(K, out_features\) = 6"),
        (lambda s: s.circulant_matmul(X, torch.randn(6), out_features=0), ValueError, r"out_features .* got 0"),
        (lambda s: s.circulant_matmul(X, torch.randn(6), factor=torch.randn(5)), ValueError, r"factor .* got \[5\]"),
        (lambda s: s.circulant_matmul(X, torch.randn(2, 3, 4)), ValueError, r"12 features"),
        (lambda s: s.circulant_matmul(X.cfloat(), torch.randn(6)), TypeError, r"x must be floating point.*complex64"),
        (lambda s: s.circulant_matmul(X, torch.randn(6).cfloat()), TypeError, r"c must be floating point.*complex64"),
        (lambda s: s.circulant_matmul(X.long(), torch.randn(6)), TypeError, r"x must be floating point.*int64"),
        (lambda s: s.circulant_matmul(X, torch.ones(6).long()), TypeError, r"c must be floating point.*int64"),
        (lambda s: s.circulant_matmul(X, torch.randn(6).half()), TypeError, r"c must have x's dtype or float32"),
        (lambda s: s.circulant_matmul([1.0], torch.randn(1)), TypeError, r"x must be a torch.Tensor, got list"),
        (lambda s: s.circulant_matmul(X, [1.0]), TypeError, r"c must be a torch.Tensor, got list"),
        (lambda s: s.circulant_matmul(torch.randn(2, 0), torch.randn(6)), ValueError, r"at least one feature"),
        (lambda s: s.circulant_matmul(torch.tensor(1.0), torch.randn(1)), ValueError, r"0-d"),
        (lambda s: s.circulant_matmul(X, torch.randn(6), add=torch.randn(2, 5)), ValueError, r"add must have shape"),
        (lambda s: s.circulant_matmul(X, torch.randn(6), scale="2"), TypeError, r"scale must be a number"),
        (lambda s: s.circulant_matmul(X, torch.randn(6), scale=float("nan")), ValueError, r"scale must be finite"),
        (lambda s: s.circulant_matmul(X, torch.randn(6), dropout_p=1.0), ValueError, r"dropout_p must be in \[0, 1\)"),
        (lambda s: s.circulant_matmul(X, torch.randn(6), transposed=1), TypeError, r"transposed must be True or False"),
        (lambda s: s.skew_circulant_matmul(X, torch.randn(7)), ValueError, r"x must have 7 features"),
        (lambda s: s.toeplitz_matmul(X, torch.randn(4), torch.randn(5)), ValueError, r"5 features .*row"),
        (lambda s: s.toeplitz_matmul(X, torch.randn(4, 1), torch.randn(6)), ValueError, r"col must have shape \[N\]"),
        (lambda s: s.toeplitz_matmul(X, torch.randn(4), torch.randn(6).half()), TypeError, r"row must .*col's dtype"),
        (lambda s: s.toeplitz_product_matmul(X, torch.randn(6), torch.randn(5)), ValueError, r"b must have a's shape"),
        (lambda s: s.kronecker_matmul(X, torch.randn(2, 2), torch.randn(2, 2)), ValueError, r"4 features .*A .*B"),
        (lambda s: s.kronecker_matmul(X, torch.randn(2), torch.randn(2, 2)), ValueError, r"A must have shape"),
        (lambda s: s.ldr_matmul(X, torch.randn(0, 6), torch.randn(0, 6)), ValueError, r"G must have shape \[q, n\]"),
        (lambda s: s.ldr_matmul(X, torch.randn(2, 6), torch.randn(1, 6)), ValueError, r"H must have G's shape"),
        (lambda s: s.ldr_matmul(X, torch.randn(6), torch.randn(6)), ValueError, r"G must have shape"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message, node):
    with pytest.raises(error, match=message):
        call(structured)


def test_a_forced_backend_that_cannot_run_says_why(every_backend):
    with peft_fused.use_backend("triton"), pytest.raises(RuntimeError, match="need a CUDA device"):
        structured.circulant_matmul(X, torch.randn(6))
    with peft_fused.use_backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' cannot run ldr"):
        structured.ldr_matmul(X, torch.randn(1, 6), torch.randn(1, 6))
    text = str(peft_fused.explain(structured.structured_problem("circulant", X, torch.randn(6), None, 6, False)))
    assert text.startswith("circulant [2, 6] -> [2, 6]") and "triton: x is on cpu" in text
