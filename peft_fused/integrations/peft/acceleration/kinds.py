"""The kinds of adapter that `accelerate` knows. A further one is a file with a `Kind`, registered in `__init__.py`."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn


def _nothing(module: nn.Module) -> None:
    return None


def _nowhere(layers: list[nn.Module]) -> dict[int, str]:
    return {}


@dataclass(frozen=True, eq=False)
class Kind:
    """One kind of PEFT's adapters.

    name: as reports write it. layer: PEFT's class that all its layers derive from, also those without a fused form,
    and at most such as belong to a more special kind.
    op: the op that adds an adapter to the output of a base layer, linear_op: the one that computes the base product as
    well, None if there is none; both as `explain` names them. fused: for each class of PEFT's that is served, as
    "module.Class" since many exist only where their library is installed, the `AcceleratedLayer` that stands before it
    among the bases of the fused class. why_not(module): reason to leave a layer of a served class to PEFT, or None.
    unused(layers): {id(module): reason} for those of a model's layers of this kind that PEFT reads instead of calling.
    """

    name: str
    layer: type[nn.Module]
    op: str
    linear_op: str | None
    fused: dict[str, type]
    why_not: Callable[[nn.Module], str | None] = _nothing
    unused: Callable[[list], dict[int, str]] = _nowhere
    _made: dict[type, type] = field(default_factory=dict, init=False, repr=False)

    @property
    def ops(self) -> str:
        """What a layer that is left to PEFT does not use."""
        return self.op if self.linear_op is None else f"{self.op}, {self.linear_op}"

    def fused_class(self, peft_class: type) -> type | None:
        """The class that exchanges for exactly this one of PEFT's, None if there is none."""
        if peft_class not in self._made:
            first = self.fused.get(f"{peft_class.__module__}.{peft_class.__qualname__}")
            if first is None:
                return None
            name = peft_class.__name__
            self._made[peft_class] = type(
                f"Fused{name}" if self.name.lower() in name.lower() else f"Fused{self.name.capitalize()}{name}",
                (first, peft_class),
                {
                    "__module__": first.__module__,
                    "__doc__": f"PEFT's `{name}` with a fused forward. Made by `accelerate`, unmade by `restore`.",
                    "kind": self,
                    "peft_class": peft_class,
                },
            )
        return self._made[peft_class]


# By `Kind.layer`.
KINDS: dict[type, Kind] = {}


def register(kind: Kind) -> None:
    """Makes a kind known to `accelerate`. ValueError if there is one for the same layers of PEFT's."""
    if kind.layer in KINDS:
        raise ValueError(f"register: {kind.layer.__qualname__} is the layer of {KINDS[kind.layer].name} already")
    KINDS[kind.layer] = kind


def kind_of(layer_class: type) -> Kind | None:
    """The kind that a class of PEFT's layers, or a class derived from one, belongs to; None if it belongs to none."""
    return next((KINDS[each] for each in layer_class.__mro__ if each in KINDS), None)
