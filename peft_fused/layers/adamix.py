"""AdaMix: stacks of experts, one of which works in each forward pass, and the state that says which."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..ops import bottleneck_adapter, lowrank_linear
from ..ops.bottleneck import ACTIVATIONS, BottleneckProblem
from ..ops.bottleneck import problem_of as bottleneck_problem
from ..ops.dispatch import Problem, problem_of
from .adapted import NO_DELTA, AdaptedLinear
from .checks import (
    check_adapter_dtype,
    check_alpha,
    check_choice,
    check_dropout,
    check_flag,
    check_int,
    check_linear,
    check_rank,
    features,
)
from .scheduled import PlacedState

__all__ = ["AdaMixAdapter", "AdaMixDelta", "AdaMixLinear", "RoutePolicy"]

ROUTINGS = ("batch", "sequence")
EXPERT_INITS = ("independent", "identical")
# Forward passes of one micro-batch that may be given routes of their own: the consistency loss has two.
PASSES = 2
MAX_EXPERTS = 1024
# Sequences in a batch where nobody says how many there are.
USUAL_BATCH = 32


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
        # The pass that forward calls are now, None for both as one doubled batch; and since which autograd node each
        # pass has been, the last one last.
        self.pass_index: int | None = 0
        self.marks: list[tuple[int, int | None]] = [(0, 0)]
        self.sequences: int | None = None  # of a doubled batch, if known
        # The backward in which checkpointed forwards are being repeated, and the pass last repeated in it.
        self.repeating: tuple[int, int | None] | None = None

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
        self.marks.append((torch.autograd._get_sequence_nr(), index))
        if index != 0:
            self.note_used(1)

    def note_used(self, index: int) -> None:
        """The experts of a pass contribute to the optimizer step under way."""
        for used, routes in zip(self.used, self.values, strict=True):
            used.add(routes[index])

    def current_pass(self) -> int | None:
        """`pass_index`; in a forward that activation checkpointing repeats, that of the first time."""
        if torch.compiler.is_compiling():
            return self.pass_index
        task = torch._C._current_graph_task_id()
        if task == -1:
            self.repeating = None  # should a backward have ended in an error
            return self.pass_index
        if self.repeating and self.repeating[0] != task:
            # A backward within that backward, of a region nested in the repeated one. Its nodes may be numbered by the
            # thread of a GPU's backward, not by the one that the marks were made in.
            return self.repeating[1]
        # Repeated within backward: the node that asked for it was made during the pass.
        made = torch._C._current_autograd_node()._sequence_nr()
        for start, index in reversed(self.marks):
            if start <= made:
                if self.repeating is None:
                    torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
                self.repeating = task, index
                return index
        raise RuntimeError("AdaMix: new routes were drawn before the backward of a checkpointed forward")

    def _end_of_backward(self) -> None:
        self.repeating = None

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
            self.count_forward()
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
        state.marks = [(torch.autograd._get_sequence_nr(), 0)]


def write_eval_routes(states: list[RouteState], values: list[tuple[int, int] | None]) -> None:
    """Sets what evaluation uses, for all states; None for the merged experts."""
    random = [(state, value) for state, value in zip(states, values, strict=True) if value is not None]
    _fill([t for state, _ in random for t in state.eval_routes.unbind()], [n for _, value in random for n in value])
    for state, value in zip(states, values, strict=True):
        state.eval_values = value


@dataclass(frozen=True)
class RouteMember:
    """One adapter of one layer as the AdaMix schedule sees it."""

    method = "adamix"
    state: RouteState
    down: "Experts"
    up: "Experts"

    def choices(self) -> tuple:
        """What all processes have to agree on."""
        return (self.state.group, self.state.policy, self.state.values)


class Experts(nn.Module):
    """A stack of linear maps, weight [E, out, in] and bias [E, out], or one, [out, in] and [out], that all share."""

    def __init__(self, experts: int | None, in_features: int, out_features: int, bias: bool, dtype=None, device=None):
        super().__init__()
        lead = () if experts is None else (experts,)
        self.weight = nn.Parameter(torch.empty(*lead, out_features, in_features, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(*lead, out_features, dtype=dtype, device=device)) if bias else None

    @property
    def stacked(self) -> bool:
        return self.weight.dim() == 3

    def averaged(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight, bias) averaged over the experts, computed in fp32 (fp64 for fp64)."""
        return _average(self.weight, 3), None if self.bias is None else _average(self.bias, 2)

    @torch.no_grad()
    def average_(self) -> None:
        """Makes it one map, the average. The parameters are new ones."""
        if not self.stacked:
            return
        weight, bias = self.averaged()
        self.weight = nn.Parameter(weight.clone(), requires_grad=self.weight.requires_grad)
        if bias is not None:
            self.bias = nn.Parameter(bias.clone(), requires_grad=self.bias.requires_grad)

    def extra_repr(self) -> str:
        return f"weight={list(self.weight.shape)}, bias={self.bias is not None}"


def _average(parameter: torch.Tensor, stacked_dim: int) -> torch.Tensor:
    if parameter.dim() < stacked_dim:
        return parameter
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.mean(0, dtype=wide).to(parameter.dtype)


class RoutedBlock(nn.Module):
    """What AdaMix's two forms share: two sides, of which each is a stack or shared, and their routes."""

    def __init__(
        self, in_features: int, out_features: int, r: int, policy: RoutePolicy, *, bias: bool, expert_init: str,
        dropout: float, group: str, dtype, device,
    ):  # fmt: skip
        super().__init__()
        check_rank("r", r)
        check_choice("expert_init", expert_init, EXPERT_INITS)
        check_dropout("dropout", dropout)
        self.in_features, self.out_features, self.r, self.expert_init = in_features, out_features, r, expert_init
        experts = [policy.num_experts if stacked else None for stacked in policy.stacks]
        self.down = Experts(experts[0], in_features, r, bias, dtype, device)
        self.up = Experts(experts[1], r, out_features, bias, dtype, device)
        self.dropout = nn.Dropout(dropout)
        self.routes = RouteState(policy, group)
        if device is not None:
            self.routes.to(device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def _each(self, stack: Experts, init) -> None:
        """Applies an initialiser to every expert of a stack, or to one that all of them copy."""
        if not stack.stacked:
            init(stack.weight)
            return
        for e, weight in enumerate(stack.weight):
            weight.copy_(stack.weight[0]) if e and self.expert_init == "identical" else init(weight)

    def member(self) -> RouteMember:
        return RouteMember(self.routes, self.down, self.up)

    def is_zero(self) -> bool:
        """Whether the block is as it was made, and so changes nothing."""
        tensors = [self.up.weight] if self.up.bias is None else [self.up.weight, self.up.bias]
        return all(tensor.is_meta or not tensor.any() for tensor in tensors)

    def randomize(self) -> None:
        """Starts both sides at random, large enough to matter, for tests."""
        for stack in (self.down, self.up):
            self._each(stack, lambda weight: nn.init.normal_(weight, std=weight.shape[-1] ** -0.5))

    def average_(self) -> None:
        """Makes it one expert, the average of each side."""
        self.down.average_()
        self.up.average_()
        policy = self.routes.policy
        self.routes.policy = RoutePolicy(1, policy.share_down, policy.share_up, "batch", False, policy.seed)
        write_routes([self.routes], [((0,) * PASSES,) * 2])
        write_eval_routes([self.routes], [None])

    def bottleneck_problem(self, x: torch.Tensor, activation: str) -> BottleneckProblem:
        """What a forward pass on x [rows, K] gives the bottleneck op."""
        groups = None
        if self.routes.grouped and self.routes.pass_index is None:
            groups = x.new_empty(PASSES, dtype=torch.int64)
        elif self.routes.grouped:
            groups = x.new_empty(math.gcd(x.shape[0], USUAL_BATCH), dtype=torch.int64)
        return bottleneck_problem(x, self.down.weight, self.up.weight, activation, groups)

    def _operands(self, x: torch.Tensor):
        """(down, down_bias, up, up_bias, expert) of a forward pass: stacks with their routes, or the averages."""
        down, up, expert = self.down, self.up, None
        if down.stacked or up.stacked:
            expert = self.routes.experts(self.training, x.shape[0] if x.dim() > 1 else 1, x.device)
            if expert is None:
                return *down.averaged(), *up.averaged(), None
        return down.weight, down.bias, up.weight, up.bias, expert


class AdaMixDelta(RoutedBlock):
    """scale * B_j A_i drop(x), the LoRA form: A is the down side [E, r, K], B the up side [E, N, r].

    alpha: scale = alpha / r. The average of the experts' factors is exactly the average of their products if one side
    is shared, and an approximation of it otherwise.
    """

    def __init__(
        self, in_features: int, out_features: int, r: int, policy: RoutePolicy, *, alpha: float,
        expert_init: str = "independent", dropout: float = 0.0, group: str = "default", dtype=None, device=None,
    ):  # fmt: skip
        self.alpha = check_alpha("alpha", alpha)
        super().__init__(
            in_features, out_features, r, policy, bias=False, expert_init=expert_init, dropout=dropout, group=group,
            dtype=dtype, device=device,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """A from kaiming_uniform(a=sqrt(5)), B zero: the adapter starts as a change of nothing."""
        self._each(self.down, lambda weight: nn.init.kaiming_uniform_(weight, a=math.sqrt(5)))
        nn.init.zeros_(self.up.weight)

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    @property
    def dropout_p(self) -> float:
        return self.dropout.p if self.dropout.training else 0.0

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x weight^T + bias + scale * B_j A_i drop(x) in one op; the routes must not be grouped."""
        A, _, B, _, expert = self._operands(x)
        return lowrank_linear(x, weight, bias, A, B, scale=self.scale, expert=expert, dropout_p=self.dropout_p)

    def forward(self, x: torch.Tensor, add: torch.Tensor | None = None) -> torch.Tensor:
        """add + scale * B_j A_i drop(x), by the bottleneck op without activation, which takes one per sequence."""
        A, _, B, _, expert = self._operands(x)
        residual = x.new_zeros(*x.shape[:-1], self.out_features) if add is None else add
        x = F.dropout(x, self.dropout_p)
        return bottleneck_adapter(x, A, None, B, None, "identity", residual=residual, scale=self.scale, expert=expert)

    def delta(self) -> torch.Tensor:
        """The dense change of the weight by the averaged experts, [N, K], in fp32 (fp64 for fp64)."""
        dtype = torch.promote_types(self.up.weight.dtype, torch.float32)
        (A, _), (B, _) = self.down.averaged(), self.up.averaged()
        return self.scale * (B.to(dtype) @ A.to(dtype))

    def problem(self, x: torch.Tensor, has_weight: bool) -> Problem | BottleneckProblem:
        """What a forward pass on x [rows, K] gives `linear` (has_weight) or `forward`."""
        if not has_weight or self.routes.grouped:
            return self.bottleneck_problem(x, "identity")
        return problem_of(x, self.down.weight, self.up.weight, has_weight=True, dropout=self.dropout_p > 0)


class AdaMixAdapter(RoutedBlock):
    """h + U_j act(D_i drop(h) + b_i) + c_j, the adapter form: down side [E, r, n], up side [E, n, r], each with biases.

    Source: AdaMix, Wang et al. 2022, sec. 3, on the bottleneck adapter of Houlsby et al. 2019. The down side starts as
    N(0, 0.02) and the up side at zero, so that the block starts as the identity; the authors draw both.
    """

    def __init__(
        self, n: int, r: int, policy: RoutePolicy, *, activation: str = "gelu", expert_init: str = "independent",
        dropout: float = 0.0, group: str = "default", dtype=None, device=None,
    ):  # fmt: skip
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        super().__init__(
            n, n, r, policy, bias=True, expert_init=expert_init, dropout=dropout, group=group, dtype=dtype,
            device=device,
        )  # fmt: skip

    def reset_parameters(self) -> None:
        """Down from N(0, 0.02), up and the biases zero: the adapter starts as a change of nothing."""
        self._each(self.down, lambda weight: nn.init.normal_(weight, std=0.02))
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, h: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """residual + U_j act(D_i drop(h) + b_i) + c_j; residual None means h. h: [..., n]."""
        down, down_bias, up, up_bias, expert = self._operands(h)
        if self.dropout.training and self.dropout.p > 0:
            residual = h if residual is None else residual
            h = F.dropout(h, self.dropout.p)
        return bottleneck_adapter(h, down, down_bias, up, up_bias, self.activation, residual=residual, expert=expert)

    def problem(self, h: torch.Tensor) -> BottleneckProblem:
        """What a forward pass on h [rows, n] gives the op."""
        return self.bottleneck_problem(h, self.activation)


class AdaMixLinear(AdaptedLinear):
    """A linear map with W and bias frozen, and `AdaMixDelta` beside it or `AdaMixAdapter` on its output.

    In training one expert of each side works per forward pass, drawn by `peft_fused.on_step`; in evaluation their
    average, unless `peft_fused.set_adamix_routing` asks for random ones. `merge` folds the average of the LoRA form
    into W, and raises ValueError for the adapter form. Made by `from_linear`.
    """

    def __init__(self, base: nn.Module, block: RoutedBlock):
        super().__init__(base)
        self.block = block

    @classmethod
    def from_linear(
        cls, base: nn.Module, *, kind: str = "adapter", r: int = 16, alpha: float = 16, num_experts: int = 4,
        share_down: bool = False, share_up: bool = True, activation: str = "gelu", routing: str = "batch",
        expert_init: str = "independent", dropout: float = 0.0, strict_experts: bool = False, seed: int = 0, dtype=None,
    ) -> "AdaMixLinear":  # fmt: skip
        """An adapted layer that shares, and freezes, the weight and bias Parameters of `base`.

        base: torch.nn.Linear or transformers' Conv1D, weight in fp32, fp16, bf16 or fp64. kind: "adapter" or "lora".
        r: 1..256, of the bottleneck or the LoRA factors. alpha: of "lora", whose scale is alpha / r. activation: of
        "adapter", "gelu", "gelu_tanh", "relu", "silu", "swish", "tanh" or "identity". expert_init: experts start
        "independent" or "identical". dropout: in [0, 1), on the block's input. dtype: of the block, by default fp32.
        The rest: see `RoutePolicy`. Raises TypeError or ValueError naming the argument.
        """
        check_linear("base", base)
        check_choice("kind", kind, ("adapter", "lora"))
        check_alpha("alpha", alpha)
        policy = RoutePolicy(num_experts, share_down, share_up, routing, strict_experts, seed)
        k, n = features(base)
        shared = dict(
            expert_init=expert_init, dropout=dropout, device=base.weight.device,
            dtype=check_adapter_dtype("dtype", dtype, base.weight.dtype),
        )  # fmt: skip
        if kind == "lora":
            return cls(base, AdaMixDelta(k, n, r, policy, alpha=alpha, **shared))
        return cls(base, AdaMixAdapter(n, r, policy, activation=activation, **shared))

    @property
    def additive(self) -> bool:
        return isinstance(self.block, AdaMixDelta)

    @property
    def op_name(self) -> str:
        return "lowrank_linear" if self.additive else "bottleneck"

    def schedule_members(self) -> list[RouteMember]:
        return [self.block.member()]

    def delta(self) -> torch.Tensor:
        """The dense change of the weight, [N, K]; ValueError for the adapter form, which has none."""
        if not self.additive:
            raise ValueError(f"an AdaMixAdapter has no dense delta: {NO_DELTA}")
        return self.block.delta()

    def adapted(self, x: torch.Tensor) -> torch.Tensor:
        if not self.additive:
            return self.block(self.base(x))
        if self.block.routes.grouped:
            return self.block(x, self.base(x))
        return self.block.linear(x, self.weight_nk(), self.bias)

    def path(self) -> str:
        if not self.additive:
            return "F.linear, then bottleneck on its output"
        return "F.linear, then bottleneck added to it" if self.block.routes.grouped else "lowrank_linear"

    def op_problem(self, rows: int) -> Problem | BottleneckProblem:
        """What a forward pass on x [rows, K] gives the op."""
        if self.additive:
            return self.block.problem(self.weight.new_empty(1, self.in_features).expand(rows, -1), True)
        return self.block.problem(self.weight.new_empty(1, self.out_features).expand(rows, -1))
