import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))

import contract


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """For every test here."""


@pytest.fixture(params=contract.VARIANTS, ids=str)
def variant(request):
    """Every variant of every method that a registration names."""
    return request.param


@pytest.fixture(params=contract.ADDITIVE, ids=str)
def additive(request):
    """Those whose adapter is a change of a weight."""
    return request.param


@pytest.fixture(params=contract.ON_OUTPUT, ids=str)
def on_output(request):
    """Those whose adapter works on the output of a layer."""
    return request.param
