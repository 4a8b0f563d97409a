"""Compiles Triton kernels without a GPU and reads what the machine code takes. Used by the test_aot*.py modules.

`launch_source` describes a kernel as its launcher would specialise it; `compile_all` compiles such sources for one
generation and gives a `Resources` each; `table` prints the worst of them by kernel.
"""

import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes of a block, by compute capability
# Bytes of a thread. What Triton 3.6 compiles leaves a number or two of some kernels there.
STACK_LIMIT = 16 if triton.__version__.startswith("3.6") else 0
TRITON_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes: per thread registers and bytes of local memory, per block bytes of shared memory,
    and how many instructions of each kind."""

    target: int
    registers: int
    stack: int
    shared: int
    wgmma: int
    mma: int
    copies: int  # asynchronous copies of 16 bytes

    def __str__(self):
        return (
            f"sm_{self.target} registers {self.registers:3} stack {self.stack} shared {self.shared:6} "
            f"wgmma {self.wgmma:3} mma {self.mma:3} copies {self.copies:2}"
        )

    def problems(self):
        """What no kernel may do; the instructions to expect are up to the caller."""
        found = ["spills"] if self.stack > STACK_LIMIT else []
        return found + (["shared memory"] if self.shared > SHARED_LIMIT[self.target] else [])


def launch_source(kernel, types, constants, unaligned=frozenset()):
    """ASTSource of a kernel. types: Triton's types by parameter ("*bf16", "i32"); constants: values by parameter, for
    constexprs, absent pointers and unit strides. Every other argument that the kernel specialises is a multiple of 16
    unless it is named in `unaligned`.
    """
    signature, attributes = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = types[name]
        specialised = not parameter.do_not_specialize and not parameter.do_not_specialize_on_alignment
        if specialised and name not in unaligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_for(source, target, *, num_warps, num_stages, maxnreg=None):
    """Resources of a source compiled for a compute capability such as 90."""
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [CUOBJDUMP, "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    patterns = r"wgmma\.mma_async", r"\bmma\.sync", r"cp\.async\.cg"
    counts = (len(re.findall(pattern, compiled.asm["ptx"])) for pattern in patterns)
    return Resources(target, registers, stack + local, compiled.metadata.shared, *counts)


def compile_all(configs, source_of, target):
    """Resources of every configuration (which has num_warps, num_stages and perhaps maxnreg), in order."""

    def resources(config):
        launch = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        return compile_for(source_of(config), target, **launch, maxnreg=getattr(config, "maxnreg", None))

    with ThreadPoolExecutor(2) as pool:  # most of a compilation runs outside Python
        return list(pool.map(resources, configs))


def table(title, rows):
    """One line per kernel: how many configurations, and the worst of each resource among them. rows: pairs of a name
    and its Resources."""
    lines = [title, "kernel       configurations  registers  spilled bytes  shared KiB  with wgmma  with mma.sync"]
    for name in sorted({name for name, _ in rows}):
        of = [resources for other, resources in rows if other == name]
        registers, stack, shared = (max(getattr(r, field) for r in of) for field in ("registers", "stack", "shared"))
        wgmma, mma = (sum(getattr(r, field) > 0 for r in of) for field in ("wgmma", "mma"))
        lines.append(f"{name:12} {len(of):14} {registers:10} {stack:14} {shared / 1024:11.1f} {wgmma:11} {mma:14}")
    return "\n".join(lines)
