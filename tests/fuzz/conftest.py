"""What the fuzz tests share: how long they are to run."""

import os

import pytest


@pytest.fixture
def multiplier() -> float:
    """PEFT_FUSED_FUZZ: how many times the usual number of calls is made, by default 1, which takes seconds."""
    return float(os.environ.get("PEFT_FUSED_FUZZ", "1"))
