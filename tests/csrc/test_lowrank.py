"""csrc/kernels/lowrank.cu as it is, run by the CPU (cuda_on_host.py): at most twice plain PyTorch's error."""

import ctypes
import itertools
from ctypes import c_float, c_int, c_int64, c_uint32, c_void_p

import pytest
import torch
import torch.nn.functional as F
from cuda_on_host import (
    KERNELS,
    LAYOUTS,
    NUMBERS,
    ORDERS,
    THRESHOLD,
    IntControl,
    Unit,
    bits,
    control,
    in_orders,
    laid_out,
    pointer,
)

from peft_fused.ops.accuracy import judge
from peft_fused.ops.dropout import keep_mask, keep_scale

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TYPES = {
    "fp32": (F32, F32), "fp16": (F16, F16), "bf16": (BF16, BF16), "fp16+fp32": (F16, F32), "bf16+fp32": (BF16, F32),
}  # fmt: skip
ROWS, WIDTHS, RANKS = (1, 3, 17, 131), (1, 7, 8, 63, 257, 768), (1, 4, 7, 8, 9, 16, 17, 33)
SEEDS = (2**40 + 3, -123456789)

ENTRIES = """
PEFT_FUSED_ENTRY int run_shrink(const peft_fused::ShrinkParams& p) { return peft_fused::shrink(p, nullptr); }
PEFT_FUSED_ENTRY int run_drop(const void* x, void* out, const int64_t* seed, int64_t rows, int64_t columns,
                              int64_t first_row, uint32_t threshold, float scale, int type) {
  return peft_fused::drop(x, out, seed, rows, columns, first_row, threshold, scale, peft_fused::Type(type), nullptr);
}
"""


class ShrinkParams(ctypes.Structure):
    _fields_ = (
        [(name, c_void_p) for name in ("x", "A", "S", "seed")]
        + [(name, c_int64) for name in ("m", "k", "x_row", "a_expert", "a_row")]
        + [("r", c_int), ("threshold", c_uint32), ("keep_scale", c_float)]
        + [("rank", IntControl), ("expert", IntControl), ("x_type", c_int), ("a_type", c_int)]
    )


UNIT = Unit(KERNELS / "lowrank.cu", ENTRIES, (ShrinkParams,))


@pytest.fixture
def sound(compiled):
    return compiled(UNIT)


def shrink(library, x, A, *, rank=None, expert=0, seed=None, on_device=False, orders=ORDERS):
    """S of the kernel; rank and expert as numbers or, on_device, in memory."""
    m, k, r = *x.shape, A.shape[-2]

    def run(memory):
        def control(value):
            lent = memory.lend(torch.tensor(value)) if on_device else None
            return IntControl(pointer(lent), 99 if on_device else value)

        S = memory.result(m, r, A.dtype)
        params = ShrinkParams(
            x=pointer(memory.lend(x)),
            A=pointer(memory.lend(A)),
            S=pointer(S),
            seed=pointer(memory.lend(None if seed is None else torch.tensor(seed))),
            m=m,
            k=k,
            x_row=x.stride(0),
            a_expert=A.stride(0) if A.dim() == 3 else 0,
            a_row=A.stride(-2),
            r=r,
            threshold=THRESHOLD,
            keep_scale=keep_scale(THRESHOLD),
            rank=control(r if rank is None else rank),
            expert=control(expert),
            x_type=NUMBERS[x.dtype],
            a_type=NUMBERS[A.dtype],
        )
        library("run_shrink", ctypes.byref(params))
        return (S,)

    return in_orders(library, run, orders)[0]


def drop(library, x, seed, first_row=0):
    def run(memory):
        out = memory.result(*x.shape, x.dtype)
        library(
            "run_drop", memory.lend(x), out, memory.lend(torch.tensor(seed)), *(c_int64(n) for n in x.shape),
            c_int64(first_row), THRESHOLD, c_float(keep_scale(THRESHOLD)), NUMBERS[x.dtype],
        )  # fmt: skip
        return (out,)

    return in_orders(library, run)[0]


def draw(m, k, r, types, experts=None):
    x_type, a_type = types
    shape = (r, k) if experts is None else (experts, r, k)
    return torch.randn(m, k).to(x_type), (torch.randn(shape) / k**0.5).to(a_type)


def check_error(library, types, r, rows=ROWS, widths=WIDTHS):
    """All sizes are judged together: the errors of a few numbers are a coin toss. Layouts and orders take turns."""
    got, plain, truth = [], [], []
    orders = itertools.cycle(ORDERS)
    for i, (m, k) in enumerate(itertools.product(rows, widths)):
        x, A = draw(m, k, r, types)
        x, A = laid_out(x, LAYOUTS[i % 4]), laid_out(A, LAYOUTS[i // 4 % 4])
        got.append({"S": shrink(library, x, A, orders=[next(orders)]).double()})
        # Without the gaps between the rows: on CPUs with AMX torch's bf16 product reads the NaNs in there.
        plain.append({"S": F.linear(x.to(A.dtype).contiguous(), A.contiguous()).double()})
        truth.append({"S": F.linear(x.double(), A.double())})
    (found,) = judge(got, plain, truth, {"S": types[1]})
    assert found.ok, found


def check_layouts(library, types=TYPES["bf16+fp32"], r=9):
    """The way a row is loaded changes no bit, and neither does the order of threads."""
    for m, k in ((3, 63), (17, 264)):
        x, A = draw(m, k, r, types)
        want = shrink(library, x, A)
        for layout in itertools.product(LAYOUTS, repeat=2):
            got = shrink(library, *(laid_out(t, where) for t, where in zip((x, A), layout, strict=True)))
            assert torch.equal(bits(got), bits(want)), layout


def check_controls(library, types=TYPES["fp16"], r=17):
    """Experts and ranks in and beyond the first group of 16, as numbers and in memory."""
    x, A = draw(5, 72, r, types, experts=3)
    A = laid_out(A, (8, 1))
    for expert, on_device in itertools.product(range(3), (False, True)):
        full = shrink(library, x, A[expert])
        for rank in (1, 5, 16, 17):
            got = shrink(library, x, A, rank=rank, expert=expert, on_device=on_device)
            assert torch.equal(got[:, :rank], full[:, :rank]) and (got[:, rank:] == 0).all()


def check_beyond(library):
    """A rank in memory may be larger than the factor."""
    for r in (4, 8, 9):
        x, A = draw(3, 40, r, TYPES["fp32"])
        for rank in (r + 1, 16, 2**40):
            assert torch.equal(shrink(library, x, A, rank=rank, on_device=True), shrink(library, x, A))


def check_mask(library, types=TYPES["fp32"], m=21, k=63):
    """With the identity for A, S is the mask."""
    x_type, a_type = types
    for seed in SEEDS:
        S = shrink(library, torch.ones(m, k, dtype=x_type), torch.eye(k, dtype=a_type), seed=seed)
        keep = keep_mask(torch.tensor(seed), m, k, THRESHOLD)
        assert torch.equal(S, (keep * torch.tensor(keep_scale(THRESHOLD))).to(a_type))


def check_drop(library, dtype=F32):
    scale = torch.tensor(keep_scale(THRESHOLD))
    for i, (rows, columns) in enumerate(itertools.product((1, 3, 17), (1, 7, 8, 63, 264))):
        x, seed, first_row = torch.randn(rows, columns).to(dtype), SEEDS[i % 2], (0, 5, 2**31)[i % 3]
        keep = keep_mask(torch.tensor(seed), rows, columns, THRESHOLD, first_row)
        want = torch.where(keep, x.float() * scale, 0.0).to(dtype)
        assert torch.equal(drop(library, x, seed, first_row), want)


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("types", TYPES)
def test_error_is_at_most_twice_pytorchs(sound, types, r):
    check_error(sound, TYPES[types], r)


@pytest.mark.parametrize("types", TYPES)
def test_layouts_change_no_bit(sound, types):
    check_layouts(sound, TYPES[types])


@pytest.mark.parametrize("types", TYPES)
def test_rank_and_expert(sound, types):
    check_controls(sound, TYPES[types])


def test_a_rank_beyond_the_factor_keeps_all(sound):
    check_beyond(sound)


@pytest.mark.parametrize("types", TYPES)
def test_mask_is_exact(sound, types):
    check_mask(sound, TYPES[types])


def test_dropout_and_sums_together(sound):
    x, A = draw(17, 257, 9, TYPES["bf16+fp32"])
    keep = keep_mask(torch.tensor(SEEDS[0]), *x.shape, THRESHOLD)
    want = F.linear(x.double() * keep * keep_scale(THRESHOLD), A.double())
    torch.testing.assert_close(shrink(sound, x, A, seed=SEEDS[0]).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["fp32", "fp16", "bf16"])
def test_drop(sound, dtype):
    check_drop(sound, dtype)


def test_no_rows(sound):
    assert shrink(sound, torch.randn(0, 8), torch.randn(4, 8)).shape == (0, 4)
    assert drop(sound, torch.randn(0, 8), 1).shape == (0, 8)


def check_sizes(library):
    check_error(library, TYPES["fp32"], 17, rows=(3, 17), widths=(8, 63, 257))


DEFECTS = {
    "half of the lanes": (check_sizes, "offset = 16;", "offset = DEFECT ? 8 : 16;"),
    "lanes leave a warp": (check_sizes, "if (row >= p.m)", "if (row + (DEFECT ? lane : 0) >= p.m)"),
    "rows beyond the last are read": (check_sizes, "row + i < p.m ?", "DEFECT || row + i < p.m ?"),
    "rows beyond the last are written": (check_sizes, "0 && row + i < p.m", "0 && (DEFECT || row + i < p.m)"),
    "ranks beyond the last are written": (check_sizes, "first + j < p.r)", "(DEFECT || first + j < p.r))"),
    "unaligned rows of x": (
        check_layouts,
        "p.x_row * sizeof(X) % 16 == 0",
        "(DEFECT || p.x_row * sizeof(X) % 16 == 0)",
    ),
    "an unaligned A": (check_layouts, "vector_aligned(A) &&", "(DEFECT || vector_aligned(A)) &&"),
    "the first ranks again": (check_sizes, "first * p.a_row", "(DEFECT ? 0 : first) * p.a_row"),
    "another expert": (check_controls, "expert * p.a_expert", "(DEFECT ? 0 : expert) * p.a_expert"),
    "every rank": (check_controls, "j < live", "DEFECT || j < live"),
    "ranks that there are not": (
        check_beyond,
        "static_cast<int64_t>(p.r))",
        "DEFECT ? 99 : static_cast<int64_t>(p.r))",
    ),
    "another row's mask": (check_mask, "column, row + i, p", "column, row + (DEFECT ? 0 : i), p"),
    "half a seed": (check_mask, "(*p.seed)", "(DEFECT ? *p.seed & 0xFFFFFFFF : *p.seed)"),
    "the mask of row 0": (check_drop, "first_row + row, ", "(DEFECT ? 0 : first_row) + row, "),
    "columns beyond the last": (check_drop, "j < columns) target", "j < columns || DEFECT) target"),
}


test_a_defect_shows = control(UNIT, DEFECTS)
