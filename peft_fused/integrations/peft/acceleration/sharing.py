"""Accelerated layers of one parent that receive the same tensor share one pass over it (ops/shared_shrink.py).

No name and no class tells which layers these are: it is seen when they run. Layers of one parent that are called one
after the other on the same x are a run. The next time the first of them, the leader, is called on an x, it takes the
products with x of all of them, and offers the others theirs. An offer is for this very x as it is, and for the factor
and the dropout probability that it was made with; whoever finds anything else than was foreseen runs alone. So a plan
that turns out wrong costs time and changes no result. What autograd does not see, such as x.data.mul_(2), an offer does
not see either.

What was made together is freed together by a backward. An x without a graph of its own is therefore not shared: layers
on it can be differentiated one after the other.

Checkpointing runs a forward a second time and expects it to save the same tensors and to draw the same masks. So a
leader's plan stays as it is while the hooks for saved tensors live under which the leader used it. Where there are no
hooks, in a forward without gradients and when that is repeated, each layer draws its mask by itself.
"""

import weakref
from collections.abc import Callable
from threading import get_ident

import torch

from ....ops.shared_shrink import is_spent, shared_shrink

# Where a layer keeps its `Sibling`; None there: `accelerate` was told not to group.
SIBLING = "_sibling"

_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_in_backward = torch._C._current_graph_task_id
_modes = torch._C._len_torch_dispatch_stack


class _Seen:
    """A tensor and the circumstances of a call on it. No reference to it is kept, nor to hooks."""

    __slots__ = ("context", "hook", "version", "x")

    def __init__(self, x: torch.Tensor, context: tuple, hook: weakref.ref | None):
        self.x, self.version, self.context, self.hook = weakref.ref(x), x._version, context, hook

    def is_now(self, x: torch.Tensor, context: tuple, hook: weakref.ref | None) -> bool:
        """Whether x is that tensor, unchanged since, and the circumstances are the same."""
        return (
            self.x() is x
            and self.version == x._version
            and self.context == context
            and (None if self.hook is None else self.hook()) is (None if hook is None else hook())
        )


def _circumstances(x: torch.Tensor) -> tuple[tuple, weakref.ref | None] | None:
    """(what calls have to agree in, hook for saved tensors) of a call on x; None where sharing cannot be shown safe."""
    if x.is_inference() or _modes() > 0:  # changes are not counted, or whoever records has to see each layer whole
        return None
    hooks, hook = _top_hooks(True), None
    if hooks is not None:
        try:
            hook = weakref.ref(hooks[1])
        except TypeError:  # of a built-in method, say: its life cannot be told
            return None
    kind, stream = "cpu", None
    if x.is_cuda:
        kind, stream = "cuda", torch._C._cuda_getCurrentRawStream(x.device.index)
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return (torch.is_grad_enabled(), x.requires_grad, cast, stream, get_ident()), hook


class _Run:
    """Siblings that were called one after the other on one tensor. offer: a weak reference to the leader's, once it
    has run. repeated: in a backward, by checkpointing, which may stop it halfway."""

    __slots__ = ("members", "offer", "repeated", "seen")

    def __init__(self, seen: _Seen, leader: "Sibling", repeated: bool):
        self.seen, self.members, self.repeated = seen, [leader], repeated
        self.offer = lambda: None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(member.name for member in self.members)


class _Offer:
    """Products with the x of a run for siblings that are still to come. names: of those that the pass was for. Whoever
    owns an offer must not outlive what x lives for."""

    __slots__ = ("__weakref__", "names", "products", "run", "x")

    def __init__(self, x: torch.Tensor, run: _Run, names: tuple[str, ...]):
        self.products = products = {}  # by id of the factor: (factor, what it was like, S)
        self.run, self.names = run, names
        self.x = weakref.ref(x, lambda _: products.clear())

    def put(self, step, S: torch.Tensor) -> None:
        self.products[id(step.A)] = step.A, _state(step), S

    def give(self, step, x: torch.Tensor) -> bool:
        """Gives a step its product. Whether there was one for it as it is now."""
        A, state, S = self.products.pop(id(step.A), (None, None, None))
        if A is not step.A or state != _state(step) or is_spent(S):
            return False
        step.shared = x, S
        return True


def _state(step) -> tuple:
    """What of a factor a product with it depends on, and its gradient."""
    return step.A._version, step.A.requires_grad, step.p


class Family:
    """The accelerated layers of one parent, and what they are at."""

    __slots__ = ("held", "run")

    def __init__(self):
        self.run: _Run | None = None
        self.held: _Offer | None = None  # where no graph is recorded

    def __reduce__(self):  # a copy, or what is loaded, begins anew
        return Family, ()

    def end_run(self) -> None:
        run = self.run
        if run is not None and not run.repeated:
            names, run.members[0].observed = run.names, tuple(run.members[1:])
            for member in run.members:
                member.ran_with = names


class Sibling:
    """A layer's part in its family. name: below the parent."""

    __slots__ = ("family", "frames", "layer", "name", "observed", "plan", "ran_with", "told")

    def __init__(self, family: Family, name: str):
        self.family, self.name = family, name
        self.layer = lambda: None  # a weak reference
        # As a leader: the others that it foresees now, those of its last run, and hooks under which it used the plan.
        self.plan: tuple[Sibling, ...] = ()
        self.observed: tuple[Sibling, ...] = ()
        self.frames: list[weakref.ref] = []
        self.ran_with: tuple[str, ...] = ()  # names of those of its last run, its own among them
        # Of its last call: names of those that shared the pass over x, or why it ran alone, where more is to be said.
        self.told: tuple[str, ...] | str | None = None

    def __reduce__(self):
        return Sibling, (self.family, self.name)

    def share(self, layer: torch.nn.Module, x: torch.Tensor, steps: list) -> _Offer | None:
        """Gives to the steps of a layer, before they run on x, what is at hand for them. Returns an offer to others,
        for `hold`."""
        mine = [step for step in steps if step.shares]
        found = _circumstances(x) if mine else None
        if found is None:
            self.told = "PEFT runs it" if not mine else "in the last forward pass it could not be shown safe"
            return None
        family, run = self.family, self.family.run
        self.layer, self.told = weakref.ref(layer), None
        if run is None or self in run.members or not run.seen.is_now(x, *found):
            family.end_run()
            family.run = run = _Run(_Seen(x, *found), self, _in_backward() != -1)
            if not run.repeated:
                self._settle(found[1])
            return self._lead(x, mine, found, run) if self.plan else None
        run.members.append(self)
        offer = run.offer()
        if offer is not None:
            given = [offer.give(step, x) for step in mine]
            self.told = offer.names if all(given) else f"it was not as {run.members[0].name} had foreseen it"
        return None

    def hold(self, offer: _Offer, y: torch.Tensor) -> None:
        """Keeps an offer while the graph of the leader's output lives, as that of each layer would keep x; where no
        graph is recorded, while x lives."""
        offer.run.offer, records = weakref.ref(offer), y.grad_fn is not None
        self.family.held = None if records else offer
        if records:
            y.grad_fn.metadata[SIBLING] = offer

    def outcome(self) -> tuple[str, ...] | str:
        """Of its last call: names, its own among them, of those that shared a pass, or why it ran alone."""
        run = self.family.run
        names = run.names if run is not None and not run.repeated and self in run.members else self.ran_with
        if not names:
            return "which siblings receive the same input is seen in the first forward pass"
        if self.told is not None:
            return self.told
        if len(names) == 1:
            return "no sibling received the same input in the last forward pass"
        return f"{', '.join(names)} received the same input in the last forward pass, and share it from the next on"

    def _settle(self, hook) -> None:
        self.frames = [frame for frame in self.frames if frame() is not None]
        if self.plan != self.observed and not self.frames:
            self.plan = self.observed
        if hook is not None and all(frame() is not hook() for frame in self.frames):
            self.frames.append(hook)

    def _lead(self, x: torch.Tensor, mine: list, found: tuple, run: _Run) -> _Offer | None:
        first, (context, hook) = mine[0], found
        records = context[0]
        if records and x.grad_fn is None:
            self.told = "its input has no graph, so that each layer may be differentiated by itself"
            return None
        if first.p > 0 and hook is None and (run.repeated or not records):
            self.told = "there is dropout in a forward pass without gradients, which checkpointing may repeat"
            return None
        # Of factors whose products are made together. One that is trained would keep x for the others as well.
        wanted = (first.A.dtype, x.device, x.shape[-1:], first.A.requires_grad, False, first.p)
        theirs, names = [], [self.name]
        for sibling in self.plan:
            layer = sibling.layer()
            if layer is not None and layer.__dict__.get(SIBLING) is sibling:
                steps = [step for step in layer.steps_to_share(x) if step.shares and _traits(step) == wanted]
                theirs += steps
                names += [sibling.name] if steps else []
        if not theirs or _traits(first) != wanted:
            self.told = "its siblings' factors or dropout are of another kind"
            return None
        mine = [step for step in mine if _traits(step) == wanted]
        factors = [step.A for step in (*mine, *theirs)]
        shared = shared_shrink(x, factors, dropout_p=first.p, out_features=first.B.shape[0])
        if shared is None:
            self.told = "a pass of its own is the better one"
            return None
        x_of_node, *products = shared
        for step in mine:
            step.shared = x_of_node, products.pop(0)
        offer = _Offer(x, run, tuple(names))
        for step, S in zip(theirs, products, strict=True):
            offer.put(step, S)
        self.told = offer.names
        return offer


def _traits(step) -> tuple:
    A = step.A
    return A.dtype, A.device, A.shape[1:], A.requires_grad, A.is_inference(), step.p


def join_siblings(model: torch.nn.Module, accelerated: Callable, group: bool) -> list[list[str]]:
    """Makes families of the layers of equal width below each module that are `accelerated(layer)`; group=False parts
    them. Returns the names of each family's layers."""
    families = []
    for parent_name, parent in model.named_modules():
        by_width: dict[int, dict[str, torch.nn.Module]] = {}
        for name, child in parent.named_children():
            if accelerated(child):
                by_width.setdefault(child.in_features, {})[name] = child
        for layers in by_width.values():
            if len(layers) == 1:
                continue
            known = [layer.__dict__.get(SIBLING) for layer in layers.values()]
            family = next((sibling.family for sibling in known if sibling is not None), None) or Family()
            for (name, layer), sibling in zip(layers.items(), known, strict=True):
                layer.__dict__[SIBLING] = (sibling or Sibling(family, name)) if group else None
            if group:
                families.append([f"{parent_name}.{name}" if parent_name else name for name in layers])
    return families
