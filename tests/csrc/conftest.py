"""The CUDA sources run on the CPU where there is a g++ (cuda_on_host.py)."""

import functools
import shutil
import sys
from pathlib import Path

import pytest

# For `from cuda_on_host import ...`: under --import-mode=importlib a test module finds no neighbours by itself.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """(unit, defects) -> its library (cuda_on_host.py), compiled once."""
    from cuda_on_host import compile_kernels

    return functools.cache(
        lambda unit, defects=(): compile_kernels(unit, defects, tmp_path_factory.mktemp("kernels") / "build")
    )


def pytest_collection_modifyitems(items):
    if shutil.which("g++"):
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="there is no g++"))
