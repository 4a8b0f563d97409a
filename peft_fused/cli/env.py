"""`peft-fused env`: what is here, what each op will run, and what is missing at what cost."""

import platform
from collections.abc import Iterable
from dataclasses import replace
from importlib import metadata

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from .output import out, print_json

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "peft-fused")
# Of the batch whose paths are shown: 32 texts of 128 tokens.
ROWS = 4096


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def collect() -> dict:
    """Everything `env` shows, as plain JSON values."""
    import torch

    from peft_fused.ops import native

    gpus = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            memory = round(found.total_memory / 2**30, 1)
            gpus.append({"name": found.name, "capability": f"{found.major}.{found.minor}", "memory_gib": memory})
    versions = {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}
    versions["torch"] = torch.__version__  # unlike the metadata it always names the build
    extension = {
        "loaded": native.module is not None,
        "why_not": native.why_missing or None,
        "cuda_kernels": native.has_cuda(),
    }
    return {
        "versions": versions,
        "cpu": {
            "machine": platform.machine(),
            "vector": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "torch_cuda": torch.version.cuda,
        "gpus": gpus,
        "extension": extension,
        "paths": [
            {"op": op, "path": path, "against": [f"{name}: {'; '.join(reasons)}" for name, reasons in against.items()]}
            for op, path, against in _paths("cuda" if gpus else "cpu")
        ],
        "missing": _missing(versions, extension, gpus, torch.version.cuda),
    }


def _paths(device: str) -> list[tuple[str, str, dict[str, list[str]]]]:
    """(op, its path, reasons against each other backend) for the common types on a device."""
    import torch

    from peft_fused.ops import dispatch
    from peft_fused.ops.cases import OPS
    from peft_fused.triton_kernels.launching import gpu_of

    where = dict(m=ROWS, device=device, gpu=gpu_of(torch.device(device)))
    problems = [
        replace(op.problem(op.layer(op.name, dtype, torch.float32, "meta")), **where)
        for op in OPS.values()
        for dtype in (torch.float32, torch.bfloat16)
    ]
    found = []
    for problem in problems:
        ((op, path, lines),) = dispatch.explain(problem).lines
        against = dict(line.split(": ", 1) for line in lines)
        # Reason by reason, where a backend cannot run it at all.
        found.append((op, path, {name: dispatch.why_not(name, problem) or [text] for name, text in against.items()}))
    return found


def _missing(versions: dict, extension: dict, gpus: list, torch_cuda: str | None) -> list[dict]:
    """What is not here, why, what that costs, and what to do about it."""
    from peft_fused.ops import native

    found = []

    def add(what: str, why: str, cost: str, remedy: str | None = None) -> None:
        found.append({"what": what, "why": why, "cost": cost, "remedy": remedy})

    if not gpus:
        why = "torch sees no CUDA device" if torch_cuda else "this torch is a CPU-only build"
        add("GPU", why, "the Triton and CUDA kernels cannot run; ops run on the torch backend")
    if versions["triton"] is None:
        add("triton", "not installed", "no Triton kernels: on a GPU large layers run on the CUDA or torch backend")
    if not extension["loaded"]:
        add("C++ extension", extension["why_not"], native.COST, native.REMEDY if native.not_built else None)
    elif gpus and not extension["cuda_kernels"]:
        add("CUDA kernels", "the extension was built without them", "small layers on a GPU run on Triton or torch")
    return found


def run(as_json: bool) -> None:
    found = collect()
    if as_json:
        print_json(found)
        return
    console = out()
    console.print("  ".join(f"{name} {value or 'missing'}" for name, value in found["versions"].items()))
    cpu = found["cpu"]
    console.print(f"CPU: {cpu['machine']}, {cpu['vector']}, {cpu['threads']} threads")
    for gpu in found["gpus"]:
        console.print(f"GPU: {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB")
    state = "not used"
    if found["extension"]["loaded"]:
        state = "loaded, " + ("with CUDA kernels" if found["extension"]["cuda_kernels"] else "without CUDA kernels")
    console.print(f"C++ extension: {state}")
    _print_paths(console, _paths("cuda" if found["gpus"] else "cpu"), found["extension"]["why_not"])
    if found["missing"]:
        console.print("\n[bold]missing[/]")
    for entry in found["missing"]:
        _print(console, f"{entry['what']}: {entry['why']}", 2)
        _print(console, entry["cost"], 4)
        if entry["remedy"]:
            _print(console, entry["remedy"], 4)


def _print(console: Console, text: str, indent: int) -> None:
    console.print(Padding(Text(text), (0, 0, 0, indent), expand=False))


def _print_against(console: Console, pairs: Iterable[tuple[str, str]], indent: int) -> None:
    by_name: dict[str, list[str]] = {}
    for name, reason in pairs:
        by_name.setdefault(name, []).append(reason)
    for name, reasons in by_name.items():
        _print(console, f"not {name}: {'; '.join(reasons)}", indent)


def _print_paths(console: Console, paths: list, extension_missing: str | None) -> None:
    """Ops that take the same path for the same reasons together; a reason that is the same for all of them, once."""
    pairs = {op: [(name, why) for name, reasons in against.items() for why in reasons] for op, _, against in paths}
    first, *others = pairs.values()
    common = [pair for pair in first if all(pair in other for other in others)]
    groups: dict[tuple, list[str]] = {}
    for op, path, _ in paths:
        own = tuple(pair for pair in pairs[op] if pair not in common)
        groups.setdefault((path, own), []).append(op)
    console.print("\n[bold]paths[/]")
    for (path, own), ops in groups.items():
        _print(console, path, 2)
        for op in ops:
            _print(console, op, 4)
        _print_against(console, own, 6)
    if common:
        _print(console, "for all of them:", 2)
        if extension_missing:  # which stands below, with what to do about it
            common = [(name, why.replace(extension_missing, "see below")) for name, why in common]
        _print_against(console, common, 6)
