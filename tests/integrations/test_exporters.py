"""torch.export, torch.jit.trace and torch.onnx record the plain formulas, which run without this package."""

import logging
from functools import partial

import contract
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft_fused

pytest.importorskip("onnxscript")
ReferenceEvaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
LORA = "accelerated lora"
STRUCTURES = ("circulant", "toeplitz", "symmetric_toeplitz", "kronecker", "ldr")
METHODS = (
    {LORA: lambda: LoraConfig(r=4, init_lora_weights=False, target_modules=["0"])}
    | {
        v.name: partial(v.config, target_modules=["1" if "target_modules" in v.options else "0"], init_weights=False)
        for v in contract.VARIANTS
    }
    | {
        f"surm {structure} {kind}": partial(
            peft_fused.SurmConfig, structure=structure, kind=kind, target_modules=["0"], init_weights=False
        )
        for structure in STRUCTURES
        for kind in ("lora", "adapter")
    }
)
X = torch.linspace(-1, 1, 64).view(4, 16)
MORE = torch.linspace(1, -2, 112).view(7, 16)


def adapted(method):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)), METHODS[method]()).eval()
    if method == LORA:
        peft_fused.accelerate(model)
    inner = model.base_model.model
    with torch.no_grad():
        return inner, [inner(X), inner(MORE)]


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_torch_export(method):
    model, expected = adapted(method)
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called and all(name.startswith(("aten.", "<built-in", "_operator.")) for name in called), called
    for x, y in zip((X, MORE), expected, strict=True):
        close(program.module()(x), y)


@pytest.mark.parametrize("method", METHODS)
def test_torch_jit_trace(method):
    model, expected = adapted(method)
    traced = torch.jit.trace(model, (X,))
    assert "peft_fused::" not in str(traced.inlined_graph)
    for x, y in zip((X, MORE), expected, strict=True):
        close(traced(x), y)


@pytest.mark.parametrize("method", METHODS)
def test_torch_onnx(method, tmp_path):
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    model, expected = adapted(method)
    path = tmp_path / "model.onnx"
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    torch.onnx.export(model, (X,), path, dynamo=True, verbose=False, dynamic_shapes=shapes)
    evaluator = ReferenceEvaluator(str(path))
    assert not evaluator.proto_.functions or {f.domain for f in evaluator.proto_.functions} <= {
        "pkg.onnxscript.torch_lib"
    }
    for x, y in zip((X, MORE), expected, strict=True):
        (found,) = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
        close(torch.from_numpy(found), y)


def test_a_forced_backend_is_recorded_as_it_is():
    model, expected = adapted("dylora")
    with peft_fused.use_backend("torch"):
        program = torch.export.export(model, (X,))
    assert "peft_fused.lowrank_fwd.default" in {str(node.target) for node in program.graph.nodes}
    close(program.module()(X), expected[0])


@pytest.mark.parametrize("method", [LORA, "dylora", "rosa"])
def test_a_language_model_is_exported_with_dynamic_shapes(method):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, use_cache=False
    )
    adapter = METHODS[method]()
    adapter.target_modules = "all-linear"
    model = get_peft_model(LlamaForCausalLM(config), adapter).eval()
    if method == LORA:
        peft_fused.accelerate(model)

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids).logits

    ids = torch.arange(12).view(2, 6)
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(Logits(), (ids,), dynamic_shapes=dynamic)
    assert not [node for node in program.graph.nodes if "peft_fused" in str(node.target)]
    for given in (ids, torch.arange(27).view(3, 9)):
        close(program.module()(given), model(input_ids=given).logits)
