"""Whether all processes of a distributed run made the same choices and hold the same adapters."""

import hashlib
from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import nn

from ..layers.sharded import is_sharded
from .schedule import members_of

# Calls of on_step whose choices are compared without being asked: what goes wrong, goes wrong from the start.
CHECKED_CALLS = 3
# Taken at a time into a checksum, which widens them eightfold.
CHECKSUM_BYTES = 1 << 22
ZERO3 = (
    "DeepSpeed ZeRO-3 is not supported: which parameters take part is fixed when it starts, and their values are not "
    "at hand between uses. Use DDP or FSDP2."
)


def _digest(values: Iterable) -> int:
    """63 bits of a hash of host values."""
    key = repr(tuple(values)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1


def _checksum(tensor: torch.Tensor) -> int:
    """Equal for equal bits."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, flat.numel(), CHECKSUM_BYTES):
        part = flat[start : start + CHECKSUM_BYTES].to(torch.int64)
        # Weighted by position, so that an exchange of two values shows; integers wrap around and so sum in any order.
        total += (part * torch.arange(start + 1, start + 1 + part.numel(), device=flat.device)).sum()
    return total.item()


def _compare(digests: dict[str, int], device: torch.device, remedy: str) -> None:
    """RuntimeError naming the keys under which the processes' digests differ."""
    mine = torch.tensor(list(digests.values()), dtype=torch.int64, device=device)
    # First whether they have the same keys: what does not line up must not be gathered.
    count = torch.tensor([len(digests), _digest(digests)], dtype=torch.int64, device=device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    if any(not torch.equal(other, counts[0]) for other in counts):
        raise RuntimeError("check_sync: the processes hold different adapters or layers")
    everyone = [torch.empty_like(mine) for _ in counts]
    dist.all_gather(everyone, mine)
    table = torch.stack(everyone).tolist()
    for position, name in enumerate(digests):
        column = [row[position] for row in table]
        if len(set(column)) > 1:
            odd = [rank for rank, value in enumerate(column) if value != column[0]]
            raise RuntimeError(f"check_sync: processes {odd} differ from process 0 in {name}. {remedy}")


def _device(model: nn.Module) -> torch.device:
    """Where the process group takes tensors."""
    if dist.get_backend() == "gloo":
        return torch.device("cpu")
    return next(parameter.device for parameter in model.parameters())


def _choices(found: dict[str, list]) -> dict[str, int]:
    return {f"what {name} chose": _digest(m.choices() for m in members) for name, members in found.items()}


_REMEDY = (
    "Every choice is a function of the adapter's configuration and of on_step's arguments: give all processes the "
    "same configuration, seed, step, micro, total_steps and epoch."
)


def check_first_steps(model: nn.Module, found: dict[str, list], arguments: tuple) -> None:
    """Compares the first calls of on_step for a model; costs nothing after those, or in a single process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    calls = _CALLS.get(model, 0)
    if calls < CHECKED_CALLS:
        _CALLS[model] = calls + 1
        _compare({"the arguments of on_step": _digest(arguments), **_choices(found)}, _device(model), _REMEDY)


_CALLS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def check_sync(model: nn.Module) -> None:
    """RuntimeError unless all processes hold the same trainable parameters and made the same scheduled choices.

    All processes call it, at the same point; it gathers a few numbers and synchronises with the device. on_step
    compares the choices by itself on its first calls. Sharded parameters (FSDP2), of which each process holds its own
    part, are left out. Without a process group it does nothing. TypeError if model is not a module.
    """
    found = members_of(model)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    device = _device(model)
    _compare(_choices(found), device, _REMEDY)
    parameters = {
        f"the values of {name}": _checksum(parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not is_sharded(parameter)
    }
    # Whether or not there are any: all processes have to come.
    _compare(parameters, device, "Start all processes from one checkpoint or seed, and give all the same updates.")


def refuse_zero3(model: nn.Module) -> None:
    """NotImplementedError if DeepSpeed ZeRO-3 has partitioned the model's parameters."""
    # ds_id marks a parameter that ZeRO-3 owns; between uses it is empty.
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise NotImplementedError(ZERO3)
