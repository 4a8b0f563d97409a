"""The Trainer callback that drives the methods' schedules."""

from transformers import TrainerCallback

from ..methods import on_step


class PeftFusedCallback(TrainerCallback):
    """`Trainer(..., callbacks=[PeftFusedCallback()])`: calls `peft_fused.on_step` before every step and micro-batch.

    It keeps no state that a checkpoint would need: what is chosen depends on the method's seed and the Trainer's step.
    ValueError at the start of training if the model has no method with a schedule.
    """

    def __init__(self):
        self.micro = 0

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
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
        return on_step(model, step=state.global_step, micro=self.micro, total_steps=total, optimizer=optimizer)
