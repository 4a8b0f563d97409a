"""What `accelerate` tells of the layers of a model."""

from dataclasses import dataclass, field

from ....ops import native
from ....ops.dispatch import first_of
from .kinds import KINDS


@dataclass
class AccelerationReport:
    """What `accelerate` did, by module name.

    swapped: layers that it changed. already: layers that an earlier call had changed. skipped: every other layer of the
    kinds of adapter that it knows, with the reason. slower: those of `swapped` and `already` that cannot use the
    fastest path as they are now, with the reason; `peft_fused.explain` gives the same answer at any later time. own:
    layers of peft_fused's own methods, which have nothing to swap. kinds: which kinds of adapter the layers are.
    groups: layers of one parent and of equal width, of which those that receive the same tensor share one pass over it.
    frozen: linear layers, adapters' base layers among them, whose products run in oneDNN while they are not trained.
    """

    swapped: list[str] = field(default_factory=list)
    already: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    slower: dict[str, str] = field(default_factory=dict)
    own: list[str] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    groups: list[list[str]] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        total = len(self.swapped) + len(self.already) + len(self.skipped)
        own = f"{len(self.own)} layers of peft_fused's own methods [{first_of(self.own)}] are already fused"
        if not total:
            known = " or ".join(kind.name for kind in KINDS.values())
            reason = f"{own}, there is" if self.own else f"the model has no {known} layers,"
            return "\n".join([f"peft_fused.accelerate: {reason} nothing to swap", *self._frozen()])
        kinds = " and ".join(self.kinds)
        lines = [f"peft_fused.accelerate: {len(self.swapped)} of {total} {kinds} layers swapped"]
        if self.own:
            lines.append(f"  {own}")
        if self.already:
            lines.append(f"  accelerated before: {len(self.already)}")
        if self.slower:
            lines.append(f"  accelerated, but not on the fastest path: {len(self.slower)}")
            lines.extend(_counted(self.slower))
        if self.groups:
            parent, *_ = self.groups[0][0].rpartition(".")
            names = ", ".join(name.rpartition(".")[2] for name in self.groups[0])
            lines.append(f"  groups of siblings: {len(self.groups)} [{parent}: {names}]")
            lines.append("    those that receive the same tensor share one pass over it, from their second forward on")
        lines.extend(self._frozen())
        if self.skipped:
            lines.append(f"  left to PEFT: {len(self.skipped)}")
            lines.extend(_counted(self.skipped))
        if native.module is None and (self.swapped or self.already):
            lines.append(f"  without the C++ extension ({native.why_missing}), which means {native.COST}")
            if native.not_built:
                lines.append(f"    {native.REMEDY}")
        return "\n".join(lines)

    def _frozen(self) -> list[str]:
        if not self.frozen:
            return []
        return [f"  frozen linear layers in fp32 by oneDNN: {len(self.frozen)} [{first_of(self.frozen)}]"]


def _counted(reasons: dict[str, str]) -> list[str]:
    """A line for each reason, with the first of the layers that have it."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name or "(the model itself)")
    return [f"    {len(group)}: {reason} [{first_of(group)}]" for reason, group in names.items()]
