"""Compiles every kernel configuration of the default plans for sm_80 and sm_90, without a GPU, and reads the resource
report: no register spills, shared memory within the limit, tensor-core instructions of the generation.

It prints a table by kernel; `pytest -s` shows every configuration.
"""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import triton
from peft_fused.triton_kernels import lowrank_kernels
from peft_fused.triton_kernels.plan import configurations
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

pytestmark = pytest.mark.aot

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
TRITON_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}

ACTIVATIONS = {"x_ptr", "w_ptr", "bias_ptr", "y_ptr", "dy_ptr", "dx_ptr", "add_ptr", "dbias_ptr"}
ADAPTER = {"a_ptr", "b_ptr", "u_ptr", "v_ptr", "s_ptr", "dsu_ptr", "dv_ptr", "du_ptr"}
PARTIAL_SUMS = {"planes_ptr", "sums_ptr", "dots_ptr"}
INTEGERS = {"rank_ptr", "expert_ptr", "expert_a_ptr", "expert_b_ptr", "seed_ptr"}
# Strides of contiguous operands, as they are on the hot path; `linear` and `expand` read B along its ranks.
UNIT_STRIDES = {
    "shrink_kernel": {"stride_xk", "stride_ak"},
    "expand_kernel": {"stride_br", "stride_dn"},
    "linear_kernel": {"stride_xk", "stride_wk", "stride_ak", "stride_br"},
    "grad_b_kernel": {"stride_yn", "stride_br"},
    "grad_a_kernel": {"stride_xk", "stride_ak"},
    "reduce_kernel": {"stride_or", "stride_br"},
}
# Arguments that are r in contiguous operands: rank 8 leaves the compiler without their alignment.
RANK_SIZED = {kernel: {"r", "stride_bn"} for kernel in UNIT_STRIDES} | {
    "reduce_kernel": {"r", "stride_bn", "stride_ox"}
}


@dataclass
class Report:
    config: object
    target: int
    aligned_rank: bool
    registers: int
    stack: int
    shared: int
    wgmma: int
    mma: int
    copies: int  # asynchronous copies of 16 bytes

    def __str__(self):
        c = self.config
        types = c.dtype if c.dtype == c.adapter_dtype else f"{c.dtype}+{c.adapter_dtype}"
        flags = "-".join(name for name, value in c.constexprs if value is True)
        blocks = "x".join(f"{name[6:]}{value}" for name, value in c.constexprs if name.startswith("BLOCK_"))
        rank = "r%16=0" if self.aligned_rank else "r%16>0"
        return (
            f"{c.kernel[:-7]:7} {types:16} sm_{self.target} {blocks:24} {flags:28} {rank} warps {c.num_warps} "
            f"registers {self.registers:3} stack {self.stack} shared {self.shared:6} wgmma {self.wgmma:3} "
            f"mma {self.mma:3} copies {self.copies:2}"
        )

    def problems(self):
        found = []
        if self.stack:
            found.append("spills")
        if self.shared > SHARED_LIMIT[self.target]:
            found.append("shared memory")
        rows = rows_of_products(self.config)
        if rows and self.target == 80 and (self.wgmma or not self.mma):
            found.append("expected mma.sync")
        # wgmma multiplies 64 rows at a time: a product of fewer takes mma.sync instead.
        if self.target == 90 and bool(self.wgmma) != any(m >= 64 for m in rows):
            found.append("expected wgmma")
        if self.target == 90 and bool(self.mma) != any(m < 64 for m in rows):
            found.append("expected no mma.sync")
        # A pointer whose alignment the compiler cannot see is loaded by the element and never pipelined.
        reads_activations = self.config.kernel in ("shrink_kernel", "linear_kernel", "grad_b_kernel")
        if self.target == 90 and (reads_activations or dict(self.config.constexprs).get("NEED_DA")) and not self.copies:
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
    constants = dict(config.constexprs)
    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in UNIT_STRIDES[config.kernel]:
            constants[name] = 1
        if name == "sums_ptr" and constants.get("NEED_DX"):
            constants[name] = None  # column sums belong to dY, which has no dx
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name in ACTIVATIONS or (name == "out_ptr" and config.kernel == "expand_kernel"):
            signature[name] = "*" + TRITON_TYPES[config.dtype]
        elif name in ADAPTER or name == "out_ptr":
            signature[name] = "*" + TRITON_TYPES[config.adapter_dtype]
        elif name in PARTIAL_SUMS or name == "scale_ptr":
            signature[name] = "*fp32"
        elif name in INTEGERS:
            signature[name] = "*i64"
        else:
            signature[name] = "fp32" if name == "scale" else "i32"
        if name in RANK_SIZED[config.kernel] and not aligned_rank:
            continue
        if not parameter.do_not_specialize and not parameter.do_not_specialize_on_alignment:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_for(config, target, aligned_rank, folder):
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    compiled = triton.compile(source(config, aligned_rank), target=GPUTarget("cuda", target, 32), options=options)
    cubin = folder / f"{compiled.hash}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    ptx = compiled.asm["ptx"]
    counts = (len(re.findall(pattern, ptx)) for pattern in (r"wgmma\.mma_async", r"\bmma\.sync", r"cp\.async\.cg"))
    return Report(config, target, aligned_rank, registers, stack + local, compiled.metadata.shared, *counts)


def table(reports):
    """One line per kernel: how many configurations, and the worst of each resource among them."""
    lines = [
        f"sm_{reports[0].target}, r {'a multiple of 16' if reports[0].aligned_rank else 'of any size'}",
        "kernel   configurations  registers  spilled bytes  shared KiB  with wgmma  with mma.sync",
    ]
    for kernel in sorted({report.config.kernel for report in reports}):
        of = [report for report in reports if report.config.kernel == kernel]
        registers, stack, shared = (max(getattr(r, name) for r in of) for name in ("registers", "stack", "shared"))
        wgmma, mma = (sum(getattr(r, name) > 0 for r in of) for name in ("wgmma", "mma"))
        lines.append(
            f"{kernel[:-7]:8} {len(of):14} {registers:10} {stack:14} {shared / 1024:11.1f} {wgmma:11} {mma:14}"
        )
    return "\n".join(lines)


@pytest.mark.parametrize("aligned_rank", [True, False])
@pytest.mark.parametrize("target", [80, 90])
def test_every_configuration_fits(target, aligned_rank, tmp_path, capsys):
    configs = configurations()
    if target == 80 or not aligned_rank:
        # One full pass is enough: fp16 differs from bf16 in the name of its instructions only.
        configs = [c for c in configs if c.dtype != "float16" or (aligned_rank and c.adapter_dtype == "float32")]
    with ThreadPoolExecutor(2) as pool:  # most of a compilation runs outside Python
        reports = list(pool.map(lambda config: compile_for(config, target, aligned_rank, tmp_path), configs))
    print("", *reports, sep="\n")
    with capsys.disabled():
        print("", table(reports), sep="\n")
    bad = [f"{report}: {', '.join(report.problems())}" for report in reports if report.problems()]
    assert not bad, "\n" + "\n".join(bad)
