"""SURM as plain PyTorch layers: structured matrices beside a frozen linear map, or within a block on its output."""

from .adapter import SurmAdapter, SurmAdapterLinear
from .linear import CirculantLinear, KroneckerLinear, LdrLinear, ToeplitzLinear
from .maps import CirculantMap, KroneckerMap, LdrMap, MapSpec, SymmetricToeplitzMap, ToeplitzMap

__all__ = [
    "CirculantLinear",
    "CirculantMap",
    "KroneckerLinear",
    "KroneckerMap",
    "LdrLinear",
    "LdrMap",
    "MapSpec",
    "SurmAdapter",
    "SurmAdapterLinear",
    "SymmetricToeplitzMap",
    "ToeplitzLinear",
    "ToeplitzMap",
]
