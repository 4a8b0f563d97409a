"""PEFT's LoRA: base(x) + scale * B(A(dropout(x))), beside plain and quantised base layers."""

from collections.abc import Callable

import torch
from peft.tuners.lora.layer import LoraLayer, MultiheadAttention
from torch import nn

from ....ops import lowrank_adapter, lowrank_linear
from ....ops.lowrank import MAX_RANK, LowRankProblem, lowrank_problem
from ..base import PLAIN_TENSORS, is_hooked
from ..quantised import unpack
from .kinds import Kind
from .layer import AcceleratedLayer, AdapterStep
from .operands import casts, drop_probability, is_scale

# PEFT's variants of LoRA that run fused, by their class: (layer, adapter name, x) -> as `adapter_step` returns.
VARIANTS: dict[type, Callable[[LoraLayer, str, torch.Tensor], AdapterStep | str]] = {}


class LoraStep(AdapterStep):
    """y + scale * (B(A(dropout(x))) + B's bias), or x W^T + bias with that added."""

    __slots__ = ("A", "B", "bias", "p", "scale", "shared", "up_bias", "weight")
    shares = True

    def __init__(self, A: torch.Tensor, B: torch.Tensor, up_bias: torch.Tensor | None, scale, p: float):
        self.A, self.B, self.up_bias, self.scale, self.p = A, B, up_bias, scale, p
        self.weight = self.shared = None

    @property
    def name(self) -> str:
        return "lowrank" if self.weight is None else "lowrank_linear"

    def run(self, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        if self.weight is None:
            return self._added(x, y)
        bias, extra = self.bias, self.up_bias
        if extra is not None:
            bias = (self.scale * extra if bias is None else bias + self.scale * extra).to(self.weight.dtype)
        x, A, given = self._product(x)
        return lowrank_linear(x, self.weight, bias, A, self.B, scale=self.scale, **given)

    def _product(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, dict]:
        """(x, A, options) of an op: its product with x, to be made or made already."""
        if self.shared is None:
            return x, self.A, {"dropout_p": self.p}
        x, S = self.shared
        return x, None, {"S": S}

    def _added(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """In y's dtype, for y from any base layer."""
        dtype, device = x.dtype, x.device.type
        if dtype != torch.float64 and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        # A base layer that answers in a type of its own decides the type of the sum, as it does in PEFT.
        add = y if y.dtype == dtype and type(y) in PLAIN_TENSORS else None
        x, A, given = self._product(x)
        out = lowrank_adapter(x, A, self.B, add=add, scale=self.scale, **given)
        if add is None:
            out = y + out
        if self.up_bias is not None:
            out = out + self.scale * self.up_bias
        return out.to(y.dtype)

    def problem(self, x: torch.Tensor) -> LowRankProblem:
        has_weight, dropout = self.weight is not None, self.p > 0
        return lowrank_problem(x, self.A, self.B, has_weight=has_weight, dropout=dropout, scale=self.scale)


class AcceleratedLora(AcceleratedLayer):
    """PEFT's LoRA linear layers, by `LoraStep`."""

    def adapter_step(self, name: str, x: torch.Tensor) -> AdapterStep | str | None:
        own = self.__dict__  # see base.py
        modules, variants = own["_modules"], own["lora_variant"]
        downs = modules["lora_A"]._modules
        if name not in downs:
            return None
        if name in variants:
            variant = type(variants[name])
            return VARIANTS[variant](self, name, x) if variant in VARIANTS else f"it is a variant ({variant.__name__})"
        down, up, dropout = downs[name], modules["lora_B"]._modules[name], modules["lora_dropout"]._modules[name]
        if type(down) is not nn.Linear or type(up) is not nn.Linear:
            return f"lora_A and lora_B are {type(down).__name__} and {type(up).__name__}, not torch.nn.Linear"
        p = 0.0 if type(dropout) is nn.Identity else drop_probability(dropout)  # most often without a further call
        if p is None:
            return f"lora_dropout is {dropout}; fused are Identity() and Dropout(p < 1, inplace=False)"
        if is_hooked(down) or is_hooked(up) or is_hooked(dropout):
            return "lora_A, lora_B or lora_dropout carries hooks or a replaced forward"
        of_down, of_up = down._parameters, up._parameters
        A, B = of_down.get("weight"), of_up.get("weight")
        if type(A) not in PLAIN_TENSORS or type(B) not in PLAIN_TENSORS:
            return f"its weights are {type(A).__name__} and {type(B).__name__}, not plain parameters"
        if of_down["bias"] is not None:
            return "lora_A has a bias"
        dtype = A.dtype
        if B.dtype != dtype:
            return f"lora_A is {dtype}, lora_B {B.dtype}"
        if dtype != x.dtype and not casts(self.cast_input_dtype_enabled, x, dtype):
            return f"it is {dtype}, x {x.dtype}" + ("" if self.cast_input_dtype_enabled else ", casting is disabled")
        if A.size(0) > MAX_RANK:
            return f"its rank is {A.size(0)}; the fused operations take ranks up to {MAX_RANK}"
        scale = own["scaling"][name]
        if type(scale) is not float and not is_scale(scale, x.device):
            return f"its scaling is {scale!r}: neither a number nor a constant 0-d tensor on x's device"
        return LoraStep(A, B, of_up["bias"], scale, p)


class AcceleratedQuantisedLora(AcceleratedLora):
    """The same beside a quantised base, which bitsandbytes may have packed for inference on a CPU.

    PEFT's forwards for these differ from `lora.Linear`'s in how the base layer is called and in casts that `LoraStep`
    makes as well; merging, which does differ, is inherited.
    """

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if x.requires_grad:
            unpack(self.get_base_layer())
        return super().forward(x, *args, **kwargs)

    def merge(self, *args, **kwargs) -> None:
        """As PEFT's, of the weight as it was before it was packed."""
        unpack(self.get_base_layer())
        super().merge(*args, **kwargs)

    def unmerge(self) -> None:
        """As PEFT's; see `merge`."""
        unpack(self.get_base_layer())
        super().unmerge()


def _why_not(layer: LoraLayer) -> str | None:
    if getattr(layer.get_base_layer(), "_hf_tp_plan", None) is not None:
        return "tensor parallel: its inputs and outputs are redistributed by hooks on lora_A and lora_B"
    variants = {name: type(variant) for name, variant in layer.lora_variant.items() if type(variant) not in VARIANTS}
    if variants and all(name in variants for name in layer.lora_A):
        return f"LoRA variant: {', '.join(sorted({variant.__name__ for variant in variants.values()}))}"
    return None


def _unused(layers: list[LoraLayer]) -> dict[int, str]:
    reason = "the output projection of a lora.MultiheadAttention, which merges it instead of calling it"
    return {id(layer.get_base_layer().out_proj): reason for layer in layers if isinstance(layer, MultiheadAttention)}


_QUANTISED = (
    "bnb.Linear8bitLt", "bnb.Linear4bit", "torchao.TorchaoLoraLinear", "hqq.HqqLoraLinear", "gptq.GPTQLoraLinear",
    "awq.AwqLoraLinear", "aqlm.AqlmLoraLinear", "eetq.EetqLoraLinear",
)  # fmt: skip

LORA = Kind(
    name="LoRA",
    layer=LoraLayer,
    op="lowrank",
    linear_op="lowrank_linear",
    fused={"peft.tuners.lora.layer.Linear": AcceleratedLora}
    | {f"peft.tuners.lora.{name}": AcceleratedQuantisedLora for name in _QUANTISED},
    why_not=_why_not,
    unused=_unused,
)
