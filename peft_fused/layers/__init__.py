"""Adapter layers: modules that own parameters, bind an op to a base layer, and know the dense weight change."""

from .adamix import AdaMixAdapter, AdaMixDelta, AdaMixLinear, RoutePolicy
from .aflora import AFLoRALinear, FreezingPolicy
from .dylora import DyLoRALinear, RankPolicy
from .lora import LoRALinear
from .rosa import RosaLinear, SubspacePolicy
from .structured import CirculantLinear, KroneckerLinear, LDRLinear, ToeplitzLinear
from .structured_maps import CirculantMap, KroneckerMap, LDRMap, MapSpec, SymmetricToeplitzMap, ToeplitzMap
from .surm_adapter import SurmAdapter, SurmAdapterLinear

__all__ = [
    "AFLoRALinear",
    "AdaMixAdapter",
    "AdaMixDelta",
    "AdaMixLinear",
    "CirculantLinear",
    "CirculantMap",
    "DyLoRALinear",
    "FreezingPolicy",
    "KroneckerLinear",
    "KroneckerMap",
    "LDRLinear",
    "LDRMap",
    "LoRALinear",
    "MapSpec",
    "RankPolicy",
    "RosaLinear",
    "RoutePolicy",
    "SubspacePolicy",
    "SurmAdapter",
    "SurmAdapterLinear",
    "SymmetricToeplitzMap",
    "ToeplitzLinear",
    "ToeplitzMap",
]
