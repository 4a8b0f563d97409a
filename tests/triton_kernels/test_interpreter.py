"""Starts the kernel tests in Triton's interpreter, which takes a process of its own (see conftest.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = ["test_lowrank.py", "test_bottleneck.py", "test_kronecker.py", "test_structured.py", "test_structured_ops.py"]


@pytest.mark.parametrize("file", FILES)
def test_kernels_interpreted(file):
    # -P keeps the repository root off the path: its `triton_kernels` folder is `peft_fused.triton_kernels`.
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-x", str(Path(__file__).with_name(file))]
    child = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-8000:] + child.stderr[-2000:]
