"""Triton kernels of the low-rank adapter and the plans that choose their tiles.

`plan` and `dropout` import neither torch nor triton; `lowrank` needs both.
"""
