"""Compiles Triton kernels without a GPU and reads what the machine code takes. Used by the test_aot*.py modules.

`launch_source` describes a kernel as its launcher would specialise it; a `Row` is one such kernel for one generation of
GPUs, and one test; the tables at the end of a run have the worst of all rows by kernel (tests/conftest.py).
"""

import os
import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

import triton
from peft_fused.triton_kernels.problem import H200, LARGE, MEDIUM, SMALL, Gpu
from peft_fused.triton_kernels.tiles import operand_class
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

# Every configuration, as `make aot` sets it; otherwise the largest that ask for most.
EVERY = os.environ.get("PEFT_FUSED_AOT") == "all"
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
# By compute capability a GPU to make plans for. Of those whose code is of one shape, the first is compiled.
GPUS = {
    90: H200,
    80: Gpu("NVIDIA A100", 108, MEDIUM, 80),
    86: Gpu("NVIDIA A40", 84, SMALL, 86),
    89: Gpu("NVIDIA L40S", 142, SMALL, 89),
    120: Gpu("NVIDIA RTX PRO 6000", 188, SMALL, 120),
    100: Gpu("NVIDIA B200", 148, LARGE, 100),
}
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
    tcgen05: int
    mma: int
    copies: int  # asynchronous copies of 16 bytes

    def __str__(self):
        return (
            f"sm_{self.target} registers {self.registers:3} stack {self.stack} shared {self.shared:6} "
            f"wgmma {self.wgmma:3} tcgen05 {self.tcgen05:3} mma {self.mma:3} copies {self.copies:2}"
        )

    def problems(self):
        """What no kernel may do; the instructions to expect are up to the caller."""
        found = ["spills"] if self.stack > STACK_LIMIT else []
        # What multiplies by mma.sync on sm_90 is the code of sm_80 too, and may not be compiled for that again.
        limit = GPUS[80 if self.target == 90 and not self.wgmma else self.target].shared_memory
        return found + (["shared memory"] if self.shared > limit else [])


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
    """Resources of a source compiled for a compute capability such as 90.

    Stage by stage, as `triton.compile` does it, without that function's files: they cost a fifth of the time.
    """
    goal = GPUTarget("cuda", target, 32)
    backend, context = make_backend(goal), ir.context()
    options = backend.parse_options({"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg})
    ir.load_dialects(context)
    backend.load_dialects(context)
    code = backend.get_codegen_implementation(options)
    module = source.make_ir(goal, options, code, backend.get_module_map(), context)
    stages, metadata, made = {}, dict(vars(options)), {}
    backend.add_stages(stages, options, source.language)
    for name, stage in stages.items():
        module = made[name] = stage(module, metadata)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(made["cubin"])
        cubin.flush()
        command = [CUOBJDUMP, "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    patterns = r"wgmma\.mma_async", r"tcgen05\.mma", r"\bmma\.sync", r"cp\.async\.cg"
    counts = (len(re.findall(pattern, made["ptx"])) for pattern in patterns)
    return Resources(target, registers, stack + local, metadata["shared"], *counts)


@dataclass(frozen=True)
class Row:
    """A configuration (with num_warps, num_stages and perhaps maxnreg) for a compute capability: one test.

    title: of its table; kernel: its line in there. source(): what is compiled. aligned: whether the compiler sees the
    alignment of all operands.
    """

    target: int
    title: str
    kernel: str
    config: object
    text: str
    source: Callable[[], ASTSource]
    aligned: bool = True
    # Rows of the left operands of its products: of 64 and more, sm_90 takes wgmma and sm_100 tcgen05.
    products: tuple[int, ...] = ()
    # Other compute capabilities with this configuration and with code of the same shape: see `to_compile`.
    also: tuple[int, ...] = ()

    def __str__(self):
        return f"sm_{self.target}-" + "-".join(self.text.split())

    @property
    def instruction(self):
        """What multiplies: code with the same is of one shape, and takes the same shared memory to a few KB."""
        wide = max(self.products, default=0) >= 64
        return {90: "wgmma", 100: "tcgen05"}.get(self.target, "mma.sync") if wide else "mma.sync"

    @property
    def limit(self):
        """Bytes of shared memory of a block on the GPUs that it is for."""
        return min(GPUS[target].shared_memory for target in (self.target, *self.also))

    @property
    def family(self):
        """What the compiler's choices hang on: rows with the same differ in their sizes and in what they ask for."""
        c = self.config
        words = tuple(pair for pair in c.constexprs if not self._is_switch(*pair) and not self._is_number(*pair))
        return self.limit, self.instruction, *self.kind, words, self.of_members, c.num_warps, self.maxnreg

    @property
    def of_members(self):
        """Whether it is of projections that share a product, whose ranks lie otherwise than those of one."""
        return dict(self.config.constexprs).get("MEMBERS", 1) > 1

    @property
    def maxnreg(self):
        return getattr(self.config, "maxnreg", None)

    @property
    def kind(self):
        return self.config.kernel, operand_class(self.config.dtype, self.config.adapter_dtype)

    @property
    def sizes(self):
        """The sides of its tiles and the stages of its loop, which decide its registers and memory; other numbers are
        constants of its code."""
        sides = tuple(v for name, v in self.config.constexprs if name.startswith("BLOCK") or name in ("PLANES", "R"))
        return *sides, self.config.num_stages

    @property
    def demand(self):
        """What adds to them: options that are on, operands that are there, loads by the element."""
        on = [f"{name}={value}" for name, value in self.config.constexprs if value and self._is_switch(name, value)]
        loads = [] if self.aligned else ["loads by the element"]
        types = ["bfloat16"] if self.config.dtype == "bfloat16" else []  # which fp16 is like
        return frozenset(on + loads + types)

    @property
    def extent(self):
        return self.sizes, self.demand

    def is_less_than(self, other):
        """Whether `other`, of the same family, is at least as large and asks for at least as much, and one is more."""
        smaller = all(mine <= its for mine, its in zip(self.sizes, other.sizes, strict=True))
        return smaller and self.demand <= other.demand and self.extent != other.extent

    @staticmethod
    def _is_switch(name, value):
        return name == "DROPOUT" or (name != "BACKWARD" and (isinstance(value, bool) or value is None))

    @staticmethod
    def _is_number(name, value):
        return isinstance(value, int) and not isinstance(value, bool)

    def check(self, problems, record_property):
        """Compiles it, leaves its resources for the table, and fails with what problems(config, resources) names."""
        config = self.config
        launch = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        resources = compile_for(self.source(), self.target, **launch, maxnreg=self.maxnreg)
        record_property("aot", [f"sm_{self.target}, {self.title}", self.kernel, asdict(resources)])
        print(f"{self.text} {resources}")  # for pytest -rP
        found = problems(config, resources)
        found += [f"shared memory of sm_{other}" for other in self.also if resources.shared > GPUS[other].shared_memory]
        assert not found, f"{self.text} {resources}: {', '.join(found)}"


def to_compile(rows):
    """The rows of a run: all, or those than which no other is larger and asks for more, the first of equal ones.

    A configuration of several compute capabilities that multiply by the same instruction is compiled for one of them,
    within the shared memory of all: their code is of one shape. The registers are not quite the same: each compute
    capability has at least the largest aligned row of each kernel and class of operands. Of members, whose tiles are
    those of a layer by itself too, the first has all such rows, and others the largest of each kernel with products.
    """
    rows, alike, families, found = list(rows), defaultdict(list), defaultdict(list), {}
    if EVERY:
        return rows
    order = list(GPUS)
    for row in rows:
        alike[row.instruction, row.config, row.aligned].append(row)
    for group in alike.values():
        first, *others = sorted(group, key=lambda row: order.index(row.target))
        row = replace(first, also=tuple(other.target for other in others))
        families[row.family].append(row)
    for family in families.values():
        for row in family:
            if not any(row.is_less_than(other) for other in family):
                found.setdefault((row.family, row.extent), row)
    chosen, of_members = [], {}
    for row in sorted(found.values(), key=lambda row: (prod(row.sizes), len(row.demand))):
        if row.of_members and row.target != order[0]:
            of_members |= {(row.target, row.kind): row} if row.products else {}
        else:
            chosen.append(row)
    seen = {(row.target, row.kind) for row in chosen}
    largest = {}
    for row in sorted(rows, key=lambda row: (row.aligned, prod(row.sizes), len(row.demand))):
        largest[row.target, row.kind] = row
    chosen += of_members.values()
    return chosen + [row for key, row in largest.items() if key not in seen]
