"""A layer whose base weight holds the pretrained one without what the factors have."""

import torch
from torch.autograd.graph import increment_version

from .pretrained import PretrainedWeight


class SubspaceHost:
    """A module whose base weight holds W0 without what its factors have. Mixin before nn.Module; subclasses define:

    base_weight(): the Parameter. transposed: whether it is [K, N]. WEIGHT: its name in this module's state dict.
    wanted(): a key for what the weight must hold now. wanted_change(): that as a change of W0, [N, K], or None.
    other_changes(): those with which the weight may have been saved elsewhere. suspended(): whether what the weight
    holds is only for a while, after which it will hold again what it did.
    """

    WEIGHT: str

    def keep_pretrained(self) -> None:
        """Takes the weight as it is for W0."""
        self._pretrained = PretrainedWeight(self.base_weight())
        self._holds = self._held_in_use = None
        self._written: tuple[torch.Tensor, int] | None = None  # the weight and its version, as left by `refresh`
        self._loading = self._weight_loaded = False
        self.register_load_state_dict_post_hook(_after_load)

    def _in_layout(self, change: torch.Tensor | None) -> torch.Tensor | None:
        return change.t() if change is not None and self.transposed else change

    def pretrained_nk(self) -> torch.Tensor:
        """W0 as [N, K] on the weight's device; collective if it is sharded."""
        values = self._pretrained.whole(self.base_weight())
        return values.t() if self.transposed else values

    def suspended(self) -> bool:
        return False

    @torch.no_grad()
    def refresh(self, force: bool = False) -> None:
        """Sets the base weight, in place, to what it must hold now. force: even if it should hold that already.

        A backward pass that needs the values from before raises autograd's error, except after `suspended` changes:
        those are undone by the time of the backward pass (`disable_adapter` between forward and backward).
        """
        wanted, suspended = self.wanted(), self.suspended()
        if force or wanted != self._holds:
            weight = self.base_weight()
            with torch.autocast(weight.device.type, enabled=False):
                self._pretrained.write(weight, self._in_layout(self.wanted_change()))
            self._holds = wanted
        if force or not (suspended or wanted == self._held_in_use):
            increment_version(self.base_weight())
        if not suspended:
            self._held_in_use = wanted
        self._note_written()

    def _note_written(self) -> None:
        weight = self.base_weight()
        self._written = None if weight.is_inference() else (weight, weight._version)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._note_written()  # which may be another tensor now
        return self

    def check_held(self) -> None:
        """RuntimeError if something else has written to the base weight what does not go with the factors, as averages
        of models over draws do (EMA). Where nothing has, it costs two comparisons.
        """
        if torch.compiler.is_compiling() or self._written is None:
            return
        weight, version = self._written
        # Another tensor is what FSDP gathers for the forward. A copy made in inference mode has no version.
        if weight is not self.base_weight() or weight.is_inference() or weight._version == version:
            return
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            if not self._pretrained.is_in(weight, self._in_layout(self.wanted_change())):
                raise RuntimeError(
                    "ROSA: the base weight was changed by something else than the adapter, and no longer goes with its "
                    "factors, as when a model is averaged over draws (EMA, AveragedModel), or loaded in part. Average "
                    "what evaluation uses after merging, or exported adapters; copy an adapter with "
                    "peft_fused.copy_adapter; load with load_state_dict or PEFT"
                )
        self._note_written()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self._loading, self._weight_loaded = True, prefix + self.WEIGHT in state_dict
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.no_grad()
    def loaded(self) -> None:
        """Makes the base weight follow state, or a W0, that was loaded."""
        weight = self.base_weight()
        if self._weight_loaded and not weight.is_meta:
            others = map(self._in_layout, self.other_changes())
            self._pretrained.adopt(weight, self._in_layout(self.wanted_change()), others)
        self._loading = self._weight_loaded = False
        self.refresh(force=True)

    def state_loaded(self) -> None:
        """For states loaded one by one, as transformers' models do: without a hook for when all is loaded."""
        if not self._loading:
            self.refresh(force=True)


def _after_load(module: SubspaceHost, incompatible_keys) -> None:
    module.loaded()
