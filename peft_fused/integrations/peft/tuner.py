"""What all our PEFT tuners share: target checks, the forward pass, exact merging, strict loading.

A method adds a config on the base class in `config.py`, a layer with `update_layer` and `adapter`, a tuner that names
them, and its registration; see `dylora.py` and `surm.py`.
"""

import copy
import warnings
from collections.abc import Container
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge, onload_layer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    PeftType,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...layers.adapted import NO_DELTA
from ...layers.checks import check_own_weight, check_tensor
from ...layers.replaced import ReplacedWeight, kept_through
from ...layers.route import CallBase, Route, Routed, Step
from ...layers.scheduled import EXTRA_STATE, ScheduleState, check_saved_with
from ...methods.sync import refuse_zero3
from .base import base_operands, execution_device, has_accelerate_hook
from .effective import EffectiveWeight
from .loading import (
    Snapshot,
    awaits_checkpoint,
    check_adapter_names,
    check_checkpoint,
    check_state_dict,
    check_tensors,
    forget_checkpoint,
    undo_injection,
)
from .quantised import is_packed, unpack
from .sharing import HeldMemory

NOT_ADDITIVE = f"is of kind 'adapter' and cannot be merged: {NO_DELTA}"


def check_target(module: nn.Module, key: str) -> None:
    """TypeError if a module cannot carry one of our adapters."""
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"target module {key!r} is part of torch.nn.MultiheadAttention, which reads its weight without calling it: "
            "an adapter would have no effect. Exclude it with exclude_modules."
        )
    backend = resolve_quantization_backend(module) if not _is_torchao(module) else None
    if isinstance(module, nn.Linear | Conv1D) or (backend is not None and backend.layer_type == "linear"):
        return
    raise TypeError(
        f"target module {key!r} is a {type(module).__name__}; allowed are torch.nn.Linear, transformers' Conv1D and "
        "the quantised linear layers that PEFT knows"
    )


def _is_torchao(module: nn.Module) -> bool:
    # Resolving its backend needs arguments that only the model has; such layers are torch.nn.Linear anyway.
    return isinstance(module, nn.Linear) and type(getattr(module, "weight", None)) not in (torch.Tensor, nn.Parameter)


def find_dropout(parent: nn.Module, names: list[str], key: str) -> str:
    """Which child of a target's parent the adapters of the target stand after. ValueError if none has such a name."""
    for name in names:
        module = parent._modules.get(name)
        if isinstance(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, nn.Dropout):
            return name
    found = [name for name, module in parent.named_children() if isinstance(module, nn.Dropout)]
    raise ValueError(
        f"after: beside target module {key!r} no torch.nn.Dropout is named {' or '.join(map(repr, names))}; its parent "
        f"has {found or 'none'}"
    )


class BaseLayer(CallBase):
    """The base layer, called with all arguments of the layer."""

    __slots__ = ("args", "kwargs")
    name = "base layer"

    def __init__(self, base: nn.Module, args: tuple, kwargs: dict):
        self.base, self.args, self.kwargs = base, args, kwargs

    def run(self, x: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        return self.base(x, *self.args, **self.kwargs)


class AddStep(Step):
    """An adapter's part, added to a result whose type may be another one than the adapter's."""

    __slots__ = ("adapter", "factor", "layer")

    def __init__(self, layer: "FusedLayer", name: str):
        self.layer, self.adapter, self.factor = layer, layer.adapter(name), layer.factor(name).dtype

    @property
    def name(self) -> str:
        return self.adapter.step(self.layer.typical_input()).name

    def run(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        adapter = self.adapter
        x = y if adapter.on_output else x
        autocast = torch.is_autocast_enabled(x.device.type)
        if (autocast or x.dtype == y.dtype) and mixes(self.factor, y.dtype):
            return adapter.step(x).run(x, y)
        # An input in another dtype than the output, as behind a norm kept in fp32 before a quantised layer.
        x = self._mixing(x)
        return (y + adapter.step(x).run(x, None)).to(y.dtype)

    def problem(self, x: torch.Tensor):
        if not torch.is_autocast_enabled(x.device.type):
            x = self._mixing(x)
        return self.adapter.step(x).problem(x)

    def _mixing(self, x: torch.Tensor) -> torch.Tensor:
        """An input that the ops combine with the adapter."""
        return x if mixes(self.factor, x.dtype) else x.to(self.factor)


def mixes(factor: torch.dtype, dtype: torch.dtype) -> bool:
    """Whether the ops combine an adapter with inputs of a dtype: it is the same one, or fp32 beside a half."""
    return factor == dtype or (factor == torch.float32 and dtype.itemsize == 2)


class FusedLayer(Routed, nn.Module, BaseTunerLayer):
    """A linear layer with our adapters. Subclasses name their containers, which become ModuleDicts keyed by adapter
    name, in `adapter_layer_names` and `other_param_names`, and define:

    update_layer(adapter_name, config, key, init_weights): creates an adapter by its config for the module named key,
    as one that changes nothing, or else with random values to tell it from one whose weights a checkpoint had.
    adapter(adapter_name): it, as the plain layers have it: with `step(x)`, its part in a forward pass; `delta()`, its
    change of the weight, [N, K], in fp32; `is_zero()`, whether it is as it was made, and so changes nothing; on_output.
    factor(adapter_name): one of its parameters, whose dtype and device all share.
    linear_op, linear_step(adapter_name, x): the op that computes base and adapter in one, and the part in that, whose
    `weight` and `bias` are set. None if there is no such op: then the base layer is called, and the adapter added.
    linear_operands(adapter_name): may be extended, by why that op cannot run with an adapter.
    """

    linear_op: str | None = None
    # In the model that it was made for, for messages.
    module_name: str = ""
    # Of other_param_names, those that hold what a schedule keeps for a resumed run, as the extra state of a module that
    # defines problem_with(state), state being None where a checkpoint has none.
    state_names: tuple[str, ...] = ()

    def __init__(self, base_layer: nn.Module, adapter_name: str, config, key: str, **options):
        super().__init__()
        for container in self.adapter_layer_names + self.other_param_names:
            setattr(self, container, nn.ModuleDict())
        self.base_layer = base_layer
        self.merged_adapters = []
        self._unmerged = None
        # By name, whether PEFT casts the adapter to fp32 where it has a half-precision type.
        self.autocasts: dict[str, bool] = {}
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=options.pop("get_apply_tensor_subclass", None)
        )
        # What has the sizes: the base layer, or, where that is a dropout, the layer before it.
        sized = options.pop("sized", self.get_base_layer())
        self.transposed = isinstance(sized, Conv1D)
        self.in_features, self.out_features = self.sizes(sized)
        self._made_for = sized.weight.device, sized.weight.dtype
        self._active_adapter = adapter_name
        self.add_adapter(adapter_name, config, key)

    @staticmethod
    def sizes(base: nn.Module) -> tuple[int, int]:
        """(input, output) features of a base layer."""
        return tuple(base.weight.shape) if isinstance(base, Conv1D) else (base.in_features, base.out_features)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module):
        if isinstance(base_layer, nn.Dropout):
            device, dtype = self._made_for
            return next((p.device for p in self.parameters()), device), dtype
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is not None and device.type == "meta" and has_accelerate_hook(base_layer):
            device = execution_device(base_layer) or device
        return device, dtype

    def add_adapter(self, adapter_name: str, config, key: str) -> None:
        """An adapter by its config, where the base layer is; key: the layer's name in its model."""
        self.autocasts.pop(adapter_name, None)
        # Weights about to be loaded need no random start; if they then do not fit, it is seen that none were lost.
        self.update_layer(adapter_name, config, key, config.init_weights or awaits_checkpoint(config))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def update_layer(self, adapter_name: str, config, key: str, init_weights: bool) -> None:
        raise NotImplementedError

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if not self.keeps_dtype(adapter_name):  # PEFT's also casts to the base's type
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)
            return
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        for container in self.adapter_layer_names + self.other_param_names:
            block = self._modules[container]._modules.get(adapter_name)
            if device is not None and block is not None and not any(p.is_meta for p in block.parameters()):
                block.to(device)

    def keeps_dtype(self, adapter_name: str) -> bool:
        """Whether moving an adapter leaves its type: what low_cpu_mem_usage has loaded, and PEFT casts to fp32 after it
        has moved it, would have been rounded in between."""
        return self.autocasts.get(adapter_name, False)

    def block(self, container: str, adapter_name: str) -> nn.Module:
        """What a container holds of an adapter, found without the detour of attributes, which costs a microsecond."""
        return self._modules[container]._modules[adapter_name]

    def adapter(self, adapter_name: str):
        raise NotImplementedError

    def linear_step(self, adapter_name: str, x: torch.Tensor) -> Step:
        return self.adapter(adapter_name).step(x)

    def on_output(self, adapter_name: str) -> bool:
        """Whether an adapter works on the layer's output: not linear in the weight, it cannot be merged."""
        return self.adapter(adapter_name).on_output

    def factor(self, adapter_name: str) -> torch.Tensor:
        """One of an adapter's parameters."""
        return self.adapter(adapter_name).factor()

    def is_untouched(self, adapter_name: str) -> bool:
        """Whether an adapter is as it was made, and so changes nothing."""
        return adapter_name not in self.adapters_here() or self.adapter(adapter_name).is_zero()

    def dense_delta(self, adapter_name: str) -> torch.Tensor:
        """An adapter's change of the weight, [N, K], in fp32."""
        return self.adapter(adapter_name).delta()

    def adapters_here(self) -> nn.ModuleDict:
        """The first container, whose keys are the names of the adapters that this layer has."""
        return self._modules[self.adapter_layer_names[0]]

    def adapters_in_use(self) -> list[str]:
        """The active adapters that this layer has."""
        here = self.adapters_here()
        return [name for name in self.active_adapters if name in here]

    @property
    def weight(self) -> torch.Tensor:
        """For modules that read the weight instead of calling the layer: the base weight with the active adapters."""
        weight = super().weight
        applies = not self.disable_adapters and not self.merged and self.adapters_in_use()
        if not applies or not weight.is_floating_point():  # a packed weight is of use to its own layer only
            return weight
        # A compiler sees from the graph whether the value is needed.
        return self.effective_weight() if torch.compiler.is_compiling() else EffectiveWeight(self)

    def effective_weight(self) -> torch.Tensor:
        """Base weight and active adapters, in the shape and dtype of the base weight, with gradients for the adapters.

        RuntimeError if one works on the output, or differently on the rows of a batch: no weight expresses that.
        """
        weight = self.get_base_layer().weight
        names = self.adapters_in_use()
        for name in names:
            if reason := self.reason_against_weight(name):
                raise RuntimeError(
                    f"the weight of {self.module_name!r} was read by a module that does not call the layer, but its "
                    f"adapter {name!r} {reason}; leave this layer out with exclude_modules"
                )
        with torch.autocast(weight.device.type, enabled=False):
            # The forward of each on every unit vector: whatever rank, expert or dropout is in use now.
            wide = self.factor(names[0]).dtype
            units = torch.eye(self.in_features, dtype=wide, device=weight.device)
            delta = sum(self._change(name, units.to(self.factor(name).dtype)).to(wide) for name in names)
            return (weight + (delta if self.transposed else delta.t())).to(weight.dtype)

    def _change(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """What an adapter adds to the result on x."""
        return self.adapter(adapter_name).step(x).run(x, None)

    def reason_against_weight(self, adapter_name: str) -> str | None:
        """Why no weight has an adapter's effect, as the end of a sentence; None if one has."""
        return NOT_ADDITIVE if self.on_output(adapter_name) else None

    def follow_mode(self, adapter_name: str) -> None:
        """Puts an adapter added to a layer in use into the layer's mode, training or evaluation."""
        for container in self.adapter_layer_names + self.other_param_names:
            self._modules[container][adapter_name].train(self.training)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        check_tensor(x)
        if self.quantization_backend is not None and x.requires_grad:
            unpack(self.get_base_layer())
        if self.disable_adapters and self.merged:
            with onload_layer(self):
                self.unmerge()
        names = self._names_to_run()
        if names and self.is_offloaded(names):
            with self.onloaded(names):
                return self._route(names, x, args, kwargs).run(x)
        return self._route(names, x, args, kwargs).run(x)

    def route(self, x: torch.Tensor) -> Route:
        """What `forward` runs on x: see layers/route.py."""
        return self._route(self._names_to_run(), x, (), {})

    def _names_to_run(self) -> list[str]:
        """The adapters that a forward pass adds to the base layer."""
        return [] if self.disable_adapters or self.merged else self.adapters_in_use()

    def _route(self, names: list[str], x: torch.Tensor, args: tuple, kwargs: dict) -> Route:
        base = self._modules["base_layer"]  # which torch.nn.Module itself takes ten times as long to find
        if not names:
            state = "disabled" if self.disable_adapters else "merged" if self.merged else "not active in this layer"
            against = (self.linear_op or "adapter op", f"the adapters are {state}")
            return Route((BaseLayer(base, args, kwargs),), (against,))
        if self.linear_op is None:
            return Route([BaseLayer(base, args, kwargs), *(AddStep(self, name) for name in names)])
        reason = "the base layer is called with more than x" if args or kwargs else ""
        operands = reason or self.linear_operands(names[0])
        if type(operands) is str:
            steps = [BaseLayer(base, args, kwargs), *(AddStep(self, name) for name in names)]
            return Route(steps, [(self.linear_op, operands)])
        step = self.linear_step(names[0], x)
        step.weight, step.bias = operands
        return Route([step, *(AddStep(self, name) for name in names[1:])])

    def linear_operands(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor | None] | str:
        """(weight [N, K], bias) for one op with the adapter, or a str: why the base layer has to be called."""
        operands = base_operands(self._modules["base_layer"])
        if type(operands) is not str and not mixes(self.factor(adapter_name).dtype, operands[0].dtype):
            return "the adapter's dtype is neither the base weight's nor float32 beside a half-precision base"
        return operands

    def typical_input(self, rows: int = 1) -> torch.Tensor:
        """An input [rows, K] in the dtype of the base layer."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        dtype = dtype if dtype.is_floating_point else torch.bfloat16  # a quantised weight does not tell
        names = self._names_to_run()
        device = self.factor(names[0]).device if names else device
        return torch.empty(1, self.in_features, device=device, dtype=dtype).expand(rows, -1)

    def is_offloaded(self, names: list[str]) -> bool:
        """Whether accelerate's hooks may hold parameters of these adapters elsewhere until their modules are called."""
        return self.factor(names[0]).is_meta or has_accelerate_hook(self.base_layer)

    @contextmanager
    def onloaded(self, names: list[str]):
        """Runs those hooks, as calling the modules would: the ops read parameters without calling modules."""
        blocks = (self._modules[each][name] for name in names for each in self.adapter_layer_names)
        hooked = [module for block in blocks for module in block.modules() if has_accelerate_hook(module)]
        for module in hooked:
            module._hf_hook.pre_forward(module)
        try:
            yield
        finally:
            for module in hooked:
                module._hf_hook.post_forward(module, None)

    def get_base_weight(self) -> torch.Tensor:
        """The base layer's weight, dequantised."""
        base = self.get_base_layer()
        if is_packed(base):
            base = copy.deepcopy(base)  # this one computes on as it did
            unpack(base)
            return self.quantization_backend.get_base_weight(base)
        return super().get_base_weight()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters to the base weight: summed in fp32 and rounded once per call, to the weight's dtype.

        What `unmerge` puts back is kept: the weight, on the host, or for a quantised layer the whole layer. safe_merge:
        ValueError, and an unchanged weight, if the result is not finite. adapter_names: None means the active ones.
        Raises ValueError for an adapter that no weight can express.
        """
        names = self.to_merge(adapter_names)
        if not names:
            return
        for name in names:
            self._check_additive(name)
        with torch.no_grad():
            merged = self.merged_weight(names)
            if safe_merge:
                self.check_finite(merged, names)
            if self.quantization_backend is None:
                weight = self.get_base_layer().weight
                if self._unmerged is None:
                    self._unmerged = ReplacedWeight(weight)
                else:
                    self.check_unmerge()
                weight.data.copy_(merged)
                self._unmerged.note(weight)
            else:
                # Quantising again would not give back the old layer, so a copy is merged and the original is put aside.
                if self._unmerged is None:
                    self._unmerged = (self.base_layer,)
                    self.base_layer = copy.deepcopy(self.base_layer)
                self.set_base_weight(merged)
        self.merged_adapters.extend(names)

    def to_merge(self, adapter_names: list[str] | None) -> list[str]:
        """Those of some adapters, or of the active ones, that this layer has and that are not merged."""
        return [name for name in check_adapters_to_merge(self, adapter_names) if name in self.adapters_here()]

    @torch.no_grad()
    def merged_weight(self, names: list[str]) -> torch.Tensor:
        """The base weight with these adapters, in its layout and dtype."""
        weight = self.get_base_weight()
        with torch.autocast(weight.device.type, enabled=False):
            delta = sum(self.dense_delta(name) for name in names)
        return (weight.to(delta.dtype) + (delta.t() if self.transposed else delta)).to(weight.dtype)

    def check_finite(self, merged: torch.Tensor, names: list[str]) -> None:
        """ValueError if the weight with these adapters is not finite."""
        if not torch.isfinite(merged).all():
            raise ValueError(
                f"safe_merge: the weight of {self.module_name!r} merged with {names} is not finite; nothing was merged"
            )

    def check_merge(self, memory: HeldMemory) -> None:
        """ValueError if merging would also change another module, or be undone by what computes the weight."""
        base = self.get_base_layer()
        if self.quantization_backend is not None:
            return
        check_own_weight(f"cannot merge into {self.module_name!r}:", base, ValueError)
        if others := memory.other_holders(base):
            raise ValueError(
                f"cannot merge into {self.module_name!r}, which shares its weight with {', '.join(map(repr, others))}: "
                "merging would change both. Untie them first: give one a copy of the weight as a new "
                "torch.nn.Parameter, and set tie_word_embeddings=False in the model's config where that tied them"
            )

    def unmerge(self) -> None:
        """Puts back, bit for bit, what `merge` replaced, whatever became of the adapters or their ranks since.

        RuntimeError if something else has written to the weight since: see `ReplacedWeight`.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self.quantization_backend is None:
            self.check_unmerge()
            with torch.no_grad():
                self.get_base_layer().weight.data.copy_(self._unmerged.values)
        else:
            self.base_layer = self._unmerged[0]
        self._unmerged = None
        self.merged_adapters = []

    def check_unmerge(self) -> None:
        """RuntimeError if something else has written to the merged weight."""
        if isinstance(self._unmerged, ReplacedWeight):
            self._unmerged.check(self.get_base_layer().weight, repr(self.module_name))

    def _apply(self, fn, recurse=True):
        replaced = self._unmerged if isinstance(self._unmerged, ReplacedWeight) else None
        with kept_through(replaced, lambda: self.get_base_layer().weight):
            return super()._apply(fn, recurse)

    def _check_additive(self, name: str) -> None:
        if self.on_output(name):
            raise ValueError(f"adapter {name!r} {NOT_ADDITIVE}")

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The adapter's change of the base weight, in the layout of that weight, fp32. ValueError if it has none."""
        self._check_additive(adapter)
        delta = self.dense_delta(adapter)
        return delta.t() if self.transposed else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return adapter_name not in self.adapters_here() or not self.on_output(adapter_name)

    def release(self) -> None:
        """Leaves the base layer as it was found, for use without this layer."""

    def check_state(self, adapter_name: str, tensors: dict[str, torch.Tensor]) -> None:
        """ValueError if a checkpoint's tensors under `state_names` are none that this adapter's state could hold.

        tensors: keyed "<container>.<name>"; empty where the checkpoint has none.
        """
        for container in self.state_names:
            state = self._modules[container][adapter_name]
            problem = state.problem_with(tensors.get(f"{container}.{EXTRA_STATE}"))
            if unknown := sorted(tensors.keys() - {f"{each}.{EXTRA_STATE}" for each in self.state_names}):
                problem = f"must not have {unknown}"
            if problem:
                raise ValueError(
                    f"the checkpoint does not fit adapter {adapter_name!r}; nothing was loaded. {container} of "
                    f"{self.module_name!r} {problem}"
                )

    def check_complete(self, prefix: str, keys: Container[str]) -> None:
        """ValueError if a state dict has parameters of an adapter without the state that gives them a meaning.

        prefix: of this layer's keys in the state dict.
        """
        for name in self.adapters_here() if self.state_names else ():
            parameters = [
                f"{prefix}{container}.{name}.{key}"
                for container in self.adapter_layer_names
                for key, _ in self._modules[container][name].named_parameters()
            ]
            for container in self.state_names:
                check_saved_with(parameters, self._modules[container][name], f"{prefix}{container}.{name}", keys)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.check_complete(prefix, state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def copy_adapter(self, source: str, target: str) -> None:
        """Makes an adapter of this layer what another is, its parameters in place."""
        for container in self.adapter_layer_names + self.other_param_names:
            blocks = self._modules[container]
            blocks[target].load_state_dict(blocks[source].state_dict())
            for mine, other in zip(blocks[target].modules(), blocks[source].modules(), strict=True):
                if isinstance(mine, ScheduleState):
                    mine.follow_state(other)

    def fit_state(self, adapter_name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Takes over a state that `check_state` let pass: what is then loaded can fail no more."""
        for key, tensor in tensors.items():
            self._modules[key.partition(".")[0]][adapter_name].set_extra_state(tensor)


class FusedTuner(BaseTuner):
    """Base of our tuners. Subclasses set `prefix` and `tuner_layer_cls`."""

    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    # (adapter, what to put back) while weights are about to be loaded into that adapter.
    before_load: tuple[str, Snapshot] | None = None

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        """As PEFT's, but a failure leaves the model as it was."""
        before, config = Snapshot(self), self.peft_config[adapter_name]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            check_checkpoint(model, config, adapter_name)
            check_adapter_names(model)
        except Exception:
            before.restore()
            raise
        # A config that the user read and passed on is known by its inference_mode, which get_peft_model leaves off.
        loading = awaits_checkpoint(config) or config.inference_mode
        self.before_load = (adapter_name, before) if loading else None

    def _check_target_module_compatiblity(self, peft_config, model, target_name):
        # PEFT makes this check for methods that it knows by name; ours meet the same modules as its LoRA.
        as_lora = copy.copy(peft_config)
        as_lora.peft_type = PeftType.LORA
        try:
            super()._check_target_module_compatiblity(as_lora, model, target_name)
        except ValueError as error:
            raise ValueError(f"{peft_config.peft_type.value}, as LoRA: {error}") from error

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # All layers before the first one loads anything.
        for name, layer in self.named_modules(prefix=prefix.rstrip(".")):
            if isinstance(layer, FusedLayer):
                layer.check_complete(f"{name}.", state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def layer_cls_for(self, base: nn.Module, config, key: str) -> type:
        """The class that adapts a target. TypeError if none does."""
        check_target(base, key)
        return self.tuner_layer_cls

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        if merge:
            self._check_merge(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def unmerge_adapter(self) -> None:
        """As PEFT's, but in the reverse order of merging, and not at all if one layer cannot be."""
        layers = [module for module in reversed(list(self.model.modules())) if isinstance(module, BaseTunerLayer)]
        last = {}  # of several around one weight the one merged last
        for layer in layers:
            if isinstance(layer, FusedLayer) and layer.merged:
                last.setdefault(id(layer.get_base_layer()), layer)
        for layer in last.values():
            with onload_layer(layer):
                layer.check_unmerge()
        for layer in layers:
            with onload_layer(layer):
                layer.unmerge()

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """ValueError naming the layer, before any is merged, if one cannot be, or for safe_merge not finitely."""
        self._check_additive(adapter_names)
        memory = HeldMemory(self.model)
        for layer in self.model.modules():
            if isinstance(layer, FusedLayer) and (names := layer.to_merge(adapter_names)):
                layer.check_merge(memory)
                if safe_merge:
                    with onload_layer(layer):
                        layer.check_finite(layer.merged_weight(names), names)

    def _layers(self) -> list[FusedLayer]:
        return [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self._layers():
            layer.autocasts[adapter_name] = autocast_adapter_dtype

    def train(self, mode: bool = True):
        super().train(mode)
        if mode and getattr(self.model, "is_loaded_in_4bit", False):
            # Packed in evaluation, they would return no gradient to what comes before them; adapted or not.
            for module in self.modules():
                unpack(module)
        return self

    def _check_additive(self, adapter_names: list[str] | None) -> None:
        """ValueError, before any layer is merged, if an adapter to merge is of a kind that no weight can express."""
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if getattr(self.peft_config.get(name), "kind", None) == "adapter":
                raise ValueError(f"adapter {name!r} {NOT_ADDITIVE}")

    def _prepare_model(self, peft_config, model):
        refuse_zero3(model)
        if (getattr(model, "_tp_size", None) or 1) > 1:
            raise NotImplementedError(
                f"{peft_config.peft_type.value} does not support tensor-parallel models; load the model without tp_plan"
            )

    def _create_and_replace(
        self, peft_config, adapter_name, target, target_name, parent, current_key, parameter_name=None
    ):
        layer_key = current_key
        made = get_quantization_kwargs(self)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        wrapped = isinstance(target, self.tuner_layer_cls)
        layer_cls = self.tuner_layer_cls
        if not wrapped:
            layer_cls = self.layer_cls_for(base, peft_config, current_key)
        if after := getattr(peft_config, "after", None):
            target_name = find_dropout(parent, after, current_key)
            target, made = getattr(parent, target_name), made | {"sized": base}
            wrapped = isinstance(target, self.tuner_layer_cls)
            current_key = f"{current_key.rpartition('.')[0]}.{target_name}".lstrip(".")
        try:
            if wrapped:
                target.add_adapter(adapter_name, peft_config, layer_key)
                target.follow_mode(adapter_name)
                return
            layer = layer_cls(target, adapter_name, peft_config, layer_key, **made)
            layer.module_name = current_key
        except ValueError as error:  # options that do not fit this layer's sizes, which do not know its name
            raise ValueError(f"target module {current_key!r}: {error}") from error
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent, child_name, new_module, child):
        # PEFT's gives the module what the replaced one has as its weight: of a module in modules_to_save that is none,
        # where it is made of several, or the original's, where the adapters are disabled. A dropout has none. And
        # PEFT's moves the adapters to the device of the weight, which under accelerate's hooks may be none (meta).
        weightless = isinstance(child, AuxiliaryTrainingWrapper) or nn.Dropout in map(type, (child, new_module))
        if weightless or has_accelerate_hook(child):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            raise NotImplementedError(
                f"{type(self).__name__} does not support adapter_names, one adapter per sample; use set_adapter, or "
                "export the adapters to LoRA"
            )
        yield

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT's looks for it in the last two places only; an adapter may be a module of modules.
        for container in cls.tuner_layer_cls.adapter_layer_names + cls.tuner_layer_cls.state_names:
            layer, found, name = key.rpartition(f".{container}.{adapter_name}.")
            if found:
                return f"{layer}.{container}.{name}"
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        try:
            check_tensors("the state dict", state_dict)
            remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
            if len(remapped) < len(state_dict):
                raise ValueError("the checkpoint has tensors twice, with and without the adapter's name in theirs")
            states = check_state_dict(model, cls.prefix, adapter_name, remapped)
            for layer, tensors in states:
                layer.check_state(adapter_name, tensors)
        except Exception:
            undo_injection(model, adapter_name)
            raise
        for layer, tensors in states:
            layer.fit_state(adapter_name, tensors)
        forget_checkpoint(model, config)
        # With low_cpu_mem_usage PEFT puts the tensors of the file in the place of parameters, instead of copying them.
        own = model.state_dict()
        return {key: t.detach().to(own[key].dtype).contiguous() if key in own else t for key, t in remapped.items()}
