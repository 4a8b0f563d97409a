"""The CUDA sources run on the CPU where there is a g++ (cuda_on_host.py)."""

import shutil
import sys
from pathlib import Path

import pytest

# For `from cuda_on_host import ...`: under --import-mode=importlib a test module finds no neighbours by itself.
sys.path.append(str(Path(__file__).parent))


def pytest_collection_modifyitems(items):
    if shutil.which("g++"):
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="there is no g++"))
