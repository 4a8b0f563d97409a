"""Adapter layers: modules that own parameters, bind an op to a base layer, and know the dense weight change."""

from .dylora import DyLoRALinear, RankPolicy
from .lora import LoRALinear
from .structured import CirculantLinear, KroneckerLinear, LDRLinear, ToeplitzLinear
from .structured_maps import CirculantMap, KroneckerMap, LDRMap, MapSpec, SymmetricToeplitzMap, ToeplitzMap
from .surm_adapter import SurmAdapter, SurmAdapterLinear

__all__ = [
    "CirculantLinear",
    "CirculantMap",
    "DyLoRALinear",
    "KroneckerLinear",
    "KroneckerMap",
    "LDRLinear",
    "LDRMap",
    "LoRALinear",
    "MapSpec",
    "RankPolicy",
    "SurmAdapter",
    "SurmAdapterLinear",
    "SymmetricToeplitzMap",
    "ToeplitzLinear",
    "ToeplitzMap",
]
