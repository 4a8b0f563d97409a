"""The code of the FFT kernels (csrc/kernels/butterfly.h) on the CPU: at most twice the error of torch's fp32 FFT."""

import itertools
import math

import pytest
import torch

from peft_fused.ops import native
from peft_fused.ops.accuracy import judge
from peft_fused.ops.dropout import drop, dropout_threshold, keep_mask, keep_scale

pytestmark = pytest.mark.skipif(native.module is None, reason=native.why_missing or "-")
RADICES = (2, 3, 4, 5, 8)
# Each radix alone and repeated, all of them together, as few points as threads of a warp and fewer, the longest.
LENGTHS = [1, 2, 3, 4, 5, 6, 8, 9, 15, 16, 25, 27, 60, 64, 120, 125, 250, 360, 384, 512, 768, 1000, 1024, 1536, 2048]
LONG = [3072, 4096, 5000, 6144, 6250, 6561, 7290, 8192]
MAGNITUDES = [1e30, 1e-30, 1.0, 0.0, 1e4]
# Lengths at which the two rows of a pair are compared: no padding of the last thread's points and some, one warp, many.
PAIRED = [1, 3, 8, 60, 384, 1000, 4096, 8192]


def convolution(x, k, length, n_out, conjugate=False):
    """Plain PyTorch in x's dtype."""
    khat = torch.fft.rfft(k, length)
    return torch.fft.irfft(torch.fft.rfft(x, length) * (khat.conj() if conjugate else khat), length)[:, :n_out]


def correlation(x, dy, k, length, conjugate=False):
    """dx and dk of that convolution."""
    xhat, dyhat = torch.fft.rfft(x, length), torch.fft.rfft(dy, length)
    dk = (xhat.conj() * dyhat).sum(0)
    dk = torch.fft.irfft(dk.conj() if conjugate else dk, length)
    return {"dx": convolution(dy, k, length, x.shape[1], not conjugate), "dk": dk}


def tables(k, length):
    return torch.fft.fft(k, length), native.module.fft_twiddles(length)


def host_convolution(x, k, length, n_out, conjugate=False, twiddles=None, **options):
    khat, sound = tables(k, length)
    twiddles = sound if twiddles is None else twiddles
    return native.module.fft_convolve_host(x, khat, twiddles, n_out, conjugate, **options)


def host_correlation(x, dy, k, length, conjugate=False, twiddles=None, blocks=2, **options):
    khat, sound = tables(k, length)
    twiddles = sound if twiddles is None else twiddles
    dx, partial = native.module.fft_correlate_host(x, dy, khat, twiddles, blocks, conjugate, **options)
    assert partial.shape == (blocks, length // 2 + 1)
    return {"dx": dx, "dk": torch.fft.irfft(partial.sum(0), length)}


def draws(length, n_in, n_out, rows=5):
    """x, dy, k of an odd number of rows, so that one has no partner. Short rows are drawn often: the errors of a few
    numbers are a coin toss."""
    for _ in range(max(1, 2000 // (rows * length))):
        yield torch.randn(rows, n_in), torch.randn(rows, n_out), torch.randn(length)


def verdicts(host, plain, cases):
    """host against plain, which also gives the truth in float64."""
    truth = [plain(*(t.double() for t in case)) for case in cases]
    got, simple = ([{n: v.double() for n, v in fn(*case).items()} for case in cases] for fn in (host, plain))
    return judge(got, simple, truth, {name: torch.float32 for name in truth[0]})


def check_convolution(length, n_in, n_out, conjugate=False, twiddles=None):
    return verdicts(
        lambda x, dy, k: {"y": host_convolution(x, k, length, n_out, conjugate, twiddles)},
        lambda x, dy, k: {"y": convolution(x, k, length, n_out, conjugate)},
        list(draws(length, n_in, n_out)),
    )


def check_correlation(length, n_in, n_out, conjugate=False, twiddles=None, rows=5, blocks=2):
    return verdicts(
        lambda x, dy, k: host_correlation(x, dy, k, length, conjugate, twiddles, blocks),
        lambda x, dy, k: correlation(x, dy, k, length, conjugate),
        list(draws(length, n_in, n_out, rows)),
    )


@pytest.mark.parametrize("length", [*LENGTHS, *LONG])
def test_convolution(poisoned, length):
    found = check_convolution(length, length, length)
    assert all(v.ok for v in found), found


@pytest.mark.parametrize("length", [*LENGTHS, *LONG])
def test_correlation(poisoned, length):
    found = check_correlation(length, length, length)
    assert all(v.ok for v in found), found


@pytest.mark.parametrize("conjugate", [False, True])
@pytest.mark.parametrize(
    ("length", "n_in", "n_out"),
    [(6, 1, 4), (60, 31, 29), (128, 64, 128), (384, 383, 1), (1000, 7, 999), (1536, 768, 640), (5000, 2500, 2048)],
)
def test_padding_cropping_conjugate(poisoned, length, n_in, n_out, conjugate):
    found = check_convolution(length, n_in, n_out, conjugate) + check_correlation(length, n_in, n_out, conjugate)
    assert all(v.ok for v in found), found


@pytest.mark.parametrize("length", [1, 6, 60, 375, 1000, 4096, 6561, 8192])
def test_no_race(poisoned, length):
    """Within a phase the order of the threads is free."""
    x, dy, k = next(draws(length, length, length))
    x[1] *= 1e10
    forth, back = (host_convolution(x, k, length, length, backwards=order) for order in (False, True))
    assert torch.equal(forth, back)
    forth, back = (host_correlation(x, dy, k, length, backwards=order) for order in (False, True))
    assert all(torch.equal(forth[name], back[name]) for name in forth)


def test_full_stripes(poisoned):
    """A block adds up its stripe one pair after the other: 64 of them, as many as fft_correlate_blocks gives it."""
    found = check_correlation(1000, 1000, 1000, rows=640, blocks=5)
    assert all(v.ok for v in found), found


@pytest.mark.parametrize("blocks", [1, 3])
def test_no_rows(poisoned, blocks):
    empty, k = torch.empty(0, 48), torch.randn(48)
    assert host_convolution(empty, k, 48, 40).shape == (0, 40)
    found = host_correlation(empty, empty, k, 48, blocks=blocks)
    assert found["dx"].shape == (0, 48) and torch.equal(found["dk"], torch.zeros(48))


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
@pytest.mark.parametrize("blocks", [1, 2, 3, 7])
def test_row_counts_and_stripes(poisoned, rows, blocks):
    length = 48
    x, dy, k = torch.randn(rows, 40), torch.randn(rows, 48), torch.randn(length)
    torch.testing.assert_close(host_convolution(x, k, length, 48), convolution(x, k, length, 48), rtol=1e-5, atol=1e-5)
    got = host_correlation(x, dy, k, length, blocks=blocks)
    for name, want in correlation(x, dy, k, length).items():
        torch.testing.assert_close(got[name], want, rtol=1e-5, atol=1e-4)


def test_rows_at_a_stride_and_unaligned(poisoned):
    length, wide = 96, torch.randn(7, 131)
    x, dy, k = wide[:, 3:93], torch.randn(96, 7).t().contiguous()[:, 1:], torch.randn(length)
    assert torch.equal(host_convolution(x, k, length, 50), host_convolution(x.contiguous(), k, length, 50))
    got, want = (host_correlation(a, b, k, length) for a, b in ((x, dy), (x.contiguous(), dy.contiguous())))
    assert all(torch.equal(got[name], want[name]) for name in want)


def check_rows(fn, x, k, names):
    """Verdicts of fn(x, k) for the rows of each name, judged alone."""
    length = x.shape[1]

    def named(y):
        groups = {name: [] for name in names}
        for name, row in zip(itertools.cycle(names), y, strict=False):
            groups[name].append(row)
        return {name: torch.stack(rows).double() for name, rows in groups.items()}

    plain, truth = named(convolution(x, k, length, length)), named(convolution(x.double(), k.double(), length, length))
    return judge([named(fn(x, k))], [plain], [truth], dict.fromkeys(names, torch.float32))


def packed_convolution(x, k):
    """The control: pairs in plain PyTorch, their rows as they are."""
    y = torch.fft.ifft(torch.fft.fft(torch.complex(x[::2], x[1::2])) * torch.fft.fft(k))
    return torch.stack([y.real, y.imag], 1).flatten(0, 1)


@pytest.mark.parametrize("length", PAIRED)
def test_rows_of_any_magnitude_share_a_transform(poisoned, length):
    """Each row has the errors that it would have alone, whatever lies beside it."""
    pairs = [*itertools.product([*MAGNITUDES, 1e-40], repeat=2)]
    names = [f"{own} beside {other} as {part}" for a, b in pairs for own, other, part in ((a, b, "re"), (b, a, "im"))]
    scales = torch.tensor(pairs).flatten()[:, None]
    x = (torch.randn(max(1, 400 // length), len(names), length) * scales).flatten(0, 1)
    k = torch.randn(length)
    found = check_rows(lambda x, k: host_convolution(x, k, length, length), x, k, names)
    assert all(v.ok for v in found), [v for v in found if not v.ok]
    assert sum(v.error == 0 for v in found) >= 2 * 6  # the zero rows
    spoilt = {v.name for v in check_rows(packed_convolution, x, k, names) if not v.ok}
    # One point is multiplied by a real number, which mixes nothing.
    assert length == 1 or {"1.0 beside 10000.0 as re", "1.0 beside 1e+30 as im"} <= spoilt


@pytest.mark.parametrize("length", [384, 4096, 8192])
def test_rows_with_outliers(poisoned, length):
    """It is norms that have to be alike: with equal largest elements the row of a single one would drown."""
    names = ["dense", "sparse", "sparse again", "dense again"]
    x = torch.randn(2, 4, length).clamp(-1, 1)
    x[:, 1:3] *= 1e-6
    x[:, 1:3, length // 3] = 1
    x[:, 3, 7] = 1e4
    k = torch.randn(length)
    found = check_rows(lambda x, k: host_convolution(x, k, length, length), x.flatten(0, 1), k, names)
    assert all(v.ok for v in found), found
    assert not all(v.ok for v in check_rows(packed_convolution, x.flatten(0, 1), k, names))


@pytest.mark.parametrize("length", [1, 60, 1000, 8192])
def test_powers_of_two_change_no_bit(poisoned, length):
    """Up to the largest numbers there are; the kernel is small, so that results stay in range."""
    x, dy, k = torch.randn(2, length).clamp(-1.9, 1.9), torch.randn(2, length), torch.randn(length) / (16 * length)
    want = host_convolution(x, k, length, length)
    want_dx = host_correlation(dy, x, k, length)["dx"]
    for exponents in itertools.product([-90, -1, 0, 13, 127], repeat=2):
        factors = torch.tensor(exponents, dtype=torch.float64).exp2()[:, None]
        scaled = (x * factors).float()
        assert scaled.isfinite().all()
        assert torch.equal(host_convolution(scaled, k, length, length), (want * factors).float())
        assert torch.equal(host_correlation(dy, scaled, k, length)["dx"], (want_dx * factors).float())


@pytest.mark.parametrize("length", [60, 1000])
def test_correlation_of_rows_of_any_magnitude(poisoned, length):
    """The sum has what each row of a pair contributes, be it of a large x or of a large dy."""
    signals = [torch.randn(2, length) for _ in range(2 * max(1, 180 // length))]
    k = torch.randn(length)
    for scales in itertools.product(MAGNITUDES, repeat=4):
        if max(scales[0] * scales[2], scales[1] * scales[3]) > 1e31:
            continue  # out of the range of fp32
        of_x, of_dy = torch.tensor(scales).view(2, 2, 1)
        cases = [(of_x * x, of_dy * dy, k) for x, dy in zip(signals[::2], signals[1::2], strict=True)]
        found = verdicts(
            lambda x, dy, k: {"dk": host_correlation(x, dy, k, length, blocks=1)["dk"]},
            lambda x, dy, k: {"dk": correlation(x, dy, k, length)["dk"]},
            cases,
        )
        assert all(v.ok for v in found), (scales, found)


@pytest.mark.parametrize("length", [384, 1000, 8192])
@pytest.mark.parametrize("scales", [(1e30, 1e-30), (1e-30, 1e30), (1e4, 1e-4), (1e-18, 1.0)])
def test_large_x_beside_large_dy(poisoned, length, scales):
    """Both rows count the same in dk, and each row of dx is as right as alone."""
    of_x = torch.tensor(scales)[:, None]
    cases = [(x * of_x, dy / of_x, k) for x, dy, k in draws(length, length, length, rows=2)]

    def by_row(fn):
        def named(*case):
            found = fn(*case, length)
            return {"dk": found["dk"], "dx[0]": found["dx"][:1], "dx[1]": found["dx"][1:]}

        return named

    found = verdicts(by_row(host_correlation), by_row(correlation), cases)
    assert all(v.ok for v in found), found
    # The control: the second row at half its weight.
    halved = verdicts(
        lambda x, dy, k: {"dk": host_correlation(x, dy * torch.tensor([[1.0], [0.5]]), k, length)["dk"]},
        lambda x, dy, k: {"dk": correlation(x, dy, k, length)["dk"]},
        cases,
    )
    assert not any(v.ok for v in halved)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [0, 3, 4])
@pytest.mark.parametrize("length", [1, 60, 1000])
def test_non_finite_rows_stay_alone(poisoned, length, row, bad):
    """NaN wherever such a row counts; everything else is what it is beside a row of zeros."""
    x, dy, k = torch.randn(5, length), torch.randn(5, length), torch.randn(length)
    others = [i for i in range(5) if i != row]
    spoilt, without = x.clone(), x.clone()
    spoilt[row, length // 2], without[row] = bad, 0
    y = host_convolution(spoilt, k, length, length)
    assert y[row].isnan().all()
    assert torch.equal(y[others], host_convolution(without, k, length, length)[others])

    khat, twiddles = tables(k, length)
    run = native.module.fft_correlate_host
    dx, sums = run(spoilt, dy, khat, twiddles, 3)
    dx_without, sums_without = run(without, dy, khat, twiddles, 3)
    assert torch.equal(dx, dx_without)
    block = row // 2
    assert torch.view_as_real(sums[block]).isnan().all()
    assert torch.equal(sums[[i for i in range(3) if i != block]], sums_without[[i for i in range(3) if i != block]])

    dx, sums = run(dy, spoilt, khat, twiddles, 3)
    assert dx[row].isnan().all() and torch.equal(dx[others], run(dy, without, khat, twiddles, 3)[0][others])
    assert torch.view_as_real(sums[block]).isnan().all()


def test_what_dropout_drops_need_not_be_finite(poisoned):
    length, seed, threshold = 60, torch.tensor(5), dropout_threshold(0.5)
    x, k = torch.randn(4, length), torch.randn(length)
    dropped = ~keep_mask(seed, *x.shape, threshold)
    assert dropped.any(1).all()
    y = host_convolution(x.masked_fill(dropped, math.inf), k, length, length, seed=seed, threshold=threshold)
    assert torch.equal(y, host_convolution(x, k, length, length, seed=seed, threshold=threshold))


def test_plan():
    smooth = []
    for length in range(1, 8193):
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            radices = native.module.fft_radices(length)
            assert math.prod(radices) == length and set(radices) <= set(RADICES) and len(radices) <= 8
            assert radices.count(4) + radices.count(2) <= 1
            smooth.append(length)
        else:
            with pytest.raises(ValueError, match="length must be 5-smooth"):
                native.module.fft_radices(length)
    assert [native.module.fft_length(least) for least in (-1, 0, 1, 7, 97, 8191, 8192, 8193)] == [
        1, 1, 1, 8, 100, 8192, 8192, 0,
    ]  # fmt: skip
    assert all(native.module.fft_length(length) == length for length in smooth)
    for length in (-8, 0, 8640, 2**40 + 8):
        with pytest.raises(ValueError, match="length must be 5-smooth"):
            native.module.fft_twiddles(length)
    assert [native.module.fft_radices(radix) for radix in RADICES] == [[radix] for radix in RADICES]


@pytest.mark.parametrize("length", [1, 8, 60, 1000, 8192])
def test_twiddles_are_roots_of_unity_to_the_last_bit(length):
    table, span = native.module.fft_twiddles(length), 1
    want = torch.ones(length, dtype=torch.complex128)
    for radix in native.module.fft_radices(length):
        for r in range(1, radix):
            angle = -2 * math.pi * r * torch.arange(span, dtype=torch.float64) / (span * radix)
            want[span * r : span * (r + 1)] = torch.polar(torch.ones_like(angle), angle)
        span *= radix
    assert span == length
    torch.testing.assert_close(table.to(torch.complex128), want, rtol=2**-24, atol=1e-16)


@pytest.mark.parametrize("length", [6, 9, 16, 25, 60, 384, 1000, 4096, 8192])
@pytest.mark.parametrize("at", ["first", "middle", "last"])
def test_one_wrong_twiddle_fails(length, at):
    """The control: a single entry, off by a thousandth."""
    used = native.module.fft_radices(length)[0]  # entries before belong to the first pass
    entry = {"first": used, "middle": (used + length) // 2, "last": length - 1}[at]
    twiddles = native.module.fft_twiddles(length)
    twiddles[entry] *= 1.001
    for check in (check_convolution, check_correlation):
        assert not any(v.ok for v in check(length, length, length, twiddles=twiddles))


@pytest.mark.parametrize("scale", [0.5, -3.0])
def test_scale_and_add(poisoned, scale):
    length = 360
    x, base, k = next(draws(length, 300, 280))
    want = base + scale * convolution(x.double(), k.double(), length, 280)
    got = host_convolution(x, k, length, 280, scale=scale, add=base)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    found = host_correlation(x, base, k, length, scale=scale)
    want = correlation(x.double(), base.double(), k.double(), length)
    torch.testing.assert_close(found["dx"].double(), scale * want["dx"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found["dk"].double(), want["dk"], rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("length", [60, 1000])
def test_dropout_is_that_of_every_backend(poisoned, length):
    x, dy, k = next(draws(length, length - 3, length - 5, rows=9))
    seed, threshold = torch.tensor(-123456789), dropout_threshold(0.3)
    dropout = {"seed": seed, "threshold": threshold}
    dropped, keep = drop(x, seed, threshold), keep_mask(seed, *x.shape, threshold)
    assert torch.equal(host_convolution(x, k, length, length, **dropout), host_convolution(dropped, k, length, length))
    got, want = host_correlation(x, dy, k, length, **dropout), host_correlation(dropped, dy, k, length)
    assert torch.equal(got["dk"], want["dk"])
    assert torch.equal(got["dx"], torch.where(keep, want["dx"] * keep_scale(threshold), 0.0))
    # The same dx from the convolution kernel, with something below it.
    base = torch.randn_like(x)
    alone = host_convolution(dy, k, length, x.shape[1], conjugate=True, mask_output=True, **dropout)
    assert torch.equal(alone, got["dx"])
    below = host_convolution(dy, k, length, x.shape[1], conjugate=True, mask_output=True, add=base, **dropout)
    assert torch.equal(below, base + alone)


def test_partial_sums_are_the_same_every_time():
    x, dy, k = next(draws(384, 384, 384))
    runs = [host_correlation(x, dy, k, 384, blocks=4) for _ in range(2)]
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


def test_bad_arguments_say_so():
    x, k = torch.randn(3, 8), torch.randn(8)
    khat, twiddles = tables(k, 8)
    convolve = native.module.fft_convolve_host
    for args, message in [
        ((x.double(), khat, twiddles, 8), "must be fp32 CPU matrices"),
        ((torch.randn(3, 9), khat, twiddles, 8), "at most 8 columns"),
        ((x, khat, twiddles, 9), "n_out must be at most 8"),
        ((x, khat, twiddles[:4], 8), "complex64 CPU tensors of one length"),
        ((x, torch.fft.fft(k, 7), twiddles, 8), "length must be 5-smooth"),
    ]:
        with pytest.raises(ValueError, match=message):
            convolve(*args)
