"""Fused kernels that make parameter-efficient fine-tuning nearly free, and methods that PEFT does not ship.

    import peft_fused
    peft_fused.accelerate(model)                          # an existing PEFT LoRA model: same numbers, less time
    model = get_peft_model(model, peft_fused.DyLoraConfig(r=8, target_modules=["query", "value"]))

Importing this registers the methods with PEFT. It needs no GPU, no Triton and no C++ extension; `peft-fused env` says
what is missing and what that costs.
"""

import importlib
import importlib.util
import os
import sys
import warnings

__version__ = "0.1.0"

# Where names are that have not been imported below, by module. The Trainer callback pulls in the whole Trainer, so it
# waits for its first use.
_HOMES = {
    ".": ("layers", "methods", "ops"),
    ".ops.dispatch": ("explain", "use_backend"),
    ".methods": (
        "adamix_loss", "check_sync", "consistency_loss", "decay_groups", "evaluate_dylora_ranks", "freezing_history",
        "on_step", "set_adamix_pass", "set_dylora_rank", "set_adamix_routing",
    ),
    ".integrations.peft": (
        "AdaMixConfig", "AfLoraConfig", "DyLoraConfig", "RosaConfig", "SurmConfig", "copy_adapter", "export_lora",
        "merge_experts",
    ),
    ".integrations.peft.acceleration": ("accelerate", "restore"),
    ".integrations.transformers": ("AdaMixTrainerMixin", "PeftFusedCallback"),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}

# Our own command alone does without torch and PEFT, which are slow to import, until it needs them. Anyone else has the
# methods known to PEFT's loaders from here on.
_OWN_COMMAND = os.path.splitext(os.path.basename((getattr(sys, "argv", None) or [""])[0]))[0] == "peft-fused"
if not _OWN_COMMAND:
    from . import layers, methods, ops
    from .methods import (
        adamix_loss,
        check_sync,
        consistency_loss,
        decay_groups,
        evaluate_dylora_ranks,
        freezing_history,
        on_step,
        set_adamix_pass,
        set_adamix_routing,
        set_dylora_rank,
    )
    from .ops.dispatch import explain, use_backend

    if importlib.util.find_spec("peft") is not None:
        from .integrations.peft import (
            AdaMixConfig,
            AfLoraConfig,
            DyLoraConfig,
            RosaConfig,
            SurmConfig,
            copy_adapter,
            export_lora,
            merge_experts,
        )
        from .integrations.peft.acceleration import accelerate, restore

    # Whoever asks for a pure Python package knows what it lacks, and our command's reports say so themselves.
    if ops.native.not_built and os.environ.get("PEFT_FUSED_BUILD") != "off":
        warnings.warn(
            f"peft_fused has no C++ extension, which means {ops.native.COST}. {ops.native.REMEDY}. Where this is "
            "intended, PEFT_FUSED_BUILD=off in the environment keeps this warning away.",
            stacklevel=2,
        )

__all__ = [
    "AdaMixConfig",
    "AdaMixTrainerMixin",
    "AfLoraConfig",
    "DyLoraConfig",
    "PeftFusedCallback",
    "RosaConfig",
    "SurmConfig",
    "accelerate",
    "adamix_loss",
    "build_info",
    "check_sync",
    "consistency_loss",
    "copy_adapter",
    "decay_groups",
    "evaluate_dylora_ranks",
    "explain",
    "export_lora",
    "freezing_history",
    "layers",
    "merge_experts",
    "methods",
    "on_step",
    "ops",
    "restore",
    "set_adamix_pass",
    "set_adamix_routing",
    "set_dylora_rank",
    "use_backend",
]


def build_info() -> dict:
    """What the C++ extension was built for and whether it is in use; `why_not` says why if it is not."""
    from .ops import native

    return {"loaded": native.module is not None, "why_not": native.why_missing or None, **native.stamp}


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOME[name]
    try:
        found = importlib.import_module(f".{name}" if home == "." else home, __name__)
    except ModuleNotFoundError as error:
        raise AttributeError(f"peft_fused.{name} needs {error.name}: pip install {error.name}") from error
    globals()[name] = found if home == "." else getattr(found, name)
    return globals()[name]
