"""The Trainer callback that drives the methods' schedules."""

import math

from transformers import TrainerCallback

from ..methods import on_step
from ..methods.sync import ZERO3

EPOCH_ROUNDING = 1e-6


class PeftFusedCallback(TrainerCallback):
    """`Trainer(..., callbacks=[PeftFusedCallback()])`: calls `peft_fused.on_step` before every step and micro-batch.

    It keeps no state that a checkpoint would need: what is chosen depends on the method's seed and the Trainer's step,
    and what a method has changed lies in the adapter. ValueError at the start of training if the model has no method
    with a schedule; NotImplementedError under DeepSpeed ZeRO-3.
    """

    def __init__(self):
        self.micro = 0

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        deepspeed = getattr(args, "hf_deepspeed_config", None)
        if deepspeed is not None and deepspeed.is_zero3():
            raise NotImplementedError(f"PeftFusedCallback: {ZERO3}")
        self.micro = 0
        if self._tell(state, model, optimizer) == 0:
            raise ValueError("PeftFusedCallback: the model has no adapter with a schedule, such as DyLoRA's")

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.micro = 0
        self._tell(state, model, optimizer)

    def on_substep_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.micro += 1
        self._tell(state, model, optimizer)

    def _tell(self, state, model, optimizer) -> int:
        total = state.max_steps if state.max_steps > 0 else None
        # The Trainer counts epochs in fractions of their steps: the whole ones may come out a rounding short.
        epoch = math.floor((state.epoch or 0) + EPOCH_ROUNDING)
        return on_step(
            model, step=state.global_step, micro=self.micro, total_steps=total, epoch=epoch, optimizer=optimizer
        )
