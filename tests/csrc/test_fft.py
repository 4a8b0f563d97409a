"""csrc/kernels/fft.cu as it is, run by the CPU (cuda_on_host.py): blocks, warps, barriers, memory, types, launches.

test_fft_accuracy.py has the transforms at every kind of length.
"""

import itertools
from ctypes import byref, c_int, c_int64

import pytest
import torch
from cuda_on_host import LAYOUTS, ORDERS, DeviceError, bits, control, laid_out
from fft_calls import INVALID_VALUE, UNIT, convolve, correlate, plain_convolution, plain_correlation

from peft_fused.ops.accuracy import judge

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
TYPES = {"fp32": F32, "fp16": F16, "bf16": BF16}
# (length, n_in, n_out): one point; less than a thread's eight; less than a warp; several warps, the last full or not.
SIZES = [(1, 1, 1), (6, 1, 4), (20, 20, 13), (60, 31, 60), (125, 64, 125), (250, 250, 249), (384, 384, 200)]
SIZES += [(1000, 7, 999), (1536, 768, 1536), (2048, 2048, 1000)]
LONG = (6561, 8192)
SEED = 2**40 + 3


@pytest.fixture
def sound(compiled):
    return compiled(UNIT)


def options(masks_output):
    """Every combination, the number of rows taking turns: odd ones leave a row without a partner."""
    rows = itertools.cycle((5, 1, 4, 2))
    for conjugate, dropout, also, mask_output in itertools.product((False, True), repeat=4):
        if mask_output and not (dropout and masks_output):
            continue
        chosen = {"conjugate": conjugate, "seed": SEED if dropout else None, "scale": -1.5 if also else 1.0}
        yield next(rows), also, {**chosen, "mask_output": mask_output} if masks_output else chosen


def check_convolve(library, dtype=F32, size=(250, 250, 249)):
    """All options are judged together, and with several draws of short rows: the errors of a few are a coin toss."""
    length, n_in, n_out = size
    got, plain, truth = [], [], []
    layouts, orders = itertools.cycle(LAYOUTS), itertools.cycle(ORDERS)
    for m, also, chosen in [*options(masks_output=True)] * max(1, 10 // length):
        x, k = laid_out(torch.randn(m, n_in).to(dtype), next(layouts)), torch.randn(length)
        add = laid_out(torch.randn(m, n_out).to(dtype), next(layouts)) if also else None
        place = {"layout": next(layouts), "on_device": also, "orders": [next(orders)]}
        got.append({"y": convolve(library, x, k, n_out, add=add, **chosen, **place).double()})
        plain.append({"y": plain_convolution(x, k, n_out, dtype, add=add, **chosen).double()})
        truth.append({"y": plain_convolution(x, k.double(), n_out, F64, add=add, **chosen)})
    (found,) = judge(got, plain, truth, {"y": dtype})
    assert found.ok, found


def check_correlate(library, dtype=F32, size=(250, 250, 249)):
    length, n_in, n_out = size
    got, plain, truth = [], [], []
    layouts, orders, blocks = itertools.cycle(LAYOUTS), itertools.cycle(ORDERS), itertools.cycle((1, 2, 7, 3))
    for m, also, chosen in [*options(masks_output=False)] * max(1, 20 // length):
        x, dy = (laid_out(torch.randn(m, n).to(dtype), next(layouts)) for n in (n_in, n_out))
        k = torch.randn(length)
        place = {"layout": next(layouts), "on_device": also, "orders": [next(orders)], "blocks": next(blocks)}
        dx, partial = correlate(library, x, dy, k, **chosen, **place)
        got.append({"dx": dx.double(), "dk": torch.fft.irfft(partial.sum(0), length).double()})
        plain.append({name: t.double() for name, t in plain_correlation(x, dy, k, dtype, **chosen).items()})
        truth.append(plain_correlation(x, dy, k.double(), F64, **chosen))
    found = judge(got, plain, truth, {"dx": dtype, "dk": F32})
    assert all(v.ok for v in found), found


def check_types_and_layouts(library):
    """Only the rounding of the result depends on y's type, and nothing on where rows lie or who runs first."""
    length, n_in, n_out = 270, 200, 264
    x, dy, k = torch.randn(5, n_in).bfloat16(), torch.randn(5, n_out).half(), torch.randn(length)
    y = convolve(library, x.float(), k, n_out)
    dx, partial = correlate(library, x.float(), dy.float(), k)
    for i, (where, there) in enumerate(itertools.product(LAYOUTS, repeat=2)):
        dtype = list(TYPES.values())[i % 3]
        got = convolve(library, laid_out(x, where), k, n_out, dtype=dtype, layout=there)
        assert torch.equal(got, y.to(dtype)), (where, there)
        got = correlate(library, laid_out(x, where), laid_out(dy, there), k, layout=there)
        assert torch.equal(got[0], dx.bfloat16()) and torch.equal(bits(got[1]), bits(partial)), (where, there)


def check_partials(library):
    """A block's partial sum is that of its rows alone, whoever else is there and whether dx is wanted."""
    length = 96
    x, dy, k = torch.randn(11, 90), torch.randn(11, 96), torch.randn(length)
    for blocks, block_rows in ((1, 12), (2, 6), (3, 4), (6, 2), (8, 2)):
        (partial,) = correlate(library, x, dy, k, blocks=blocks, want_dx=False)
        for i in range(blocks):
            rows = slice(i * block_rows, (i + 1) * block_rows)
            alone = correlate(library, x[rows], dy[rows], k, blocks=1)[1] if len(x[rows]) else torch.zeros_like(partial)
            assert torch.equal(partial[i], alone[0])


def check_magnitudes(library):
    """Each row of a pair has the errors that it would have alone, where its partner's largest elements lie far off and
    are others in kind: the norms are those of all warps."""
    length = 1000
    x, k = torch.randn(12, length).clamp(-1, 1), torch.randn(length)
    x[1::4] *= 1e-6
    x[2::4] *= 1e-6
    x[1, 700], x[2, 3], x[5, 998], x[6, 300], x[9, 255], x[10, 256] = 1, 1, 1, 1, 1, 1  # sparse beside dense
    x[3, 777], x[7, 7], x[11, 999] = 1e4, 1e4, 1e4
    x[8] *= 1e30
    scaled = torch.stack([x, x.flip(1)]).flatten(0, 1)
    y = convolve(library, scaled, k, length)
    names = [f"row {i}" for i in range(12)]

    def named(t):
        return {name: t[i::12].double() for i, name in enumerate(names)}

    plain, truth = (plain_convolution(scaled, kernel, length, kernel.dtype) for kernel in (k, k.double()))
    found = judge([named(y)], [named(plain)], [named(truth)], dict.fromkeys(names, F32))
    assert all(v.ok for v in found), [v for v in found if not v.ok]


def check_not_finite(library):
    """A NaN is a matter of its row alone, in whichever warp it is found."""
    length = 1000
    x, k = torch.randn(4, length), torch.randn(length)
    for row, column in ((0, 0), (1, 300), (2, 999)):
        spoilt, without = x.clone(), x.clone()
        spoilt[row, column], without[row] = torch.nan, 0
        want = convolve(library, without, k, length)
        want[row] = torch.nan
        got = convolve(library, spoilt, k, length)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(), want.nan_to_num())


def check_longest(library):
    """More shared memory than without asking, as many threads as a block may have."""
    for length in LONG:
        x, dy, k = torch.randn(2, length), torch.randn(2, length - 1), torch.randn(length)
        y, (dx, partial) = convolve(library, x, k, length - 1), correlate(library, x, dy, k, blocks=1)
        got = {"y": y, "dx": dx, "dk": torch.fft.irfft(partial.sum(0), length)}
        plain = {"y": plain_convolution(x, k, length - 1, F32), **plain_correlation(x, dy, k, F32)}
        x, dy, k = x.double(), dy.double(), k.double()
        truth = {"y": plain_convolution(x, k, length - 1, F64), **plain_correlation(x, dy, k, F64)}
        got, plain = ({name: t.double() for name, t in found.items()} for found in (got, plain))
        found = judge([got], [plain], [truth], dict.fromkeys(got, F32))
        assert all(v.ok for v in found), found


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", TYPES)
def test_convolution(sound, dtype, size):
    check_convolve(sound, TYPES[dtype], size)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", TYPES)
def test_correlation(sound, dtype, size):
    check_correlate(sound, TYPES[dtype], size)


def test_types_and_layouts(sound):
    check_types_and_layouts(sound)


def test_partials(sound):
    check_partials(sound)


def test_rows_of_any_magnitude(sound):
    check_magnitudes(sound)


def test_not_finite_rows(sound):
    check_not_finite(sound)


def test_longest_rows(sound):
    check_longest(sound)


@pytest.mark.parametrize("length", [1, 6, 60, 375, 1000, 4096, 6561, 8192])
def test_no_race(sound, length):
    """In every order of the threads, of a row alone, of a pair, of three, and of pairs that a block has one after the
    other."""
    for rows in (1, 2, 3, 5):
        x, dy, k = torch.randn(rows, length), torch.randn(rows, length), torch.randn(length)
        x[0] *= 1e10
        convolve(sound, x, k, length, seed=SEED)
        correlate(sound, x, dy, k, seed=SEED)


def test_the_result_may_take_the_place_of_what_it_is_added_to(sound):
    x, k, add = torch.randn(5, 96).half(), torch.randn(96), torch.randn(5, 90).half()
    want = convolve(sound, x, k, 90, add=add)
    assert torch.equal(convolve(sound, x, k, 90, add=add, in_place=True), want)


@pytest.mark.parametrize("blocks", [1, 3])
def test_no_rows(sound, blocks):
    empty, k = torch.empty(0, 48), torch.randn(48)
    assert convolve(sound, empty, k, 40).shape == (0, 40)
    dx, partial = correlate(sound, empty, empty, k, blocks=blocks)
    assert dx.shape == (0, 48) and (partial == 0).all()


def test_impossible_calls_are_refused(sound):
    x, k = torch.randn(2, 8), torch.randn(8)
    for length, n_out in ((7, 7), (0, 0), (4, 4), (8640, 8), (8, 9)):
        with pytest.raises(DeviceError, match=INVALID_VALUE):
            convolve(sound, x, k, n_out, length=length)
    with pytest.raises(DeviceError, match=INVALID_VALUE):
        correlate(sound, x, x, k, blocks=-1)


def test_number_of_blocks(sound):
    """As many as run at once on 132 multiprocessors, but a block takes at most 64 pairs and at least one."""

    def blocks(m, length):
        found = c_int(-1)
        sound("run_blocks", c_int64(m), length, byref(found))
        return found.value

    for length, resident in ((1, 32 * 132), (384, 16 * 132), (1000, 8 * 132), (8192, 132)):
        for m in (0, 1, 2, 3, 100, 2 * resident, 2 * resident + 2, 128 * resident, 128 * resident + 1, 10**9):
            pairs = (m + 1) // 2
            each = -(-max(pairs, 1) // blocks(m, length))
            assert 1 <= blocks(m, length) <= max(pairs, 1) and each <= 64
            assert blocks(m, length) <= resident or each == 64
            assert blocks(m, length) > resident // 2 or each == 1
    for length in (0, 7, 8640):
        with pytest.raises(DeviceError, match=INVALID_VALUE):
            blocks(10, length)


def check_both(library):
    check_convolve(library, size=(60, 31, 60))
    check_correlate(library, size=(60, 31, 60))


MOST = "cudaFuncAttributeMaxDynamicSharedMemorySize, "
DEFECTS = {
    "no barrier": (check_both, "__syncthreads();", "if (!DEFECT) __syncthreads();"),
    "threads that stay away": (
        check_both,
        "join_sum(thread,",
        "if (!DEFECT || thread * kVector < length) join_sum(thread,",
    ),
    "the largest of a lane": (
        check_magnitudes,
        "__reduce_max_sync(0xFFFFFFFFu, value)",
        "DEFECT ? value : __reduce_max_sync(0xFFFFFFFFu, value)",
    ),
    "the largest of a warp": (
        check_not_finite,
        "atomicMax(target, value)",
        "DEFECT ? *target = value : atomicMax(target, value)",
    ),
    "the sum of a lane": (
        check_magnitudes,
        "__reduce_add_sync(0xFFFFFFFFu, value)",
        "DEFECT ? value : __reduce_add_sync(0xFFFFFFFFu, value)",
    ),
    "half of a pair too much": (
        check_both,
        "if (row + i < m.rows) store_row",
        "if (DEFECT || row + i < m.rows) store_row",
    ),
    "a short buffer": (check_both, "fft_convolve_shared(p.length)", "fft_convolve_shared(p.length) - 16 * DEFECT"),
    "short buffers": (check_both, "fft_correlate_shared(p.length)", "fft_correlate_shared(p.length) - 16 * DEFECT"),
    "no more memory than without asking": (check_longest, MOST + "most", MOST + "DEFECT ? 49152 : most"),
    "a block short": (check_both, "static_cast<unsigned>(blocks)", "static_cast<unsigned>(blocks - DEFECT)"),
    "a warp short": (
        check_magnitudes,
        "fft_threads(plan.length), shared",
        "fft_threads(plan.length) - 32 * DEFECT, shared",
    ),
    "the first pair again": (check_both, "2 * static_cast<int64_t>(blockIdx.x)", "2 * !DEFECT * int64_t{blockIdx.x}"),
    "the first sum again": (
        check_both,
        "static_cast<int64_t>(blockIdx.x) * fft_half",
        "!DEFECT * int64_t{blockIdx.x} * fft_half",
    ),
    "splits that overlap": (
        check_partials,
        "min(begin + block_rows, p.m)",
        "min(begin + block_rows + 2 * DEFECT, p.m)",
    ),
    "dx that nobody wants": (check_partials, "p.dx != nullptr", "DEFECT || p.dx != nullptr"),
    "masks on both sides": (check_both, "if (!p.mask_output)", "if (DEFECT || !p.mask_output)"),
    "x's type for y": (check_types_and_layouts, "with_type(p.y_type", "with_type(DEFECT ? p.x_type : p.y_type"),
    "x's type for dy": (check_types_and_layouts, "with_type(p.dy_type", "with_type(DEFECT ? p.x_type : p.dy_type"),
    "dx without its mask": (
        check_both,
        "store_dx = [&](int64_t row, int column, PairBlock& block) {",
        "store_dx = [&](int64_t row, int column, PairBlock& block) { if (!DEFECT)",
    ),
}


test_a_defect_shows = control(UNIT, DEFECTS)
