"""What the two processes run. Everything is float64, so that a different order of summation is no difference."""

import copy
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import contract
import torch
import torch.distributed as dist
from contract import Block, Net
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import peft_fused
from peft_fused.integrations.peft.acceleration.layer import AcceleratedLayer
from peft_fused.integrations.peft.tuner import FusedLayer

ROWS, STEPS, TOTAL = 8, 6, 12
DENSE = dict(modules_to_save=["head"])
# PEFT's LoRA, accelerated, and every variant of every method that its registration names.
METHODS = {"lora": lambda: LoraConfig(r=3, target_modules=contract.TARGETS, **DENSE)} | {
    variant.name: partial(variant.config, **DENSE) for variant in contract.VARIANTS
}
REGISTRATIONS = {variant.name: variant.method for variant in contract.VARIANTS}


def writes_base(method: str) -> bool:
    return method in REGISTRATIONS and REGISTRATIONS[method].writes_base


def build(method: str, seed: int = 0, **options) -> nn.Module:
    """The same in every process."""
    torch.manual_seed(7)
    model = Net()
    config = METHODS[method]()
    for name, value in options.items():
        setattr(config, name, value)
    if method != "lora":
        config.seed = seed
    model = get_peft_model(model, config)
    # From a start at zero a wrong adapter could pass for a right one.
    generator = torch.Generator().manual_seed(8)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "head" not in name and not writes_base(method):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    if method == "lora":
        peft_fused.accelerate(model)
    return model.train()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(ROWS, 5, contract.WIDTH, generator=generator), torch.randint(0, 4, (ROWS,), generator=generator)


def mine(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def train(model, method: str, part, steps=STEPS, accumulate: int = 1, start: int = 0, optimizer=None):
    """Trains on `part` of each batch. SGD with momentum: equal gradients give equal steps, and it has a state."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)
    for step in range(start, steps):
        for micro in range(accumulate):
            peft_fused.on_step(model, step=step, micro=micro, total_steps=TOTAL, epoch=step, optimizer=optimizer)
            x, labels = (part(t) for t in batch(step * accumulate + micro))
            own = REGISTRATIONS[method].demo.loss if method in REGISTRATIONS else None
            loss = model(x, labels)["loss"] if own is None else own(model, {"x": x, "labels": labels})[0]
            (loss / accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter by its name without wrappers, gathered where it is sharded."""
    return {name.removeprefix("module."): whole(p.detach()).clone() for name, p in model.named_parameters()}


def compare(found: dict, expected: dict, moved_from: dict) -> int:
    """How many tensors training has moved, all of them to where they were expected. AssertionError otherwise."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-9, rtol=1e-9, msg=lambda text, n=name: f"{n}: {text}")
    return sum(not torch.equal(value, moved_from[name]) for name, value in expected.items())


def frozen(model: nn.Module) -> int:
    """Parameters of adapters that no longer train."""
    layers = [module for module in model.modules() if isinstance(module, FusedLayer)]
    blocks = [layer._modules[each] for layer in layers for each in layer.adapter_layer_names]
    return sum(not p.requires_grad for block in blocks for p in block.parameters())


def single(method: str, **options):
    """(state before, state after, matrices frozen) of one process on the joint batches."""
    model = build(method)
    before = state(model)
    # Without the group, as a process of its own.
    with mock.patch.object(dist, "is_initialized", lambda: False):
        train(model, method, lambda t: t, **options)
    return before, state(model), frozen(model)


def ddp(method: str, find_unused: bool, accumulate: int = 1) -> dict:
    before, expected, frozen_single = single(method, accumulate=accumulate)
    model = build(method)
    wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
    train(wrapped, method, mine, accumulate=accumulate)
    moved = compare(state(wrapped), expected, before)
    peft_fused.check_sync(wrapped)
    assert frozen(model) == frozen_single
    return {"moved": moved, "frozen": frozen(model)}


def fsdp2(method: str, unit: str) -> dict:
    """unit: "parent" shards an adapted layer with its block, "own" makes it a unit of its own."""
    before, expected, frozen_single = single(method)
    model = build(method)
    shard(model, unit)
    train(model, method, mine)
    sharded = [n for n, p in model.named_parameters() if p.requires_grad and not hasattr(p, "full_tensor")]
    assert not sharded, sharded
    moved = compare(state(model), expected, before)
    peft_fused.check_sync(model)
    assert frozen(model) == frozen_single
    return {"moved": moved, "frozen": frozen(model)}


def shard(model: nn.Module, unit: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    units = blocks
    if unit == "own":
        units = [m for m in model.modules() if isinstance(m, FusedLayer | AcceleratedLayer)] + blocks
        assert len(units) > len(blocks)
    for module in units:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def saved_and_loaded(method: str, unit: str) -> float:
    """Largest difference of a sharded model from one that loads, without sharding, what it saved half-way."""
    model = build(method)
    shard(model, unit)
    optimizer = train(model, method, mine, steps=4)
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    x, _ = batch(50)
    model.eval()
    y = model(x)["logits"]
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder, src=0)
    if dist.get_rank() == 0:  # which alone was given the whole state
        model.save_pretrained(folder[0], state_dict=full)
    dist.barrier()
    torch.manual_seed(7)
    loaded = PeftModel.from_pretrained(Net(), folder[0], is_trainable=True)
    difference = (loaded.eval()(x)["logits"] - y).abs().max().item()
    assert Path(folder[0], "adapter_model.safetensors").is_file()
    assert (y - build(method).eval()(x)["logits"]).abs().max() > 1e-6
    del optimizer
    return difference


def other_seed_is_caught(method: str, wrap: str) -> str:
    """What on_step says when the processes were configured with different seeds."""
    model = build(method, seed=dist.get_rank())
    if wrap == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    else:
        shard(model, "parent")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    try:
        for step in range(3):  # two draws may agree by chance
            peft_fused.on_step(model, step=step, total_steps=TOTAL, epoch=step, optimizer=optimizer)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def other_total_is_caught() -> str:
    """What on_step says when the processes are told different lengths of the run."""
    model = build("aflora")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    try:
        peft_fused.on_step(model, step=0, total_steps=TOTAL + dist.get_rank(), optimizer=optimizer)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def one_trains_nothing() -> str:
    """What check_sync says when one process has frozen everything."""
    model = build("dylora")
    if dist.get_rank() == 1:
        model.requires_grad_(False)
    try:
        peft_fused.check_sync(model)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def strays_are_caught(what: str) -> str:
    """What check_sync says of a process that has left the others."""
    model = build("dylora")
    peft_fused.check_sync(model)
    stray = dist.get_rank() == 1
    if what == "value" and stray:
        parameter = next(p for n, p in model.named_parameters() if "dylora_B" in n)
        parameter.data.view(-1)[3] += 1e-12
    elif what == "rank":
        peft_fused.set_dylora_rank(model, 2 if stray else 3)
    elif what == "layers" and stray:
        next(p for n, p in model.named_parameters() if "dylora_B" in n).requires_grad_(False)
    try:
        peft_fused.check_sync(model)
    except RuntimeError as error:
        return str(error)
    return "nothing"


def subspaces_come_from_process_0() -> int:
    """How often this process decomposed a matrix while both resampled."""
    model = build("rosa")
    calls = []
    right = torch.linalg.svd

    def counted(*args, **kwargs):
        calls.append(1)
        return right(*args, **kwargs)

    with mock.patch.object(torch.linalg, "svd", counted):
        train(DistributedDataParallel(model), "rosa", mine, steps=5)
    peft_fused.check_sync(model)
    return len(calls)


def resumed(method: str) -> None:
    """A run under DDP continued from its adapter file after 3 of 6 steps equals the one that went through."""
    straight = build(method)
    train(DistributedDataParallel(straight, find_unused_parameters=True), method, mine, steps=STEPS)
    model = build(method)
    optimizer = train(DistributedDataParallel(model, find_unused_parameters=True), method, mine, steps=3)
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder, src=0)
    if dist.get_rank() == 0:
        model.save_pretrained(folder[0])
    dist.barrier()
    torch.manual_seed(7)
    again = PeftModel.from_pretrained(Net(), folder[0], is_trainable=True).train()
    names = {id(p): n for n, p in model.named_parameters()}
    momenta = {
        names[id(p)]: copy.deepcopy(value) for p, value in optimizer.state.items() if p.requires_grad and id(p) in names
    }
    parameters = {n: p for n, p in again.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for name, value in momenta.items():
        optimizer.state[parameters[name]] = value
    wrapped = DistributedDataParallel(again, find_unused_parameters=True)
    train(wrapped, method, mine, steps=STEPS, start=3, optimizer=optimizer)
    compare(state(again), state(straight), state(build(method)))


def refuses_static_reducer() -> str:
    """What on_step says of AFLoRA under a DDP that does not look for unused parameters."""
    model = DistributedDataParallel(build("aflora"), find_unused_parameters=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    try:
        peft_fused.on_step(model, step=0, total_steps=TOTAL, optimizer=optimizer)
    except ValueError as error:
        return str(error)
    return "nothing"
