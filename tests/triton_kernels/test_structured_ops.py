"""The structured ops on the Triton backend, through the same dispatch and autograd node as on a GPU."""

import os

import pytest
import torch

import peft_fused
from peft_fused.ops import structured
from peft_fused.ops.accuracy import unseen, wrong
from peft_fused.ops.cases import make_structured
from peft_fused.ops.structured.engine import STRUCTURES

pytestmark = [] if os.environ.get("TRITON_INTERPRET") == "1" else pytest.mark.gpu

SIZES = {
    "circulant": [(2,), (7,), (40,), (97,)],
    "skew_circulant": [(2,), (97,)],
    "toeplitz": [(1, 2), (96, 40)],
    "toeplitz_product": [(40,)],
    "kronecker": [(3, 5, 7, 4)],
    "ldr": [(2, 24)],
}
TYPES = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32)]


@pytest.mark.parametrize("types", TYPES, ids=["fp32", "fp16", "fp16+fp32"])
@pytest.mark.parametrize("kind", STRUCTURES)
def test_error_is_at_most_twice_pytorchs(kind, types, device, poisoned):
    options = [{"dropout_p": 0.3, "seed": 5, "add": True}]
    if types[0] == types[1] == torch.float32:
        options += [{}, {"dropout_p": 0.3, "seed": 5, "transposed": True}]
    for sizes in SIZES[kind]:
        for option in options if sizes == SIZES[kind][-1] else options[:1]:
            case = make_structured(
                kind, 5, *sizes, dtype=types[0], adapter_dtype=types[1], device=str(device), **option
            )
            with peft_fused.use_backend("triton"):
                assert not wrong(case)


@pytest.mark.parametrize("kind", STRUCTURES)
def test_controls_fail(kind, device):
    case = make_structured(kind, 5, *SIZES[kind][-1], device=str(device))
    with peft_fused.use_backend("triton"):
        assert not unseen(case)


def test_options_of_circulant(device):
    for sizes, option in (((24,), {"factor": True}), ((24,), {"inputs": 17, "out_features": 24})):
        case = make_structured("circulant", 3, *sizes, device=str(device), **option)
        with peft_fused.use_backend("triton"):
            assert not wrong(case)


def test_rows_of_any_magnitude_share_a_tile(device):
    """Two rows make one complex row: a huge one must not take digits, or finiteness, from its small neighbour."""
    x = torch.randn(4, 48, device=device)
    x *= torch.tensor([1e30, 1e-30, 1.0, 0.0], device=device).unsqueeze(1)
    c = torch.randn(48, device=device)
    with peft_fused.use_backend("triton"):
        y = structured.circulant_matmul(x, c)
    exact = structured.circulant_matmul_reference(x.double(), c.double())
    error = (y - exact).abs().amax(1) / exact.abs().amax(1).clamp_min(1e-300)
    assert (error[:3] < 1e-5).all() and (y[3].abs() < 1e-30).all()
