"""Dropout masks that are a function of a seed and a position, identical on every backend.

Source: Salmon et al. 2011, Philox-4x32, here with 7 rounds (the fewest that pass BigCrush): on a GPU the ten rounds of
the usual generator would cost more time than the memory traffic of the kernel they sit in. Element (m, k) of a 2-D
input takes 16 bits of the block with counter (k // 8, m, 0, 0) and the seed as key: word (k % 8) // 2, low half for
even k. It is kept when they are at least `threshold`. The mask needs no storage: forward, backward and a recomputed
forward derive it again. `triton_kernels/philox.py` and `csrc/kernels/philox.h` are the same function.
"""

import torch

from ..triton_kernels.dropout import dropout_threshold, keep_scale
from . import native

__all__ = ["draw_seed", "drop", "dropout_threshold", "keep_mask", "keep_scale"]

ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_BLOCK = 8


def draw_seed(device: torch.device, shape: tuple[int, ...] = ()) -> torch.Tensor:
    """0-d int64 seed, or seeds of a shape, from torch's own generator of the device: replayed by activation
    checkpointing and CUDA graphs."""
    return torch.randint(0, 2**63 - 1, shape, dtype=torch.int64, device=device)


def keep_mask(seed: torch.Tensor, rows: int, columns: int, threshold: int, first_row: int = 0) -> torch.Tensor:
    """Boolean [rows, columns], True where an element is kept; row i stands for row first_row + i of the input.

    seed: 0-d int64 tensor; threshold: see `dropout_threshold`.
    """
    device = seed.device
    blocks = -(-columns // _BLOCK)
    # Unsigned 32-bit words are kept in int64; a 32x32-bit product still overflows its sign, which the masks repair.
    words = [
        torch.arange(blocks, device=device).expand(rows, blocks),
        torch.arange(first_row, first_row + rows, device=device).unsqueeze(1).expand(rows, blocks),
        torch.zeros((), dtype=torch.int64, device=device),
        torch.zeros((), dtype=torch.int64, device=device),
    ]
    keys = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(ROUNDS):
        product0, product1 = words[0] * _MULTIPLIERS[0], words[2] * _MULTIPLIERS[1]
        words = [
            ((product1 >> 32) & _WORD) ^ words[1] ^ keys[0],
            product1 & _WORD,
            ((product0 >> 32) & _WORD) ^ words[3] ^ keys[1],
            product0 & _WORD,
        ]
        keys = [(key + weyl) & _WORD for key, weyl in zip(keys, _WEYL, strict=True)]
    halves = [part for word in words for part in (word & 0xFFFF, word >> 16)]
    return (torch.stack(halves, -1) >= threshold).reshape(rows, blocks * _BLOCK)[:, :columns]


def drop(x: torch.Tensor, seed: torch.Tensor, threshold: int, first_row: int = 0) -> torch.Tensor:
    """x [rows, columns], dropped elements zero and kept ones scaled by 1 / (1 - threshold / 65536), in x's dtype."""
    if native.module is not None and x.device.type == "cpu":
        return native.module.drop(x, seed, threshold, first_row)
    return x * keep_mask(seed, *x.shape, threshold, first_row) * keep_scale(threshold)
