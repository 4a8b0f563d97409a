import sys
from pathlib import Path

import pytest
import torch

from peft_fused.integrations.peft.acceleration import layer, lora

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(layer, "_said", set())


@pytest.fixture
def calls(monkeypatch):
    """Names of the fused operations called by accelerated layers, in order."""
    made = []

    def spy(name, op):
        def wrapper(*args, **kwargs):
            made.append(name)
            return op(*args, **kwargs)

        monkeypatch.setattr(lora, name, wrapper)

    spy("lowrank_linear", lora.lowrank_linear)
    spy("lowrank_adapter", lora.lowrank_adapter)
    return made


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()
