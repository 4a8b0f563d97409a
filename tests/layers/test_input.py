"""What a layer says of an input that is no tensor: the same, whatever of it would have been asked first."""

import pytest
import torch
from torch import nn

from peft_fused.integrations.peft.registration import REGISTERED
from peft_fused.layers import AdaMixLinear, LoraLinear

LAYERS = {cls.__name__: cls.from_linear for cls in (LoraLinear, *(c for m in REGISTERED.values() for c in m.layers))}
LAYERS["AdaMixLinear, lora"] = lambda base: AdaMixLinear.from_linear(base, kind="lora")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("x", [[1.0], None], ids=["list", "None"])
@pytest.mark.parametrize("name", LAYERS)
def test_what_is_no_tensor_is_named(name, x, training):
    layer = LAYERS[name](nn.Linear(16, 16)).train(training)
    with pytest.raises(TypeError, match=f"x must be a torch.Tensor, got {type(x).__name__}"):
        layer(x)
    assert layer.eval()(torch.ones(2, 16)).shape == (2, 16)
