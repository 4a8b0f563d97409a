"""ROSA as a plain PyTorch layer, and what any ROSA layer is made of.

ROSA, random subspace adaptation (Gamboa et al. 2024), moves a few singular directions of a weight into trainable
factors and leaves the rest frozen; the factors are drawn anew in the course of training. With the values A0, B0 that
the factors had when drawn, and the change `delta` learned before, what a layer computes with at any time is

    W = W0 + delta + B A - B0 A0

of which the base weight holds round(W0 + delta - B0 A0), computed in fp64 and rounded once, and the factors the rest.
W0 and the state that the change is made of are kept on the host: they are read when the factors are drawn and when the
base weight changes, and cost neither device memory nor, as buffers would, a broadcast per forward pass in DDP.
"""

from .linear import RosaLinear
from .subspace import SubspacePolicy

__all__ = ["RosaLinear", "SubspacePolicy"]
