"""What nvcc says of the CUDA kernels, for both architectures that setup.py names."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
@pytest.mark.parametrize(("source", "kernels"), [("fft", 2), ("lowrank", 13)])
def test_kernels_keep_to_registers(tmp_path, source, kernels):
    root = Path(__file__).parents[2]
    (found,) = re.findall(r"^CUDA_ARCHITECTURES = (.*)$", (root / "setup.py").read_text(), re.MULTILINE)
    flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", *ast.literal_eval(found), "-Xptxas", "-v"]
    command = ["nvcc", *flags, "-c", root / f"csrc/kernels/{source}.cu", "-o", tmp_path / "kernels.o"]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert (
        log.count("Compiling entry function") == log.count("0 bytes stack frame, 0 bytes spill stores") == 2 * kernels
    ), log
