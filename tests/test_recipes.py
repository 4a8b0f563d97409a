"""The recipes of CONTRIBUTING.md, followed to the letter in a copy of the tree, and what comes of them put to use."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
EDIT = re.compile(
    r"^\*\*(?P<recipe>[MOK])\d+\. `(?P<path>[^`]+)`, "
    r"(?P<where>new|at the end|below (?P<ticks>`+)(?P<anchor>.+?) ?(?P=ticks))\.\*\*.*\n"
    r"(?:(?!\*\*[MOK]|```).*\n)*"
    r"(?P<fence>`{3,})\w+\n(?P<text>(?s:.*?))^(?P=fence)$",
    re.MULTILINE,
)


class Edit(NamedTuple):
    """What a recipe says of a file: its whole text if it is new, what to put below a line, or at the end."""

    path: str
    where: str
    anchor: str | None
    text: str

    def apply(self, tree: Path) -> None:
        path = tree / self.path
        if self.where == "new":
            assert not path.exists(), f"{self.path} is there already"
            path.write_text(self.text)
            return
        lines = path.read_text().splitlines(keepends=True)
        if self.anchor is None:
            blank = "\n\n" if path.suffix == ".py" else "\n"
            path.write_text("".join([*lines, blank, self.text]))
            return
        found = [i for i, line in enumerate(lines, 1) if line.strip().startswith(self.anchor)]
        assert len(found) == 1, f"{self.path} has {len(found)} lines that begin with {self.anchor}"
        path.write_text("".join([*lines[: found[0]], self.text, *lines[found[0] :]]))


def recipes() -> dict[str, list[Edit]]:
    """The edits of each recipe, by its letter."""
    text, found = (ROOT / "CONTRIBUTING.md").read_text(), {}
    for match in EDIT.finditer(text):
        found.setdefault(match["recipe"], []).append(Edit(*match.group("path", "where", "anchor", "text")))
    # Nothing that looks like an edit is passed over.
    assert sum(map(len, found.values())) == len(re.findall(r"^\*\*[A-Z]\d+\. ", text, re.MULTILINE))
    return found


RECIPES = recipes()


def files(recipe: str) -> set[str]:
    return {edit.path for edit in RECIPES[recipe]}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree with all recipes followed, laid out as it is installed."""
    tree = tmp_path_factory.mktemp("recipes")
    for name in ("peft_fused", "triton_kernels", "bench", "tests", "docs", "examples"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and not path.name.startswith("."):
            shutil.copy(path, tree)
    for edits in RECIPES.values():
        for edit in edits:
            edit.apply(tree)
    for name in ("triton_kernels", "bench"):
        (tree / "peft_fused" / name).symlink_to(tree / name, target_is_directory=True)
    return tree


def run(tree: Path, *command: str) -> str:
    """What a command with the copy's package prints."""
    env = {**os.environ, "PYTHONPATH": str(tree), "PEFT_FUSED_BUILD": "off", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-P", "-m", *command], cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    return done.stdout


def passes(tree: Path, *tests: str) -> None:
    run(tree, "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests)


def test_a_method(tree):
    print(len(files("M")), "files for a method")
    assert len(files("M")) == 8
    passes(
        tree,
        "tests/recipes/method.py",
        "tests/test_documents.py",
        # What every method joins by its registration.
        "tests/cli/test_demo.py",
        "tests/fuzz",
        "tests/layers",
        "tests/methods",
        "tests/integrations",
        # Named one by one: that it joins nothing at all would pass unseen.
        "tests/integrations/test_state.py::test_state_dict_helpers_round_trip[ramp]",
        "tests/integrations/test_trainer.py::test_a_resumed_run_equals_the_straight_one_bit_for_bit[ramp]",
        "-k",
        "ramp or recipes or all_methods or links_lead or names_of_the_package",
    )


def test_an_op(tree):
    print(len(files("O")), "files for an op")
    assert len(files("O")) == 6
    passes(
        tree,
        "tests/recipes/op.py",
        "tests/ops/test_contract.py",
        "tests/cli/test_check.py",
        "-k",
        "recipes or projection or test_check",
        *(f"tests/ops/test_dispatch.py::test_what_is_told_is_what_runs[cpu-True-{b}-projection]" for b in FORCED),
    )


FORCED = ("None", "torch", "reference")


def test_a_kind_of_adapter(tree):
    print(len(files("K")), "files for a kind of adapter")
    assert len(files("K")) == 4
    passes(tree, "tests/integrations/acceleration/test_c3a.py")


def test_style(tree):
    pytest.importorskip("ruff")
    changed = sorted(path for recipe in RECIPES for path in files(recipe) if path.endswith(".py"))
    run(tree, "ruff", "check", "--no-cache", *changed)
    run(tree, "ruff", "format", "--check", "--no-cache", *changed)
