"""AdaMix's two forms: stacks of experts beside a weight, or in a bottleneck on an output."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from ...ops import bottleneck_adapter
from ...ops.bottleneck import BOTTLENECK_ACTIVATIONS, BottleneckProblem, bottleneck_problem
from ..checks import check_alpha, check_choice, check_dropout, check_rank
from ..lowrank import LowRankStep
from ..route import BlockStep
from .routes import (
    EXPERT_INITS,
    PASSES,
    RouteMember,
    RoutePolicy,
    RouteState,
    write_eval_routes,
    write_routes,
)

# Sequences in a batch where nobody says how many there are.
USUAL_BATCH = 32


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

    def step(self, x: torch.Tensor) -> BlockStep:
        return BlockStep(self)

    def factor(self) -> nn.Parameter:
        """One of the parameters, whose dtype and device all share."""
        return self.down.weight

    def typical_shape(self, rows: int) -> tuple[int, ...]:
        """Of the rows of an input, in as many sequences as is usual where they are routed one by one."""
        if not self.routes.grouped:
            return (rows,)
        batch = PASSES if self.routes.current_pass() is None else math.gcd(rows, USUAL_BATCH)
        return (batch, max(1, rows // batch))

    def _operands(self, x: torch.Tensor, count: bool = False):
        """(down, down_bias, up, up_bias, expert) of a forward pass: stacks with their routes, or the averages.

        count: it is not only asked, but will run.
        """
        modules = self._modules  # the short way, as in `AdaptedLinear.operands`
        down, up, expert = modules["down"], modules["up"], None
        if down.stacked or up.stacked:
            if count and self.training:
                self.routes.count_forward()
            expert = self.routes.experts(self.training, x.shape[0] if x.dim() > 1 else 1, x.device)
            if expert is None:
                return *down.averaged(), *up.averaged(), None
        return down.weight, down.bias, up.weight, up.bias, expert


class AdaMixDelta(RoutedBlock):
    """scale * B_j A_i drop(x), the LoRA form: A is the down side [E, r, K], B the up side [E, N, r].

    alpha: scale = alpha / r. The average of the experts' factors is exactly the average of their products if one side
    is shared, and an approximation of it otherwise.
    """

    on_output = False
    path = "bottleneck added to it"

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
        dropout = self._modules["dropout"]
        return dropout.p if dropout.training else 0.0

    def linear_step(self, x: torch.Tensor) -> LowRankStep:
        """The part in one op with the base product; ValueError if the routes are grouped."""
        A, _, B, _, expert = self._operands(x)
        options = {"scale": self.scale, "expert": expert, "dropout_p": self.dropout_p}
        return LowRankStep(A, B, options, self.routes if self.training and expert is not None else None)

    def against_linear(self) -> str | None:
        """Why there is no such part now."""
        return "rows of one batch go to different experts" if self.routes.grouped else None

    def apply_to(self, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        return self(x, y)

    def forward(self, x: torch.Tensor, add: torch.Tensor | None = None) -> torch.Tensor:
        """add + scale * B_j A_i drop(x), by the bottleneck op without activation, which takes one per sequence."""
        A, _, B, _, expert = self._operands(x, count=True)
        residual = x.new_zeros(*x.shape[:-1], self.out_features) if add is None else add
        x = F.dropout(x, self.dropout_p)
        return bottleneck_adapter(x, A, None, B, None, "identity", residual=residual, scale=self.scale, expert=expert)

    def problem(self, x: torch.Tensor) -> BottleneckProblem:
        """What a forward pass on x gives the op."""
        A, _, B, _, expert = self._operands(x)
        return bottleneck_problem(x, A, B, "identity", expert, self.scale)

    def delta(self) -> torch.Tensor:
        """The dense change of the weight by the averaged experts, [N, K], in fp32 (fp64 for fp64)."""
        dtype = torch.promote_types(self.up.weight.dtype, torch.float32)
        (A, _), (B, _) = self.down.averaged(), self.up.averaged()
        return self.scale * (B.to(dtype) @ A.to(dtype))


class AdaMixAdapter(RoutedBlock):
    """h + U_j act(D_i drop(h) + b_i) + c_j, the adapter form: down side [E, r, n], up side [E, n, r], each with biases.

    Source: AdaMix, Wang et al. 2022, sec. 3, on the bottleneck adapter of Houlsby et al. 2019. The down side starts as
    N(0, 0.02) and the up side at zero, so that the block starts as the identity; the authors draw both.
    """

    on_output = True
    path = "bottleneck on its output"

    def __init__(
        self, n: int, r: int, policy: RoutePolicy, *, activation: str = "gelu", expert_init: str = "independent",
        dropout: float = 0.0, group: str = "default", dtype=None, device=None,
    ):  # fmt: skip
        self.activation = check_choice("activation", activation, BOTTLENECK_ACTIVATIONS)
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
        down, down_bias, up, up_bias, expert = self._operands(h, count=True)
        dropout = self._modules["dropout"]
        if dropout.training and dropout.p > 0:
            residual = h if residual is None else residual
            h = F.dropout(h, dropout.p)
        return bottleneck_adapter(h, down, down_bias, up, up_bias, self.activation, residual=residual, expert=expert)

    def apply_to(self, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        """On the output y; for None what would be added to an output x, alone."""
        return self(x, torch.zeros_like(x)) if y is None else self(y)

    def problem(self, x: torch.Tensor) -> BottleneckProblem:
        """What a forward pass gives the op where the layer's input is x."""
        h = x[..., :1].expand(*x.shape[:-1], self.in_features)
        down, _, up, _, expert = self._operands(h)
        return bottleneck_problem(h, down, up, self.activation, expert)
