"""What the state of any scheduled adapter has in common: it notices when no schedule ever sets it."""

import warnings
import weakref

import torch
from torch import nn

# A loop calls the schedule before a step's forward: one that has not by the next forward is not going to.
FORWARDS_BEFORE_WARNING = 1


class ScheduleState(nn.Module):
    """State that a method sets from outside the forward pass. Subclasses define `unscheduled()`.

    scheduled: whether a method has set it. group: name of the adapter; its layers are scheduled together.
    """

    def __init__(self, group: str = "default"):
        super().__init__()
        self.group = group
        self.scheduled = False
        self.forwards = 0

    def unscheduled(self) -> str:
        """What training does while no schedule sets this state, as a clause: "DyLoRA trains at the fixed rank 8"."""
        raise NotImplementedError

    def count_forward(self) -> None:
        """Warns, once per model, with the second training forward that no schedule preceded."""
        if torch.compiler.is_compiling() or self.scheduled:
            return
        self.forwards += 1
        if self.forwards == FORWARDS_BEFORE_WARNING + 1:
            _warn_unscheduled(self)


class PlacedState(ScheduleState):
    """A ScheduleState whose tensors lie on the device of its adapter's input. Subclasses define `place(device)`, which
    makes them there anew from numbers on the host, and `device`, where they are.

    They are no buffers: DistributedDataParallel would write those between a forward pass and its backward.
    """

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    def place(self, device: torch.device) -> None:
        raise NotImplementedError

    def follow(self, device: torch.device, anew: bool = False) -> None:
        """To the device of an input: FSDP and DataParallel move parameters and buffers, and nothing else. anew: even if
        they are there, as they are to be of another type.
        """
        if anew or self.device != device:
            with torch.inference_mode(False), torch.no_grad():
                self.place(device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # Only where they are is followed, not a change of type.
        self.follow(fn(torch.empty(0, device=self.device)).device)
        return self


_last_to_warn: weakref.ref | None = None


def _warn_unscheduled(state: ScheduleState) -> None:
    global _last_to_warn
    # The layers of one model come here in one pass, during which the first of them does not run again.
    first = _last_to_warn and _last_to_warn()
    if first is not None and first.forwards == state.forwards and not first.scheduled:
        return
    _last_to_warn = weakref.ref(state)
    warnings.warn(
        f"{state.unscheduled()}, because no schedule sets it. Add "
        "peft_fused.PeftFusedCallback() to the Trainer, or call peft_fused.on_step(model, step=..., optimizer=...) "
        "before each step.",
        stacklevel=5,
    )
