"""Compiles every kernel configuration of the default plans for six GPUs, without one, and reads the resource report:
no register spills, shared memory within the limit, tensor-core instructions of the generation.

A test each; the end of the run has a table by kernel, and `pytest -rP` shows every configuration.
"""

from functools import partial
from itertools import product

import pytest
import triton.language as tl
from aot import GPUS, TRITON_TYPES, Row, launch_source, to_compile
from peft_fused.triton_kernels import lowrank_kernels
from peft_fused.triton_kernels.lowrank_plan import configurations

pytestmark = pytest.mark.aot

TRITON_DTYPES = {name: getattr(tl, name) for name in TRITON_TYPES}
ACTIVATION_POINTERS = {"x_ptr", "w_ptr", "bias_ptr", "y_ptr", "dy_ptr", "dx_ptr", "add_ptr", "dbias_ptr"}
ADAPTER = {"a_ptr", "b_ptr", "u_ptr", "v_ptr", "s_ptr", "da_ptr", "db_ptr", "dv_ptr", "du_ptr"}
# S or dSu, whole or in planes; grad_b and shrink write them whole where they are not shared out.
SUMS_OF_COLUMNS = {"planes_ptr", "dsu_ptr"}
PARTIAL_SUMS = {"partials_ptr", "a_partials_ptr", "b_partials_ptr", "sums_ptr", "dots_ptr"}
INTEGERS = {"rank_ptr", "expert_ptr", "expert_a_ptr", "expert_b_ptr", "seed_ptr"}
# Strides of contiguous operands, as they are on the hot path; `linear` and `expand` read B along its ranks.
UNIT_STRIDES = {
    "shrink_kernel": {"stride_xk", "stride_ak"},
    "expand_kernel": {"stride_br", "stride_dn"},
    "linear_kernel": {"stride_xk", "stride_wk", "stride_ak", "stride_br"},
    "grad_b_kernel": {"stride_yn", "stride_br"},
    "grad_a_kernel": {"stride_xk", "stride_ak"},
    "reduce_kernel": {"stride_br", "stride_dbr", "stride_dak"},
}
# Arguments that are r in contiguous operands: rank 8 leaves the compiler without their alignment.
RANK_SIZED = {kernel: {"r", "stride_bn"} for kernel in UNIT_STRIDES} | {
    "reduce_kernel": {"r", "stride_bn", "stride_dbn"}
}


def describe(config, aligned_rank):
    types = config.dtype if config.dtype == config.adapter_dtype else f"{config.dtype}+{config.adapter_dtype}"
    flags = "-".join(name for name, value in config.constexprs if value is True)
    members = ("EACH", "MEMBERS") if dict(config.constexprs).get("MEMBERS", 1) > 1 else ()
    flags += "".join(f"-{name}{value}" for name, value in config.constexprs if name in ("PLANES", "R", *members))
    blocks = "x".join(f"{name[6:]}{value}" for name, value in config.constexprs if name.startswith("BLOCK_"))
    rank = "aligned" if aligned_rank else "unaligned"
    return f"{config.kernel[:-7]:7} {types:16} {blocks:24} {flags:28} {rank} warps {config.num_warps}"


def problems(config, resources):
    found = resources.problems()
    rows = rows_of_products(config)
    if rows and resources.target not in (90, 100) and (resources.wgmma or resources.tcgen05 or not resources.mma):
        found.append("expected mma.sync")
    # wgmma multiplies 64 rows at a time: a product of fewer takes mma.sync instead.
    if resources.target == 90 and bool(resources.wgmma) != any(m >= 64 for m in rows):
        found.append("expected wgmma")
    if resources.target == 90 and bool(resources.mma) != any(m < 64 for m in rows):
        found.append("expected no mma.sync")
    # A pointer whose alignment the compiler cannot see is loaded by the element and never pipelined.
    reads_activations = config.kernel in ("shrink_kernel", "linear_kernel", "grad_b_kernel")
    pipelined = reads_activations or dict(config.constexprs).get("NEED_DA")
    if resources.target == 90 and pipelined and not resources.copies:
        found.append("expected pipelined loads")
    return found


def rows_of_products(config):
    """Rows of the left operand of each tensor-core product of a kernel."""
    c = dict(config.constexprs)
    if config.kernel == "reduce_kernel":
        return []
    if config.kernel == "grad_b_kernel":
        return [c["BLOCK_M"], c["BLOCK_N"]]
    if config.kernel == "grad_a_kernel":
        return [c["BLOCK_M"]] * c["NEED_DX"] + [c["BLOCK_K"]] * c["NEED_DA"]
    return [c["BLOCK_M"]]


def source(config, aligned_rank):
    """The kernel with every optional operand present, contiguous, M free and N and K multiples of 16, r too or not."""
    kernel = getattr(lowrank_kernels, config.kernel)
    constants = dict(config.constexprs) | dict.fromkeys(UNIT_STRIDES[config.kernel], 1)
    if constants.get("NEED_DX"):
        constants["sums_ptr"] = None  # column sums belong to dY, which has no dx
    planes = constants.get("PLANES", 1)
    if config.kernel == "grad_a_kernel":
        constants["DTYPE"] = TRITON_DTYPES[config.adapter_dtype]
    if config.kernel == "expand_kernel" and "s_ptr" not in constants and (planes == 1 or constants["DROPOUT"]):
        constants["s_ptr"] = None  # S is whole, or it is dSu
    types = {}
    for parameter in kernel.params:
        name = parameter.name
        if name in ACTIVATION_POINTERS or (name == "out_ptr" and config.kernel == "expand_kernel"):
            types[name] = "*" + TRITON_TYPES[config.dtype]
        elif name in SUMS_OF_COLUMNS:
            types[name] = "*fp32" if planes > 1 else "*" + TRITON_TYPES[config.adapter_dtype]
        elif name in ADAPTER or name == "out_ptr":
            types[name] = "*" + TRITON_TYPES[config.adapter_dtype]
        elif name in PARTIAL_SUMS or name == "scale_ptr":
            types[name] = "*fp32"
        elif name in INTEGERS:
            types[name] = "*i64"
        else:
            types[name] = "fp32" if name == "scale" else "i32"
    return launch_source(kernel, types, constants, frozenset() if aligned_rank else RANK_SIZED[config.kernel])


def rows():
    for (target, gpu), aligned_rank in product(GPUS.items(), (True, False)):
        title = f"low rank, r {'a multiple of 16' if aligned_rank else 'of any size'}"
        for c in configurations(gpu):
            # One full pass is enough: fp16 differs from bf16 in the name of its instructions only.
            full = target == 90 and aligned_rank
            if full or c.dtype != "float16" or (aligned_rank and c.adapter_dtype == "float32"):
                text, made = describe(c, aligned_rank), partial(source, c, aligned_rank)
                yield Row(target, title, c.kernel[:-7], c, text, made, aligned_rank, tuple(rows_of_products(c)))


@pytest.mark.parametrize("row", to_compile(rows()), ids=str)
def test_configuration_fits(row, record_property):
    row.check(problems, record_property)
