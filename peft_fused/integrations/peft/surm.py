"""SURM as a PEFT method: `get_peft_model(model, SurmConfig(...))`."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from ...layers.checks import check_alpha, check_dropout, check_rank
from ...layers.sharded import is_sharded
from ...layers.surm.adapter import SurmAdapter, SurmAdapterLinear, make_activation
from ...layers.surm.linear import CirculantLinear, KroneckerLinear, LdrLinear, StructuredDelta, ToeplitzLinear
from ...layers.surm.maps import MapSpec
from .config import FusedConfig, check_after
from .export import Exported, ExportedLayer, check_additive
from .positions import default_targets
from .registration import Demo, FusedPeftType, Registration, register
from .tuner import FusedLayer, FusedTuner

__all__ = ["SurmConfig", "SurmModel"]


@dataclass
class SurmConfig(FusedConfig):
    """Configuration of SURM (Sehanobish et al. 2024): structured matrices M in place of low-rank ones.

    kind="lora": y = W x + bias + scale * M drop(x), which merges into W. kind="adapter": h' = h + act(scale * M
    drop(h)) + beta on the output h of a target, which does not. Structures of M, and parameters per N x K matrix:

    "circulant": C(a . b), 2 max(N, K), or with product=False half of that; with rectangular="block" 2 N K / block_size.
    "toeplitz": any Toeplitz matrix, N + K - 1. "symmetric_toeplitz": T(b) T(a), 2 n. "kronecker": B (x) A, N + K,
    whatever r. "ldr": sum of q products circulant x skew-circulant, 2 q n. N = K = n where n stands.

    Where the model drops the output that an adapter stands on, the authors' adapter stands after its dropout:
    after="dropout", the name it has beside the target, puts it there. By default it stands before, where any layer can
    be adapted without knowing the model; in evaluation both are the same.

    scale: 1 if surm_alpha is None; else surm_alpha, which "kronecker" divides by r. Structured parameters are few, and
    weight decay on them is seldom meant: see `peft_fused.decay_groups`. Raises TypeError or ValueError naming the
    field, the value and what is allowed; for options that do not fit a layer, also the target module.
    """

    fused_type: ClassVar = FusedPeftType.SURM

    structure: str = field(
        default="circulant",
        metadata={"help": "'circulant', 'toeplitz', 'symmetric_toeplitz', 'kronecker' or 'ldr'."},
    )
    kind: str = field(default="lora", metadata={"help": "'lora': beside a weight. 'adapter': on a layer's output."})
    r: int | None = field(
        default=None,
        metadata={"help": "Of 'kronecker': must divide both sizes of every target; None takes that of highest rank."},
    )
    q: int = field(default=1, metadata={"help": "Of 'ldr': number of terms."})
    product: bool = field(default=True, metadata={"help": "Of 'circulant': two vectors multiplied, or one."})
    rectangular: str = field(
        default="pad", metadata={"help": "Of 'circulant': 'pad' to the larger size, or 'block' circulant."}
    )
    block_size: int | None = field(
        default=None,
        metadata={"help": "Of 'circulant' with 'block': must divide both sizes; None takes their common divisor."},
    )
    surm_alpha: float | None = field(
        default=None, metadata={"help": "None: scale 1. A number: the scale, for 'kronecker' divided by r."}
    )
    surm_dropout: float = field(default=0.0, metadata={"help": "Dropout on the map's input, in [0, 1)."})
    activation: str = field(
        default="gelu", metadata={"help": "Of the adapter kind: 'gelu', 'relu', 'silu', 'tanh', 'identity', ..."}
    )
    allow_nonidentity: bool = field(
        default=False, metadata={"help": "Of the adapter kind: accept an activation that is not 0 at 0."}
    )

    after: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Of the adapter kind: name of the torch.nn.Dropout beside a target that the adapter stands after."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        MapSpec(kind=self.kind, **self.map_options())
        if self.surm_alpha is not None:
            check_alpha("surm_alpha", self.surm_alpha)
        check_dropout("surm_dropout", self.surm_dropout)
        if not isinstance(self.activation, str):
            raise TypeError(f"activation must be the name of one, got {self.activation!r}")
        make_activation(self.activation, self.allow_nonidentity)
        check_after(self, self.kind == "adapter", "kind='adapter'")
        for name in ("activation", "allow_nonidentity"):
            if self.kind != "adapter" and getattr(self, name) != getattr(SurmConfig, name):
                raise ValueError(f"{name} is an option of kind='adapter', got {getattr(self, name)!r}")

    def map_options(self) -> dict:
        names = ("structure", "r", "q", "product", "rectangular", "block_size")
        return {name: getattr(self, name) for name in names}


class SurmPeftLinear(FusedLayer):
    """A linear layer with SURM adapters of either kind, applied in the order in which they are active."""

    adapter_layer_names = ("surm_block",)

    def update_layer(self, adapter_name: str, config: SurmConfig, key: str, init_weights: bool) -> None:
        options, alpha, dropout = config.map_options(), config.surm_alpha, config.surm_dropout
        if config.kind == "adapter":
            block = SurmAdapter(
                self.out_features, activation=config.activation, allow_nonidentity=config.allow_nonidentity,
                alpha=alpha, dropout=dropout, **options,
            )  # fmt: skip
        else:
            spec = MapSpec(kind=config.kind, **options)
            block = StructuredDelta(spec.make(self.in_features, self.out_features), alpha, dropout)
        if not init_weights:
            block.randomize()
        self.surm_block[adapter_name] = block

    def adapter(self, name: str) -> StructuredDelta:
        return self.block("surm_block", name)


class SurmModel(FusedTuner):
    """The SURM tuner, made by `get_peft_model` and PEFT's loaders."""

    prefix = "surm_"
    tuner_layer_cls = SurmPeftLinear

    def _prepare_adapter_config(self, peft_config: SurmConfig, model_config: dict) -> SurmConfig:
        if peft_config.kind == "adapter" and peft_config.target_modules is None:
            peft_config.target_modules = default_targets("houlsby", model_config.get("model_type"))
            return peft_config
        return super()._prepare_adapter_config(peft_config, model_config)


@torch.no_grad()
def _export(config: SurmConfig, layers: dict[str, SurmPeftLinear], adapter_name: str, rank: int | None) -> Exported:
    """The closest of a rank, which must be given, by singular value decomposition of each layer's scaled dense matrix.

    Those matrices are of full rank as a rule, so that the rank decides on the error; a layer whose smaller size is less
    than rank gets that one and is exact.
    """
    check_additive(config, adapter_name)
    most = max(min(layer.in_features, layer.out_features) for layer in layers.values())
    if rank is None:
        raise ValueError(f"rank must be given for a SURM adapter, 1..{most}")
    check_rank("rank", rank, most)
    if any(is_sharded(layer.factor(adapter_name)) for layer in layers.values()):
        raise ValueError("export_lora: sharded parameters (FSDP2) are not supported for SURM; gather the model first")
    found, errors = {}, []
    for name, layer in layers.items():
        delta = layer.dense_delta(adapter_name)
        U, S, V = torch.linalg.svd(delta, full_matrices=False)
        U, S, V = U[:, :rank], S[:rank].sqrt(), V[:rank]
        A, B = S[:, None] * V, U * S
        found[name] = ExportedLayer(A, B, len(A))  # alpha = rank makes LoRA's scale 1
        size = delta.norm()
        errors.append(((delta - B @ A).norm() / size).item() if size > 0 else 0.0)
    return Exported(found, rank, rank, config.surm_dropout, max(errors))


def _demo_config(settings, model: nn.Module, names: list[str], seed: int) -> SurmConfig:
    return SurmConfig(structure="circulant", target_modules=names)


register(
    Registration(
        name="surm",
        config=SurmConfig,
        tuner=SurmModel,
        layers=(CirculantLinear, ToeplitzLinear, KroneckerLinear, LdrLinear, SurmAdapterLinear),
        export=_export,
        contract={
            "surm": dict(structure="toeplitz"),
            "surm_kronecker": dict(structure="kronecker"),
            "surm_adapter": dict(kind="adapter"),
        },
        demo=Demo(
            "SURM, circulant",
            _demo_config,
            note="SURM trains other parameters than LoRA: a circulant matrix, two vectors, beside each weight",
        ),
    )
)
