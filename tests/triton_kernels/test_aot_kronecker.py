"""Compiles the Kronecker kernels of each GPU's plans, without a GPU: see aot.py."""

from functools import partial

import pytest
from aot import GPUS, TRITON_TYPES, Row, launch_source, to_compile
from peft_fused.triton_kernels import kronecker_kernels
from peft_fused.triton_kernels.kronecker_plan import configurations

pytestmark = pytest.mark.aot

ACTIVATION_POINTERS = {"x_ptr", "y_ptr", "dy_ptr", "dx_ptr", "add_ptr"}
FACTORS = {"a_ptr", "b_ptr"}
SUMS = {"a_partials_ptr", "b_partials_ptr", "scale_ptr"}


def describe(config):
    c = dict(config.constexprs)
    types = config.dtype if config.dtype == config.adapter_dtype else f"{config.dtype}+{config.adapter_dtype}"
    sizes = "x".join(str(c[name]) for name in ("A1", "A2", "B1", "B2") if name in c)
    blocks = "x".join(f"{name[6:]}{value}" for name, value in c.items() if name.startswith("BLOCK_"))
    flags = "-".join(name for name, value in c.items() if value is True)
    dropout = c["DROPOUT"] if isinstance(c.get("DROPOUT"), str) else ""
    return f"{config.kernel[:-7]:8} {types:16} {sizes:15} {blocks:28} {flags or dropout:31} warps {config.num_warps}"


def rows_of_products(c):
    """Rows of the left operand of each tensor-core product of a kernel."""
    inputs = c["BLOCK_B2"] * c["BLOCK_M"]
    if "NEED_DX" not in c:
        return [inputs, c["BLOCK_B1"]]
    rows = [c["BLOCK_M"] * c["BLOCK_A1"]] * (c["NEED_DX"] or c["NEED_DA"])
    return rows + [inputs] * c["NEED_DX"] + [c["BLOCK_A2"]] * c["NEED_DA"] + [inputs, c["BLOCK_B1"]] * c["NEED_DB"]


def problems(config, resources):
    found = resources.problems()
    if config.kernel == "reduce_kernel":
        return found
    c = dict(config.constexprs)
    # wgmma and tcgen05 multiply 64 rows at a time or more: a product of fewer takes mma.sync instead.
    rows = rows_of_products(c)
    if resources.target == 90 and bool(resources.wgmma) != any(m >= 64 for m in rows):
        found.append("expected wgmma")
    if resources.target == 90 and bool(resources.mma) != any(m < 64 for m in rows):
        found.append("expected no mma.sync")
    if not (resources.wgmma or resources.tcgen05 or resources.mma):
        found.append("expected tensor cores")
    if resources.target not in (90, 100) and (resources.wgmma or resources.tcgen05):
        found.append("expected mma.sync")
    # A load reaches shared memory by itself only where it is not transposed in fp32 on its way, nor of odd rows.
    pipelined = config.dtype != "float32" and c["A2"] % 8 == 0 and config.num_stages > 1
    if resources.target == 90 and pipelined and not resources.copies:
        found.append("expected pipelined loads")
    return found


def source(config):
    """The kernel with contiguous operands and, in forward, with `add`; A and B are transposed views in a dx."""
    kernel = getattr(kronecker_kernels, config.kernel)
    c = dict(config.constexprs)
    constants = dict(c)
    strides = {}
    if config.kernel != "reduce_kernel":
        transposed = c["DROPOUT"] == "output"
        strides = {"stride_ai": c["A2"], "stride_aj": 1, "stride_bi": c["B2"], "stride_bj": 1}
        if transposed:
            strides = {"stride_ai": 1, "stride_aj": c["A1"], "stride_bi": 1, "stride_bj": c["B1"]}
        inputs, outputs = c["A2"] * c["B2"], c["A1"] * c["B1"]
        strides |= {"stride_xm": inputs, "stride_xk": 1, "stride_ym": outputs, "stride_yn": 1}
        strides |= {"stride_dm": outputs, "stride_dn": 1}
    types = {}
    for parameter in kernel.params:
        name = parameter.name
        if strides.get(name) == 1:
            constants[name] = 1
        if name in ACTIVATION_POINTERS:
            types[name] = "*" + TRITON_TYPES[config.dtype]
        elif name in FACTORS:
            types[name] = "*" + TRITON_TYPES[config.adapter_dtype]
        elif name in SUMS:
            types[name] = "*fp32"
        else:
            types[name] = "*i64" if name == "seed_ptr" else "fp32" if name == "scale" else "i32"
    return launch_source(kernel, types, constants, {name for name, stride in strides.items() if stride % 16})


def rows():
    for target, gpu in GPUS.items():
        for c in configurations(gpu):
            # fp16 differs from bf16 in the name of its instructions, and beside fp32 factors it is upcast like fp32.
            if c.dtype != "float16":
                products = () if c.kernel == "reduce_kernel" else tuple(rows_of_products(dict(c.constexprs)))
                yield Row(target, "Kronecker", c.kernel[:-7], c, describe(c), partial(source, c), products=products)


@pytest.mark.parametrize("row", to_compile(rows()), ids=str)
def test_configuration_fits(row, record_property):
    row.check(problems, record_property)
