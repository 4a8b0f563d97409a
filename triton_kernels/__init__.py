"""Triton kernels of the adapters and the plans that choose their tiles.

The modules named `plan` or `*_plan`, and `dropout`, import neither torch nor triton; the others need both.
"""
