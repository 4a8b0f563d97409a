"""Compiles the bottleneck kernels of each GPU's plans, without a GPU: see aot.py."""

from functools import partial
from itertools import product

import pytest
from aot import GPUS, TRITON_TYPES, Row, launch_source, to_compile
from peft_fused.triton_kernels import bottleneck_kernels
from peft_fused.triton_kernels.bottleneck_plan import configurations

pytestmark = pytest.mark.aot

ROWS = {"x_ptr", "add_ptr", "y_ptr"}
SUMS = {"partials_ptr", "down_partials_ptr", "up_partials_ptr", "sums_ptr", "unit_sums_ptr", "scale_ptr"}
# Strides of contiguous operands; backward reads both factors transposed.
FORWARD_UNIT = {"stride_xk", "stride_ik", "stride_or", "stride_dn"}
BACKWARD_UNIT = {"stride_xk", "stride_ir", "stride_on", "stride_dn"}


def describe(config, aligned_rank):
    c = dict(config.constexprs)
    types = config.dtype if config.dtype == config.adapter_dtype else f"{config.dtype}+{config.adapter_dtype}"
    blocks = "x".join(f"{name[6:]}{value}" for name, value in c.items() if name.startswith("BLOCK_"))
    absent = (f"no_{name[:-4]}" for name, value in c.items() if value is None)
    flags = "-".join([c.get("ACTIVATION", ""), *(name for name, value in c.items() if value is True), *absent])
    rank = "aligned" if aligned_rank else "unaligned"
    return f"{config.kernel[:-7]:6} {types:16} {blocks:22} {flags:31} {rank} warps {config.num_warps}"


def rows_of_products(config):
    """Rows of the left operand of the tensor-core products of a kernel."""
    c = dict(config.constexprs)
    name = {"rows_kernel": "BLOCK_M", "grad_kernel": "BLOCK_X"}.get(config.kernel)
    return (c[name],) if name else ()


def problems(config, resources):
    found = resources.problems()
    if not (products := rows_of_products(config)):
        return found
    (rows,) = products
    if not (resources.wgmma or resources.tcgen05 or resources.mma):
        found.append("expected tensor cores")
    if resources.target not in (90, 100) and (resources.wgmma or resources.tcgen05):
        found.append("expected mma.sync")
    # wgmma multiplies 64 rows at a time: a product of fewer takes mma.sync instead.
    if resources.target == 90 and bool(resources.wgmma) != (rows >= 64):
        found.append("expected wgmma")
    # A load reaches shared memory by itself only where a thread has 16 bytes of it, and where it is not transposed in
    # fp32 on its way; the rows of s alone, which a second launch reads, may not be aligned.
    c = dict(config.constexprs)
    loads_x = c.get("SHRINK") or (config.kernel == "grad_kernel" and config.dtype != "float32")
    columns = c["BLOCK_K"] if c.get("SHRINK") else c.get("BLOCK_X", 0)
    size = c["BLOCK_M"] * columns * (4 if config.dtype == "float32" else 2)
    if resources.target == 90 and loads_x and size >= 16 * 32 * config.num_warps and not resources.copies:
        found.append("expected pipelined loads")
    return found


def source(config, aligned_rank):
    """The kernel with every optional operand present, contiguous, an expert per group, N and K multiples of 16."""
    kernel = getattr(bottleneck_kernels, config.kernel)
    c = dict(config.constexprs)
    unit = BACKWARD_UNIT if c.get("BACKWARD") else FORWARD_UNIT
    if config.kernel == "reduce_kernel":
        unit = {"stride_dk", "stride_ur"}
    constants = c | {p.name: 1 for p in kernel.params if p.name in unit}
    if config.kernel == "rows_kernel":
        unused = ("b_in_ptr", "b_out_ptr") if c["BACKWARD"] else ("a_ptr",)
        constants |= dict.fromkeys(unused)
    types = {}
    for parameter in kernel.params:
        name = parameter.name
        if "expert" in name and name.endswith("_ptr"):
            types[name] = "*i64"
        elif name in SUMS:
            types[name] = "*fp32"
        elif name.endswith("_ptr"):
            types[name] = "*" + TRITON_TYPES[config.dtype if name in ROWS else config.adapter_dtype]
        else:
            types[name] = "fp32" if name == "scale" else "i32"
    ranked = {"r", "stride_on", "stride_be", "stride_un"} | ({"stride_ik"} if c.get("BACKWARD") else set())
    return launch_source(kernel, types, constants, frozenset() if aligned_rank else ranked)


def rows():
    for (target, gpu), aligned_rank in product(GPUS.items(), (True, False)):
        title = f"bottleneck, r {'' if aligned_rank else 'not '}a multiple of 16"
        for c in configurations(gpu):
            # fp16 differs from bf16 in the name of its instructions, and beside fp32 parameters it is upcast like fp32.
            # An unaligned rank changes how factors are loaded, whatever their type.
            if c.dtype != "float16" and (aligned_rank or c.adapter_dtype == "bfloat16"):
                text, made = describe(c, aligned_rank), partial(source, c, aligned_rank)
                yield Row(target, title, c.kernel[:-7], c, text, made, aligned_rank, rows_of_products(c))


@pytest.mark.parametrize("row", to_compile(rows()), ids=str)
def test_configuration_fits(row, record_property):
    row.check(problems, record_property)
