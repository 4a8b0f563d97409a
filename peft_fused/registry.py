"""The methods. This alone names them: each is found by its name, and whatever lists methods reads it from here.

A method has, on every floor where there is something of it, a module or a package of its name: its plain layers in
`layers`, its schedule in `methods`, its PEFT tuner and its registration, which says all that tools and tests need to
know of it, in `integrations.peft`. What `__all__` of such a module lists, the floor offers.
"""

import importlib
import importlib.util
import sys

# Method -> floor -> what `peft_fused` itself offers of it.
METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    "dylora": {"methods": ("evaluate_dylora_ranks", "set_dylora_rank"), "integrations.peft": ("DyLoraConfig",)},
    "surm": {"integrations.peft": ("SurmConfig",)},
    "adamix": {
        "methods": ("adamix_loss", "consistency_loss", "set_adamix_pass", "set_adamix_routing"),
        "integrations.peft": ("AdaMixConfig", "merge_experts"),
        "integrations.transformers": ("AdaMixTrainerMixin",),
    },
    "aflora": {"methods": ("freezing_history",), "integrations.peft": ("AfLoraConfig",)},
    "rosa": {"integrations.peft": ("RosaConfig",)},
}


def offer(floor: str) -> list[str]:
    """Imports the methods' modules in a package and puts what they offer into it. Returns the names, in order."""
    package, names = sys.modules[floor], []
    for method in METHODS:
        if importlib.util.find_spec(f"{floor}.{method}") is not None:
            module = importlib.import_module(f"{floor}.{method}")
            vars(package).update({name: getattr(module, name) for name in module.__all__})
            names += module.__all__
    return sorted(names)
