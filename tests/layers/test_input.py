"""What a layer says of an input that is no tensor: the same, whatever of it would have been asked first."""

import pytest
import torch
from torch import nn

from peft_fused import layers


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("x", [[1.0], None], ids=["list", "None"])
@pytest.mark.parametrize(
    "make",
    [
        layers.LoraLinear.from_linear,
        layers.DyLoraLinear.from_linear,
        layers.AfLoraLinear.from_linear,
        layers.RosaLinear.from_linear,
        layers.CirculantLinear.from_linear,
        lambda base: layers.AdaMixLinear.from_linear(base, kind="lora"),
        lambda base: layers.AdaMixLinear.from_linear(base, kind="adapter"),
    ],
    ids=["lora", "dylora", "aflora", "rosa", "circulant", "adamix", "adamix adapter"],
)
def test_what_is_no_tensor_is_named(make, x, training):
    layer = make(nn.Linear(16, 16)).train(training)
    with pytest.raises(TypeError, match=f"x must be a torch.Tensor, got {type(x).__name__}"):
        layer(x)
    assert layer.eval()(torch.ones(2, 16)).shape == (2, 16)
