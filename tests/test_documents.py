"""README and docs: their Python runs as it is printed, page by page; their commands, links, images, names, options,
figures and the files that they name exist and are as they say. Files named in comments and docstrings exist as well.
"""

import ast
import dataclasses
import doctest
import importlib
import io
import json
import re
import shlex
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

import peft_fused
from peft_fused.cli import app
from peft_fused.integrations.peft.config import FusedConfig

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (README, *DOCS)}
LINKED = PAGES | {name: ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "bench/NOTES.md")}


class Block(NamedTuple):
    """A fenced block of a page: its language, its text, and the line on which that begins."""

    language: str
    text: str
    line: int


def blocks(path: Path) -> list[Block]:
    text = path.read_text()
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(match[1], match[2], text[: match.start(2)].count("\n") + 1) for match in found]


def tables(path: Path) -> Iterator[list[list[str]]]:
    """The tables of a page: lists of rows, the headings first, of cells without spaces around them."""
    for match in re.finditer(r"(?:^\|.*\|\n)+", path.read_text(), re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in match[0].splitlines()]
        yield [rows[0], *rows[2:]]


# ------------------------------------------------------------------------------------------------------------- Python


def tensors(folder: str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def after_readme(page: dict) -> None:
    assert len(tensors("adapter")) == 2 * 4 + 2  # A and B of two layers in two blocks, and the head
    assert page["model"].peft_config["default"].peft_type == "DYLORA"


def after_lora(page: dict) -> None:
    assert len(page["report"].swapped) == 4 and not page["report"].skipped
    assert page["layer"].merged


def after_dylora(page: dict) -> None:
    assert list(page["scores"]) == list(range(1, 9)) and len(set(page["scores"].values())) == 8
    plain = page["plain"]
    assert plain.peft_config["default"].peft_type == "LORA" and plain.peft_config["default"].r == 4
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(page["ids"]).logits, page["model"].eval()(page["ids"]).logits)
        assert page["loaded"].eval()(page["ids"]).logits.equal(page["model"](page["ids"]).logits)


def after_surm(page: dict) -> None:
    # Two vectors and a bias for each of two adapters per layer, and the head.
    trainable = sum(p.numel() for p in page["model"].parameters() if p.requires_grad)
    assert trainable == 2 * 2 * 3 * 32 + 2 * 32 + 2
    decayed, kept = (sum(p.numel() for p in group["params"]) for group in page["optimizer"].param_groups)
    assert (decayed, kept) == (2 * 32, trainable - 2 * 32)


def after_adamix(page: dict) -> None:
    assert PeftModel.from_pretrained(page["base"](), "adamix").peft_config["default"].num_experts == 1
    assert page["config"].num_experts == 4, "the user's"


def after_aflora(page: dict) -> None:
    history = peft_fused.freezing_history(page["model"])
    assert len(history) == 2 * 2 * 6  # matrices, layers, modules
    assert all(frozen.step is not None for frozen in history) and {frozen.step for frozen in history} > {0}
    assert page["plain"].peft_config["default"].peft_type == "LORA"


def after_rosa(page: dict) -> None:
    assert not any("rosa" in name for name, _ in page["plain"].named_parameters())


def after_ops(page: dict) -> None:
    h, down, up, y = (page[name] for name in ("h", "down", "up", "y"))
    for sequence, expert in enumerate((3, 1)):
        expected = h[sequence] + torch.nn.functional.gelu(h[sequence] @ down[expert].T) @ up[expert].T
        torch.testing.assert_close(y[sequence], expected, atol=1e-2, rtol=1e-4)
    assert page["adapter"](h).equal(h)


AFTER = {
    "README.md": after_readme,
    "docs/lora.md": after_lora,
    "docs/dylora.md": after_dylora,
    "docs/surm.md": after_surm,
    "docs/adamix.md": after_adamix,
    "docs/aflora.md": after_aflora,
    "docs/rosa.md": after_rosa,
    "docs/ops.md": after_ops,
}
# Pages about training start from one small model, which a reader who has seen one of them need not read again.
START = "def base():"


@pytest.fixture
def alone(monkeypatch):
    """What a launcher tells the one process of a run, and no process group afterwards."""
    for name, value in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="0").items():
        monkeypatch.setenv(name, value)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", [name for name, path in PAGES.items() if "```python" in path.read_text()])
def test_python_runs_as_printed(name, tmp_path, monkeypatch, capsys, one_thread, request):
    """In an empty folder. What a block prints is the text below it, where there is one."""
    monkeypatch.chdir(tmp_path)
    if name == "docs/distributed.md":
        request.getfixturevalue("alone")
    page, checker = {"__name__": "__main__"}, doctest.OutputChecker()
    found = blocks(PAGES[name])
    for block, following in zip(found, [*found[1:], Block("", "", 0)], strict=True):
        if block.language != "python":
            continue
        capsys.readouterr()
        exec(compile("\n" * (block.line - 1) + block.text, str(PAGES[name]), "exec"), page)
        if following.language == "text":
            printed = capsys.readouterr().out
            same = checker.check_output(following.text, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            assert same, f"{name}:{following.line}: the block above prints\n{printed}"
    if name in AFTER:
        AFTER[name](page)


def test_every_example_of_a_page_is_checked():
    assert AFTER.keys() <= {name for name, path in PAGES.items() if "```python" in path.read_text()}


def test_pages_that_train_start_alike():
    starts = {name: block.text for name, path in PAGES.items() for block in blocks(path)[:1] if START in block.text}
    assert len(starts) >= 6 and len(set(starts.values())) == 1, starts


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 150


# ----------------------------------------------------------------------------------------------------------- commands


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page and line, words of a command) of every line of shell, without comments and what is set before it, and of
    our own commands in the text.
    """
    for name, path in PAGES.items():
        for block in blocks(path):
            if block.language == "bash":
                for number, line in enumerate(block.text.splitlines(), block.line):
                    words = shlex.split(line, comments=True)
                    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                        assert words[0].partition("=")[0] in VARIABLES, f"{name}:{number}: {words[0]}"
                        words.pop(0)
                    if words:
                        yield f"{name}:{number}", words
        for inline in re.findall(r"`((?:make|peft-fused) [^`]+)`", path.read_text()):
            yield f"{name}: {inline}", shlex.split(inline)


VARIABLES = {
    found
    for folder in ("peft_fused", "bench", "tests", "setup.py")
    for path in ([ROOT / folder] if folder.endswith(".py") else (ROOT / folder).rglob("*.py"))
    for found in re.findall(r"\bPEFT_FUSED_[A-Z]+", path.read_text())
} | {"OMP_NUM_THREADS", "TRITON_INTERPRET", "CUDA_HOME"}
# Programs whose own arguments are not ours to check, up to the script that they start.
LAUNCHERS = ("python", "torchrun", "accelerate")


def options_of(command) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def problem_with(words: list[str]) -> str | None:
    """What is wrong with a command, as far as that can be known without running it."""
    program, *rest = words
    given = {word.partition("=")[0] for word in rest if word.startswith("--")}
    if program == "peft-fused":
        group = typer.main.get_command(app)
        command = group.commands.get(rest[0]) if rest and not rest[0].startswith("-") else group
        if command is None:
            return f"peft-fused has no command {rest[0]}"
        unknown = given - options_of(command) - {"--help"}
        return f"unknown options {unknown}" if unknown else None
    if program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        unknown = {word for word in rest if "=" not in word} - targets
        return f"no targets {unknown}" if unknown else None
    if program in LAUNCHERS:
        if "-m" in rest:
            module = rest[rest.index("-m") + 1]
            return None if importlib.util.find_spec(module) else f"no module {module}"
        script = next((word for word in rest if word.endswith(".py")), None)
        if script is None:
            return "starts no script"
        if not (ROOT / script).is_file():
            return None if script in NOT_OURS else f"no script {script}"
        unknown = {w for w in rest[rest.index(script) + 1 :] if w.startswith("--") and w not in source(script)}
        return f"{script} has no options {unknown}" if unknown else None
    return None if program in ("pip", "pytest", "export") else f"unknown program {program}"


def source(script: str) -> str:
    return (ROOT / script).read_text()


def test_commands_exist():
    assert problem_with(["peft-fused", "fly"]) and problem_with(["peft-fused", "env", "--fast"])
    assert problem_with(["make", "tea"]) and problem_with(["torchrun", "examples/finetune.py", "--tea"])
    found = {place: problem for place, words in commands() if (problem := problem_with(words))}
    assert not found, found
    assert {"env", "check", "bench", "demo"} <= {words[1] for _, words in commands() if words[0] == "peft-fused"}


# ---------------------------------------------------------------------------------------------------- links and names


def without_blocks(path: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^(`{3,}).*?^\1$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere():
    broken, reached = [], set()
    for name, path in LINKED.items():
        for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(path)):
            if target.startswith("https://"):
                continue
            file, _, anchor = target.partition("#")
            to = (path.parent / file).resolve() if file else path
            if not to.exists() or (anchor and anchor not in anchors(to)):
                broken.append(f"{name}: {target}")
            elif path == README:
                reached.add(to)
    assert not broken, broken
    assert not set(DOCS) - reached, "pages that the README does not link to"
    assert any(to.suffix == ".png" for to in reached), "no figure in the README"


def test_names_of_the_package_exist():
    missing = []
    for name, path in PAGES.items():
        for dotted in set(re.findall(r"\bpeft_fused((?:\.\w+)+)", path.read_text())):
            found, parts = peft_fused, dotted.strip(".").split(".")
            for index, part in enumerate(parts):
                if not hasattr(found, part):
                    spec = importlib.util.find_spec(".".join(["peft_fused", *parts[: index + 1]]))
                    if spec is None:
                        missing.append(f"{name}: peft_fused{dotted}")
                        break
                    found = importlib.import_module(spec.name)
                else:
                    found = getattr(found, part)
    assert not missing, missing


def literals() -> list[str]:
    """The texts in the package's code: what stands around the values of an f-string is one of "...", each time."""
    found = []
    for path in (ROOT / "peft_fused").rglob("*.py"):
        tree = ast.parse(path.read_text())
        inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inner:
                found.append(node.value)
    return found


def test_messages_are_those_of_the_code():
    rows = [row for table in tables(PAGES["docs/troubleshooting.md"]) if table[0][0] == "message" for row in table[1:]]
    said = [message for row in rows for message in re.findall(r"`([^`]+)`", row[0])]
    assert len(said) > 30
    texts_of_code = literals()

    def appears(message: str) -> bool:
        parts = [part.strip(" ") for part in message.split("...") if part.strip(" ")]
        return any(all(part in text for part in parts) for text in texts_of_code)

    assert not appears("the adapter has run away")
    missing = [message for message in said if not appears(message)]
    assert not missing, missing


# ------------------------------------------------------------------------------------------------------------ options


METHODS = [getattr(peft_fused, name) for name in peft_fused.__all__ if name.endswith("Config")]
CONFIGS = {"docs/usage.md": FusedConfig} | {f"docs/{cls.fused_type.value.lower()}.md": cls for cls in METHODS}


@pytest.mark.parametrize("name", CONFIGS)
def test_options_are_those_of_the_config(name):
    """All of them, with their defaults: of a method's page those that not all methods have."""
    inherited = PeftConfig if CONFIGS[name] is FusedConfig else FusedConfig
    known = {field.name for field in dataclasses.fields(inherited)}
    expected = {
        f"`{field.name}`": f"`{field.default if field.default_factory is dataclasses.MISSING else {}!r}`"
        for field in dataclasses.fields(CONFIGS[name])
        if field.name not in known
    }
    found = {row[0]: row[1] for table in tables(PAGES[name]) if table[0][0] == "option" for row in table[1:]}
    assert {option: default.replace('"', "'") for option, default in found.items()} == expected


# ------------------------------------------------------------------------------------------------------------ figures


RESULTS = {
    machine: [json.loads(line) for line in (ROOT / "bench/results" / folder / "results.jsonl").read_text().splitlines()]
    for machine, folder in (("Intel", "intel-r-xeon-r-processor-2-threads"), ("AMD", "amd-epyc-2-threads"))
}
# What a heading of a table of figures stands for: the field of a row that has it, and whose saved bytes it lists.
RATIOS = {
    "time / PEFT": ["ratio_to_peft"],
    "time / frozen layer": ["ratio_to_frozen"],
    "time / compiled PEFT": ["ratio_to_compiled"],
    "time / plain PyTorch": ["ratio_to_addmm", "ratio_to_baseline"],
    "time / C3A": ["ratio_to_c3a"],
    "time / dense": ["ratio_to_dense"],
    "time / one expert": ["ratio_to_one"],
    "time / LoRA": ["ratio_to_lora"],
}
KEPT = {"kept, ours": "ours", "kept, PEFT": "peft", "kept, plain PyTorch": "baseline", "kept, LoRA": "lora"}
# First heading of a table: what its first cell says of a row.
KEYS: dict[str, Callable[[dict], str]] = {
    "LoRA layer: rows x in x out, rank": lambda row: f"{row['shape']}, {row['r']}" if row["op"] == "lora" else "",
    "map: rows x in x out": lambda row: f"{row['op']} {row['shape']}" if "plan" in row else "",
    "AdaMix layer": lambda row: f"{row['kind']}, {row['experts']}" if row["op"] == "adamix" else "",
    "AFLoRA layer, frozen": lambda row: row["frozen"] or "nothing" if row["op"] == "aflora" else "",
}
OTHER_KEYS = {"dtype": lambda row: row["dtype"], "dropout": lambda row: f"{row['dropout']:g}",
              "of": lambda row: row["mode"], "layer": lambda row: row["shape"]}  # fmt: skip


def size(number: int) -> str:
    return f"{number / 2**20:.2f} MiB" if number >= 2**18 else f"{number / 2**10:.1f} KiB"


def shown(row: dict, heading: str) -> str:
    what = heading.rpartition(", ")[0] if heading.endswith(tuple(f", {machine}" for machine in RESULTS)) else heading
    if what in KEPT:
        return size(row["saved_bytes"][KEPT[what]])
    (value,) = (row[field] for field in RATIOS[what] if field in row)
    return "" if value is None else f"{value:.2f}"


def wrong_figures(table: list[list[str]]) -> list[str]:
    """Cells of a table of benchmark results that the committed files do not bear out; an empty one says nothing."""
    headings, *rows = table
    keys = [heading for heading in headings if heading in OTHER_KEYS]
    wrong = []
    for cells in rows:
        said = dict(zip(headings, cells, strict=True))
        for heading, cell in said.items():
            if heading in (headings[0], *keys) or not cell:
                continue
            machine = "AMD" if heading.endswith("AMD") else "Intel"
            matching = [
                row
                for row in RESULTS[machine]
                if KEYS[headings[0]](row) == cells[0]
                and (row["mode"] == "both" or "of" in keys)
                and all(OTHER_KEYS[key](row) == said[key] for key in keys)
            ]
            found = [shown(row, heading) for row in matching]
            if found != [cell]:
                wrong.append(f"{cells}: {heading} says {cell}, measured {found}")
    return wrong


@pytest.mark.parametrize("name", ["README.md", "docs/benchmarks.md"])
def test_figures_are_those_of_the_result_files(name):
    found = [table for table in tables(PAGES[name]) if table[0][0] in KEYS]
    assert found
    wrong = [line for table in found for line in wrong_figures(table)]
    assert not wrong, "\n".join(wrong)
    changed = [found[0][0], [*found[0][1][:3], "0.01", *found[0][1][4:]]]
    assert wrong_figures(changed)


def evidence(name: str) -> dict:
    return json.loads((ROOT / f"bench/results/evidence/{name}.json").read_text())


def spread(of: dict, digits: int = 3) -> str:
    return f"{of['mean']:.{digits}f} ± {of['std']:.{digits}f}"


def evidence_tables() -> dict[str, list[list[str]]]:
    """First heading of a table: what the committed experiments have for its rows."""
    rosa, psd, pinwheel, sst2 = map(evidence, ("rosa", "psd", "pinwheel", "sst2"))
    errors = rosa["relative_error"]
    columns = [errors[rate][method] for rate in ("constant", "falling") for method in ("ROSA", "LoRA")]
    full = [f"{errors[rate]['full fine-tuning']:.2g}" for rate in ("constant", "falling")]
    return {
        "rank": [[rank, *(f"{column[rank]:.2g}" for column in columns)] for rank in errors["constant"]["ROSA"]]
        + [["full fine-tuning", full[0], "", full[1], ""]],
        "matrices": [
            [name, *(f"{error['mean']:.3g}" for error in found["relative_error"].values()),
             f"{found['trials_in_the_papers_order']} of {len(psd['seeds'])}"]
            for name, found in psd["ensembles"].items()
        ],
        "hidden layers": [
            [name, str(found["parameters_per_matrix"]), spread(found)] for name, found in pinwheel["accuracy"].items()
        ],
        "adapter": [
            [name, f"{found['adapter_parameters']:,}", spread(found)] for name, found in sst2["methods"].items()
        ],
    }  # fmt: skip


def test_evidence_is_that_of_the_result_files():
    found = {table[0][0]: table[1:] for table in tables(PAGES["docs/evidence.md"])}
    for heading, rows in evidence_tables().items():
        assert found[heading] == rows, heading


# -------------------------------------------------------------------------------------------------------- named files


# Folders of the checkout whose text names files. What is not ours stands in NOT_OURS, with what commands write.
TEXTS = ("*.md", "Makefile", "*.py", "docs", "peft_fused", "csrc", "triton_kernels", "bench", "examples", "tests")
NOT_OURS = {
    "_build_info.py", "adapter_config.json", "aflora.json", "aflora.png", "demo.json", "demo.png", "dev.tsv",
    "parts.jsonl", "results.jsonl", "results.png", "summary.json", "train.tsv", "folder/name.json", "folder/name.png",
    "train.py",
}  # fmt: skip
NAME = re.compile(r"(?<![\w./<>-])[\w/.-]*\w\.(?:py|cpp|cu|h|md|tsv|jsonl?|toml|png)\b(?![\w(>])")


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
    named = (re.sub(r"^(\.{1,2}/)+", "", name) for name in NAME.findall(text))
    return [name for name in named if name not in NOT_OURS and not any(file.endswith("/" + name) for file in files)]


def test_files_that_are_named_exist():
    skipped = {".git", ".venv", "build"}
    files = [str(path) for path in ROOT.rglob("*.*") if skipped.isdisjoint(path.relative_to(ROOT).parts)]
    made = re.findall(r"^\*\*[A-Z]\d+\. `([^`]+)`, new", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert made
    files += [str(ROOT / name) for name in made]  # by whoever follows a recipe
    assert unknown("see ops/lowrank.py, ops/missing.py and gone.cpp; v0.1.py3", files) == ["ops/missing.py", "gone.cpp"]
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in texts()
        for line, text in prose(path)
        for name in unknown(text, files)
    ]
    assert not found, found
