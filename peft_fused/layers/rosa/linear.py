"""ROSA as a plain PyTorch layer."""

from collections.abc import Iterator

import torch
from torch import nn

from ..adapted import AdaptedLinear, FrozenProduct
from ..checks import check_adapter_dtype, check_int, check_linear, features
from ..route import Route
from ..scheduled import check_saved_with
from .host import SubspaceHost
from .pretrained import check_finite, check_writable
from .state import RosaAdapter, RosaMember, RosaState, SubspaceFactor, draw_factors
from .subspace import EPOCH, SubspacePolicy, check_subspace_rank, subspace_rank


class RosaLinear(SubspaceHost, AdaptedLinear):
    """y = x W_f^T + bias + B (A x) in one fused op, where B A are singular directions of the weight and W_f the rest.

    Source: ROSA, Gamboa et al. 2024. `peft_fused.on_step` draws A and B anew as resample_every says, or `resample`
    does. Made by `from_linear`. The Parameter `weight` is the base layer's, which it freezes but also changes, in
    place: it holds W_f, once merged the whole changed weight, and after `restore` the pretrained one.

    rosa_A.weight: [r, K], rosa_B.weight: [N, r].
    """

    op_name = "lowrank_linear"
    WEIGHT = "weight"

    def __init__(self, base: nn.Module, r: int | float, policy: SubspacePolicy, dtype, layer: int | str):
        check_linear("base", base)
        check_subspace_rank("r", r)
        dtype = check_adapter_dtype("dtype", dtype, base.weight.dtype)
        check_writable("base", base)
        check_finite("base", base.weight)
        if isinstance(layer, bool) or not isinstance(layer, int | str):
            raise TypeError(f"layer must be an int or a str, got {layer!r}")
        r = subspace_rank(r, *features(base))
        super().__init__(base)
        device = self.weight.device
        self.rosa_A = SubspaceFactor(r, self.in_features, dtype=dtype, device=device)
        self.rosa_B = SubspaceFactor(self.out_features, r, dtype=dtype, device=device)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        self.rosa_state = RosaState(r, self.in_features, self.out_features, policy, wide, layer=layer)
        self._merged = self._restored = False
        self.keep_pretrained()
        self._draw(0)

    @classmethod
    def from_linear(
        cls,
        base: nn.Module,
        *,
        r: int | float = 8,
        split: str = "us_v",
        sample: str = "random",
        resample_every: str | int = EPOCH,
        seed: int = 0,
        layer: int | str = 0,
        dtype=None,
    ) -> "RosaLinear":
        """An adapted layer that shares the weight and bias Parameters of `base`, freezes them, and changes the weight.

        base: torch.nn.Linear or transformers' Conv1D, weight in fp32, fp16, bf16 or fp64. r: 1..256, at most the
        smaller size of the weight; or in (0, 1), a fraction of that. layer: number or name, so that layers with the
        same seed draw differently. dtype: of A and B, by default fp32. The rest: see `SubspacePolicy`. Raises TypeError
        or ValueError naming the argument, the value and what is allowed.
        """
        return cls(base, r, SubspacePolicy(split, sample, resample_every, seed), dtype, layer)

    @property
    def merged(self) -> bool:
        return self._merged

    def base_weight(self) -> torch.Tensor:
        return self.weight

    def wanted(self) -> str:
        return "restored" if self._restored else "merged" if self._merged else "frozen"

    def wanted_change(self) -> torch.Tensor | None:
        if self._restored:
            return None
        if self._merged:
            return self.adapter().change()
        return self.rosa_state.frozen_change(self.weight.device)

    def other_changes(self) -> Iterator[torch.Tensor | None]:
        yield None
        yield self.adapter().change()
        yield self.rosa_state.frozen_change(self.weight.device)

    def _draw(self, phase: int, agree=None) -> None:
        draw_factors(self.rosa_state, self.pretrained_nk(), *self.factors(), phase, agree)
        self.refresh(force=True)

    def resample(self, phase: int, agree=None) -> None:
        """Draws A and B anew, the draw being a function of seed, layer and phase; the layer computes what it did.

        What an optimizer keeps of the old A and B is not reset; `peft_fused.on_step` does so. RuntimeError if merged.
        """
        check_int("phase", phase)
        self._check_in_use("resample")
        if self._merged:
            raise RuntimeError("resample: this layer is merged; call unmerge() first")
        self._draw(phase, agree)

    def _check_in_use(self, caller: str) -> None:
        if self._restored:
            raise RuntimeError(f"{caller}: the pretrained weight was put back by restore(), which ends the layer's use")

    def schedule_members(self) -> list[RosaMember]:
        if self._restored:
            return []
        return [RosaMember(self.rosa_state, self.factors, self._merged, self.resample)]

    def _load_from_state_dict(self, state_dict, prefix, *args):
        factors = (f"{prefix}rosa_A.weight", f"{prefix}rosa_B.weight")
        check_saved_with(factors, self.rosa_state, f"{prefix}rosa_state", state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def adapter(self) -> RosaAdapter:
        return RosaAdapter(*self.factors(), self._modules["rosa_state"], self.check_held)

    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A [r, K] and B [N, r]."""
        modules = self._modules
        return modules["rosa_A"].weight, modules["rosa_B"].weight

    def delta(self) -> torch.Tensor:
        """The dense change of the pretrained weight so far, [N, K] in fp32 (fp64 for an fp64 layer)."""
        return self.adapter().delta()

    def merge(self) -> None:
        """Sets the base weight to round(W0 + delta()), which the forward pass then uses alone.

        Raises RuntimeError if the layer is merged already.
        """
        self._check_in_use("merge")
        if self._merged:
            raise RuntimeError("merge: this layer is merged already; call unmerge() first")
        self._merged = True
        self.refresh()

    def unmerge(self) -> None:
        """Puts back, bit for bit, the weight that `merge` replaced. Raises RuntimeError if the layer is not merged."""
        if not self._merged:
            raise RuntimeError("unmerge: this layer is not merged")
        self._merged = False
        self.refresh()

    def restore(self) -> None:
        """Puts back the pretrained weight, bit for bit, for the base layer to be used without this one."""
        self._merged, self._restored = False, True
        self.refresh()

    def adapted_route(self, x: torch.Tensor) -> Route:
        if self._restored:
            return Route((FrozenProduct(self),))
        step = self.adapter().step(x)
        step.weight, step.bias = self.operands()
        return Route((step,))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, r={self.rosa_state.r}"
