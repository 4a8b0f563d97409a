"""Peak memory against cases counted by hand."""

import os

import pytest
import torch

from peft_fused.cli import demo_train
from peft_fused.cli.demo_memory import peak_bytes

N = 5000
FLOAT = 4


def test_peak_is_of_what_is_held_at_once():
    def call(kept):
        first = torch.empty(3 * N)
        second = torch.empty(N)
        if not kept:
            del first
        third = torch.empty(2 * N)
        return second, third

    assert peak_bytes(lambda: call(kept=False), "cpu") == 4 * N * FLOAT
    assert peak_bytes(lambda: call(kept=True), "cpu") == 6 * N * FLOAT


def test_memory_of_a_training_step():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(N))

        def forward(self, x):
            return type("Output", (), {"loss": (self.w * x).exp().exp().sum()})

    batch = {"x": torch.full((N,), 0.1)}
    model = Twice()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # Most is held where backward begins: what the two exponentials have saved, the gradient of the outer one, and the
    # loss and its gradient. What is there before, the parameter and the batch, is not counted.
    assert demo_train.step_memory(model, "peft", optimizer, batch, "cpu") == (3 * N + 2) * FLOAT
    # Adam makes its two averages in the first step, beside the gradient and a temporary; the next step finds them.
    model = Twice()
    optimizer = torch.optim.Adam(model.parameters(), foreach=False)
    first, second = (demo_train.step_memory(model, "peft", optimizer, batch, "cpu") for _ in range(2))
    assert first >= 4 * N * FLOAT > second
    assert model.w.any(), "a step that was measured is one that was done"


def test_temporaries_of_an_op_are_seen():
    x = torch.randn(500, 400)
    assert peak_bytes(lambda: x.logsumexp(1), "cpu") >= x.numel() * FLOAT


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_cuda():
    size = 1 << 20
    kept = torch.empty(size, device="cuda")
    assert peak_bytes(lambda: torch.empty_like(kept), "cuda") == size * FLOAT


def test_only_the_profiler_is_silenced(capfd):
    peak_bytes(lambda: os.write(2, b"said by the call"), "cpu")
    assert capfd.readouterr().err == "said by the call"
