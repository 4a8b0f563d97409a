"""What an adapted layer costs the host: `python -m peft_fused.bench.host [--json]`.

A layer of 4 x 32 x 32 with a bf16 base and fp32 adapters, so small that its arithmetic takes no time, forward and
backward, on CPU tensors, so that all sides pay the same allocator. Of the paths of a GPU the driver is missing: it is
not given what has been prepared for it, nor asked for the current stream and device. Times are of the process in
microseconds, above those of the base layer; ratios are to PEFT's in the same rounds. AdaMix has no dropout.
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
    """A layer, and where its ops run: a context that is entered around its calls."""

    name: str
    layer: nn.Module
    context: Callable = ExitStack


def _model(config, seed: int = 0) -> nn.Module:
    from peft import get_peft_model

    torch.manual_seed(seed)
    net = nn.Sequential()
    net.add_module("linear", nn.Linear(WIDTH, WIDTH, bias=False))
    return get_peft_model(net.to(torch.bfloat16), config).train()


def _layer(model: nn.Module) -> nn.Module:
    return model.base_model.model.linear


def _lora(dropout: float, accelerated: bool) -> nn.Module:
    from peft import LoraConfig

    model = _model(LoraConfig(r=RANK, lora_alpha=16, lora_dropout=dropout, target_modules=["linear"]))
    if accelerated:
        peft_fused.accelerate(model)
    return _layer(model)


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
    """The base layer, PEFT's, and ours."""
    torch.manual_seed(0)
    base = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    dylora = _layer(_model(peft_fused.DyLoraConfig(r=RANK, lora_dropout=dropout, target_modules=["linear"])))
    adamix = {
        kind: _layer(_model(peft_fused.AdaMixConfig(r=RANK, num_experts=4, kind=kind, target_modules=["linear"])))
        for kind in ("lora", "adapter")
    }
    return [
        Path("base layer", base),
        Path("PEFT", _lora(dropout, accelerated=False)),
        Path("accelerated, C++ on CPU", _lora(dropout, accelerated=True)),
        Path("accelerated, Triton from C++", _lora(dropout, accelerated=True), lambda: on_triton(cpp=True)),
        Path("accelerated, Triton from Python", _lora(dropout, accelerated=True), lambda: on_triton(cpp=False)),
        Path("DyLoRA, Triton from C++", dylora, lambda: on_triton(cpp=True)),
        *(
            Path(f"AdaMix ({kind}), Triton from C++", layer, lambda: on_triton(cpp=True))
            for kind, layer in adamix.items()
        ),
    ]


def _microseconds(layer: nn.Module, calls: int) -> float:
    x = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.ones(ROWS, WIDTH, dtype=torch.bfloat16)
    for _ in range(WARM):
        layer(x).backward(dy)
    begin = time.process_time()
    for _ in range(calls):
        layer(x).backward(dy)
    return (time.process_time() - begin) / calls * 1e6


def measure(dropout: float, rounds: int) -> list[dict]:
    """A row per path: medians over rounds, in each of which every path has a turn."""
    found = paths(dropout)
    times: dict[str, list[float]] = {path.name: [] for path in found}
    gc.disable()
    try:
        for i in range(rounds):
            for path in found if i % 2 else found[::-1]:
                with path.context():
                    times[path.name].append(_microseconds(path.layer, CALLS))
            gc.collect()
    finally:
        gc.enable()
    base, *adapted = ([*times[path.name]] for path in found)
    above = [[mine - its for mine, its in zip(one, base, strict=True)] for one in adapted]
    return [
        {
            "path": path.name,
            "dropout": dropout,
            "host_us": round(statistics.median(one), 2),
            "ratio_to_peft": round(statistics.median(a / b for a, b in zip(one, above[0], strict=True)), 3),
        }
        for path, one in zip(found[1:], above, strict=True)
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="a line of JSON per path")
    parser.add_argument("--rounds", type=int, default=25, help="turns of every path")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for dropout in DROPOUTS:
        for row in measure(dropout, options.rounds):
            text = "{path:34} dropout {dropout:4}  {host_us:7.1f} us  {ratio_to_peft:5.2f} of PEFT's"
            print(json.dumps(row) if options.json else text.format(**row), flush=True)


if __name__ == "__main__":
    main()
