"""Tables that fit, and progress that is told where no terminal shows it."""

import io
import re

import pytest
from rich.console import Console

from peft_fused.cli import output

HEADINGS = ("name", "kind", "first\nnumber", "second", "third", "fourth")
ROWS = [
    [f"layer {i}", "[green]a kind[/]" if i else "another", f"{i}.123456 ± 0.1", "0.804 ± 0.01", "x" * 9, "1,234"]
    for i in range(3)
]


def printed(width, **options):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    output.show(console, "title", HEADINGS, ROWS, keys=2, **options)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [200, 80, 60, 50])
def test_nothing_in_a_table_is_cut(width):
    text = printed(width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text and text.count("title") == 1
    tables = text.count("┏")
    assert tables == {200: 1, 80: 1, 60: 2, 50: 3}[width]
    for name, kind, *numbers in ROWS:
        assert text.count(name) == tables  # each part has the names
        assert all(number in text for number in numbers)
        assert re.sub(r"\[.*?\]", "", kind) in text
    assert all(text.count(word) == 1 for heading in HEADINGS[2:] for word in heading.split())


def test_a_cell_wider_than_the_console_is_folded():
    console = Console(file=io.StringIO(), width=30, highlight=False)
    output.show(console, None, ("a", "b"), [["name", "word" * 20]])
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 30
    assert "".join(re.findall(r"[word]{4,}", text.split("┡")[1])).count("word") == 20


def test_a_pipe_has_the_width_of_columns_and_a_wide_one_without(monkeypatch):
    monkeypatch.setattr(output.sys, "stdout", io.StringIO())
    monkeypatch.delenv("COLUMNS", raising=False)
    assert output.out().width == output.PIPE_WIDTH
    for columns, width in (("72", 72), ("", output.PIPE_WIDTH), ("wide", output.PIPE_WIDTH)):
        monkeypatch.setenv("COLUMNS", columns)
        assert output.out().width == width


def test_progress_is_told_again_though_nothing_has_happened(monkeypatch, capsys):
    monkeypatch.setattr(output, "TELL_EVERY", 0.02)
    said = []
    monkeypatch.setattr(output.Console, "print", lambda self, text, **options: said.append(text))
    with output.progress(lines=False) as tell:
        assert not said
        tell("training", 0, 7)
        assert said == ["training: 0 of 7, 0 s"]
        tell("training", 5, 7)
        for _ in range(500):
            if len(said) < 4:
                output.time.sleep(0.01)
    assert len(said) >= 4 and {text.split(",")[0] for text in said[1:]} == {"training: 5 of 7"}
    number = len(said)
    output.time.sleep(0.1)
    assert len(said) == number


def test_progress_is_on_standard_error(capsys):
    with output.progress(lines=True) as tell:
        tell("a shape", 1, 2)
    with output.progress(lines=True):
        pass
    assert capsys.readouterr() == ("", "a shape: 1 of 2, 0 s\n")


def test_a_minute_is_never_silent():
    assert output.TELL_EVERY < 60
