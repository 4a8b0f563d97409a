"""The Trainer callback that drives the methods' schedules, and AdaMix's loss in a Trainer."""

import math
import warnings

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..layers.adamix import PASSES
from ..methods import on_step, set_adamix_pass
from ..methods.adamix import can_double, double, pass_divergence, predicts_tokens, second_pass, with_decoder_input
from ..methods.aflora import NEEDS_UNUSED
from ..methods.stepping import members_of
from ..methods.sync import ZERO3

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
        if args.ddp_find_unused_parameters is False and args.world_size > 1 and "aflora" in members_of(model):
            raise ValueError(NEEDS_UNUSED)
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


class AdaMixTrainerMixin:
    """`class MyTrainer(AdaMixTrainerMixin, Trainer)`: adds AdaMix's consistency loss to the loss of training.

    Every micro-batch runs twice, by different routes; the loss is the first pass's plus consistency_weight times the
    symmetric divergence of the two. See `peft_fused.adamix_loss`, whose options are class attributes here. For token
    predictions both are averaged over the tokens of a step, for others over its batches: gradient accumulation changes
    neither, and not the one beside the other. Needs PeftFusedCallback among the callbacks. Evaluation is left alone.
    """

    consistency_weight: float = 1.0
    consistency_detach: bool = True
    consistency_doubled: bool = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        labels = inputs.get("labels")
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        if not isinstance(labels, torch.Tensor):
            warnings.warn(
                "AdaMixTrainerMixin: the inputs have no labels, so there is no consistency loss", stacklevel=2
            )
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        # The sum over a step of losses of sequences, each divided by their number in the step, is not what every model
        # of transformers returns; the mean of a batch is.
        items = num_items_in_batch if labels.dim() > 1 or self.compute_loss_func is not None else None
        doubled = self.consistency_doubled and self.consistency_weight != 0 and can_double(model, labels)
        inputs = with_decoder_input(model, inputs)
        taken = double(inputs, labels.shape[0]) if doubled else dict(inputs)
        set_adamix_pass(model, None if doubled else 0, sequences=PASSES * labels.shape[0] if doubled else None)
        try:
            loss, outputs = super().compute_loss(model, taken, True, items, **kwargs)
        finally:
            set_adamix_pass(model, 0)
        first = outputs["logits"]
        if doubled:
            first, second = first.split(labels.shape[0])
            outputs["logits"] = first
        summed = self._summed(num_items_in_batch)
        steps = self.current_gradient_accumulation_steps
        if items is None and summed:
            loss = loss / steps
        if isinstance(items, torch.Tensor):
            items = items.flatten()[0]  # the same number for each GPU of a DataParallel
        if self.consistency_weight != 0 and first.shape[-1] != 1:
            second = second if doubled else second_pass(model, inputs)["logits"]
            tokens = predicts_tokens(first, labels) and items is not None and summed
            divergence = pass_divergence(
                model, first, second, labels, detach=self.consistency_detach, num_items=items if tokens else None
            )
            if tokens and self.args.average_tokens_across_devices:
                # As the Trainer: the items are counted over all processes, whose gradients are averaged.
                divergence = divergence * self.accelerator.num_processes
            elif summed and not tokens:
                divergence = divergence / steps
            loss = loss + self.consistency_weight * divergence
        return (loss, outputs) if return_outputs else loss

    def _summed(self, num_items) -> bool:
        """Whether the Trainer sums the losses of a step's micro-batches as they are, rather than averaging them."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # which the Trainers of transformers 5.17 do not have
        if scaled is not None:
            return scaled
        return (self.model_accepts_loss_kwargs and num_items is not None) or self.compute_loss_func is not None
