"""Where results and messages go: JSON alone on standard output, messages and progress on standard error."""

import json
import sys
from typing import NoReturn

import typer
from rich.console import Console

# Made per call: a test or a shell may exchange the streams after import.


def out() -> Console:
    """Tables for people. A pipe has no width of its own and gets enough for the widest table."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160, highlight=False)


def err() -> Console:
    return Console(file=sys.stderr, highlight=False)


def print_json(value) -> None:
    """One line of JSON. NaN and infinity are no JSON and raise ValueError."""
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")
    sys.stdout.flush()


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
