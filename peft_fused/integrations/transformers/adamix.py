"""AdaMix's loss in a Trainer."""

import warnings

import torch

from ...layers.adamix.routes import PASSES
from ...methods.adamix import (
    can_double,
    double,
    pass_divergence,
    predicts_tokens,
    second_pass,
    set_adamix_pass,
    with_decoder_input,
)

__all__ = ["AdaMixTrainerMixin"]


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
