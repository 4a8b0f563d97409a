"""The FFT kernels (fft_calls.py) at every kind of length: at most twice the error of torch's fp32 FFT."""

import functools
import itertools
import math

import pytest
import torch
from cuda_on_host import THRESHOLD, DeviceError
from fft_calls import (
    INVALID_VALUE,
    UNIT,
    convolve,
    correlate,
    kept,
    plain_convolution,
    plain_correlation,
    radices_of,
    twiddles_of,
)

from peft_fused.ops.accuracy import judge
from peft_fused.ops.dropout import keep_mask, keep_scale
from peft_fused.ops.structured.plan import MAX_CUDA_LENGTH, fast_length

RADICES = (2, 3, 4, 5, 8)
# Each radix alone and repeated, all of them together, as few points as threads of a warp and fewer, the longest.
LENGTHS = [1, 2, 3, 4, 5, 6, 8, 9, 15, 16, 25, 27, 60, 64, 120, 125, 250, 360, 384, 512, 768, 1000, 1024, 1536, 2048]
LONG = [3072, 4096, 5000, 6144, 6250, 6561, 7290, 8192]
MAGNITUDES = [1e30, 1e-30, 1.0, 0.0, 1e4]
# Lengths at which the two rows of a pair are compared: no padding of the last thread's points and some, one warp, many.
PAIRED = [1, 3, 8, 60, 384, 1000, 4096, 8192]


@pytest.fixture
def sound(compiled):
    return compiled(UNIT)


def convolution(library, x, k, n_out, **options):
    """y of the kernel, its threads in one order: test_fft.py has the others."""
    return convolve(library, x, k, n_out, orders=["forwards"], **options)


def correlation(library, x, dy, k, **options):
    dx, partial = correlate(library, x, dy, k, orders=["forwards"], **options)
    return {"dx": dx, "dk": torch.fft.irfft(partial.sum(0), len(k))}


def draws(length, n_in, n_out, rows=5):
    """x, dy, k of an odd number of rows, so that one has no partner. Short rows are drawn often: the errors of a few
    numbers are a coin toss."""
    for _ in range(max(1, 2000 // (rows * length))):
        yield torch.randn(rows, n_in), torch.randn(rows, n_out), torch.randn(length)


def verdicts(run, plain, cases):
    """run against plain, which also gives the truth in float64."""
    truth = [plain(*(t.double() for t in case)) for case in cases]
    got, simple = ([{n: v.double() for n, v in fn(*case).items()} for case in cases] for fn in (run, plain))
    return judge(got, simple, truth, {name: torch.float32 for name in truth[0]})


def check_convolution(library, length, n_in, n_out, conjugate=False, **options):
    return verdicts(
        lambda x, dy, k: {"y": convolution(library, x, k, n_out, conjugate=conjugate, **options)},
        lambda x, dy, k: {"y": plain_convolution(x, k, n_out, conjugate=conjugate)},
        list(draws(length, n_in, n_out)),
    )


def check_correlation(library, length, n_in, n_out, conjugate=False, rows=5, **options):
    return verdicts(
        lambda x, dy, k: correlation(library, x, dy, k, conjugate=conjugate, **options),
        lambda x, dy, k: plain_correlation(x, dy, k, conjugate=conjugate),
        list(draws(length, n_in, n_out, rows)),
    )


@pytest.mark.parametrize("length", [*LENGTHS, *LONG])
def test_convolution(sound, length):
    found = check_convolution(sound, length, length, length)
    assert all(v.ok for v in found), found


@pytest.mark.parametrize("length", [*LENGTHS, *LONG])
def test_correlation(sound, length):
    found = check_correlation(sound, length, length, length)
    assert all(v.ok for v in found), found


@pytest.mark.parametrize("conjugate", [False, True])
@pytest.mark.parametrize(
    ("length", "n_in", "n_out"),
    [(60, 31, 29), (128, 64, 128), (384, 383, 1), (1536, 768, 640), (5000, 2500, 2048)],
)
def test_padding_cropping_conjugate(sound, length, n_in, n_out, conjugate):
    size = (length, n_in, n_out, conjugate)
    found = check_convolution(sound, *size) + check_correlation(sound, *size)
    assert all(v.ok for v in found), found


def test_full_splits(sound):
    """A block adds up its split one pair after the other: 64 of them, as many as fft_correlate_blocks gives it."""
    found = check_correlation(sound, 1000, 1000, 1000, rows=640, blocks=5)
    assert all(v.ok for v in found), found


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
def test_row_counts_and_splits(sound, rows, blocks):
    length = 48
    x, dy, k = torch.randn(rows, 40), torch.randn(rows, 48), torch.randn(length)
    y = convolution(sound, x, k, length)
    torch.testing.assert_close(y, plain_convolution(x, k, length), rtol=1e-5, atol=1e-5)
    got = correlation(sound, x, dy, k, blocks=blocks)
    for name, want in plain_correlation(x, dy, k).items():
        torch.testing.assert_close(got[name], want, rtol=1e-5, atol=1e-4)


def test_rows_at_a_stride_and_unaligned(sound):
    length, wide = 96, torch.randn(7, 131)
    x, dy, k = wide[:, 3:93], torch.randn(96, 7).t().contiguous()[:, 1:], torch.randn(length)
    assert torch.equal(convolution(sound, x, k, 50), convolution(sound, x.contiguous(), k, 50))
    got, want = (correlation(sound, a, b, k) for a, b in ((x, dy), (x.contiguous(), dy.contiguous())))
    assert all(torch.equal(got[name], want[name]) for name in want)


def check_rows(fn, x, k, names):
    """Verdicts of fn(x, k) for the rows of each name, judged alone."""
    length = x.shape[1]

    def named(y):
        groups = {name: [] for name in names}
        for name, row in zip(itertools.cycle(names), y, strict=False):
            groups[name].append(row)
        return {name: torch.stack(rows).double() for name, rows in groups.items()}

    plain, truth = named(plain_convolution(x, k, length)), named(plain_convolution(x.double(), k.double(), length))
    return judge([named(fn(x, k))], [plain], [truth], dict.fromkeys(names, torch.float32))


def packed_convolution(x, k):
    """The control: pairs in plain PyTorch, their rows as they are."""
    y = torch.fft.ifft(torch.fft.fft(torch.complex(x[::2], x[1::2])) * torch.fft.fft(k))
    return torch.stack([y.real, y.imag], 1).flatten(0, 1)


@pytest.mark.parametrize("length", PAIRED)
def test_rows_of_any_magnitude_share_a_transform(sound, length):
    """Each row has the errors that it would have alone, whatever lies beside it."""
    pairs = [*itertools.product([*MAGNITUDES, 1e-40], repeat=2)]
    names = [f"{own} beside {other} as {part}" for a, b in pairs for own, other, part in ((a, b, "re"), (b, a, "im"))]
    scales = torch.tensor(pairs).flatten()[:, None]
    x = (torch.randn(max(1, 400 // length), len(names), length) * scales).flatten(0, 1)
    k = torch.randn(length)
    found = check_rows(lambda x, k: convolution(sound, x, k, length), x, k, names)
    assert all(v.ok for v in found), [v for v in found if not v.ok]
    assert sum(v.error == 0 for v in found) >= 2 * 6  # the zero rows
    spoilt = {v.name for v in check_rows(packed_convolution, x, k, names) if not v.ok}
    # One point is multiplied by a real number, which mixes nothing.
    assert length == 1 or {"1.0 beside 10000.0 as re", "1.0 beside 1e+30 as im"} <= spoilt


@pytest.mark.parametrize("length", [384, 4096, 8192])
def test_rows_with_outliers(sound, length):
    """It is norms that have to be alike: with equal largest elements the row of a single one would drown."""
    names = ["dense", "sparse", "sparse again", "dense again"]
    x = torch.randn(2, 4, length).clamp(-1, 1)
    x[:, 1:3] *= 1e-6
    x[:, 1:3, length // 3] = 1
    x[:, 3, 7] = 1e4
    k = torch.randn(length)
    found = check_rows(lambda x, k: convolution(sound, x, k, length), x.flatten(0, 1), k, names)
    assert all(v.ok for v in found), found
    assert not all(v.ok for v in check_rows(packed_convolution, x.flatten(0, 1), k, names))


@pytest.mark.parametrize("length", [1, 60, 1000, 8192])
def test_powers_of_two_change_no_bit(sound, length):
    """Up to the largest numbers there are; the kernel is small, so that results stay in range."""
    x, dy, k = torch.randn(2, length).clamp(-1.9, 1.9), torch.randn(2, length), torch.randn(length) / (16 * length)
    want = convolution(sound, x, k, length)
    want_dx = correlation(sound, dy, x, k)["dx"]
    for exponents in itertools.product([-90, -1, 0, 13, 127], repeat=2):
        factors = torch.tensor(exponents, dtype=torch.float64).exp2()[:, None]
        scaled = (x * factors).float()
        assert scaled.isfinite().all()
        assert torch.equal(convolution(sound, scaled, k, length), (want * factors).float())
        assert torch.equal(correlation(sound, dy, scaled, k)["dx"], (want_dx * factors).float())


@pytest.mark.parametrize("length", [60, 1000])
def test_correlation_of_rows_of_any_magnitude(sound, length):
    """The sum has what each row of a pair contributes, be it of a large x or of a large dy."""
    signals = [torch.randn(2, length) for _ in range(2 * max(1, 180 // length))]
    k = torch.randn(length)
    for scales in itertools.product(MAGNITUDES, repeat=4):
        if max(scales[0] * scales[2], scales[1] * scales[3]) > 1e31:
            continue  # out of the range of fp32
        of_x, of_dy = torch.tensor(scales).view(2, 2, 1)
        cases = [(of_x * x, of_dy * dy, k) for x, dy in zip(signals[::2], signals[1::2], strict=True)]
        found = verdicts(
            lambda x, dy, k: {"dk": correlation(sound, x, dy, k, blocks=1)["dk"]},
            lambda x, dy, k: {"dk": plain_correlation(x, dy, k)["dk"]},
            cases,
        )
        assert all(v.ok for v in found), (scales, found)


@pytest.mark.parametrize("length", [384, 1000, 8192])
@pytest.mark.parametrize("scales", [(1e30, 1e-30), (1e-30, 1e30), (1e4, 1e-4), (1e-18, 1.0)])
def test_large_x_beside_large_dy(sound, length, scales):
    """Both rows count the same in dk, and each row of dx is as right as alone."""
    of_x = torch.tensor(scales)[:, None]
    cases = [(x * of_x, dy / of_x, k) for x, dy, k in draws(length, length, length, rows=2)]

    def by_row(fn):
        def named(*case):
            found = fn(*case)
            return {"dk": found["dk"], "dx[0]": found["dx"][:1], "dx[1]": found["dx"][1:]}

        return named

    found = verdicts(by_row(functools.partial(correlation, sound)), by_row(plain_correlation), cases)
    assert all(v.ok for v in found), found
    # The control: the second row at half its weight.
    halved = verdicts(
        lambda x, dy, k: {"dk": correlation(sound, x, dy * torch.tensor([[1.0], [0.5]]), k)["dk"]},
        lambda x, dy, k: {"dk": plain_correlation(x, dy, k)["dk"]},
        cases,
    )
    assert not any(v.ok for v in halved)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 3, 4])
@pytest.mark.parametrize("length", [1, 60, 1000])
def test_non_finite_rows_stay_alone(sound, length, row, bad):
    """NaN wherever such a row counts; everything else is what it is beside a row of zeros."""
    x, dy, k = torch.randn(5, length), torch.randn(5, length), torch.randn(length)
    others = [i for i in range(5) if i != row]
    spoilt, without = x.clone(), x.clone()
    spoilt[row, length // 2], without[row] = bad, 0
    y = convolution(sound, spoilt, k, length)
    assert y[row].isnan().all()
    assert torch.equal(y[others], convolution(sound, without, k, length)[others])

    run = functools.partial(correlate, sound, k=k, blocks=3, orders=["forwards"])
    dx, sums = run(spoilt, dy)
    dx_without, sums_without = run(without, dy)
    assert torch.equal(dx, dx_without)
    block = row // 2
    assert torch.view_as_real(sums[block]).isnan().all()
    assert torch.equal(sums[[i for i in range(3) if i != block]], sums_without[[i for i in range(3) if i != block]])

    dx, sums = run(dy, spoilt)
    assert dx[row].isnan().all() and torch.equal(dx[others], run(dy, without)[0][others])
    assert torch.view_as_real(sums[block]).isnan().all()


def test_what_dropout_drops_need_not_be_finite(sound):
    length, seed = 60, 5
    x, k = torch.randn(4, length), torch.randn(length)
    dropped = ~keep_mask(torch.tensor(seed), *x.shape, THRESHOLD)
    assert dropped.any(1).all()
    y = convolution(sound, x.masked_fill(dropped, math.inf), k, length, seed=seed)
    assert torch.equal(y, convolution(sound, x, k, length, seed=seed))


def test_plan(sound):
    smooth = []
    for length in range(1, 8193):
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            radices = radices_of(sound, length)
            assert math.prod(radices) == length and set(radices) <= set(RADICES) and len(radices) <= 8
            assert radices.count(4) + radices.count(2) <= 1
            smooth.append(length)
        else:
            with pytest.raises(DeviceError, match=INVALID_VALUE):
                radices_of(sound, length)
    # What the plan of a structured map pads to is a length that the kernels take.
    assert smooth[-1] == MAX_CUDA_LENGTH
    assert [fast_length(least, 5) for least in (1, 7, 97, 8191, 8192)] == [1, 8, 100, 8192, 8192]
    assert all(fast_length(length, 5) == length for length in smooth)
    for length in (-8, 0, 8640):
        for refused in (radices_of, twiddles_of):
            with pytest.raises(DeviceError, match=INVALID_VALUE):
                refused(sound, length)
    assert [radices_of(sound, radix) for radix in RADICES] == [[radix] for radix in RADICES]


@pytest.mark.parametrize("length", [1, 8, 60, 1000, 8192])
def test_twiddles_are_roots_of_unity_to_the_last_bit(sound, length):
    table, span = twiddles_of(sound, length), 1
    want = torch.ones(length, dtype=torch.complex128)
    for radix in radices_of(sound, length):
        for r in range(1, radix):
            angle = -2 * math.pi * r * torch.arange(span, dtype=torch.float64) / (span * radix)
            want[span * r : span * (r + 1)] = torch.polar(torch.ones_like(angle), angle)
        span *= radix
    assert span == length
    torch.testing.assert_close(table.to(torch.complex128), want, rtol=2**-24, atol=1e-16)


@pytest.mark.parametrize("length", [6, 9, 16, 25, 60, 384, 1000, 4096, 8192])
@pytest.mark.parametrize("at", ["first", "middle", "last"])
def test_one_wrong_twiddle_fails(sound, length, at):
    """The control: a single entry, off by a thousandth."""
    used = radices_of(sound, length)[0]  # entries before belong to the first pass
    entry = {"first": used, "middle": (used + length) // 2, "last": length - 1}[at]
    twiddles = twiddles_of(sound, length)
    twiddles[entry] *= 1.001
    for check in (check_convolution, check_correlation):
        assert not any(v.ok for v in check(sound, length, length, length, twiddles=twiddles))


@pytest.mark.parametrize("length", [60, 1000])
def test_dropout_is_that_of_every_backend(sound, length):
    x, dy, k = next(draws(length, length - 3, length - 5, rows=9))
    seed = -123456789
    dropped, keep = kept(x, seed), keep_mask(torch.tensor(seed), *x.shape, THRESHOLD)
    assert torch.equal(convolution(sound, x, k, length, seed=seed), convolution(sound, dropped, k, length))
    got, want = correlation(sound, x, dy, k, seed=seed), correlation(sound, dropped, dy, k)
    assert torch.equal(got["dk"], want["dk"])
    assert torch.equal(got["dx"], torch.where(keep, want["dx"] * keep_scale(THRESHOLD), 0.0))
    # The same dx from the convolution kernel, with something below it.
    base, masked = torch.randn_like(x), {"conjugate": True, "mask_output": True, "seed": seed}
    alone = convolution(sound, dy, k, x.shape[1], **masked)
    assert torch.equal(alone, got["dx"])
    assert torch.equal(convolution(sound, dy, k, x.shape[1], add=base, **masked), base + alone)
