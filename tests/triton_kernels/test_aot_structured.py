"""Compiles the convolution kernels of each GPU's plans, without a GPU: see aot.py.

Of configurations that differ in their true length alone, whose code differs in constants, one is compiled.
"""

from functools import partial

import pytest
from aot import EVERY, GPUS, TRITON_TYPES, Row, launch_source
from peft_fused.triton_kernels import structured_kernels
from peft_fused.triton_kernels.fft_plan import configurations

pytestmark = pytest.mark.aot

ACTIVATION_POINTERS = {"x_ptr", "y_ptr", "dy_ptr", "dx_ptr", "add_ptr"}
FLOATS = {"spectrum_ptr", "then_ptr", "partials_ptr", "scratch_ptr", "twiddle_ptr", "scale_ptr"}
UNIT_STRIDES = {"stride_xk", "stride_yn", "stride_an"}


def describe(config):
    plan = config.plan
    sizes = "x".join(map(str, plan.padded))
    switches = "-".join(sorted(config.switches))
    return (
        f"{config.kernel[:-7]:8} {config.dtype:8} {sizes:8} band {plan.band:2} rows {plan.rows_in:2} {plan.rows_out:2} "
        f"pairs {plan.pairs:3} {switches:16} warps {plan.num_warps}"
    )


def shape(config):
    """What decides the code of a kernel, up to constants; fp16 is like fp32."""
    plan = config.plan
    rows = plan.rows_in, plan.rows_mid, plan.rows_out
    aligned = plan.factors[2] % 8 == 0
    types = config.dtype == "bfloat16", plan.split
    return config.kernel, plan.padded, plan.band, rows, plan.pairs, types, aligned, config.switches


def tile(config):
    """The same but for what is switched on."""
    return *shape(config)[:-1], config.plan.num_warps


def representatives(target):
    """One configuration of each shape of 1,024 points or more, with dropout, which takes most registers. Of those, the
    ones whose groups of eight columns stay together and whose rows fill the tile as far as they can: of each tile that
    with most switched on, and those with a switch that is not among these. `make aot` compiles all for each GPU, and
    the others for sm_80.
    """
    found = {}
    for config in configurations(GPUS[target]):
        plan = config.plan
        dropout = any(name.startswith("DROP") for name in config.switches)
        full = plan.factors[2] % 8 == 0 and plan.rows_in >= plan.padded[0]
        if dropout and plan.points >= 1024 and config.dtype != "float16" and (full or (EVERY and target == 80)):
            found[shape(config)] = config
    if EVERY:
        return list(found.values())
    tiles, seen, chosen = set(), set(), []
    for config in sorted(found.values(), key=lambda c: -len(c.switches)):
        switches = {(config.kernel, config.plan.split, switch) for switch in config.switches}
        if tile(config) not in tiles or not switches <= seen:
            chosen.append(config)
        tiles.add(tile(config))
        seen |= switches
    return chosen


def source(config):
    """The kernel with every optional operand present, contiguous, widths multiples of 16."""
    kernel = getattr(structured_kernels, config.kernel)
    plan = config.plan
    constants = {
        "N": plan.factors, "P": plan.padded, "Q": plan.tile, "PAIRS": plan.pairs, "IN": plan.rows_in,
        "MID": plan.rows_mid, "OUT": plan.rows_out, "SPLIT": plan.split,
    }  # fmt: skip
    constants |= {name: name in config.switches for name in ("DROP_INPUT", "DROP_OUTPUT", "DROPOUT", "NEED_DX")}
    constants |= dict.fromkeys(UNIT_STRIDES, 1)
    if "then" not in config.switches:
        constants["then_ptr"] = None
    types = {"dft_ptr": "*fp16", "seed_ptr": "*i64", "scale": "fp32"}
    names = {parameter.name for parameter in kernel.params}
    for name in names - types.keys():
        if name in ACTIVATION_POINTERS:
            types[name] = "*" + TRITON_TYPES[config.dtype]
        else:
            types[name] = "*fp32" if name in FLOATS else "i32"
    return launch_source(kernel, types, {name: value for name, value in constants.items() if name in names})


def rows():
    seen = set()
    # Their code is of one shape, of which sm_120 takes most registers; the others have what plans have only there.
    for target in GPUS if EVERY else (120, 90, 100):
        for c in representatives(target):
            if not EVERY and (shape(c), c.num_warps) in seen:
                continue
            seen.add((shape(c), c.num_warps))
            title = f"{'split' if c.plan.split else 'half'} precision"
            yield Row(target, title, c.kernel[:-7], c, describe(c), partial(source, c))


def problems(config, resources):
    return resources.problems() + ([] if resources.mma or resources.wgmma else ["expected tensor cores"])


@pytest.mark.parametrize("row", rows(), ids=str)
def test_configuration_fits(row, record_property):
    row.check(problems, record_property)
