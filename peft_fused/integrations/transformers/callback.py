"""The Trainer callback that drives the methods' schedules."""

import math

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ...methods import on_step
from ...methods.schedule import SCHEDULES, members_of
from ...methods.sync import ZERO3

EPOCH_ROUNDING = 1e-6


class Passes:
    """Counts the Trainer's passes over the data, and goes on counting where a checkpoint left off.

    The Trainer's own `state.epoch` is a fraction of `max_steps` for a stream, whose length it does not know. epoch: the
    number of the pass under way. start: the step at which it began. length: steps of the last whole pass, or 0.
    """

    SAVED = ("epoch", "start", "length")

    def __init__(self, epoch: int = 0, start: int = 0, length: int = 0, ended: bool = False):
        """ended: whether the pass of that number is over."""
        self.epoch, self.start, self.length = epoch, start, length
        # What the next step belongs to: the pass under way, or a new one; and whether a pass has begun yet.
        self.is_new, self.waits, self.begun = ended, True, False
        # A stream cannot be resumed in the middle of a later pass: the Trainer begins a new one. The passes are then
        # counted by their length, so that what happens once per pass happens at the steps at which it would have.
        self.by_length = False

    def begin(self, step: int) -> None:
        """A pass begins: it counts once it has a step."""
        if not self.begun:
            self.begun = True
            return
        unfinished = self.waits and not self.is_new and 0 < step - self.start < self.length
        self.by_length = self.by_length or unfinished
        self.is_new = self.waits = True

    def at(self, step: int) -> int:
        """The pass that a step belongs to."""
        if self.by_length:
            passed = (step - self.start) // self.length
            self.epoch, self.start = self.epoch + passed, self.start + passed * self.length
        elif self.waits and self.is_new:
            self.epoch, self.start, self.length = self.epoch + 1, step, step - self.start
        self.waits = False
        return self.epoch


class PeftFusedCallback(TrainerCallback, ExportableState):
    """`Trainer(..., callbacks=[PeftFusedCallback()])`: calls `peft_fused.on_step` before every step and micro-batch.

    What is chosen depends on the method's seed, the Trainer's step, and the passes over the data, which are counted and
    saved in the Trainer's checkpoints; what a method has changed lies in the adapter. So a resumed run goes on as if it
    had not been interrupted. ValueError at the start of training if the model has no method with a schedule;
    NotImplementedError under DeepSpeed ZeRO-3.
    """

    def __init__(self):
        self.micro = 0
        self.passes = Passes()

    def state(self) -> dict:
        """What the Trainer saves with its checkpoints."""
        return {"args": {}, "attributes": {name: getattr(self.passes, name) for name in Passes.SAVED}}

    @classmethod
    def from_state(cls, state: dict) -> "PeftFusedCallback":
        callback = cls()
        callback.passes = Passes(**state["attributes"])
        return callback

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        deepspeed = getattr(args, "hf_deepspeed_config", None)
        if deepspeed is not None and deepspeed.is_zero3():
            raise NotImplementedError(f"PeftFusedCallback: {ZERO3}")
        # The model is given without DistributedDataParallel around it, so the method itself cannot see this.
        if args.ddp_find_unused_parameters is False and args.world_size > 1:
            for method in members_of(model):
                if SCHEDULES[method].needs_unused is not None:
                    raise ValueError(SCHEDULES[method].needs_unused)
        self.micro = 0
        self.passes = self._resumed(state) if state.global_step else Passes()
        if self._tell(state, model, optimizer, self.passes.epoch) == 0:
            raise ValueError("PeftFusedCallback: the model has no adapter with a schedule, such as DyLoRA's")

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.passes.begin(state.global_step)

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.micro = 0
        self._tell(state, model, optimizer, self.passes.at(state.global_step))

    def on_substep_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.micro += 1
        self._tell(state, model, optimizer, self.passes.epoch)

    def _resumed(self, state) -> Passes:
        # The Trainer counts epochs in fractions of their steps: the whole ones may come out a rounding short or long.
        done = state.epoch or 0.0
        ended = abs(done - round(done)) < EPOCH_ROUNDING
        saved = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, list):  # of several callbacks of this class, which all count the same
            saved = saved[0]
        if saved is None:  # a checkpoint of a run without this callback
            return Passes(math.floor(done + EPOCH_ROUNDING))
        return Passes(**saved["attributes"], ended=ended)

    def _tell(self, state, model, optimizer, epoch: int) -> int:
        total = state.max_steps if state.max_steps > 0 else None
        return on_step(
            model, step=state.global_step, micro=self.micro, total_steps=total, epoch=epoch, optimizer=optimizer
        )
