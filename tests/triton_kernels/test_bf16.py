"""The interpreter that the kernels are tested in: its bf16, and its tensor cores."""

import pytest
import tensor_cores
import torch
import triton
import triton.language as tl
from peft_fused.triton_kernels.interpreter import install
from rule import BF16, FP16, FP32
from triton.runtime.errors import InterpreterError

SIZE = 4096
SIDE = 16


@triton.jit
def convert_kernel(source_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(source_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def product_kernel(a_ptr, b_ptr, start_ptr, out_ptr, SIDE: tl.constexpr, PREC: tl.constexpr):
    at = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    product = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), tl.load(start_ptr + at), input_precision=PREC)
    tl.store(out_ptr + at, product)


@triton.jit
def move_kernel(a_ptr, b_ptr, out_ptr, SIDE: tl.constexpr):
    """[a where a row is even, else b, transposed | b or 0 on the right], row by row."""
    row, column = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    at = row * SIDE + column
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    first = tl.trans(tl.where(row % 2 == 0, a, b))
    second = tl.load(b_ptr + at, mask=column < 8, other=0.0)
    both = tl.reshape(tl.join(first, second), [SIDE, 2 * SIDE])
    tl.store(out_ptr + row * 2 * SIDE + tl.arange(0, 2 * SIDE)[None, :], both)


@triton.jit
def arithmetic_kernel(a_ptr, b_ptr, out_ptr, WHAT: tl.constexpr):
    at = tl.arange(0, 16)
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    if WHAT == "sum":
        a = a + b
    elif WHAT == "product":
        a = a * b
    elif WHAT == "quotient":
        a = a / b
    elif WHAT == "negative":
        a = -a
    elif WHAT == "magnitude":
        a = tl.abs(a)
    elif WHAT == "less":
        a = tl.where(a < b, a, b)
    elif WHAT == "equal":
        a = tl.where(a == b, a, b)
    elif WHAT == "largest":
        a = tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif WHAT == "clamped":
        a = tl.clamp(a, b, b)
    elif WHAT == "reduction":
        a = tl.reduce(a, 0, tl.standard._sum_combine)
    elif WHAT == "scan":
        a = tl.associative_scan(a, 0, tl.standard._sum_combine)
    elif WHAT == "other rounding":
        a = a.to(tl.float32).to(tl.bfloat16, fp_downcast_rounding="rtz")
    elif WHAT == "two roundings":
        a = (a.to(tl.float64) + 1e-9).to(tl.bfloat16)
    tl.store(out_ptr + at, a)


def converted(source, dtype):
    out = torch.empty(source.shape, dtype=dtype)
    convert_kernel[(source.numel() // SIZE,)](source, out, SIZE)
    return out


def product(a, b, start, precision=None):
    out = torch.empty(SIDE, SIDE)
    product_kernel[(1,)](a, b, start, out, SIDE, precision)
    return out


def every_bf16():
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(BF16)


def same_bits(a, b):
    """Of two tensors of one type, where neither has a NaN; where one has, so has the other."""
    bits = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.view(bits)[~a.isnan()], b.view(bits)[~b.isnan()])


def test_every_number_is_widened_exactly_and_comes_back():
    numbers = every_bf16()
    wide = converted(numbers, FP32)
    assert numbers.isnan().sum() == 254 and same_bits(wide, numbers.float())
    assert same_bits(converted(wide, BF16), numbers)


@pytest.mark.parametrize("rest", [1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_what_lies_between_two_numbers_is_rounded_to_the_nearest(rest):
    """A tie to the even one. The NaNs among them have no bit but the lowest, or all; torch is the one to agree with."""
    between = (every_bf16().view(torch.int16).to(torch.int32) << 16 | rest).view(FP32)
    assert between.isnan().sum() == 256
    assert same_bits(converted(between, BF16), between.to(BF16))


def test_moves_keep_the_bits():
    a, b = every_bf16()[: 2 * SIDE * SIDE].view(2, SIDE, SIDE).clone()
    out = torch.empty(SIDE, 2 * SIDE, dtype=BF16)
    move_kernel[(1,)](a, b, out, SIDE)
    even = torch.arange(SIDE)[:, None] % 2 == 0
    second = torch.where(torch.arange(SIDE) < 8, b, torch.zeros_like(b))
    expected = torch.stack([torch.where(even, a, b).t(), second], -1).view(SIDE, 2 * SIDE)
    assert same_bits(out, expected)


def test_a_product_is_that_of_the_numbers():
    a, b = torch.randint(-255, 256, (2, SIDE, SIDE)).to(BF16)
    start = torch.randint(-9, 10, (SIDE, SIDE)).float()
    assert torch.equal(product(a, b, start), a.float() @ b.float() + start)


def computed(what, a, b):
    out = torch.empty(16, dtype=a.dtype)
    arithmetic_kernel[(1,)](a, b, out, what)
    return out


REFUSED = ["sum", "product", "negative", "magnitude", "less", "equal", "reduction", "scan"]


@pytest.mark.parametrize("what", [*REFUSED, "other rounding", "two roundings"])
def test_what_would_compute_on_the_bits_is_refused(what):
    a, b = torch.randn(2, 16).to(BF16)
    with pytest.raises(InterpreterError, match=r"NotImplementedError.*bfloat16 in the interpreter"):
        computed(what, a, b)
    if what in REFUSED:  # as numbers of another type
        computed(what, a.float(), b.float())


@pytest.mark.parametrize("what", ["quotient", "largest", "clamped"])
def test_what_triton_widens_by_itself_is_right(what):
    a, b = torch.randn(2, 16).to(BF16)
    assert same_bits(computed(what, a, b), computed(what, a.float(), b.float()).to(BF16))


def test_install_twice_is_to_install_once():
    create_dot = tensor_cores.InterpreterBuilder.create_dot
    install()
    assert tensor_cores.InterpreterBuilder.create_dot is create_dot


# -------------------------------------------------------------------------------------------------------- tensor cores


@pytest.mark.parametrize(("dtype", "precision"), [(BF16, None), (FP16, None), (FP32, "tf32x3")])
def test_tensor_cores_cut_off_a_little(dtype, precision, monkeypatch):
    a, b = torch.randn(2, SIDE, SIDE).to(dtype)
    start = torch.randn(SIDE, SIDE)
    exact = a.double() @ b.double() + start
    plain = product(a, b, start, precision)
    with monkeypatch.context() as patch:
        tensor_cores.install(patch)
        found = product(a, b, start, precision)
        ieee = product(a.float(), b.float(), start, "ieee")
    assert torch.equal(ieee, product(a.float(), b.float(), start, "ieee"))  # which no tensor core has
    assert torch.equal(product(a, b, start, precision), plain)
    # Of each addition at most one unit in the last place of the largest sum on the way.
    largest = a.double().abs() @ b.double().abs() + start.abs()
    additions = SIDE / 8 if dtype != FP32 else 3 * SIDE / 4
    error = (found - exact).abs() / largest / 2**-23
    assert 0 < error.max() <= additions and not torch.equal(found, plain)
    if dtype != FP32:  # whose sums are rounded once more; cutting off makes numbers smaller, rounding as many larger
        smaller, larger = ((exact.abs() - found.abs()).sign() == sign for sign in (1, -1))
        assert smaller.sum() > 3 * larger.sum()


def test_tensor_cores_keep_25_bits_of_eight_products(monkeypatch):
    """Beside a sum of 1 the last bit of a term is worth 2 ** -24, and the last of a sum 2 ** -23."""
    tensor_cores.install(monkeypatch)
    a, b, start = torch.zeros(SIDE, SIDE), torch.zeros(SIDE, SIDE), torch.ones(SIDE, SIDE)
    half = 2**-24
    for positions, small, found in (
        (range(8), 0.75 * half, 1.0),
        (range(8), half, 1 + 8 * half),
        ([0], half, 1.0),
        ([0, 1, 2, 4, 5, 6], half, 1 + 6 * half),  # not by four
        ([0, 8], half, 1.0),  # nor by sixteen
    ):
        a.zero_()
        a[0, list(positions)], b[:, 0] = small, 1
        assert product(a.to(BF16), b.to(BF16), start)[0, 0] == found
        assert product(-a.to(BF16), b.to(BF16), -start)[0, 0] == -found
