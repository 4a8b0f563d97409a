"""What the plans of all kernels share: sizes, classes of operands, and the description of one kernel to compile."""

from dataclasses import dataclass

MAX_RANK = 256
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class KernelConfig:
    """One kernel to compile: its constexpr arguments, absent pointers among them, and its types."""

    kernel: str
    dtype: str
    adapter_dtype: str
    constexprs: tuple[tuple[str, object], ...]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


def next_power_of_2(value: int) -> int:
    return 1 << max(0, value - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def padded_rank(r: int) -> int:
    """The ranks of an internal tensor, whose rows are then aligned."""
    return max(16, next_power_of_2(r))


def operand_class(dtype: str, adapter_dtype: str) -> str:
    if dtype == adapter_dtype and dtype != "float32":
        return "half"
    return "split" if dtype == "bfloat16" else "full"


def reduce_launch(r: int) -> tuple[dict[str, int], int]:
    """(blocks, num_warps) of a tile of the second stage of sums over rows, [.., r]: partials, rows, ranks."""
    block_r = padded_rank(r)
    partials = 8 if block_r <= 64 else max(1, min(4, 4 * MAX_RANK // block_r))  # more ranks are those of members
    blocks = {"BLOCK_P": partials, "BLOCK_X": max(8, 256 // block_r), "BLOCK_R": block_r}
    return blocks, 4 if block_r <= 64 else 8
