"""Adapter layers: modules that own parameters, bind an op to a base layer, and know the dense weight change."""

from .adamix import AdaMixAdapter, AdaMixDelta, AdaMixLinear, RoutePolicy
from .aflora import AfLoraLinear, FreezingPolicy
from .dylora import DyLoraLinear, RankPolicy
from .lora import LoraLinear
from .rosa import RosaLinear, SubspacePolicy
from .structured import CirculantLinear, KroneckerLinear, LdrLinear, ToeplitzLinear
from .structured_maps import CirculantMap, KroneckerMap, LdrMap, MapSpec, SymmetricToeplitzMap, ToeplitzMap
from .surm_adapter import SurmAdapter, SurmAdapterLinear

__all__ = [
    "AdaMixAdapter",
    "AdaMixDelta",
    "AdaMixLinear",
    "AfLoraLinear",
    "CirculantLinear",
    "CirculantMap",
    "DyLoraLinear",
    "FreezingPolicy",
    "KroneckerLinear",
    "KroneckerMap",
    "LdrLinear",
    "LdrMap",
    "LoraLinear",
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
