"""What the ops compile and launch on an H200, without one: see launches.py."""

from collections import defaultdict
from itertools import cycle, product

import pytest
import torch
import triton
import triton.language as tl
from launches import host_transfers, overflows, recording
from peft_fused.triton_kernels.lowrank import shared_shrink_bwd, shared_shrink_fwd
from peft_fused.triton_kernels.tiles import padded_rank

import peft_fused
from peft_fused.ops import bottleneck_adapter, lowrank_adapter, lowrank_linear, structured
from peft_fused.ops.cases import parameter_shapes, structured_features

F32, BF16 = torch.float32, torch.bfloat16
# One of each class of plan.operand_class.
TYPES = {"bf16": (BF16, BF16), "bf16+fp32": (BF16, F32), "fp32": (F32, F32)}

SCALES = (2.0, 1.0, 1, 0.5, 16)
# As thresholds: 1, a multiple of 16 and others, which Triton would tell apart.
DROPOUT = (0.1, 2**-16, 0.0625, 0.3)


def meta(*shape, dtype=F32):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def rows(m, k, dtype, columns=False):
    """[m, k] by rows or, transposed, by columns."""
    return meta(k, m, dtype=dtype).t() if columns else meta(m, k, dtype=dtype)


class Controls:
    """The i-th values of all that may change from step to step, as numbers or as 0-d tensors."""

    def __init__(self, i, tensors):
        self.i, self.tensors = i, tensors

    def _table(self, dtype):
        """A 0-d view into a table, which is aligned to 16 bytes for some i only."""
        return torch.empty(8, dtype=dtype, device="meta")[self.i % 8]

    @property
    def scale(self):
        return self._table(F32) if self.tensors else SCALES[self.i % len(SCALES)]

    @property
    def dropout(self):
        return {"dropout_p": DROPOUT[self.i % len(DROPOUT)], "seed": self._table(torch.int64)}

    def index(self, least, most):
        return self._table(torch.int64) if self.tensors else least + self.i % (most + 1 - least)

    def rank(self, r):
        return self.index(1, r)


def lora(op, k, n, r, *, experts=None, uv=False, dropout=False, columns=False):
    """A step of a low-rank op as a function of the number of rows, the types and the controls."""

    def step(m, dtype, adapter, c):
        stack = [] if experts is None else [experts]
        tensors = {"x": rows(m, k, dtype, columns), "A": meta(*stack, r, k, dtype=adapter)}
        tensors |= {"B": meta(*stack, n, r, dtype=adapter)}
        if uv:
            tensors |= {"u": meta(r, dtype=adapter), "v": meta(n, dtype=adapter)}
        options = {"scale": c.scale, "rank": c.rank(r)} | (c.dropout if dropout else {})
        if experts is not None:
            options["expert"] = (c.index(0, experts - 1), c.index(0, experts - 1))
        if op is lowrank_adapter:
            return op(**tensors, **options, add=rows(m, n, dtype, columns))
        weight = meta(n, k, dtype=dtype).requires_grad_(False)
        return op(**tensors, **options, weight=weight, bias=meta(n, dtype=dtype))

    return step


def adapter(k, n, r, *, experts=4, groups=0, columns=False):
    """A step of the bottleneck op; groups: so many groups of rows and up to 7 more, with an expert each."""

    def step(m, dtype, kind, c):
        count = groups + c.i % 8 if groups else 1
        m = max(1, m // count) * count
        table = torch.empty(1 + 2 * count, dtype=torch.int64, device="meta")
        expert = table[c.i % 2 :: 1 + c.i // 2 % 2][:count]
        if groups == 0 or (count == 1 and not c.tensors):
            expert = c.index(0, experts - 1)
        parameters = ((r, k), (r,), (n, r), (n,))
        tensors = [meta(experts, *shape, dtype=kind) for shape in parameters]
        h, residual = rows(m, k, dtype, columns), rows(m, n, dtype, columns)
        return bottleneck_adapter(h, *tensors, residual=residual, scale=c.scale, expert=expert)

    return step


def structure(kind, *sizes, add=False, dropout=False, transposed=False):
    """A step of a structured op."""

    def step(m, dtype, parameter, c):
        k, n = structured_features(kind, sizes)[:: -1 if transposed else 1]
        parameters = [meta(*shape, dtype=parameter) for shape in parameter_shapes(kind, sizes).values()]
        options = {"scale": c.scale, "transposed": transposed} | (c.dropout if dropout else {})
        options |= {"add": meta(m, n, dtype=dtype)} if add else {}
        return getattr(structured, f"{kind}_matmul")(meta(m, k, dtype=dtype), *parameters, **options)

    return step


# A training step, and how many kernels it compiles in bf16 for 512 to 4,096 and 65,536 rows and controls of both kinds.
CASES = {
    "single kernel": (lora(lowrank_linear, 768, 768, 8), 14),
    "single kernel, experts": (lora(lowrank_linear, 768, 1024, 16, experts=4, uv=True), 18),
    "adapter and GEMM": (lora(lowrank_linear, 4096, 4096, 16), 22),
    "rank 1 of 1": (lora(lowrank_linear, 4096, 4096, 1, dropout=True), 22),
    "two passes over dY": (lora(lowrank_linear, 4096, 4096, 64, dropout=True), 14),
    "rank 200": (lora(lowrank_linear, 1024, 4096, 200, dropout=True), 15),
    "every option": (lora(lowrank_linear, 4096, 3072, 8, experts=4, uv=True, dropout=True), 24),
    "beside a layer": (lora(lowrank_adapter, 1100, 5120, 32, experts=4, uv=True), 15),
    "bottleneck": (adapter(768, 3072, 16), 16),
    "bottleneck, many units": (adapter(3072, 768, 256), 24),
    "bottleneck, groups": (adapter(768, 768, 48, groups=1), 25),
    "circulant": (structure("circulant", 768, add=True, dropout=True), 8),
    "circulant, prime": (structure("circulant", 1009, dropout=True), 8),
    "circulant, transposed": (structure("circulant", 1536, transposed=True), 8),
    "skew_circulant": (structure("skew_circulant", 768), 8),
    "toeplitz": (structure("toeplitz", 3072, 768, dropout=True), 8),
    "toeplitz_product": (structure("toeplitz_product", 768, dropout=True), 11),
    "ldr": (structure("ldr", 2, 768, dropout=True), 13),
    "kronecker": (structure("kronecker", 24, 24, 32, 32, add=True, dropout=True), 6),
    "kronecker, transposed": (structure("kronecker", 48, 24, 64, 32, transposed=True), 8),
}


def gradients(step, m, types, controls):
    y = step(m, *TYPES[types], controls)
    torch.autograd.backward(y, torch.empty_like(y))


def train(case, m, types, controls):
    gradients(CASES[case][0], m, types, controls)


@pytest.fixture
def recorder():
    with recording() as recorder, peft_fused.use_backend("triton"):
        yield recorder


def compiled_anew(recorder, case, types, warm, counts):
    """How many kernels the steps of `warm` rows compile, and names of those that `counts` rows then compile anew."""
    for m, i, tensors in product(warm, (0, 1), (False, True)):
        train(case, m, types, Controls(i, tensors))
    before = len(recorder.compilations)
    for i, (m, tensors) in enumerate(zip(counts, cycle((False, False, True)), strict=False)):
        train(case, m, types, Controls(i, tensors))
    return before, [compilation.name for compilation in recorder.compilations[before:]]


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("case", CASES)
def test_values_do_not_recompile(case, types, recorder):
    """Steps of 2,048 rows compile all that 49 other numbers of rows down to 1,025 need, whatever the controls: a plan
    knows the number of rows by its next power of two.

    Compiled anew are, for each layer and not for each step: a control that turns from a number into a tensor or has
    another type, dropout or a gradient that comes or goes, other strides (by columns M is one) or another alignment.
    """
    compiled, anew = compiled_anew(recorder, case, types, (2048,), range(1025, 2049, 21))
    assert compiled and not anew


@pytest.mark.parametrize("case", CASES)
def test_other_powers_of_two_bound_what_compiles(case, recorder):
    """All that 50 numbers of rows over 512..4096 and 40,000 need is what the next powers of two need: so many kernels
    and no more. Below 64 rows it is what 16, 32 and 64 need: one row is no special case.
    """
    warm, counts = (512, 1024, 2048, 4096, 65536), (*range(512, 4097, 73), 40000)
    compiled, anew = compiled_anew(recorder, case, "bf16", warm, counts)
    assert compiled == CASES[case][1] and not anew
    assert not compiled_anew(recorder, case, "bf16", (16, 32, 64), range(1, 65, 3))[1]


def test_every_unspecialised_argument_varies(recorder):
    """What kernels do not specialise on takes values here that Triton would tell apart: without it the tests above
    would pass whether it is specialised or not."""
    seen = defaultdict(set)
    for case, (i, m), tensors in product(CASES, enumerate((1, 2, 16, 1025, 2048, 5000, 40000, 65536)), (False, True)):
        train(case, m, "bf16", Controls(i, tensors))
    for launch in recorder.launches:
        for parameter in launch.compilation.kernel.params:
            value = launch.arguments[parameter.name]
            if parameter.do_not_specialize and isinstance(value, int):
                seen[launch.compilation.name, parameter.name].add((value == 1, value % 16 == 0))
            elif parameter.do_not_specialize_on_alignment and value is not None:
                seen[launch.compilation.name, parameter.name].add(value.data_ptr() % 16 == 0)
    assert len(seen) > 50 and not {key for key, classes in seen.items() if len(classes) < 2}


@pytest.mark.parametrize("case", CASES)
def test_no_host_sync_in_a_step(case, recorder):
    """On a second step: the first makes tables that later ones find again."""
    train(case, 100, "bf16", Controls(0, True))
    controls = Controls(1, True)
    recorder.launches.clear()
    with host_transfers() as transfers:
        train(case, 200, "bf16", controls)
    assert recorder.launches and not transfers


class _CopiesInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, copy):
        ctx.copy = copy
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        ctx.copy(dy)
        return dy, None


COPIES = {
    "tensor": lambda x: torch.tensor(3, device=x.device),
    "new_tensor": lambda x: x.new_tensor([1, 2]),
    "to": lambda x: torch.zeros(2).to(x.device),
    "copy": lambda x: x.clone().copy_(torch.zeros(2)),
}


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_from_the_host_is_found(copy):
    y = _CopiesInBackward.apply(meta(2), COPIES[copy])
    with host_transfers() as transfers:
        torch.autograd.backward(y, torch.empty_like(y))
    assert transfers


ROWS = (1, 17, 4096, 2**17, 2**22, 2**24)
WIDTHS = (1, 8, 768, 4096, 14336, 128256, 262144)
SHAPES = [*((n, 768) for n in WIDTHS), *((768, n) for n in WIDTHS), *((n, n) for n in WIDTHS)]


def steps_of_all_sizes():
    """Steps from the smallest to the largest sizes that a plan may meet."""
    for k, n in SHAPES:
        for r, dropout in ((1, False), (16, False), (16, True), (256, False), (256, True)):
            yield lora(lowrank_linear, k, n, r, dropout=dropout)
        for r, groups in product((16, 256), (0, 2, 2**20)):
            yield adapter(k, n, r, groups=groups)
    for n in (2, 7, 64, 97, 768, 1536, 3072, 4096, 8192):
        yield structure("circulant", n, dropout=True)
    for n in (1, 16, 768, 4096):
        yield structure("toeplitz", n, 4096)
        yield structure("toeplitz", 4096, n)
    yield structure("ldr", 3, 768)
    for sizes in ((1, 2, 3, 1), (24, 24, 32, 32), (64, 64, 64, 64), (7, 11, 13, 5)):
        yield structure("kronecker", *sizes)


@pytest.mark.parametrize("types", ["bf16", "fp32"])
def test_grids_are_within_the_limits_of_a_gpu(types, recorder):
    for step, m in product(steps_of_all_sizes(), ROWS):
        recorder.launches.clear()
        gradients(step, m, types, Controls(m, False))
        assert recorder.launches
        for launch in recorder.launches:
            x, y, z = launch.grid
            fits = 1 <= x < 2**31 and 1 <= y < 2**16 and 1 <= z < 2**16 and launch.compilation.options.num_warps <= 32
            assert fits, (launch.compilation.name, launch.grid, m)


# A step and its rows. Operands, results and partial sums have more than 2**31 elements.
LARGE = {
    "single kernel": (lora(lowrank_linear, 262144, 2048, 16), 2**24),
    "single kernel, few rows": (lora(lowrank_linear, 262144, 262144, 16), 64),
    "every option": (lora(lowrank_linear, 262144, 128256, 32, experts=4, uv=True, dropout=True), 2**24),
    "by columns": (lora(lowrank_adapter, 262144, 262144, 256, columns=True), 2**24),
    "bottleneck": (adapter(262144, 262144, 16, groups=2**20, columns=True), 2**24),
    "bottleneck, many units": (adapter(262144, 262144, 256, experts=64, groups=2), 2**24),
    "circulant": (structure("circulant", 4096, add=True, dropout=True), 2**24),
    "ldr": (structure("ldr", 2, 768, dropout=True), 2**24),
    "kronecker": (structure("kronecker", 64, 64, 64, 64, add=True, dropout=True), 2**24),
}


@pytest.mark.parametrize("types", ["bf16", "fp32"])
@pytest.mark.parametrize("case", LARGE)
def test_offsets_have_enough_bits(case, types, recorder):
    step, m = LARGE[case]
    gradients(step, m, types, Controls(0, False))
    assert recorder.launches
    for launch in recorder.launches:
        assert not overflows(launch), launch.compilation.name


@pytest.mark.parametrize("types", ["bf16", "fp32"])
@pytest.mark.parametrize("dropout", [False, True])
def test_members_offsets_and_grids(dropout, types, recorder):
    """Of projections that share their product with x, from few rows to more than 2**31 of everything."""
    dtype, kind = TYPES[types]
    for (m, k), sizes in product(((1, 8), (500, 4096), (2**24, 262144)), ((8, 8), (16, 3, 16), (256,) * 4)):
        r = padded_rank(max(sizes))
        x, factors, dS = meta(m, k, dtype=dtype), [meta(n, k, dtype=kind) for n in sizes], meta(m, r, dtype=kind)
        options = {"threshold": 1, "seeds": meta(len(sizes), dtype=torch.int64)} if dropout else {}
        recorder.launches.clear()
        with torch.no_grad():
            shared_shrink_fwd(x, factors, **options)
            needs = {"need_x": True, "needs": [True] * len(sizes)}
            shared_shrink_bwd([dS] * len(sizes), x, factors, onto=meta(m, k, dtype=dtype), **options, **needs)
        assert len(recorder.launches) == 4
        for launch in recorder.launches:
            x, y, z = launch.grid
            assert 1 <= x < 2**31 and 1 <= y < 2**16 and 1 <= z < 2**16, (launch.compilation.name, launch.grid)
            assert not overflows(launch), launch.compilation.name


@triton.jit
def _narrow_kernel(x_ptr, indices_ptr, stride, WIDE: tl.constexpr, LOAD: tl.constexpr):
    rows = tl.program_id(0) * 64 + tl.arange(0, 64)
    if LOAD:
        rows = tl.load(indices_ptr + rows)
    if WIDE:
        rows = rows.to(tl.int64)
    tl.store(x_ptr + rows * stride, 0.0)


@pytest.mark.parametrize("load", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_narrow_offsets_are_found(wide, load, recorder):
    indices = torch.empty(64, dtype=torch.int32, device="meta")
    for stride, fits in ((2**7, wide or not load), (2**8, wide)):
        _narrow_kernel[(2**18,)](meta(1), indices, stride, WIDE=wide, LOAD=load)
        assert bool(overflows(recorder.launches[-1])) != fits
