"""What is particular to the structured ops on a CUDA device; see test_gpu.py for what all ops have to do there."""

import pytest
import torch

import peft_fused
from peft_fused.ops import dispatch, structured
from peft_fused.ops.accuracy import wrong
from peft_fused.ops.cases import OPS, make_structured
from peft_fused.ops.dropout import dropout_threshold, keep_mask

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
every_backend = pytest.mark.parametrize("backend", ("torch", "triton", "cuda"))


def skip_unless(backend, case):
    if against := dispatch.why_not(backend, OPS[case.op].problem(case)):
        pytest.skip("; ".join(against))


@every_backend
@pytest.mark.parametrize(
    "kind, sizes", [("circulant", (3072,)), ("toeplitz", (768, 3072)), ("kronecker", (32, 24) * 2)]
)
def test_many_rows_of_a_real_layer(kind, sizes, backend):
    """Enough rows for several tiles per program and several partial sums, of which one could be lost."""
    case = make_structured(kind, 4097, *sizes, dtype=torch.bfloat16, device=DEVICE)
    skip_unless(backend, case)
    with peft_fused.use_backend(backend):
        assert not wrong(case)


@every_backend
def test_dropout_mask_of_a_long_transform_is_exact(backend):
    """The circulant matrix of a unit vector is the identity, so the op returns its mask."""
    m, n, p = 300, 1536, 0.3
    skip_unless(backend, make_structured("circulant", m, n, device=DEVICE))
    x, unit = torch.ones(m, n, device=DEVICE, requires_grad=True), torch.zeros(n, device=DEVICE)
    unit[0] = 1
    with peft_fused.use_backend(backend):
        y = structured.circulant_matmul(x, unit, dropout_p=p, seed=torch.tensor(2**40 + 3, device=DEVICE))
    (dx,) = torch.autograd.grad(y.sum(), [x])
    keep = keep_mask(torch.tensor(2**40 + 3), m, n, dropout_threshold(p)).to(DEVICE)
    assert torch.equal(y.abs() > 0.5, keep) and torch.equal(dx.abs() > 0.5, keep)


@every_backend
def test_rows_of_any_magnitude_share_a_tile(backend):
    x = torch.randn(4, 1536, device=DEVICE) * torch.tensor([1e30, 1e-30, 1.0, 1e4], device=DEVICE).unsqueeze(1)
    c = torch.randn(1536, device=DEVICE)
    skip_unless(backend, make_structured("circulant", 4, 1536, device=DEVICE))
    with peft_fused.use_backend(backend):
        y = structured.circulant_matmul(x, c)
    exact = structured.circulant_matmul_reference(x.double(), c.double())
    assert ((y - exact).abs().amax(1) / exact.abs().amax(1) < 1e-5).all()


@every_backend
def test_what_a_cuda_graph_trains_is_seen_outside(backend, capture):
    """A replay changes a vector without a word to its version counter, by which a dense matrix is known."""
    skip_unless(backend, make_structured("circulant", 67, 96, device=DEVICE))
    x, c = torch.randn(67, 96, device=DEVICE), torch.randn(96, device=DEVICE, requires_grad=True)

    def step():
        y = structured.circulant_matmul(x, c)
        (gradient,) = torch.autograd.grad(y.square().mean(), [c])
        with torch.no_grad():
            c.sub_(0.1 * gradient)
        return (y,)

    with peft_fused.use_backend(backend):
        replay, _ = capture(step)
        for _ in range(3):
            replay()
            y = structured.circulant_matmul(x, c)
            torch.testing.assert_close(y, structured.circulant_matmul_reference(x, c), rtol=1e-4, atol=1e-4)
