"""The benchmark of the host's time: every path is measured, and it is the path that it says."""

import json

import pytest
import torch
from peft_fused.bench import host
from torch import nn

from peft_fused.ops import native

pytestmark = pytest.mark.skipif(native.module is None, reason="the C++ extension is not built")


@pytest.mark.filterwarnings("ignore:.*because no schedule sets it")
def test_a_row_for_every_path(monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setattr(host, "CALLS", 2)
    host.main(["--json", "--rounds", "2"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = [path.name for path in host.paths(0.0) if not path.name.startswith("base")]
    assert [(row["path"], row["dropout"]) for row in rows] == [(name, p) for p in (0.0, 0.05) for name in names]
    assert all(row["ratio_to_peft"] == 1.0 for row in rows if row["path"].startswith("PEFT"))


def step(layers: list[nn.Module]) -> None:
    x = torch.randn(host.ROWS, host.WIDTH, dtype=torch.bfloat16, requires_grad=True) + 0
    dy = torch.ones(host.ROWS, host.WIDTH, dtype=torch.bfloat16)
    torch.autograd.backward([layer(x) for layer in layers], [dy] * len(layers))


@pytest.mark.filterwarnings("ignore:.*because no schedule sets it")
def test_a_path_is_what_it_says(monkeypatch):
    """By C++ five kernels are launched in a step, four without dropout, and by Python none, or the other way round.
    Three layers that share their input launch thirteen: three expansions and one of each other kernel for their input,
    and for each a gradient of B and its sum."""
    pytest.importorskip("triton")
    by_python = []
    monkeypatch.setattr(host._Launched, "run", lambda self, *arguments: by_python.append(arguments[:3]))
    found = {path.name: path for path in host.paths(0.05)}
    for name, path in found.items():
        if "Triton" not in name:
            continue
        with path.context():
            step(path.layers)
            native.module.send_triton_launches("list")
            native.module.triton_launches()
            by_python.clear()
            step(path.layers)
            kernels = 4 if "(lora)" in name else 13 if "grouped" in name else 5
            expected = (0, kernels) if "Python" in name else (kernels, 0)
            assert (len(native.module.triton_launches()), len(by_python)) == expected
