"""AFLoRA as a PEFT method: `get_peft_model(model, AfLoraConfig(...))`."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn

from ...layers.aflora import AfLoraAdapter, AfLoraLinear, AfLoraMember, AfLoraState, FreezingPolicy, draw_factors
from ...layers.checks import check_alpha, check_dropout, check_rank
from ...layers.sharded import whole
from .config import FusedConfig, by_pattern, check_names, check_pattern
from .export import Exported, ExportedLayer, refuse_rank
from .registration import Demo, FusedPeftType, Registration, register
from .tuner import EXTRA_STATE, FusedLayer, FusedTuner

__all__ = ["AfLoraConfig", "AfLoraModel"]

_BERT_LIKE = ("bert", "roberta", "xlm-roberta", "electra")
_LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
_FFN = ["intermediate.dense", "output.dense"]

# model type -> the paper's targets: all linear layers of an encoder, and of decoders those of its experiments on LLaMA.
TARGETS = {
    **{name: ["query", "key", "value", *_FFN] for name in _BERT_LIKE},
    "deberta": ["in_proj", *_FFN],
    "deberta-v2": ["query_proj", "key_proj", "value_proj", *_FFN],
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
    # Before and after transformers renamed them.
    "vit": ["query", "key", "value", *_FFN, "q_proj", "k_proj", "v_proj", "o_proj", "mlp.fc1", "mlp.fc2"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    **{name: ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"] for name in _LLAMA_LIKE},
}
# model type -> the attention's projections, whose matrices the paper does not train in encoders. On LLaMA it does.
ATTENTION = {
    **{name: ["query", "key", "value", "attention.output.dense"] for name in _BERT_LIKE},
    "deberta": ["in_proj", "pos_proj", "pos_q_proj", "attention.output.dense"],
    "deberta-v2": [
        "query_proj", "key_proj", "value_proj", "pos_query_proj", "pos_key_proj", "attention.output.dense",
    ],
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin"],
    "vit": ["query", "key", "value", "attention.output.dense", "q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn", "q_attn", "attn.c_proj", "crossattention.c_proj"],
}  # fmt: skip


@dataclass
class AfLoraConfig(FusedConfig):
    """Configuration of AFLoRA (Liu et al. 2024): y = x W^T + bias + scale * b . (B (d . (A drop(x)))).

    The vectors d [r] and b [N] always train. In encoders A and B of the attention stay as they were drawn
    (`frozen_modules`); the others are frozen one after another by `peft_fused.PeftFusedCallback` or
    `peft_fused.on_step`, which need the number of steps of the run; `peft_fused.freezing_history` tells when. Fields
    beside those of LoraConfig: d_initial, frozen_modules, and t_i, t_f, ramp, rule, beta1, beta2, window; see
    `peft_fused.layers.FreezingPolicy`. A checkpoint holds the state of the schedule; the optimizer of a resumed run is
    made, as Trainer does, of the parameters that then need gradients. Under DistributedDataParallel
    find_unused_parameters=True is needed, and no reentrant activation checkpointing. A model under torch.compile is
    compiled anew whenever something was frozen: compile it layer by layer, or raise
    torch._dynamo.config.recompile_limit. Raises TypeError or ValueError naming the field, the value and what is
    allowed.
    """

    fused_type: ClassVar = FusedPeftType.AFLORA

    r: int = field(default=4, metadata={"help": "Rank, 1..256."})
    lora_alpha: float | None = field(default=None, metadata={"help": "Scale lora_alpha / r. None: the scale is 1."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input, in [0, 1)."})
    rank_pattern: dict | None = field(default_factory=dict, metadata={"help": "Rank by module name."})
    alpha_pattern: dict | None = field(default_factory=dict, metadata={"help": "lora_alpha by module name."})
    d_initial: float = field(default=0.1, metadata={"help": "Start of the vector d."})
    frozen_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules whose A and B are frozen from the start: names or a regular expression. None: the "
            "attention's projections, where the model's type is known; [] for none."
        },
    )
    t_i: float | int = field(
        default=0.05, metadata={"help": "Nothing is frozen before: fraction of the run (float) or steps (int)."}
    )
    t_f: float | int = field(
        default=0.7, metadata={"help": "Everything is frozen for so long at the end: fraction (float) or steps (int)."}
    )
    ramp: str = field(default="cubic", metadata={"help": "How the frozen share grows: 'cubic' or 'quadratic'."})
    rule: str = field(
        default="paper", metadata={"help": "What is frozen: least scores first ('paper'), or as the program ('code')."}
    )
    beta1: float = field(default=0.85, metadata={"help": "Of the average of |gradient|, in [0, 1)."})
    beta2: float = field(default=0.95, metadata={"help": "Of the average of its change, in [0, 1)."})
    window: int = field(default=10, metadata={"help": "Steps averaged before the averages, and between decisions."})

    def __post_init__(self):
        super().__post_init__()
        check_rank("r", self.r)
        if self.lora_alpha is not None:
            check_alpha("lora_alpha", self.lora_alpha)
        check_dropout("lora_dropout", self.lora_dropout)
        check_alpha("d_initial", self.d_initial)
        self.rank_pattern = check_pattern("rank_pattern", self.rank_pattern, check_rank)
        self.alpha_pattern = check_pattern("alpha_pattern", self.alpha_pattern, check_alpha)
        self.frozen_modules = check_names("frozen_modules", self.frozen_modules, sorted)
        self.policy()

    def policy(self) -> FreezingPolicy:
        return FreezingPolicy(self.t_i, self.t_f, self.ramp, self.rule, self.beta1, self.beta2, self.window)

    def is_frozen(self, key: str) -> bool:
        """Whether the matrices of the module named key are frozen from the start; names match as target_modules do."""
        if isinstance(self.frozen_modules, str):
            return re.fullmatch(self.frozen_modules, key) is not None
        return any(key == name or key.endswith(f".{name}") for name in self.frozen_modules or ())


class Vectors(nn.Module):
    """The vectors of one adapter of one layer, d [r] between the matrices and b [N] on the output, and its scale."""

    def __init__(self, r: int, out_features: int, d_initial: float, scale: float):
        super().__init__()
        self.scale = scale
        self.d = nn.Parameter(torch.full((r,), float(d_initial)))
        self.b = nn.Parameter(torch.zeros(out_features))


class AfLoraPeftLinear(FusedLayer):
    """A linear layer with AFLoRA adapters: aflora_A [r, K], aflora_B [N, r] and aflora_vectors d [r], b [N]."""

    adapter_layer_names = ("aflora_A", "aflora_B", "aflora_vectors")
    other_param_names = ("aflora_state", "aflora_dropout")
    state_names = ("aflora_state",)
    linear_op = "lowrank_linear"

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register_load_state_dict_post_hook(_after_load)

    def update_layer(self, adapter_name: str, config: AfLoraConfig, key: str, init_weights: bool) -> None:
        r = by_pattern(config.rank_pattern, key, config.r)
        alpha = by_pattern(config.alpha_pattern, key, config.lora_alpha)
        A, B = nn.Linear(self.in_features, r, bias=False), nn.Linear(r, self.out_features, bias=False)
        draw_factors(A.weight, B.weight)
        vectors = Vectors(r, self.out_features, config.d_initial, 1.0 if alpha is None else alpha / r)
        if not init_weights:
            nn.init.normal_(vectors.b)
        self.aflora_A[adapter_name], self.aflora_B[adapter_name] = A, B
        self.aflora_vectors[adapter_name] = vectors
        self.aflora_state[adapter_name] = AfLoraState(
            r, (self.in_features, self.out_features), config.policy(), config.is_frozen(key), group=adapter_name
        )
        self.aflora_dropout[adapter_name] = nn.Dropout(config.lora_dropout)

    def adapter(self, name: str) -> AfLoraAdapter:
        block = self.block
        vectors = block("aflora_vectors", name)
        return AfLoraAdapter(
            block("aflora_A", name).weight, block("aflora_B", name).weight, vectors.d, vectors.b,
            block("aflora_state", name), vectors.scale, block("aflora_dropout", name),
        )  # fmt: skip

    def factor(self, name: str) -> torch.Tensor:
        return self.block("aflora_A", name).weight

    def schedule_members(self) -> list[AfLoraMember]:
        return [self.adapter(name).member() for name in self.aflora_state]

    def keep_frozen(self) -> None:
        """Takes the gradients of frozen matrices away again, after PEFT has switched those of whole adapters."""
        for name in self.aflora_state:
            self.adapter(name).keep_frozen()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode)
        self.keep_frozen()

    def set_requires_grad(self, adapter_names, requires_grad: bool = True) -> None:
        super().set_requires_grad(adapter_names, requires_grad)
        self.keep_frozen()

    def copy_adapter(self, source: str, target: str) -> None:
        super().copy_adapter(source, target)
        self.keep_frozen()


def _after_load(layer: AfLoraPeftLinear, incompatible_keys) -> None:
    layer.keep_frozen()


class AfLoraModel(FusedTuner):
    """The AFLoRA tuner, made by `get_peft_model` and PEFT's loaders."""

    prefix = "aflora_"
    tuner_layer_cls = AfLoraPeftLinear
    target_module_mapping: ClassVar = {**TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, **TARGETS}

    def _prepare_adapter_config(self, peft_config: AfLoraConfig, model_config: dict) -> AfLoraConfig:
        if peft_config.frozen_modules is None:
            peft_config.frozen_modules = list(ATTENTION.get(model_config.get("model_type"), ()))
        elif peft_config.frozen_modules and not self._has(peft_config.is_frozen):
            raise ValueError(f"frozen_modules must name modules of the model, got {peft_config.frozen_modules!r}")
        return super()._prepare_adapter_config(peft_config, model_config)

    @classmethod
    def _get_adapter_state_dict(cls, model, *args, **kwargs):
        found = super()._get_adapter_state_dict(model, *args, **kwargs)
        for name, module in model.named_modules():
            if isinstance(module, AfLoraState) and f"{name}.{EXTRA_STATE}" in found:
                found[f"{name}.{EXTRA_STATE}"] = module.unpadded(found[f"{name}.{EXTRA_STATE}"])
        return found

    def _has(self, matches: Callable[[str], bool]) -> bool:
        return any(matches(name) for name, _ in self.model.named_modules())


def _export(config: AfLoraConfig, layers: dict[str, AfLoraPeftLinear], adapter_name: str, rank: int | None) -> Exported:
    """Equal to the adapter, at its own rank: A and B take in the vectors."""
    refuse_rank("an AFLoRA", rank)
    found = {}
    for name, layer in layers.items():
        vectors = layer.aflora_vectors[adapter_name]
        A, B = whole(layer.aflora_A[adapter_name].weight), whole(layer.aflora_B[adapter_name].weight)
        d, b = whole(vectors.d), whole(vectors.b)
        found[name] = ExportedLayer(d.unsqueeze(1) * A, b.unsqueeze(1) * B, vectors.scale * len(d))
    alpha = config.r if config.lora_alpha is None else config.lora_alpha
    return Exported(found, config.r, alpha, config.lora_dropout)


# Its windows are of ten steps, in runs of thousands; in a run of a hundred that leaves three decisions.
DEMO_WINDOW, DEMO_WINDOWS = 10, 50


def _demo_config(settings, model: nn.Module, names: list[str], seed: int) -> AfLoraConfig:
    # The paper's matrices lie in the feed-forward blocks. Where they are not known, or others are asked for, these are
    # what is frozen by and by, rather than from the start as the attention's.
    known = settings.target_modules is None and model.config.model_type in TARGETS
    where = {} if known else dict(target_modules=names, frozen_modules=[])
    return AfLoraConfig(window=max(1, min(DEMO_WINDOW, settings.steps // DEMO_WINDOWS)), **where)


register(
    Registration(
        name="aflora",
        config=AfLoraConfig,
        tuner=AfLoraModel,
        layers=(AfLoraLinear,),
        export=_export,
        contract={"aflora": dict(r=3, t_i=1, t_f=7, window=1, frozen_modules=[])},
        # The paper's rate is 1e-2.
        demo=Demo("AFLoRA", _demo_config, rate=3.0),
    )
)
