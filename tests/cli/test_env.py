"""`env` on this machine, and on machines that lack what this one may have."""

import pytest
import torch

from peft_fused.cli import env
from peft_fused.ops import dispatch, native
from peft_fused.ops.cases import OPS


def test_json_holds_versions_paths_and_reasons(cli):
    found = cli.json("env")
    assert (
        found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"] == torch.__version__
    )
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert found["extension"]["loaded"] == (native.module is not None)
    ops = {entry["op"].split()[0] for entry in found["paths"]}
    assert ops == {"lowrank_adapter" if op == "lowrank" else op for op in OPS}
    for entry in found["paths"]:
        chosen = entry["path"].split(":")[0]
        others = [reason.split(":")[0] for reason in entry["against"]]
        assert sorted([chosen, *others]) == sorted(dispatch.BACKENDS), "every backend is either taken or refused"


def test_the_table_says_the_same(cli):
    text = cli("env").stdout
    assert torch.__version__ in text and "C++ extension" in text
    for entry in cli.json("env")["paths"]:
        assert text.count(f"    {entry['op']}\n") == 1 and f"  {entry['path']}\n" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_reason_of_all_ops_is_stated_once(cli, monkeypatch):
    text = cli("env").stdout
    for reason in ("x is on cpu; Triton kernels need", "x is on cpu; CUDA kernels need", "torch comes first"):
        assert text.count(reason) == 1
    assert text.count("not cuda: ldr has no CUDA C++ kernel\n") == 1  # a reason of its own, and that alone
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "why_missing", "not built: a test took it away")
    dispatch.forget()
    try:
        assert cli("env").stdout.count("a test took it away") == 1
    finally:
        dispatch.forget()


def missing(found):
    return {entry["what"]: entry for entry in found["missing"]}


def test_without_triton(cli, monkeypatch):
    known = env.version
    monkeypatch.setattr(env, "version", lambda package: None if package == "triton" else known(package))
    assert missing(cli.json("env"))["triton"]["why"] == "not installed"
    assert "triton missing" in cli("env").stdout


def test_without_the_extension(cli, monkeypatch):
    monkeypatch.setattr(native, "module", None)
    monkeypatch.setattr(native, "why_missing", "not built: a test took it away")
    found = cli.json("env")
    assert found["extension"] == {"loaded": False, "why_not": "not built: a test took it away", "cuda_kernels": False}
    entry = missing(found)["C++ extension"]
    assert entry["cost"] == native.COST and entry["remedy"] is None
    assert entry["why"] == "not built: a test took it away" and "Python autograd node" in entry["cost"]
    assert all("Python autograd node" in path["path"] for path in found["paths"] if path["path"].startswith("torch"))
    assert "a test took it away" in cli("env").stdout
    monkeypatch.setattr(native, "not_built", True)
    assert missing(cli.json("env"))["C++ extension"]["remedy"] == native.REMEDY
    assert native.REMEDY in cli("env").stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu(cli):
    found = cli.json("env")
    assert found["gpus"] == [] and "GPU" in missing(found)
    assert all(path["op"].endswith("on cpu") for path in found["paths"])
