"""`peft-fused env`: what is here, what each op will run, and what is missing at what cost."""

import platform
from importlib import metadata

from rich.table import Table

from .output import out, print_json

TYPES = ("float32", "bfloat16")
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "peft-fused")
# The layer whose path is shown: a query projection of a base-size encoder, 32 texts of 128 tokens.
LAYER = dict(m=4096, n=768, k=768)
RANK = 8
# Sizes of the structured maps on it, see ops.structured.StructuredProblem.
SIZES = {
    "circulant": (768,), "skew_circulant": (768,), "toeplitz": (768, 768), "toeplitz_product": (768,),
    "kronecker": (24, 32, 32, 24), "ldr": (1, 768),
}  # fmt: skip


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
        "paths": _paths("cuda" if gpus else "cpu"),
        "missing": _missing(versions, extension, gpus, torch.version.cuda),
    }


def _paths(device: str) -> list[dict]:
    """The path of each op for the common types on a device, with the reasons against the other backends."""
    import torch

    from peft_fused.ops import dispatch, structured

    gpu, sm_count = "", 1
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        gpu, sm_count = found.name, found.multi_processor_count
    where = LAYER | dict(adapter_dtype="float32", device=device, gpu=gpu, sm_count=sm_count, dropout=False)
    problems = [
        dispatch.Problem(**where, r=RANK, dtype=dtype, has_weight=has_weight)
        for has_weight in (True, False)
        for dtype in TYPES
    ] + [
        structured.StructuredProblem(kind, **where, sizes=sizes, dtype=dtype)
        for kind, sizes in SIZES.items()
        for dtype in TYPES
    ]
    lines = [line for problem in problems for line in dispatch.explain(problem).lines]
    return [dict(zip(("op", "path", "against"), line, strict=True)) for line in lines]


def _missing(versions: dict, extension: dict, gpus: list, torch_cuda: str | None) -> list[dict]:
    """What is not here, why, and what that costs."""
    found = []

    def add(what: str, why: str, cost: str) -> None:
        found.append({"what": what, "why": why, "cost": cost})

    if not gpus:
        why = "torch sees no CUDA device" if torch_cuda else "this torch is a CPU-only build"
        add("GPU", why, "the Triton and CUDA kernels cannot run; ops run on the torch backend")
    if versions["triton"] is None:
        add("triton", "not installed", "no Triton kernels: on a GPU large layers run on the CUDA or torch backend")
    if not extension["loaded"]:
        add(
            "C++ extension", extension["why_not"],
            "a Python autograd node per layer instead of the C++ one, and dropout masks made by many tensor "
            "operations: small layers cost a multiple of PEFT's, and there is no CUDA backend",
        )  # fmt: skip
    elif gpus and not extension["cuda_kernels"]:
        add("CUDA kernels", "the extension was built without them", "small layers on a GPU run on Triton or torch")
    return found


def run(as_json: bool) -> None:
    found = collect()
    if as_json:
        print_json(found)
        return
    console = out()
    console.print(
        "  ".join(f"{name} {value or 'missing'}" for name, value in found["versions"].items()), soft_wrap=True
    )
    cpu = found["cpu"]
    console.print(f"CPU: {cpu['machine']}, {cpu['vector']}, {cpu['threads']} threads")
    for gpu in found["gpus"]:
        console.print(f"GPU: {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB")
    extension = found["extension"]
    state = f"not used: {extension['why_not']}"
    if extension["loaded"]:
        state = "loaded, " + ("with CUDA kernels" if extension["cuda_kernels"] else "without CUDA kernels")
    console.print(f"C++ extension: {state}", markup=False, soft_wrap=True)
    table = Table(title="paths", show_lines=True)
    for name in ("op", "path", "why not the others"):
        table.add_column(name, overflow="fold")
    # Ops that take the same path for the same reasons share a row.
    rows: dict[tuple, list[str]] = {}
    for entry in found["paths"]:
        rows.setdefault((entry["path"], "\n".join(entry["against"])), []).append(entry["op"])
    for (path, against), ops in rows.items():
        table.add_row("\n".join(ops), path, against)
    console.print(table)
    if found["missing"]:
        table = Table(title="missing", show_lines=True)
        for name in ("what", "why", "cost"):
            table.add_column(name, overflow="fold")
        for entry in found["missing"]:
            table.add_row(*entry.values())
        console.print(table)
