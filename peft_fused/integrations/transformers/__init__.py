"""What a transformers Trainer needs of the methods."""

from ...registry import offer
from .callback import PeftFusedCallback

__all__ = ["PeftFusedCallback", *offer(__name__)]
