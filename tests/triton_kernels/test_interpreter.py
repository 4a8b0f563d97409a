"""Starts the kernel tests in Triton's interpreter, which takes a process of its own (see conftest.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = ["test_lowrank.py", "test_bottleneck.py", "test_kronecker.py", "test_structured.py", "test_structured_ops.py"]


# On CPUs with AMX torch's own bf16 products read past the rows of a tensor that has gaps between them, and the NaNs in
# there come out: of the base product, and of the reference. oneDNN's kernels for AVX-512 do not.
ENVIRONMENT = {"TRITON_INTERPRET": "1", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}


@pytest.mark.parametrize("file", FILES)
def test_kernels_interpreted(file):
    # -P keeps the repository root off the path: its `triton_kernels` folder is `peft_fused.triton_kernels`.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", str(Path(__file__).with_name(file))]
    child = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]
