"""Accelerated models under torch.compile: one graph, which notices what changes and is not made anew for a scale."""

import pytest
import torch
from accelerated import FP32, assert_same, error, first, pair, results, several


@pytest.mark.parametrize(
    "options", [{}, {"lora_dropout": 0.5}, {"lora_bias": True}], ids=["plain", "dropout", "lora_bias"]
)
def test_compiles_without_graph_breaks(options):
    torch._dynamo.reset()
    reference, fused = pair(**options)
    dropout = "lora_dropout" in options
    fused.train(), reference.train()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 24)
    ours = results(fused, x, forward=lambda _, x: compiled(x))
    if not dropout:
        assert_same(ours, results(reference, x))
        return
    again = results(fused, x, forward=lambda _, x: compiled(x))
    assert not torch.equal(ours["output"], again["output"])
    fused.eval(), reference.eval()
    assert_same(results(fused, x, forward=lambda _, x: compiled(x)), results(reference, x))


def test_compiled_model_notices_switches():
    torch._dynamo.reset()
    reference, fused = several()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 24)
    for active in (["a"], ["b", "c"], ["a"]):
        fused.base_model.set_adapter(active)
        reference.base_model.set_adapter(active)
        assert error(compiled(x), reference(x)) <= FP32
    with fused.disable_adapter(), reference.disable_adapter():
        assert error(compiled(x), reference(x)) <= FP32


def test_compiled_model_takes_hotswapped_scales():
    torch._dynamo.reset()
    reference, fused = pair(target_modules=["first"])
    scale = first(reference).scaling["default"] = first(fused).scaling["default"] = torch.tensor(0.7)
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 24)
    before = compiled(x)
    assert error(before, reference(x)) <= FP32
    scale.fill_(2.0)
    with torch.compiler.set_stance("fail_on_recompile"):
        after = compiled(x)
    assert error(after, reference(x)) <= FP32
    assert error(after, before) > 0.01
