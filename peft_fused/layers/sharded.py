"""Parameters of which each process holds a part: DTensors, as FSDP2 makes them."""

import torch


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, detached; collective for a sharded one."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, in its memory: to be read, or written to behind autograd."""
    return tensor.detach().to_local().data if is_sharded(tensor) else tensor.data


def shard(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor that all processes have, sharded as `like`."""
    if not is_sharded(like):
        return full
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.contiguous(), like.device_mesh, like.placements, src_data_rank=None)


def part_of(full: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that all have, sharded as `like`."""
    return local(shard(full, like)) if is_sharded(like) else full
