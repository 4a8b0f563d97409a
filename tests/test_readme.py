"""The README's Python runs as it is printed, one block after the other, on a tiny model; files named anywhere exist."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import peft_fused

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
    accelerated, loading, dylora, surm, adamix, aflora, rosa, plain, structured, mixed = BLOCKS
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

    peft_fused.set_dylora_rank(namespace["model"], 8)  # as a loaded one
    namespace["model"].save_pretrained(namespace["folder"])
    expected, namespace["base"] = namespace["model"], tiny()
    namespace["base"].load_state_dict(base)
    exec(loading, namespace)
    assert namespace["model"].peft_config["default"].peft_type == "DYLORA"
    with torch.no_grad():
        assert namespace["model"].eval()(ids).logits.equal(expected.eval()(ids).logits)

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


# Folders of the checkout whose text names files. What is not ours stands in NOT_OURS, with what commands write.
TEXTS = ("*.md", "Makefile", "*.py", "peft_fused", "csrc", "triton_kernels", "bench", "examples", "tests")
NOT_OURS = {
    "_build_info.py", "adapter_config.json", "aflora.json", "aflora.png", "demo.json", "demo.png", "dev.tsv",
    "parts.jsonl", "results.jsonl", "results.png", "summary.json", "train.tsv", "folder/name.json", "folder/name.png",
}  # fmt: skip
NAME = re.compile(r"(?<![\w./<>-])[\w/.-]*\w\.(?:py|cpp|cu|h|md|tsv|jsonl?|toml|png)\b(?![\w(>])")
ROOT = README.parent


def prose(path: Path):
    """(line, text) of a file's comments and docstrings; of every line where the file is no code."""
    text = path.read_text()
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (doc := ast.get_docstring(node)):
                yield node.body[0].lineno, doc
        return
    for number, line in enumerate(text.splitlines(), 1):
        if path.suffix in (".cpp", ".cu", ".h"):
            line = line.partition("//")[2]
        yield number, line


def texts():
    for pattern in TEXTS:
        for found in ROOT.glob(pattern):
            if found.is_dir():
                yield from (path for path in found.rglob("*") if path.suffix in (".py", ".cpp", ".cu", ".h", ".md"))
            else:
                yield found


def unknown(text: str, files: list[str]) -> list[str]:
    """Names of files in a text that are none of ours: a name with folders has to end the path of one."""
    named = (name.removeprefix("./") for name in NAME.findall(text))
    return [name for name in named if name not in NOT_OURS and not any(file.endswith("/" + name) for file in files)]


def test_files_that_are_named_exist():
    skipped = {".git", ".venv", "build"}
    files = [str(path) for path in ROOT.rglob("*.*") if skipped.isdisjoint(path.relative_to(ROOT).parts)]
    assert unknown("see ops/lowrank.py, ops/missing.py and gone.cpp; v0.1.py3", files) == ["ops/missing.py", "gone.cpp"]
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in texts()
        for line, text in prose(path)
        for name in unknown(text, files)
    ]
    assert not found, found
