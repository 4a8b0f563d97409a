"""Starts the kernel tests in Triton's interpreter, which takes a process of its own (see conftest.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Each in a process, which takes some seconds to begin: long ones by themselves, so that others run beside them.
FILES = [("ops", "bf16"), ("bottleneck", "structured"), ("lowrank", "kronecker"), ("shared_shrink",)]


# On CPUs with AMX torch's own bf16 products read past the rows of a tensor that has gaps between them, and the NaNs in
# there come out: of the base product, and of the reference. oneDNN's kernels for AVX-512 do not.
ENVIRONMENT = {"TRITON_INTERPRET": "1", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}


@pytest.mark.parametrize("files", FILES, ids="-".join)
def test_kernels_interpreted(files):
    # -P keeps the repository root off the path: its `triton_kernels` folder is `peft_fused.triton_kernels`.
    paths = [str(Path(__file__).with_name(f"test_{name}.py")) for name in files]
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", *paths]
    child = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]
