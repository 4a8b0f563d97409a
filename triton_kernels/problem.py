"""A call as dispatch and the launch plans know it, which need neither torch nor triton."""

from dataclasses import dataclass, field

# Bytes of shared memory that a block may have: of sm_86, 89 and 120, of sm_80, and of sm_90 and 100.
SMALL, MEDIUM, LARGE = 99 * 1024, 163 * 1024, 227 * 1024


@dataclass(frozen=True)
class Gpu:
    """A GPU as far as plans depend on it; by itself, one of which nothing is known. shared_memory: bytes that a block
    may have. capability: 90 for sm_90."""

    name: str = ""
    sm_count: int = 1
    shared_memory: int = LARGE
    capability: int = 90


# What default plans are chosen for, where none is at hand.
H200 = Gpu("NVIDIA H200", 132)


@dataclass(frozen=True)
class Problem:
    """A call as far as decisions depend on it: equal for calls that run alike. An op's own has what else matters.

    m rows of k features to n. Types, of the rows and of the parameters, are names such as "bfloat16"; device is "cuda"
    or "cpu". huge_scale: whether the scale is beyond the range of the parameters' type; the C++ node has no such
    factor of a product, because ATen takes none. By itself it is that of an op without kernels of its own.
    """

    m: int
    n: int
    k: int
    dtype: str
    adapter_dtype: str
    device: str
    gpu: Gpu
    huge_scale: bool = field(default=False, kw_only=True)

    def describe(self) -> str:
        """The op, its sizes and types, for messages: a `sentence`."""
        raise NotImplementedError

    def limits(self, backend: str) -> list[str]:
        """What keeps the kernels of triton or cuda from this problem, whatever the machine."""
        return ["the op has no kernel of its own"]

    def preference(self) -> tuple[str, ...]:
        """Backends on CUDA, the best first."""
        return ("torch",)

    def native(self, backend: str) -> bool:
        """Whether the C++ node runs the problem on a backend."""
        return False

    def launch_plan(self, backend: str):
        """What the implementation is given to run by."""
        return None

    def words(self, backend: str) -> str:
        """What the backend runs, as the end of a sentence."""
        return ""

    def sentence(self, op: str, options: str, rows: str = "x", parameters: str = "parameters", more: str = "") -> str:
        """options: with their commas. rows, parameters: what they are called where their types differ."""
        types = self.dtype
        if self.adapter_dtype != types:
            types = f"{types} {rows}, {self.adapter_dtype} {parameters}"
        return f"{op} [{self.m}, {self.k}] -> [{self.m}, {self.n}]{options}, {types}{more} on {self.device}"
