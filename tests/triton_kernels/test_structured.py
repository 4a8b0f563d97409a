"""The convolution kernels against float64: values, gradients, dropout mask, magnitudes, determinism.

Runs on a GPU, or interpreted with TRITON_INTERPRET=1 (see conftest.py).
"""

import os
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from peft_fused.triton_kernels.dropout import dropout_threshold, keep_scale
from peft_fused.triton_kernels.fft_plan import next_length
from peft_fused.triton_kernels.structured import convolve, convolve_bwd
from rule import repeated

from peft_fused.ops.dropout import keep_mask

pytestmark = [] if os.environ.get("TRITON_INTERPRET") == "1" else pytest.mark.gpu

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = {"fp32": FP32, "fp16": FP16, "bf16": BF16}


@dataclass(frozen=True)
class Case:
    M: int = 5
    n_in: int = 384
    n_out: int = 0  # n_in
    length: int = 0  # the larger of both
    n_mid: int = 0  # a second convolution
    dtype: str = "fp32"
    transposed: bool = False
    add: bool = False
    p: float = 0.0
    mask_output: bool = False
    strided: bool = False
    seed: int = 0x1234_5678_9ABC_DEF1

    def __str__(self):
        default = Case.__dataclass_fields__
        changed = {k: v for k, v in vars(self).items() if v != default[k].default}
        return "-".join(f"{k}{v}" for k, v in changed.items()) or "default"

    @property
    def columns(self):
        n_out = self.n_out or self.n_in
        return self.n_in, n_out, self.length or max(self.n_in, n_out)


def make(case, device):
    """Inputs by name. Strided rows leave gaps that hold NaN."""
    generator = torch.Generator().manual_seed(case.M * 8191 + case.n_in)
    n_in, n_out, length = case.columns

    def normal(*shape, dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device)

    def rows(columns):
        value = normal(case.M, columns, dtype=DTYPES[case.dtype])
        if not case.strided:
            return value
        wide = torch.full((2 * columns + 3, case.M + 1), float("nan"), dtype=value.dtype, device=device)
        wide[1 : 2 * columns : 2, 1:] = value.t()
        return wide[1 : 2 * columns : 2, 1:].t()

    return {
        "x": rows(n_in),
        "dy": rows(n_out),
        "kernel": normal(length, dtype=FP32) * length**-0.5,
        "then": normal(length, dtype=FP32) * length**-0.5 if case.n_mid else None,
        "add": rows(n_out) if case.add else None,
    }


def dropped(case, value):
    threshold = dropout_threshold(case.p)
    mask = keep_mask(torch.tensor(case.seed), *value.shape, threshold).to(value.device)
    return value * mask * keep_scale(threshold) if threshold else value


def reference(case, t, dtype, scale=1.75):
    """y, dx and dk with PyTorch's transforms in float64 or fp32; the outputs are rounded once, by the caller."""
    n_in, n_out, length = case.columns

    def spectrum(rows):
        return torch.fft.rfft(rows, n=length)

    def conjugate(kernel):
        spectral = spectrum(kernel)
        return spectral.conj() if case.transposed else spectral

    x, dy, kernel = (t[name].to(dtype) for name in ("x", "dy", "kernel"))
    x_dropped = x if case.mask_output else dropped(case, x)
    y = torch.fft.irfft(spectrum(x_dropped) * conjugate(kernel), n=length)
    if case.n_mid:
        y = torch.fft.irfft(spectrum(y[:, : case.n_mid]) * spectrum(t["then"].to(dtype)), n=length)
    y = y[:, :n_out] * scale
    y = dropped(case, y) if case.mask_output else y
    y = y if t["add"] is None else y + t["add"].to(dtype)
    dx = torch.fft.irfft(spectrum(dy) * spectrum(kernel).conj(), n=length)[:, :n_in] * scale
    dk = torch.fft.irfft((spectrum(dropped(case, x)).conj() * spectrum(dy)).sum(0), n=length) * scale
    return {"y": y, "dx": dropped(case, dx), "dk": dk}


def run(case, t, scale=1.75, **needs):
    """The kernels; gradients only where they belong to the forward of the case."""
    n_in, n_out, _ = case.columns
    drop = {"threshold": dropout_threshold(case.p)}
    drop["seed"] = torch.tensor(case.seed, device=t["x"].device) if case.p else None
    options = {"transposed": case.transposed, "then": t["then"], "n_mid": case.n_mid, "mask_output": case.mask_output}
    y = convolve(t["x"], t["kernel"], n_out, add=t["add"], scale=scale, **options, **drop)
    if case.n_mid or case.transposed or case.mask_output:
        return {"y": y}
    dx, dk = convolve_bwd(t["dy"], t["x"], t["kernel"], n_in, scale=scale, **drop, **needs)
    return {name: value for name, value in (("y", y), ("dx", dx), ("dk", dk)) if value is not None}


def violations(got, truth, plain, factor=2.0):
    """Names whose error against float64 exceeds `factor` times that of plain PyTorch, by maximum or by RMS."""
    bad = []
    for name, value in got.items():
        if value.isnan().any():
            bad.append((name, "NaN"))
            continue
        if value.numel() == 0:
            continue
        simple = plain[name].to(value.dtype).double()
        for norm in (lambda e: e.abs().max().item(), lambda e: e.square().mean().sqrt().item()):
            error, allowed = norm(value.double() - truth[name]), factor * norm(simple - truth[name])
            # One rounding of the result, for outputs that plain PyTorch happens to get exactly. The gradient of a
            # kernel that goes with bf16 activations is as accurate as they are.
            eps = torch.finfo(BF16 if name == "dk" and got["y"].dtype == BF16 else value.dtype).eps
            if error > allowed + eps * norm(truth[name]):
                bad.append((name, error, allowed))
    return bad


def check(case, device):
    t = make(case, device)
    truth, plain = reference(case, t, torch.float64), reference(case, t, FP32)
    got = repeated(partial(run, case, t))
    assert all(got[name].shape == truth[name].shape for name in got)
    types = {"y": t["x"].dtype, "dx": t["x"].dtype, "dk": FP32}
    assert all(got[name].dtype == types[name] for name in got)
    # A transform of two or three points in fp32 is all but exact, while a high and a low half keep 22 bits.
    assert not violations(got, truth, plain, factor=2.0 if case.columns[2] > 3 else 4.0)


SIZES = [1, 2, 3, 7, 33, 208, 384, 768, 1000, 1536, 2048]
CASES = [
    *(Case(n_in=n, dtype=dtype) for n in SIZES for dtype in ("fp32", "bf16")),
    *(Case(n_in=n, dtype="fp16", M=3) for n in (7, 384, 1536)),
    *(Case(n_in=n, M=2, dtype=dtype, p=0.1) for n in (4096, 5120) for dtype in ("fp32", "bf16")),
    *(Case(n_in=n, n_out=o, length=next_length(n + o - 1)) for n, o in ((97, 97), (300, 200), (80, 700), (900, 100))),
    Case(n_in=2100, n_out=2000, length=next_length(4099), M=2),
    Case(n_in=300, n_out=384, dtype="bf16", length=768, strided=True, add=True),
    *(Case(M=M, p=0.3, add=True) for M in (1, 2)),
    *(Case(M=67, n_in=33, dtype=dtype, p=0.3, add=True) for dtype in ("fp32", "bf16")),
    *(Case(M=M, n_in=16, p=0.3) for M in (1, 150)),
    *(Case(n_in=n, dtype=dtype, p=0.3, strided=True) for n in (7, 384) for dtype in DTYPES),
    Case(n_in=1000, M=3, p=0.3, strided=True),
    *(Case(n_in=n, mask_output=True, transposed=True, p=0.3, add=True) for n in (33, 384, 1536)),
    Case(n_in=384, dtype="bf16", mask_output=True, transposed=True, p=0.3, add=True),
    *(Case(n_in=n, n_mid=n, dtype=dtype, length=2 * n, p=0.2) for n in (16, 384) for dtype in DTYPES),
    Case(n_in=200, n_mid=150, n_out=250, length=512, add=True),
    *(Case(n_in=768, n_mid=700, dtype=dtype, length=1536, M=3, p=0.2) for dtype in ("fp32", "bf16")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case, device, poisoned):
    check(case, device)


def test_no_rows(device):
    case = Case(M=0, add=True, p=0.1)
    got = run(case, make(case, device))
    assert got["y"].shape == got["dx"].shape == (0, 384) and torch.equal(got["dk"], torch.zeros(384, device=device))


@pytest.mark.parametrize("case", [Case(p=0.1), Case(n_in=5120, M=2, dtype="bf16")], ids=str)
def test_needs(case, device, poisoned):
    """Alone or together, each gradient is the same; x is not read for dx alone."""
    t = make(case, device)
    both = run(case, t)
    assert torch.equal(run(case, t, need_dx=False)["dk"], both["dk"])
    dx = run(case, t, need_dk=False)["dx"]
    assert not violations({"dx": dx}, {"dx": both["dx"].double()}, both)
    n_in, *_ = case.columns
    assert convolve_bwd(t["dy"], None, t["kernel"], n_in, need_dx=False, need_dk=False) == (None, None)
    alone, _ = convolve_bwd(t["dy"], None, t["kernel"], n_in, scale=1.75, need_dk=False)
    assert torch.isfinite(alone).all()


def test_scale_on_the_device(device):
    case = Case(n_in=64, add=True)
    t = make(case, device)
    by_value, by_tensor = run(case, t), run(case, t, scale=torch.tensor(1.75, device=device))
    assert all(torch.equal(by_value[name], by_tensor[name]) for name in by_value)


def test_types_and_precision_of_the_caller(device):
    case = Case(n_in=64, dtype="bf16")
    t = make(case, device)
    truth = reference(case, t, torch.float64)
    y = convolve(t["x"], t["kernel"], 64, scale=1.75, out_dtype=FP32)
    dx, dk = convolve_bwd(t["dy"], t["x"], t["kernel"], 64, scale=1.75, dx_dtype=FP32, precision="split")
    got = {"y": y, "dx": dx, "dk": dk}
    assert not violations(got, truth, reference(case, t, FP32))
    half = convolve(t["x"], t["kernel"], 64, scale=1.75, out_dtype=FP32, precision="half")
    assert violations({"y": half}, truth, truth) and not violations({"y": half.to(BF16)}, truth, truth)


@pytest.mark.parametrize("n", [384, 1536, 5120])
def test_a_kernel_keeps_its_digits_beside_bf16_rows(n, device):
    """In one pass, also of a small leading factor, and where dx is a convolution of its own."""
    case = Case(n_in=n, dtype="bf16", M=3, p=0.2)
    t = make(case, device)
    drop = {"threshold": dropout_threshold(case.p), "seed": torch.tensor(case.seed, device=device)}
    dx, dk = convolve_bwd(t["dy"], t["x"], t["kernel"], n, scale=1.75, precision="split", **drop)
    assert dx.dtype == BF16 and dk.dtype == FP32
    truth, plain = reference(case, t, torch.float64), reference(case, t, FP32)
    # Without "y", of which `violations` takes the type of the rows, dk is held to fp32.
    assert not violations({"dx": dx, "dk": dk, "y": dk}, truth | {"y": truth["dk"]}, plain | {"y": plain["dk"]})
    _, half = convolve_bwd(t["dy"], t["x"], t["kernel"], n, scale=1.75, precision="half", **drop)
    assert violations({"dk": half, "y": half}, truth | {"y": truth["dk"]}, plain | {"y": plain["dk"]})


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rule_rejects_planted_errors(dtype, device):
    case = Case(n_in=384, dtype=dtype)
    t = make(case, device)
    truth, plain = reference(case, t, torch.float64), reference(case, t, FP32)
    assert not violations(run(case, t), truth, plain)
    assert {name for name, *_ in violations(run(case, t, scale=1.75 * 1.02), truth, plain)} == {"y", "dx", "dk"}
    rolled = t | {"kernel": t["kernel"].roll(1)}
    assert {name for name, *_ in violations(run(case, rolled), truth, plain)} == {"y", "dx"}


@pytest.mark.parametrize("n, seed", [(7, 0), (24, -1), (250, 0x7FFF_FFFF_FFFF_FFFF), (512, -0x1234_5678_9ABC_DEF0)])
def test_dropout_mask_is_exact(n, seed, device):
    """The identity shows the mask itself, of the input and of the output."""
    x, length = torch.ones(11, n, device=device), next_length(n)
    kernel = torch.eye(1, length, device=device)[0]
    for threshold in (1, dropout_threshold(0.5), dropout_threshold(1.0)):
        options = {"threshold": threshold, "seed": torch.tensor(seed, device=device)}
        keep = keep_mask(torch.tensor(seed), *x.shape, threshold).to(device)
        for mask_output in (False, True):
            y = convolve(x, kernel, n, mask_output=mask_output, **options)
            assert torch.equal(y.abs() > 0.5, keep)
        dx, _ = convolve_bwd(x, x, kernel, n, **options)
        assert torch.equal(dx.abs() > 0.5, keep)


@pytest.mark.parametrize("n", [33, 384, 1536])
def test_magnitudes_stay_apart(n, device):
    """Rows from 1e-30 to 1e30, paired with each other and with zero rows, are each as accurate as alone."""
    magnitudes = torch.tensor([1.0, 1e30, 1e-30, 1e30, 0.0, 1e-30, 1e4, 0.0, 0.0, 0.0], device=device)[:, None]
    case = Case(M=10, n_in=n)
    t = make(case, device)
    truth, plain = reference(case, t, torch.float64), reference(case, t, FP32)
    y = convolve(t["x"] * magnitudes, t["kernel"], n, scale=1.75)
    dx, dk = convolve_bwd(t["dy"] * magnitudes, t["x"] / magnitudes.clamp(min=1e-30), t["kernel"], n, scale=1.75)
    for row, magnitude in enumerate(magnitudes[:, 0].tolist()):
        if magnitude == 0:
            assert max(y[row].abs().max(), dx[row].abs().max()) < 1e-37
            continue
        got = {"y": y[row].double() / magnitude, "dx": dx[row].double() / magnitude}
        got = {name: value.float() for name, value in got.items()}
        one = [{name: value[name][row] for name in got} for value in (truth, plain)]
        assert not violations(got, *one)
    live = magnitudes[:, 0] > 0
    alone = {"x": t["x"][live], "dy": t["dy"][live], "kernel": t["kernel"], "add": None}
    assert not violations({"dk": dk, "y": y}, *({"dk": r["dk"], "y": y.double()} for r in (
        reference(replace(case, M=int(live.sum())), alone, dtype) for dtype in (torch.float64, FP32)
    )))  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_large_and_lonely_elements(dtype, device):
    """fp16 rows near its largest number, a kernel of large numbers, rows of one element or with an outlier."""
    case = Case(M=4, n_in=768, dtype=dtype)
    t = make(case, device)
    t["x"][0] = 10000 * t["x"][0].sign()
    t["x"][1] = 0
    t["x"][1, 5] = 1
    t["x"][2, 7] = 1000
    t["kernel"][:] /= 1000
    truth, plain = reference(case, t, torch.float64), reference(case, t, FP32)
    y = run(case, t)["y"]
    for row in range(4):
        assert not violations({"y": y[row]}, {"y": truth["y"][row]}, {"y": plain["y"][row]}), row
    t["kernel"][:] *= 1e20
    y = convolve(t["x"], t["kernel"], 768, scale=1e-20)
    assert torch.isfinite(y).all()
