"""The README's Python runs as it is printed, one block after the other, on a tiny model."""

import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def tiny():
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    return BertForSequenceClassification(BertConfig(vocab_size=100, **sizes))


@pytest.fixture(scope="module")
def namespace(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("readme")
    rows = [{"input_ids": torch.randint(0, 100, (6,)), "labels": i % 2} for i in range(16)]
    return {
        "model": tiny(),
        "base": tiny(),
        "dataset": rows,
        "arguments": TrainingArguments(folder / "trainer", max_steps=3, report_to=[], disable_tqdm=True, use_cpu=True),
        "folder": folder / "adapter",
        "evaluate": lambda model: model(rows[0]["input_ids"][None]).logits.sum().item(),
    }


def test_blocks(namespace, capsys):
    accelerated, dylora, surm, adamix, aflora, rosa, plain, structured, mixed = BLOCKS
    base = {name: value.clone() for name, value in namespace["base"].state_dict().items()}

    exec(accelerated, namespace)
    assert len(namespace["report"].swapped) == 4 and not namespace["report"].skipped
    assert "4 of 4 LoRA layers swapped" in capsys.readouterr().out
    assert (namespace["folder"] / "adapter_model.safetensors").is_file()

    exec(dylora, namespace)
    assert list(namespace["scores"]) == list(range(1, 9)) and len(set(namespace["scores"].values())) == 8
    fresh = tiny()
    fresh.load_state_dict(base)
    exported = PeftModel.from_pretrained(fresh, namespace["folder"])
    assert exported.peft_config["default"].peft_type == "LORA" and exported.peft_config["default"].r == 4
    ids = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(exported.eval()(ids).logits, namespace["model"].eval()(ids).logits)

    namespace["base"] = tiny()
    exec(surm, namespace)
    # Two vectors and a bias for each of two adapters per layer, and the head.
    trainable = sum(p.numel() for p in namespace["model"].parameters() if p.requires_grad)
    assert trainable == 2 * 2 * 3 * 32 + 2 * 32 + 2
    decayed, kept = (sum(p.numel() for p in g["params"]) for g in namespace["optimizer"].param_groups)
    assert (decayed, kept) == (2 * 32, trainable - 2 * 32)

    namespace["base"] = tiny()
    exec(adamix, namespace)
    assert namespace["model"].peft_config["default"].num_experts == 1
    assert PeftModel.from_pretrained(tiny(), namespace["folder"]).peft_config["default"].peft_type == "ADAMIX"

    namespace["base"] = tiny()
    exec(aflora, namespace)
    assert capsys.readouterr().out.count(" A ") == 2 * 6  # layers times modules
    assert PeftModel.from_pretrained(tiny(), namespace["folder"]).peft_config["default"].r == 4

    namespace["base"] = tiny()
    exec(rosa, namespace)
    assert not any("rosa" in name for name, _ in namespace["plain"].named_parameters())

    exec(plain, namespace)
    assert namespace["y"].shape == (32, 3072)
    assert namespace["layer"].merged

    exec(structured, namespace)
    assert namespace["y"].shape == (32, 3072)
    assert namespace["adapter"](namespace["y"][:, :768]).equal(namespace["y"][:, :768])

    exec(mixed, namespace)
    h, down, up, y = (namespace[name] for name in ("h", "down", "up", "y"))
    for sequence, expert in enumerate((3, 1)):
        expected = h[sequence] + torch.nn.functional.gelu(h[sequence] @ down[expert].T) @ up[expert].T
        torch.testing.assert_close(y[sequence], expected, atol=1e-2, rtol=1e-4)
