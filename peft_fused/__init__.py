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

from .registry import METHODS

__version__ = "0.1.0"

# Floor -> what is offered of it here, beside what the methods add. The Trainer callback pulls in the whole Trainer, so
# it waits for its first use.
_HOMES = {
    "": ("layers", "methods", "ops"),
    "ops.dispatch": ("explain", "use_backend"),
    "methods": ("check_sync", "decay_groups", "on_step"),
    "integrations.peft": ("copy_adapter", "export_lora"),
    "integrations.peft.acceleration": ("accelerate", "restore"),
    "integrations.transformers": ("PeftFusedCallback",),
}
# Name -> the module that has it.
_HOME = {name: floor for floor, names in _HOMES.items() for name in names}
for _method, _floors in METHODS.items():
    _HOME |= {name: f"{floor}.{_method}" for floor, names in _floors.items() for name in names}


def _load(name: str):
    """Imports a name from where it is, and keeps it here."""
    home = _HOME[name]
    found = importlib.import_module(f".{home or name}", __name__)
    globals()[name] = found if home == "" else getattr(found, name)
    return globals()[name]


# Our own command alone does without torch and PEFT, which are slow to import, until it needs them. Anyone else has the
# methods known to PEFT's loaders from here on.
_OWN_COMMAND = os.path.splitext(os.path.basename((getattr(sys, "argv", None) or [""])[0]))[0] == "peft-fused"
if not _OWN_COMMAND:
    from . import ops

    _PEFT = importlib.util.find_spec("peft") is not None
    for _name, _home in _HOME.items():
        if not _home.startswith("integrations") or (_PEFT and _home.startswith("integrations.peft")):
            _load(_name)

    # Whoever asks for a pure Python package knows what it lacks, and our command's reports say so themselves.
    if ops.native.not_built and os.environ.get("PEFT_FUSED_BUILD") != "off":
        warnings.warn(
            f"peft_fused has no C++ extension, which means {ops.native.COST}. {ops.native.REMEDY}. Where this is "
            "intended, PEFT_FUSED_BUILD=off in the environment keeps this warning away.",
            stacklevel=2,
        )

__all__ = sorted(["build_info", *_HOME])


def build_info() -> dict:
    """What the C++ extension was built for and whether it is in use; `why_not` says why if it is not."""
    from .ops import native

    return {"loaded": native.module is not None, "why_not": native.why_missing or None, **native.stamp}


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return _load(name)
    except ModuleNotFoundError as error:
        raise AttributeError(f"peft_fused.{name} needs {error.name}: pip install {error.name}") from error


def __dir__():
    return sorted({*globals(), *__all__})
