"""Which of AdaMix's experts work in a forward pass, and the state that says so."""

from dataclasses import dataclass

import torch
from torch import nn

from ..checks import check_choice, check_flag, check_int
from ..scheduled import Member, PlacedState

ROUTINGS = ("batch", "sequence")
EXPERT_INITS = ("independent", "identical")
# Forward passes of one micro-batch that may be given routes of their own: the consistency loss has two.
PASSES = 2
MAX_EXPERTS = 1024


@dataclass(frozen=True)
class RoutePolicy:
    """Which experts there are and how one is drawn. (AdaMix, Wang et al. 2022, sec. 3.)

    num_experts: in the stack of a side that is not shared. share_down, share_up: one matrix instead of a stack.
    routing: one expert for the whole batch, as the paper, or one per sequence, the first dimension of the input.
    strict_experts: what was not routed is kept from moving by momentum or weight decay; routing="batch" only. seed: of
    the draws. Raises TypeError or ValueError naming the field.
    """

    num_experts: int = 4
    share_down: bool = False
    share_up: bool = True
    routing: str = "batch"
    strict_experts: bool = False
    seed: int = 0

    def __post_init__(self):
        check_int("num_experts", self.num_experts, 1)
        if self.num_experts > MAX_EXPERTS:
            raise ValueError(f"num_experts must be in 1..{MAX_EXPERTS}, got {self.num_experts}")
        check_flag("share_down", self.share_down)
        check_flag("share_up", self.share_up)
        if self.share_down and self.share_up and self.num_experts > 1:
            raise ValueError(
                f"share_down and share_up must not both be True with num_experts={self.num_experts}: nothing is left "
                "to be routed"
            )
        check_choice("routing", self.routing, ROUTINGS)
        check_flag("strict_experts", self.strict_experts)
        if self.strict_experts and self.routing != "batch":
            raise ValueError(f"strict_experts needs routing='batch', got {self.routing!r}")
        check_int("seed", self.seed)

    @property
    def stacks(self) -> tuple[bool, bool]:
        """Whether (down, up) are stacks of experts."""
        return self.num_experts > 1 and not self.share_down, self.num_experts > 1 and not self.share_up


class RouteState(PlacedState):
    """The experts of the two sides of one adapter of one layer, per forward pass of a micro-batch.

    `routes` [2, PASSES] holds an expert's index per side and pass, or with routing="sequence" the key from which each
    sequence's index follows. It is written in place, so that nothing compiled or captured has to be made anew.
    """

    def __init__(self, policy: RoutePolicy, group: str = "default"):
        super().__init__(group)
        self.policy = policy
        self.values = ((0,) * PASSES, (0,) * PASSES)
        self.eval_values: tuple[int, int] | None = None  # None: the merged experts
        # Experts (of down, of up) that contributed gradients to the optimizer step under way, and what strict_experts
        # keeps of the others during its update.
        self.used: tuple[set, set] = ({0}, {0})
        self.kept: list = []
        # Of a distributed run; its batch is the processes' batches in order.
        self.process = 0
        self.routes = torch.zeros(2, PASSES, dtype=torch.int64)
        self.eval_routes = torch.zeros(2, dtype=torch.int64)
        # The pass that forward calls are now, None for both as one doubled batch; and those that have run, in training,
        # since routes were drawn.
        self.pass_index: int | None = 0
        self.passes_run: set[int | None] = set()
        self.sequences: int | None = None  # of a doubled batch, if known

    def unscheduled(self) -> str:
        return "AdaMix has trained the same experts"

    def follow_state(self, other: "RouteState") -> None:
        super().follow_state(other)
        write_routes([self], [other.values])
        write_eval_routes([self], [other.eval_values])
        self.used = tuple(map(set, other.used))

    def begin_pass(self, index: int | None, sequences: int | None = None) -> None:
        """From here on forward calls are pass `index`, or, for None, both: the first half of a batch is pass 0.

        sequences: of the doubled batch, for inputs to be checked against.
        """
        self.pass_index, self.sequences = index, sequences
        if index != 0:
            self.note_used(1)

    def count_forward(self) -> None:
        """As the base class's, and notes the pass."""
        super().count_forward()
        if not torch.compiler.is_compiling():
            self.passes_run.add(self.current_pass())

    def note_used(self, index: int) -> None:
        """The experts of a pass contribute to the optimizer step under way."""
        for used, routes in zip(self.used, self.values, strict=True):
            used.add(routes[index])

    def current_pass(self) -> int | None:
        """`pass_index`; in a forward that activation checkpointing repeats within backward, that of the first time.

        RuntimeError if that cannot be told, as two passes have run.
        """
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
            return self.pass_index
        if not self.passes_run:
            raise RuntimeError("AdaMix: new routes were drawn before the backward of a checkpointed forward")
        if len(self.passes_run) > 1:
            raise RuntimeError(
                "AdaMix: activation checkpointing repeats forwards of two passes and cannot tell whose they are. Run "
                "both as one batch (AdaMixTrainerMixin.consistency_doubled, or adamix_loss(doubled=True)), or "
                "switch checkpointing off"
            )
        return next(iter(self.passes_run))

    def experts(self, training: bool, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(expert of down, of up) as the ops take them, 0-d tensors or one index per group of rows; None: merged.

        batch: length of the input's first dimension. device: of the input.
        """
        self.follow(device)
        if not training:
            if self.eval_values is None:
                return None
            routes = self.eval_routes
        else:
            index = self.current_pass()
            if index is None:
                return self._doubled(batch)
            routes = self.routes[:, index]
        if self.policy.routing == "sequence":
            return self._per_sequence(routes[0], batch), self._per_sequence(routes[1], batch)
        return routes[0], routes[1]

    def _doubled(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        if batch % PASSES or batch != (self.sequences or batch):
            wanted = f"have {self.sequences} sequences" if self.sequences else f"be divisible by {PASSES}"
            raise ValueError(
                f"AdaMix: both passes as one batch must {wanted} in the first dimension of a layer's input, got "
                f"{batch}; run them one after the other (doubled=False)"
            )
        if self.policy.routing == "batch":
            return self.routes[0], self.routes[1]
        half = batch // PASSES
        down, up = (torch.cat([self._per_sequence(key, half) for key in side]) for side in self.routes)
        return down, up

    def _per_sequence(self, key: torch.Tensor, batch: int) -> torch.Tensor:
        """Index of each sequence's expert: a hash of the key and the sequence's place, on the key's device."""
        first = self.process * batch
        h = torch.arange(first, first + batch, device=key.device)
        # Integers wrap around in two's complement on every device, so all of them agree.
        h = (h + 1) * -7046029254386353131 + key
        for factor in (-4658895280553007687, -7723592293110705685):
            h = (h ^ (h >> 32)) * factor
        return ((h ^ (h >> 32)) & 0x7FFFFFFF) * self.policy.num_experts >> 31

    @property
    def grouped(self) -> bool:
        """Whether rows of one batch may go to different experts."""
        return self.policy.routing == "sequence" or (self.training and self.current_pass() is None)

    @property
    def device(self) -> torch.device:
        return self.routes.device

    def place(self, device: torch.device) -> None:
        self.routes = torch.empty_like(self.routes, device=device)
        self.eval_routes = torch.empty_like(self.eval_routes, device=device)
        _fill(*_routes_of([self], [self.values]))
        write_eval_routes([self], [self.eval_values])

    def chosen(self) -> tuple:
        return (self.values,)

    def extra_repr(self) -> str:
        return f"values={self.values}, evaluation={'merged' if self.eval_values is None else self.eval_values}"


@torch.no_grad()
def _fill(tensors: list[torch.Tensor], numbers: list[int]) -> None:
    """Writes 0-d tensors by a few fused in-place kernels and without a sync."""
    if tensors:
        torch._foreach_zero_(tensors)
        torch._foreach_add_(tensors, numbers)


def _routes_of(states: list[RouteState], values: list) -> tuple[list[torch.Tensor], list[int]]:
    """(the 0-d tensors of all routes, what they are to hold)."""
    tensors = [t for state in states for side in state.routes.unbind() for t in side.unbind()]
    return tensors, [number for sides in values for side in sides for number in side]


def write_routes(states: list[RouteState], values: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    """Sets what both sides use in each pass, for all states, and starts pass 0."""
    _fill(*_routes_of(states, values))
    for state, value in zip(states, values, strict=True):
        state.values, state.pass_index, state.sequences = value, 0, None
        state.passes_run = set()


def write_eval_routes(states: list[RouteState], values: list[tuple[int, int] | None]) -> None:
    """Sets what evaluation uses, for all states; None for the merged experts."""
    random = [(state, value) for state, value in zip(states, values, strict=True) if value is not None]
    _fill([t for state, _ in random for t in state.eval_routes.unbind()], [n for _, value in random for n in value])
    for state, value in zip(states, values, strict=True):
        state.eval_values = value


@dataclass(frozen=True)
class RouteMember(Member):
    method = "adamix"
    down: nn.Module
    up: nn.Module
