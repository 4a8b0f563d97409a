"""What bitsandbytes does to a quantised weight that PEFT does not know of."""

from torch import nn


def is_packed(base: nn.Module) -> bool:
    """Whether bitsandbytes has packed a layer's 4-bit weight for inference on a CPU.

    It does so in the first forward pass in evaluation. PEFT takes the packed weight for the quantised one: what it
    dequantises for merging is then noise. And until it is unpacked the layer returns no gradient for its input, or,
    with a bias, cannot compute where one is wanted.
    """
    weight = base._parameters["weight"] if "weight" in base._parameters else None  # noqa: SIM401, of a ScriptModule
    return getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False)


def unpack(base: nn.Module) -> None:
    """Takes the packing back, in place. The scales of blocks, which packing has rounded to bf16, stay rounded."""
    if is_packed(base):
        base.state_dict()  # bitsandbytes unpacks what it saves
        state = base.weight.quant_state
        if state.absmax.dim() == 2:  # but leaves scales that are not quantised themselves as packing turned them
            state.absmax = state.absmax.t().reshape(-1).float()
