"""The Trainer callback that drives the methods' schedules, and AdaMix's loss in a Trainer."""

import math

from transformers import TrainerCallback

from ..methods import on_step, set_pass
from ..methods.adamix import double, pass_divergence, second_pass
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


class AdaMixTrainerMixin:
    """`class MyTrainer(AdaMixTrainerMixin, Trainer)`: adds AdaMix's consistency loss to the loss of training.

    Every micro-batch runs twice, by different routes; the loss is the first pass's plus consistency_weight times the
    symmetric divergence of the two. See `peft_fused.adamix_loss`, whose options are class attributes here. For token
    predictions the divergence is averaged over tokens; with gradient accumulation it is averaged over the step, as the
    Trainer does with its own loss. Needs PeftFusedCallback among the callbacks. Evaluation is left alone.
    """

    consistency_weight: float = 1.0
    consistency_detach: bool = True
    consistency_doubled: bool = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        labels = inputs.get("labels")
        if not model.training or labels is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        doubled = self.consistency_doubled and not labels.is_floating_point()
        taken = double(inputs, labels.shape[0]) if doubled else dict(inputs)
        set_pass(model, None if doubled else 0)
        try:
            loss, outputs = super().compute_loss(model, taken, True, num_items_in_batch, **kwargs)
        finally:
            set_pass(model, 0)
        first = outputs["logits"]
        if doubled:
            first, second = first.split(labels.shape[0])
            outputs["logits"] = first
        if self.consistency_weight != 0 and first.shape[-1] != 1:
            second = second if doubled else second_pass(model, inputs)["logits"]
            loss = loss + self.consistency_weight * self._divergence(model, first, second, labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _divergence(self, model, first, second, labels, num_items):
        """The divergence, scaled as the Trainer expects of the loss that it is added to."""
        # A loss already divided by the step's number of items is summed over its micro-batches, others are averaged.
        summed = self.loss_is_scaled_for_ga
        if summed is None:
            summed = (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None
        tokens = first.dim() > 2 and num_items is not None and summed
        divergence = pass_divergence(
            model, first, second, labels, detach=self.consistency_detach, num_items=num_items if tokens else None
        )
        if tokens:
            # As the Trainer: the items are counted over all processes, whose gradients are averaged.
            share = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            return divergence * share
        return divergence / self.current_gradient_accumulation_steps if summed else divergence
