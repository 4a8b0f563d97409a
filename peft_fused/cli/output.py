"""Where results and messages go: JSON alone on standard output, messages and progress on standard error."""

import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console

# Made per call: a test or a shell may exchange the streams after import.


def out() -> Console:
    """Tables for people. A pipe has no width of its own and gets enough for the widest table."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 160, highlight=False)


def err() -> Console:
    return Console(file=sys.stderr, highlight=False)


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
