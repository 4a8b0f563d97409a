"""What one forward pass of a layer runs, decided once: `forward` runs the route, `peft_fused.explain` prints it.

A layer derives from `Routed` and defines `route(x)`. Its `forward` is `self.route(x).run(x)`, and nothing in it decides
again; an accelerated layer runs the same steps without making a `Route` of them. A route is made on every call, so its
classes have slots, and words are put together only when somebody asks.
"""

from collections.abc import Sequence

import torch


class Step:
    """One part of a forward pass: subclasses hold the operands.

    name: what it runs, as `explain` writes it. shares: whether its product with x may come from elsewhere.
    """

    __slots__ = ()
    name: str
    shares = False

    def run(self, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        """The result up to here. x: the layer's input, [..., K]; y: the result of the steps before, None at first."""
        raise NotImplementedError

    def problem(self, x: torch.Tensor):
        """What the step's op is given, as `dispatch.decide` takes it; None for a step that calls none of ours."""
        return None


class CallBase(Step):
    """The base layer, called as a module with all that its hooks and its own forward do."""

    __slots__ = ("base",)
    name = "base layer called as a module"

    def __init__(self, base: torch.nn.Module):
        self.base = base

    def run(self, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        return self.base(x)


class BlockStep(Step):
    """A module that is an adapter: it defines `path`, the step's name, `apply_to(x, y)` and `problem(x)`."""

    __slots__ = ("block",)

    def __init__(self, block: torch.nn.Module):
        self.block = block

    @property
    def name(self) -> str:
        return self.block.path

    def run(self, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        return self.block.apply_to(x, y)

    def problem(self, x: torch.Tensor):
        return self.block.problem(x)


class Route:
    """The steps of a forward pass in order, and what speaks against each faster way, as (way, reason)."""

    __slots__ = ("against", "steps")

    def __init__(self, steps: Sequence[Step], against: Sequence[tuple[str, str]] = ()):
        self.steps, self.against = steps, against

    def run(self, x: torch.Tensor) -> torch.Tensor:
        """The result of all steps on x: [..., K] -> [..., N]. Raises what the steps raise."""
        y = None
        for step in self.steps:
            y = step.run(x, y)
        return y

    @property
    def path(self) -> str:
        """The names of the steps in a line."""
        first, *others = [step.name for step in self.steps]
        join = ", then " if isinstance(self.steps[0], CallBase) else " + "
        return join.join([first, " + ".join(others)]) if others else first

    @property
    def reasons(self) -> list[str]:
        """What speaks against each faster way, a line for each."""
        return [f"{way}: {reason}" for way, reason in self.against]

    def problem(self, x: torch.Tensor):
        """What the first op of ours among the steps is given; None if there is none."""
        return next((found for step in self.steps if (found := step.problem(x)) is not None), None)


class Routed:
    """A layer that says what its forward runs. Stands before torch.nn.Module among the bases; see the module's text."""

    def route(self, x: torch.Tensor) -> Route:
        """What `forward` runs on x, [..., K], in the layer's present state."""
        raise NotImplementedError

    def typical_input(self, rows: int = 1) -> torch.Tensor:
        """An input [rows, K] such as the layer is meant for, to ask `route` with; its values are not read."""
        raise NotImplementedError

    def explain_route(self, rows: int = 1):
        """(path, reasons against each faster way, problem of the first op or None) on an input of that many rows."""
        x = self.typical_input(rows)
        route = self.route(x)
        return route.path, route.reasons, route.problem(x)
