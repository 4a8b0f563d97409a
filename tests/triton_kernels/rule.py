"""What the tests of the kernels share: types, the rule by which a kernel is right, and a run that repeats itself."""

import os

import torch

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
# Types of the rows and of the parameters.
TYPES = {
    "fp32": (FP32, FP32),
    "fp16": (FP16, FP16),
    "fp16-fp32": (FP16, FP32),
    "bf16": (BF16, BF16),
    "bf16-fp32": (BF16, FP32),
}


def violations(got, truth, plain):
    """Names whose error against float64 exceeds twice that of plain PyTorch, by maximum or by RMS.

    The rule of ops/accuracy.py, with less room for outputs that plain PyTorch happens to have exact.
    """
    bad = []
    for name, value in got.items():
        if value.dtype != plain[name].dtype or value.shape != truth[name].shape or value.isnan().any():
            bad.append((name, value.dtype, value.shape))
            continue
        if value.numel() == 0:
            continue
        for norm in (lambda e: e.abs().max().item(), lambda e: e.square().mean().sqrt().item()):
            error, simple = norm(value.double() - truth[name]), norm(plain[name].double() - truth[name])
            # Where plain PyTorch happens to be exact, one rounding in fp32 or a quarter in half precision is allowed.
            floor = (1 if value.dtype == FP32 else 0.25) * torch.finfo(value.dtype).eps * norm(truth[name])
            if error > 2 * simple + floor:
                bad.append((name, error, simple))
    return bad


def check_draws(case, make, run, reference, device):
    """Of run(t) on the inputs t of each draw of a case, judged together: of a few numbers one draw is a coin toss."""
    pools = [], [], []
    for draw in range(case.draws):
        t = make(case, device, draw)
        truth, plain = (reference(case, t, types) for types in ((torch.float64, torch.float64), TYPES[case.types]))
        got = repeated(lambda t=t: run(case, t))
        assert all(got[name].shape == truth[name].shape for name in got)
        for pool, values in zip(pools, (got, truth, plain), strict=True):
            pool.append(values)
    assert not violations(*({name: torch.cat([v[name] for v in pool]) for name in pool[0]} for pool in pools))


def repeated(run):
    """The tensors by name that run() gives, the same bits every time. Only once under the interpreter, which runs the
    programs of a grid in order: there the second run is the first."""
    found = run()
    if os.environ.get("TRITON_INTERPRET") != "1":
        again = run()
        assert all(torch.equal(found[name], again[name]) for name in found), "two runs differ"
    return found
