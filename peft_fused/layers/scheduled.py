"""What the state of any scheduled adapter has in common: it notices when no schedule ever sets it."""

import warnings
import weakref
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from ..ops.arguments import FLOATING

# What torch calls the value of get_extra_state in a state dict.
EXTRA_STATE = "_extra_state"
# A loop calls the schedule before a step's forward: one that has not by the next forward is not going to.
FORWARDS_BEFORE_WARNING = 1


class ScheduleState(nn.Module):
    """State that a method sets from outside the forward pass. Subclasses define `unscheduled()` and `chosen()`.

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

    def chosen(self) -> tuple:
        """What a schedule has set it to, as far as all processes of a run have to agree on it."""
        raise NotImplementedError

    def follow_state(self, other: "ScheduleState") -> None:
        """Takes over what a schedule has set in the state of another adapter, of the same configuration."""
        self.scheduled = other.scheduled

    def count_forward(self) -> None:
        """Warns, once per model, with the second training forward that no schedule preceded. Where forwards are
        compiled, with the first, and once per layer, of which Python shows one.
        """
        if torch.compiler.is_compiling():
            self._traced()
            return
        if self.scheduled:
            return
        self.forwards += 1
        if self.forwards == FORWARDS_BEFORE_WARNING + 1 and not _warned_in_this_pass(self):
            self._warn_unscheduled()

    def _warn_unscheduled(self) -> None:
        warnings.warn(
            f"{self.unscheduled()}, because no schedule sets it. Add "
            "peft_fused.PeftFusedCallback() to the Trainer, or call peft_fused.on_step(model, step=..., optimizer=...) "
            "before each step.",
            stacklevel=5,
        )

    def _traced(self) -> None:
        # A compiled forward is traced once: there is no second one to wait for.
        if not self.scheduled and self.forwards <= FORWARDS_BEFORE_WARNING:
            self.forwards = FORWARDS_BEFORE_WARNING + 1
            self._warn_unscheduled()

    # Run by the compiler, without a guard on `scheduled`. torch.compiler.assume_constant_result does just this, and
    # imports the compiler to do so.
    _traced._dynamo_marked_constant = True


@dataclass(frozen=True)
class Member:
    """One adapter of one layer as the schedule of its method sees it."""

    method: ClassVar[str]
    state: ScheduleState

    def choices(self) -> tuple:
        """What all processes have to agree on."""
        return (self.state.group, self.state.policy, *self.state.chosen())


class SavedState(ScheduleState):
    """A ScheduleState of which a resumed run needs tensors whose sizes change over time. They are saved as one vector,
    the extra state of torch's modules: buffers would have to keep their shapes. Subclasses define `get_extra_state`,
    `why_not`, and `take_over`.
    """

    # Numbers that a saved vector has at least.
    HEADER: int
    # What becomes of its adapter's parameters without it, as the end of a sentence.
    WITHOUT = "its parameters mean something else"

    def why_not(self, state: torch.Tensor) -> str | None:
        """What keeps a finite vector of at least HEADER numbers from being such a state, as the end of a sentence."""
        raise NotImplementedError

    def take_over(self, state: torch.Tensor) -> None:
        """Replaces everything by a vector that `why_not` let pass."""
        raise NotImplementedError

    def problem_with(self, state: torch.Tensor | None) -> str | None:
        """What keeps a tensor, or the lack of one, from being this state, as the end of a sentence."""
        if state is None:
            return f"is missing, without which {self.WITHOUT}"
        if not isinstance(state, torch.Tensor):
            return f"must be a vector of numbers, got {state!r}"
        if state.layout != torch.strided or state.is_meta or state.dim() != 1 or state.dtype not in FLOATING:
            found = f"{list(state.shape)} of {state.dtype}, {state.layout}, on {state.device}"
            return f"must be a vector of floating-point numbers, got {found}"
        if len(state) < self.HEADER:
            return f"must have at least {self.HEADER} numbers, got {len(state)}"
        return self.why_not(state) if torch.isfinite(state).all() else "has values that are not finite"

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Takes over what `get_extra_state` returned, here or elsewhere. ValueError if it is not of such an adapter."""
        if problem := self.problem_with(state):
            raise ValueError(f"{type(self).__name__} of adapter {self.group!r} {problem}")
        self.take_over(state.detach().cpu())


def check_saved_with(parameters: Iterable[str], state: SavedState, saved: str, state_dict: Container[str]) -> None:
    """ValueError if a state dict has any of some parameters without the state that goes with them.

    saved: the name under which it is saved.
    """
    found = next((name for name in parameters if name in state_dict), None)
    key = f"{saved}.{EXTRA_STATE}"
    if found and key not in state_dict:
        raise ValueError(f"the state dict has {found}, but {key} {state.problem_with(None)}")


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


def _warned_in_this_pass(state: ScheduleState) -> bool:
    """Whether another layer has warned in this pass. The layers of one model come here in one pass, during which the
    first of them does not run again.
    """
    global _last_to_warn
    first = _last_to_warn and _last_to_warn()
    if first is not None and first.forwards == state.forwards and not first.scheduled:
        return True
    _last_to_warn = weakref.ref(state)
    return False
