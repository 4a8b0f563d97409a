"""How many kernels the low-rank op launches on an H200, and how many bytes they move, without one: see launches.py.

Counted above the base layer, which reads x and W and writes y, and backward reads dY and W and writes dx: of each
kernel every operand once, and what the base product reads again because it adds to it.
"""

from dataclasses import dataclass

import pytest
import torch
from launches import recording
from peft_fused.triton_kernels import lowrank
from peft_fused.triton_kernels.dropout import dropout_threshold
from torch.utils._python_dispatch import TorchDispatchMode

import peft_fused
from peft_fused.ops import lowrank_linear

F32, BF16 = torch.float32, torch.bfloat16


@dataclass(frozen=True)
class Traffic:
    """Names of the kernels, and MB above the base layer."""

    forward: list[str]
    backward: list[str]
    forward_mb: float
    backward_mb: float


def bytes_of(launch) -> int:
    """Of each operand once."""
    return sum(t.numel() * t.itemsize for t in launch.arguments.values() if isinstance(t, torch.Tensor))


def traffic(m, n, k, r, adapter, dropout=0.0) -> Traffic:
    """Of a training step of a bf16 layer with a frozen weight."""

    def meta(*shape, dtype, trained=True):
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=trained)

    def moved(launches):
        return sum(bytes_of(one) for one in launches)

    x, W = meta(m, k, dtype=BF16), meta(n, k, dtype=BF16, trained=False)
    A, B = meta(r, k, dtype=adapter), meta(n, r, dtype=adapter)
    seed = torch.empty((), dtype=torch.int64, device="meta") if dropout else None
    with recording() as recorder, peft_fused.use_backend("triton"):
        y = lowrank_linear(x, W, None, A, B, scale=2.0, dropout_p=dropout, seed=seed)
        forward = list(recorder.launches)
        recorder.launches.clear()
        torch.autograd.backward(y, torch.empty_like(y))
        backward = list(recorder.launches)
    names = [[one.compilation.kernel.__name__.removesuffix("_kernel") for one in each] for each in (forward, backward)]
    # The single kernel is the base product too; otherwise that reads what expand wrote.
    of_base = -(m * k + n * k + m * n) if names[0] == ["linear"] else m * n
    return Traffic(*names, (moved(forward) + 2 * of_base) / 1e6, (moved(backward) + 2 * m * k) / 1e6)


FORWARD, BACKWARD = ["shrink", "expand"], ["grad_b", "grad_a", "reduce"]
# m, n, k, r, type of the adapter, dropout -> MB at most. What no design avoids that leaves the base product to the
# library is x read, the adapter's y written and read by the base product, 100.7 MB of the wide layer, and backward dY
# and x read, dx written and read, 134.2 MB. The rest is S, the factors, and partial sums.
WIDE, NARROW = (4096, 4096, 4096, 16), (4096, 768, 768, 8)
LIMITS = {
    (*WIDE, BF16, 0.0): (101.2, 148.3),
    (*WIDE, F32, 0.0): (101.8, 149.2),
    (*WIDE, F32, 0.05): (101.8, 149.2),
    (*NARROW, F32, 0.0): (19.5, 31.6),
    (*NARROW, F32, 0.05): (19.5, 31.6),
}


@pytest.mark.parametrize("case", LIMITS, ids=str)
def test_launches_and_bytes(case):
    found, (forward_mb, backward_mb) = traffic(*case), LIMITS[case]
    assert (found.forward, found.backward) == (FORWARD, BACKWARD)
    assert found.forward_mb <= forward_mb and found.backward_mb <= backward_mb
    m, n, k, *_ = case
    floor = 2 * (m * k + 2 * m * n) / 1e6, 2 * (m * n + 3 * m * k) / 1e6
    assert found.forward_mb >= floor[0] and found.backward_mb >= floor[1], "something is not counted"


def test_the_single_kernel_writes_s_alone():
    found = traffic(*NARROW, BF16)
    assert (found.forward, found.backward) == (["linear"], BACKWARD)
    assert found.forward_mb < 0.2 and found.backward_mb <= 31.3


@pytest.mark.parametrize("m", [65, 128, 512, 2048, 4096, 16384])
@pytest.mark.parametrize("adapter", [BF16, F32], ids=["bf16", "fp32"])
def test_few_kernels_whatever_the_rows(m, adapter):
    """However the sums are shared out, nobody but the end of backward adds them up."""
    for n, k, dropout in ((4096, 4096, 0.0), (1024, 4096, 0.1), (14336, 4096, 0.0), (768, 3072, 0.1)):
        found = traffic(m, n, k, 16, adapter, dropout)
        assert (found.forward, found.backward) == (FORWARD, BACKWARD)


class Copies(TorchDispatchMode):
    """Names of the functions of torch's own that copy or add beside the kernels."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).split(".")[1]
        self.names += [] if name in ("new_empty", "empty", "view", "unbind", "transpose", "expand", "slice") else [name]
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_members_read_x_once(dropout):
    """Three projections of the wide layer: the product that they share, and its gradients. No design avoids x read,
    33.6 MB, and backward x and the base products' dx read and dx written, 100.7 MB."""
    m, _, k, r = WIDE
    members, threshold = 3, dropout_threshold(dropout)

    def meta(*shape, dtype=F32):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, onto, seeds = meta(m, k, dtype=BF16), meta(m, k, dtype=BF16), meta(members, dtype=torch.int64)
    dS, factors = [meta(m, r) for _ in range(members)], [meta(r, k) for _ in range(members)]
    with recording() as recorder, Copies() as copies:
        lowrank.shared_shrink_fwd(x, factors, threshold=threshold, seeds=seeds)
        assert copies.names == ["cat"]
        needs = {"need_x": True, "needs": [True] * members}
        lowrank.shared_shrink_bwd(dS, x, factors, onto=onto, threshold=threshold, seeds=seeds, **needs)
        assert copies.names == ["cat", "stack", "cat"]
    kernels = ("shrink", "expand", "grad_a", "reduce")
    assert [one.compilation.kernel.__name__ for one in recorder.launches] == [f"{name}_kernel" for name in kernels]
    forward, *backward = map(bytes_of, recorder.launches)
    assert 33.5e6 < forward < 35.2e6 and 100.6e6 < sum(backward) < 114.4e6
    # Without dropout a program has the ranks of all members, with it those of one.
    shrink, _, grad_a, _ = recorder.launches
    each = members if dropout else 1
    assert shrink.grid == (each * m // 64, 1, 1) and grad_a.grid[::2] == (each * k // 64, 1)
