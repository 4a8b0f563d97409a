"""The bottleneck op at the sizes of real layers on a CUDA device; see test_gpu.py for what all ops have to do there."""

import pytest
import torch

import peft_fused
from peft_fused.ops.accuracy import wrong
from peft_fused.ops.cases import make_bottleneck

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("backend", ("torch", "triton"))
@pytest.mark.parametrize("sizes", [(4096, 768, 768, 16), (1024, 4096, 4096, 48), (512, 1024, 3072, 256)], ids=str)
@pytest.mark.parametrize("types", [(BF16, BF16), (BF16, F32), (F32, F32)], ids=["bf16", "bf16+fp32", "fp32"])
def test_sizes_of_real_layers(types, sizes, backend):
    """Every size of block, several splits of the rows and of the columns, and more units than one launch holds."""
    for expert in (torch.tensor(3, device=DEVICE), torch.arange(32, device=DEVICE) * 7 % 4):
        case = make_bottleneck(
            *sizes, dtype=types[0], adapter_dtype=types[1], device=DEVICE, expert=expert, experts=(4, 4)
        )
        with peft_fused.use_backend(backend):
            assert not wrong(case)
