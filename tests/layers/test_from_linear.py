"""What every layer class refuses to be made from, or with: by name, and with the base as it was."""

import inspect

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D

from peft_fused.integrations.peft.registration import REGISTERED
from peft_fused.layers import (
    AdaMixLinear,
    AfLoraLinear,
    CirculantLinear,
    DyLoraLinear,
    KroneckerLinear,
    LdrLinear,
    LoraLinear,
    RosaLinear,
    SurmAdapterLinear,
    ToeplitzLinear,
)

CLASSES = (LoraLinear, *(layer for method in REGISTERED.values() for layer in method.layers))
HUGE = 10**400


def with_weight(weight):
    base = nn.Linear(8, 8)
    base.weight = weight
    return base


def nested(layout):
    return nn.Parameter(torch.nested.nested_tensor([torch.randn(8), torch.randn(8)], layout=layout))


def with_bias(bias):
    base = nn.Linear(8, 8)
    base.bias = bias
    return base


def of_another_mode(mode):
    with mode():
        return nn.Linear(8, 8)


ODD_BASES = {
    "a string": (lambda: "x", "must be a torch.nn.Linear or transformers' Conv1D, got str"),
    "no linear layer": (lambda: nn.Conv2d(2, 2, 1), "got Conv2d"),
    "sparse": (lambda: with_weight(nn.Parameter(torch.randn(8, 8).to_sparse())), "a weight that is sparse_coo"),
    "csr": (lambda: with_weight(nn.Parameter(torch.randn(8, 8).to_sparse_csr())), "a weight that is sparse_csr"),
    "nested": (lambda: with_weight(nested(torch.strided)), "a weight that is nested"),
    "jagged": (lambda: with_weight(nested(torch.jagged)), "a weight that is nested"),
    "lazy": (lambda: nn.LazyLinear(8), "a weight that is not initialised"),
    "uninitialised": (lambda: with_weight(nn.UninitializedParameter()), "a weight that is not initialised"),
    "none": (lambda: with_weight(None), "weight of this Linear is no parameter"),
    "parametrized": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "is no parameter but computed"),
    "integers": (lambda: with_weight(nn.Parameter(torch.ones(8, 8, dtype=torch.int8), False)), r"torch.int8 \[8, 8\]"),
    "float8": (lambda: with_weight(nn.Parameter(torch.ones(8, 8).to(torch.float8_e4m3fn))), "float8_e4m3fn"),
    "of another size": (lambda: with_weight(nn.Parameter(torch.ones(8, 4))), r"\[8, 4\]"),
    "inference": (lambda: of_another_mode(torch.inference_mode), "inference_mode"),
    "a short bias": (lambda: with_bias(nn.Parameter(torch.ones(3))), r"a bias that is strided torch.float32 \[3\]"),
    "a lazy bias": (lambda: with_bias(nn.UninitializedParameter()), "a bias that is not initialised"),
    "an integer bias": (lambda: with_bias(nn.Parameter(torch.ones(8, dtype=torch.int64), False)), "torch.int64"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*Lazy modules:UserWarning", "ignore:.*prototype stage:UserWarning")
@pytest.mark.filterwarnings("ignore:.*beta state:UserWarning")
@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("what", ODD_BASES)
def test_odd_bases_are_refused_by_name(cls, what):
    make, message = ODD_BASES[what]
    base = make()
    with pytest.raises(TypeError, match=f"base.*{message}"):
        cls.from_linear(base)
    if isinstance(base, nn.Module) and what not in ("integers", "an integer bias"):
        assert all(parameter.requires_grad for parameter in base.parameters())


def test_fake_weights_are_for_all_but_rosa():
    for cls in CLASSES:
        base = of_another_mode(FakeTensorMode)
        if cls is RosaLinear:
            with pytest.raises(ValueError, match="base: the weight has no values"):
                cls.from_linear(base)
            assert base.weight.requires_grad and base.bias.requires_grad
        else:
            assert cls.from_linear(base).weight is base.weight and not base.weight.requires_grad


# Wrong values of an argument: of any, by the type that a signature gives it, and by a name that means the same in all.
ANY = (object(), [])
TYPED = {
    bool: (1, None, "yes"),
    int: (-1, 2.5, "4", None),
    float: ("1", float("nan"), HUGE, None),
    str: (3, None, "nothing"),
}
NAMED = {
    "dtype": ("float32", torch.float16, torch.int8),
    "dropout": (1.0, -0.1, "0", float("nan"), HUGE),
    "alpha": (HUGE, -HUGE, 1e39, float("nan"), "1"),
    "r": (0, 257, HUGE, True, "4"),
}
# Mistakes that a signature does not tell.
OWN = {
    DyLoraLinear: [dict(r=2, r_min=4), dict(r_min=0), dict(geometric_p=1.0)],
    AfLoraLinear: [
        dict(d_initial=1e39), dict(t_i=-1), dict(t_i=HUGE), dict(t_i=0.6, t_f=0.6), dict(beta1=1.0), dict(window=0),
    ],
    AdaMixLinear: [
        dict(kind="lora", alpha=HUGE), dict(num_experts=0), dict(num_experts=HUGE), dict(share_down=True),
        dict(routing=["batch"]), dict(strict_experts=True, routing="sequence"),
    ],
    RosaLinear: [
        dict(r=9), dict(r=1.0), dict(r=float("nan")), dict(resample_every="never"), dict(resample_every=0),
        dict(layer=None), dict(layer=1.5),
    ],
    CirculantLinear: [dict(block_size=2), dict(rectangular="block", block_size=3)],
    ToeplitzLinear: [dict(structure="toeplitz")],
    KroneckerLinear: [dict(r=3), dict(r=2.0)],
    LdrLinear: [dict(q=0)],
    SurmAdapterLinear: [
        *({name: value} for name in ("dropout", "alpha") for value in NAMED[name]), dict(q=2), dict(activation="step"),
        dict(activation=3), dict(activation=nn.ReLU()), dict(activation="sigmoid"), dict(allow_nonidentity=1),
        dict(activation=nn.Linear(8, 4)),
    ],
}  # fmt: skip


def mistakes(cls):
    """What `from_linear` has to refuse."""
    for name, argument in list(inspect.signature(cls.from_linear).parameters.items())[1:]:
        if argument.kind is not inspect.Parameter.VAR_KEYWORD:
            for value in (*ANY, *TYPED.get(argument.annotation, ()), *NAMED.get(name, ())):
                yield {name: value}
    yield from OWN.get(cls, ())


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 8), lambda: Conv1D(8, 8)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("cls", CLASSES)
def test_refused_arguments_leave_the_base_as_it_was(cls, make):
    base = make()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    dictionary = dict(vars(base))
    for wrong in mistakes(cls):
        with pytest.raises((TypeError, ValueError)) as refused:
            cls.from_linear(base, **wrong)
        # One that depends on others may be explained by those.
        assert any(name in str(refused.value) for name in wrong), (wrong, refused.value)
        assert all(parameter.requires_grad for parameter in base.parameters()), wrong
        assert vars(base) == dictionary and all(torch.equal(before[k], v) for k, v in base.state_dict().items()), wrong
    cls.from_linear(base)
    assert not any(parameter.requires_grad for parameter in base.parameters())


def test_structures_of_square_layers_leave_others_as_they_were():
    for cls in (ToeplitzLinear, LdrLinear):
        base = nn.Linear(8, 4)
        with pytest.raises(ValueError, match="square"):
            cls.from_linear(base)
        assert base.weight.requires_grad and base.bias.requires_grad


def test_rosa_refuses_weights_without_singular_directions():
    base = nn.Linear(8, 8)
    with torch.no_grad():
        base.weight[2, 3] = float("inf")
    before = base.weight.clone()
    with pytest.raises(ValueError, match="base: the weight has values that are not finite"):
        RosaLinear.from_linear(base, r=2)
    assert base.weight.requires_grad and base.bias.requires_grad and torch.equal(base.weight, before)
