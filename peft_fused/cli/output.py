"""Where results and messages go: JSON alone on standard output, messages and progress on standard error."""

import contextlib
import importlib.util
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text

# A pipe has no width of its own: unless COLUMNS says one, this is enough for the widest table.
PIPE_WIDTH = 160
# Seconds between two lines of progress.
TELL_EVERY = 20.0

# Consoles are made per call: a test or a shell may exchange the streams after import.


def out() -> Console:
    """Tables for people."""
    wide = not sys.stdout.isatty() and not os.environ.get("COLUMNS", "").isdigit()
    return Console(file=sys.stdout, width=PIPE_WIDTH if wide else None, highlight=False)


def err() -> Console:
    return Console(file=sys.stderr, highlight=False)


def show(
    console: Console, title: str | None, headings: Sequence[str], rows: Sequence[Sequence[str]], *, keys: int = 1,
    ends: Callable[[int], bool] = lambda row: False,
) -> None:  # fmt: skip
    """Prints a table, columns after the first `keys` to the right. Nothing in it is cut: what is too wide for the
    console comes as several tables, each with the first `keys` columns. ends(row): whether a line follows that row.
    """
    table = list(zip(headings, *rows, strict=True))
    widths = [max(cell_len(line) for cell in column for line in _lines(cell)) for column in table]
    # Of a column, a space on either side and a border.
    room = console.width - 1 - sum(width + 3 for width in widths[:keys])
    parts, left = [[]], room
    for index in range(keys, len(headings)):
        needed = widths[index] + 3
        if needed > left and parts[-1]:
            parts.append([])
            left = room
        parts[-1].append(index)
        left -= needed
    for part in parts:
        printed = Table(title=title)
        for index in (*range(keys), *part):
            printed.add_column(headings[index], justify="left" if index < keys else "right", overflow="fold")
        for number, row in enumerate(rows):
            printed.add_row(*(row[index] for index in (*range(keys), *part)), end_section=ends(number))
        console.print(printed)
        title = None


def _lines(cell: str) -> list[str]:
    return Text.from_markup(cell).plain.split("\n")


@contextlib.contextmanager
def progress(lines: bool) -> Iterator[Callable[[str, int, int], None]]:
    """tell(what, done, total), shown on standard error while the block runs: as a bar on a terminal, elsewhere or with
    `lines` as a line at the start and every TELL_EVERY seconds, whether or not there is anything new to tell."""
    console = err()
    if console.is_terminal and not lines:
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("")
            yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)
        return
    start, said, over = time.monotonic(), "", threading.Event()

    def say() -> None:
        console.print(f"{said}, {time.monotonic() - start:.0f} s", markup=False, soft_wrap=True)

    def keep_saying() -> None:
        while not over.wait(TELL_EVERY):
            say()

    def tell(what: str, done: int, total: int) -> None:
        nonlocal said
        first, said = not said, f"{what}: {done} of {total}"
        if first:
            say()
            thread.start()

    thread = threading.Thread(target=keep_saying, daemon=True)
    try:
        yield tell
    finally:
        over.set()
        if said:
            thread.join()


def to_json(value, indent: int | None = None) -> str:
    """JSON text. NaN and infinity, which JSON has no word for and a diverged run has many of, become null."""

    def finite(item):
        if isinstance(item, float) and not math.isfinite(item):
            return None
        if isinstance(item, dict):
            return {key: finite(each) for key, each in item.items()}
        return [finite(each) for each in item] if isinstance(item, list | tuple) else item

    return json.dumps(finite(value), allow_nan=False, indent=indent)


def print_json(value) -> None:
    """One line of JSON."""
    sys.stdout.write(to_json(value) + "\n")
    sys.stdout.flush()


def result_folder(path: Path | None) -> Path | None:
    """The folder of an --out value, made if needed; ends the command when it cannot be one. Call it before the work."""
    if path is not None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"--out must be a folder, got {str(path)!r} ({error.strerror})")
    return path


def plots() -> bool:
    """Whether matplotlib is there; says so if not."""
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        err().print("no plot: matplotlib is not installed (pip install peft-fused[bench])", markup=False)
    return found


def fail(message: str, code: int = 2) -> NoReturn:
    """Ends the command with a message on standard error."""
    err().print(f"error: {message}", style="red", markup=False, soft_wrap=True)
    raise typer.Exit(code)


def torch_device(name: str):
    """torch.device of a --device value; ends the command when it is unknown or absent."""
    import torch

    if name not in ("cpu", "cuda"):
        fail(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: this torch sees no CUDA device" + ("" if torch.version.cuda else " (a CPU-only build)"))
    return torch.device(name)
