"""What an adapted layer costs the host: `python -m peft_fused.bench.host [--json]`.

A layer of 4 x 32 x 32 with a bf16 base and fp32 adapters, so small that its arithmetic takes no time, forward and
backward, on CPU tensors, so that all sides pay the same allocator. Of the paths of a GPU the driver is missing: it is
not given what has been prepared for it, nor asked for the current stream and device. Times are of the process in
microseconds, per layer and above those of the base layer; ratios are to PEFT's in the same rounds. Of q/k/v, three
layers run on one x, and are compared with three of the base and of PEFT's. AdaMix has no dropout.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest.mock import patch

import torch
from peft_fused.triton_kernels.problem import H200
from torch import nn

import peft_fused
from peft_fused.ops import dispatch, native

ROWS, WIDTH, RANK = 4, 32, 8
DROPOUTS = (0.0, 0.05)
CALLS, WARM = 200, 20


@dataclass
class Path:
    """Layers that run on one x, and where their ops run: a context that is entered around their calls."""

    name: str
    layers: list[nn.Module]
    context: Callable = ExitStack


def _base(count: int) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in range(count))


def _layers(config, count: int = 1, accelerated: bool = False) -> list[nn.Module]:
    from peft import get_peft_model

    config.target_modules = [str(i) for i in range(count)]
    model = get_peft_model(nn.Sequential(*_base(count)), config).train()
    if accelerated:
        peft_fused.accelerate(model)
    return list(model.base_model.model)


def _lora(dropout: float, accelerated: bool = False, count: int = 1) -> list[nn.Module]:
    from peft import LoraConfig

    return _layers(LoraConfig(r=RANK, lora_alpha=16, lora_dropout=dropout), count, accelerated)


class _Launched:
    """What Triton's launcher asks of a compiled kernel, of which there is none."""

    function = packed_metadata = None
    metadata = SimpleNamespace(num_warps=4, shared=0, num_ctas=1, global_scratch_size=0, profile_scratch_size=0)

    def _init_handles(self) -> None:
        self.function = 1

    def launch_metadata(self, grid, stream, *arguments) -> None:
        return None

    def run(self, *arguments) -> None:
        return None


class _Driver:
    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@contextmanager
def on_triton(cpp: bool) -> Iterator[None]:
    """Ops run as on an H200 until the end of the block, by the C++ node or by Python's, but nothing is launched."""
    import triton
    from peft_fused.triton_kernels import compiled
    from triton.runtime.jit import JITFunction

    decide = dispatch.decide

    def as_on_a_gpu(problem, **more):
        decide(problem, **more)
        problem = replace(problem, device="cuda", gpu=H200)
        plan = problem.launch_plan("triton")
        if cpp and problem.native("triton"):
            return dispatch.Decision("triton", True, problem, compiled.for_node(native.module, problem, plan))
        return dispatch.Decision("triton", False, problem, plan)

    def compile_nothing(kernel, key, signature, device, *more):
        return kernel.device_caches[device][0].setdefault(key, _Launched())

    with ExitStack() as stack:
        for owner, name, value in (
            (dispatch, "decide", as_on_a_gpu),
            (triton.runtime.driver, "_active", _Driver()),
            (JITFunction, "_do_compile", compile_nothing),
        ):
            stack.enter_context(patch.object(owner, name, value))
        dispatch.forget()
        native.module.send_triton_launches("nowhere")
        try:
            yield
        finally:
            native.module.send_triton_launches("driver")
            dispatch.forget()


def paths(dropout: float) -> list[Path]:
    """The base layer, PEFT's and ours, and the same of three layers on one x."""
    dylora = _layers(peft_fused.DyLoraConfig(r=RANK, lora_dropout=dropout))
    adamix = {kind: _layers(peft_fused.AdaMixConfig(r=RANK, num_experts=4, kind=kind)) for kind in ("lora", "adapter")}

    def triton() -> ExitStack:
        return on_triton(cpp=True)

    return [
        Path("base layer", list(_base(1).requires_grad_(False))),
        Path("PEFT", _lora(dropout)),
        Path("accelerated, C++ on CPU", _lora(dropout, accelerated=True)),
        Path("accelerated, Triton from C++", _lora(dropout, accelerated=True), triton),
        Path("accelerated, Triton from Python", _lora(dropout, accelerated=True), lambda: on_triton(cpp=False)),
        Path("DyLoRA, Triton from C++", dylora, triton),
        *(Path(f"AdaMix ({kind}), Triton from C++", layers, triton) for kind, layers in adamix.items()),
        Path("base layers, q/k/v", list(_base(3).requires_grad_(False))),
        Path("PEFT, q/k/v", _lora(dropout, count=3)),
        Path("accelerated, grouped q/k/v, C++ on CPU", _lora(dropout, accelerated=True, count=3)),
        Path("accelerated, grouped q/k/v, Triton from C++", _lora(dropout, accelerated=True, count=3), triton),
    ]


def _microseconds(layers: list[nn.Module], calls: int) -> float:
    """Of a layer, forward and backward."""
    leaf = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    dys = [torch.ones(ROWS, WIDTH, dtype=torch.bfloat16) for _ in layers]

    def step() -> None:
        x = leaf.view_as(leaf)  # with a graph, as the input of a layer has one
        torch.autograd.backward([layer(x) for layer in layers], dys)

    for _ in range(WARM):
        step()
    begin = time.process_time()
    for _ in range(calls):
        step()
    return (time.process_time() - begin) / calls / len(layers) * 1e6


def measure(dropout: float, rounds: int) -> list[dict]:
    """A row per path: medians over rounds, in each of which every path has a turn."""
    found = paths(dropout)
    times: dict[str, list[float]] = {path.name: [] for path in found}
    gc.disable()
    try:
        for i in range(rounds):
            for path in found if i % 2 else found[::-1]:
                with path.context():
                    times[path.name].append(_microseconds(path.layers, CALLS))
            gc.collect()
    finally:
        gc.enable()
    rows = []
    for count in (1, 3):
        base, *adapted = (path for path in found if len(path.layers) == count)
        above = {
            p.name: [mine - its for mine, its in zip(times[p.name], times[base.name], strict=True)] for p in adapted
        }
        peft = above[adapted[0].name]
        rows += [
            {
                "path": name,
                "dropout": dropout,
                "host_us": round(statistics.median(one), 2),
                "ratio_to_peft": round(statistics.median(a / b for a, b in zip(one, peft, strict=True)), 3),
            }
            for name, one in above.items()
        ]
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="a line of JSON per path")
    parser.add_argument("--rounds", type=int, default=25, help="turns of every path")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for dropout in DROPOUTS:
        for row in measure(dropout, options.rounds):
            text = "{path:43} dropout {dropout:4}  {host_us:7.1f} us  {ratio_to_peft:5.2f} of PEFT's"
            print(json.dumps(row) if options.json else text.format(**row), flush=True)


if __name__ == "__main__":
    main()
