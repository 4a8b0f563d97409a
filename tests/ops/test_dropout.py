"""The mask is a function of seed and position: known values, statistics, and the C++ twin bit for bit."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from peft_fused.ops import native
from peft_fused.ops.dropout import drop, dropout_threshold, keep_mask, keep_scale

WORD = 0xFFFFFFFF


def philox_by_hand(counter, key, rounds=7):
    """Philox-4x32 in Python integers, as the paper's figure has it."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & WORD, (p0 >> 32) ^ c[3] ^ k[1], p0 & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


def test_ten_rounds_by_hand_match_the_published_vector():
    """Known answer of Random123 for zero counter and key: the oracle below is the published function."""
    assert philox_by_hand([0] * 4, [0, 0], rounds=10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63)])
def test_mask_is_philox(seed):
    rows, columns, threshold = 3, 21, 30000
    mask = keep_mask(torch.tensor(seed), rows, columns, threshold, first_row=7)
    bits = seed & (2**64 - 1)
    for m in range(rows):
        for k in range(columns):
            words = philox_by_hand([k // 8, m + 7, 0, 0], [bits & WORD, bits >> 32])
            assert mask[m, k] == ((words[(k % 8) // 2] >> (16 * (k % 2))) & 0xFFFF >= threshold)


@pytest.mark.skipif(native.module is None, reason=native.why_missing or "-")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 7, 8, 127, 128, 130, 1000])
def test_cpp_drops_the_same_elements(dtype, columns):
    x = torch.randn(33, columns).to(dtype)
    seed, threshold = torch.tensor(987654321987), 20000
    want = torch.where(keep_mask(seed, *x.shape, threshold, 5), x.double() * keep_scale(threshold), 0.0).to(dtype)
    got = native.module.drop(x, seed, threshold, 5)
    assert torch.equal(got == 0, want == 0)
    torch.testing.assert_close(got, want)


@pytest.mark.skipif(native.module is None, reason=native.why_missing or "-")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_cpp_drops_what_is_not_finite_and_keeps_it(dtype):
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0]).to(dtype).repeat(5, 200)
    seed, threshold = torch.tensor(11), 30000
    kept = keep_mask(seed, *x.shape, threshold)
    got = native.module.drop(x, seed, threshold, 0)
    assert torch.equal(got[~kept], torch.zeros_like(got[~kept]))
    torch.testing.assert_close(got[kept], x[kept], equal_nan=True)


THREADS = """
import os, torch
from peft_fused.ops import native
threads = lambda: len(os.listdir("/proc/self/task"))
x, seed = torch.ones(512, 4096), torch.tensor(5)
torch.set_num_threads(threads() + 4)  # which starts other threads than those that the next call starts
before = threads()
many = native.module.drop(x, seed, 20000, 0)
assert threads() > before, before
torch.set_num_threads(1)
assert torch.equal(many, native.module.drop(x, seed, 20000, 0))
"""


@pytest.mark.skipif(native.module is None, reason=native.why_missing or "-")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_cpp_runs_on_torchs_threads():
    """Without the compiler's flag for it at::parallel_for is a plain loop, and nothing says so."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", THREADS], check=True)


def test_keep_rate_and_independence():
    p, threshold = 0.25, dropout_threshold(0.25)
    masks = torch.stack([keep_mask(torch.tensor(s), 256, 512, threshold) for s in range(4)]).double()
    n = masks[0].numel()
    sigma = (p * (1 - p) / n) ** 0.5
    assert all(abs(mask.mean() - (1 - p)) < 5 * sigma for mask in masks)
    centred = masks.flatten(1) - (1 - p)
    correlation = (centred @ centred.t()) / n / (p * (1 - p))
    assert (correlation - torch.eye(4)).abs().max() < 5 / n**0.5
    along = (centred[:, :-1] * centred[:, 1:]).mean() / (p * (1 - p))
    assert abs(along) < 5 / (4 * n) ** 0.5


def test_scale_keeps_the_mean():
    for p in (1e-4, 0.1, 0.5, 0.999):
        threshold = dropout_threshold(p)
        assert abs((65536 - threshold) / 65536 * keep_scale(threshold) - 1) < 1e-12
    assert dropout_threshold(0.0) == 0 and dropout_threshold(0.999999999) == 65535
    x = torch.ones(64, 4096)
    assert abs(drop(x, torch.tensor(1), dropout_threshold(0.5)).mean() - 1) < 0.02


# -------------------------------------------------------------------------------------------------- memory and its bits


def negative(t):
    """The values of t as a view that has the negative bit: what lies in memory is -t."""
    return torch._neg_view(-t)


def test_values_are_dropped_not_what_lies_in_memory():
    x, seed = torch.randn(9, 21), torch.tensor(1234567)
    want = drop(x, seed, 20000, 3)
    assert torch.equal(drop(negative(x), seed, 20000, 3), want)
    assert torch.equal(drop(x, negative(seed), 20000, 3), want)
    assert torch.equal(drop(torch.complex(x, -x).conj().imag, seed, 20000, 3), want)
    assert not drop(torch._efficientzerotensor(9, 21), seed, 20000).any()


def freed(t):
    t.untyped_storage().resize_(0)
    return t


def cut(t):
    t.untyped_storage().resize_(t.untyped_storage().nbytes() // 2)
    return t


X, SEED = torch.randn(4, 6), torch.tensor(3)
NO_SEED = torch.empty(0, dtype=torch.int64)
BAD_DROPS = {
    "empty seed": ((X, NO_SEED, 100, 0), ValueError, r"seed must be a 0-d int64 tensor on cpu, got Long \[0\]"),
    "fp32 seed": ((X, torch.tensor(1.0), 100, 0), ValueError, "seed must be a 0-d int64 tensor"),
    "meta seed": ((X, SEED.to("meta"), 100, 0), ValueError, "seed must lie in memory, got a tensor.* on meta"),
    "freed seed": ((X, freed(SEED.clone()), 100, 0), ValueError, "seed must lie in memory.*freed"),
    "threshold too large": ((X, SEED, 65536, 0), ValueError, r"threshold must be in 0\.\.65535, got 65536"),
    "threshold too small": ((X, SEED, -1, 0), ValueError, r"threshold must be in 0\.\.65535, got -1"),
    "meta x": ((X.to("meta"), SEED, 100, 0), ValueError, "x must lie in memory, got a tensor, sizes .* on meta"),
    "freed x": ((freed(X.clone()), SEED, 100, 0), ValueError, "x must lie in memory.*freed"),
    "x in half a storage": ((cut(X.clone()), SEED, 100, 0), ValueError, "x must lie in memory.*too small"),
    "sparse x": ((X.to_sparse(), SEED, 100, 0), ValueError, r"x must be a dense \(strided\) tensor"),
    "fake x": ((FakeTensorMode().from_tensor(X), SEED, 100, 0), ValueError, "x must lie in memory, got a .* subclass"),
    "1-D x": ((X[0], SEED, 100, 0), ValueError, r"x must have shape \[rows, columns\], got \[6\]"),
    "int x": ((X.long(), SEED, 100, 0), TypeError, "x must be floating point, got Long"),
    "first row": ((X, SEED, 100, -1), ValueError, "first_row must be at least 0, got -1"),
}


@pytest.mark.skipif(native.module is None, reason=native.why_missing or "-")
@pytest.mark.parametrize("case", BAD_DROPS)
def test_cpp_refuses_what_it_cannot_read(case):
    arguments, error, told = BAD_DROPS[case]
    with pytest.raises(error, match=told):
        native.module.drop(*arguments)


C = torch.randn(6)
BAD_MAPS = {
    "empty seed": (dict(dropout_p=0.1, seed=NO_SEED), "seed must be a 0-d int64 tensor"),
    "dropout": (dict(dropout_p=1.5, seed=SEED), r"dropout_p must be in \[0, 1\)"),
    "2-D c": (dict(p=X), "c must have 1 dimensions"),
    "0-d x": (dict(x=X[0, 0]), "x must have shape"),
    "structure": (dict(kind="hankel"), "structure is unknown: hankel"),
    "method": (dict(method="gemm"), "method must be gemm for a Kronecker map and for no other"),
    "matrix": (dict(method="dense"), "matrix must be the dense matrix"),
    "tail": (dict(kind="toeplitz"), "factor must be a tensor, got none"),
}


@pytest.mark.skipif(native.module is None, reason=native.why_missing or "-")
@pytest.mark.parametrize("case", BAD_MAPS)
def test_cpp_refuses_maps_it_cannot_read(case):
    changed, told = BAD_MAPS[case]
    call = dict(
        x=X, p=C, q=None, add=None, kind="circulant", out_features=None, scale=1.0, dropout_p=0.0, seed=None,
        transposed=False, names=("c", "factor"),
    )  # fmt: skip

    def run(method="fft", **changed):
        """As if it were decided that the node takes the call."""
        key = native.module.structured({}, *(call | changed).values())
        decision = SimpleNamespace(native=True, plan=(method, 6, 6, None))
        return native.module.structured({key: decision}, *(call | changed).values())

    run()
    with pytest.raises(ValueError, match=told):
        run(**changed)


@pytest.mark.skipif(native.module is None, reason=native.why_missing or "-")
def test_a_call_without_memory_has_no_key():
    rest = (None, None, "circulant", None, 1.0, 0.0, None, False, ("c", "factor"))
    assert isinstance(native.module.structured({}, X, C, *rest), bytes)
    for x, c in ((X.to("meta"), C), (freed(X.clone()), C), (X, freed(C.clone()))):
        assert native.module.structured({}, x, c, *rest) is None
