"""Damaged checkpoints of every method: each is loaded as it stands, or refused by name with the model as it was.

PEFT_FUSED_FUZZ multiplies the number of random cases; -s shows what became of them.
"""

import collections
import json
import os
import pickle
import random
import shutil
import traceback
from pathlib import Path

import contract
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from unchanged import MULTIPLIER, differences, state

import peft_fused

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
CASES = int(15 * MULTIPLIER)
WRAPPER = "base_model.model."
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


class Net(nn.Module):
    """Two blocks and a head, whose counter is a buffer of integers and whose mask one of infinities."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(8, 8), "out": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}) for _ in range(2)
        )
        self.head = nn.Linear(8, 3)
        self.head.register_buffer("seen", torch.tensor(3))
        self.head.register_buffer("mask", torch.tensor([0.0, 0.0, -torch.inf]))

    def forward(self, x):
        for block in self.blocks:
            x = block["norm"](x + block["out"](torch.tanh(block["q"](x))))
        return self.head(x)


# Every variant that a registration names, with more options where there is then more to damage.
VARIANTS = {variant.name: variant for variant in contract.VARIANTS}
MORE = {"aflora": {"t_i": 0, "t_f": 2}, "dylora": {"rank_pattern": {"0.q": 2}}}


def base():
    torch.manual_seed(0)
    return Net()


def trained(method, bias=True):
    """A model with an adapter after a few steps, so that every state has something in it."""
    variant = VARIANTS[method]
    options = {"target_modules": ["q", "out"], **variant.options, **MORE.get(method, {})}
    bias = f"{variant.method.name}_only" if bias else "none"
    model = get_peft_model(base(), variant.config(**options, bias=bias, modules_to_save=["head"]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for step in range(4):
        peft_fused.on_step(model, step=step, total_steps=6, epoch=0, optimizer=optimizer)
        model(torch.randn(5, 8))[:, 0].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module", params=VARIANTS)
def saved(request, tmp_path_factory):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("saved")
    trained(request.param).save_pretrained(folder)
    return request.param, folder


def contents(folder):
    """The tensors of a checkpoint that was loaded."""
    path = folder / WEIGHTS
    return load_file(path) if path.exists() else torch.load(folder / PICKLED, weights_only=True)


def assert_as_stored(model, name, folder):
    """An adapter that was loaded is what the file says, and nothing of the base is."""
    stored, held = contents(folder), get_peft_model_state_dict(model, adapter_name=name)
    stored = {key.replace(f".{name}.", "."): tensor for key, tensor in stored.items()}  # the model's own names
    if f"{WRAPPER}head.weight" in stored:  # PEFT drops what stands beside it, before it asks anything of ours
        stored.pop(f"{WRAPPER}head.modules_to_save.weight", None)
    assert stored.keys() == held.keys()
    for key, tensor in held.items():
        torch.testing.assert_close(stored[key].to(tensor.dtype), tensor, rtol=0, atol=0, equal_nan=True, msg=key)
    with model.disable_adapter(), torch.no_grad():
        x = torch.arange(16.0).reshape(2, 8) / 16
        biases = {key: value for key, value in stored.items() if key.endswith("base_layer.bias")}
        pristine = base().eval()
        pristine.load_state_dict(
            {key.removeprefix(WRAPPER).replace(".base_layer", ""): t for key, t in biases.items()},
            strict=False,
        )
        assert torch.equal(model(x), pristine(x))


# --------------------------------------------------------------------------------------------------------- the damages


def weights_damage(change):
    """A damage as a function of (tensors, key of one, rng), which returns other tensors or changes them."""

    def damage(folder, rng):
        tensors = load_file(folder / WEIGHTS)
        changed = change(tensors, rng.choice(sorted(tensors)), rng)
        save_file({key: t.contiguous() for key, t in (changed or tensors).items()}, folder / WEIGHTS)

    return damage


def rename(to):
    def change(tensors, key, rng):
        tensors[to(key, rng)] = tensors.pop(key)

    return weights_damage(change)


def replace(make):
    def change(tensors, key, rng):
        tensors[key] = make(tensors[key], rng)

    return weights_damage(change)


def add(name, *shape):
    return weights_damage(lambda tensors, key, rng: {**tensors, WRAPPER + name: torch.ones(shape)})


def spoiled(value):
    def make(tensor, rng):
        tensor = tensor.clone()
        if tensor.is_floating_point() and tensor.numel():
            tensor.view(-1)[rng.randrange(tensor.numel())] = value
        return tensor

    return make


def pickled(make):
    """Writes adapter_model.bin with what `make` makes of the tensors and one of their keys."""

    def damage(folder, rng):
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        torch.save(make(tensors, rng.choice(sorted(tensors))), folder / PICKLED)

    return damage


def with_value(make):
    return pickled(lambda tensors, key: {**tensors, key: make(tensors[key])})


def sparse_rows(tensor):
    return tensor.to_sparse() if tensor.dim() else tensor.reshape(1).to_sparse()


def legacy(folder, rng):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / PICKLED, _use_new_zipfile_serialization=False)


class Evil:
    def __reduce__(self):
        return os.mkdir, (str(Path(__file__).parent / "executed"),)


def evil(folder, rng):
    (folder / WEIGHTS).unlink()
    (folder / PICKLED).write_bytes(pickle.dumps({"a": Evil()}))


def cut(name):
    def damage(folder, rng):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: rng.randrange(len(data))])

    return damage


def write(name, data):
    return lambda folder, rng: (folder / name).write_bytes(data)


def flip(name, first, last=None):
    """Flips a bit of bytes first..last."""

    def damage(folder, rng):
        data = bytearray((folder / name).read_bytes())
        data[rng.randrange(first, min(last or len(data), len(data)))] ^= 1 << rng.randrange(8)
        (folder / name).write_bytes(data)

    return damage


def flip_header(folder, rng):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[8 + rng.randrange(int.from_bytes(data[:8], "little"))] ^= 1 << rng.randrange(8)
    (folder / WEIGHTS).write_bytes(data)


def flip_data(folder, rng):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[rng.randrange(8 + int.from_bytes(data[:8], "little"), len(data))] ^= 1 << rng.randrange(8)
    (folder / WEIGHTS).write_bytes(data)


def folder_instead(folder, rng):
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def remove(name):
    return lambda folder, rng: (folder / name).unlink()


def config_damage(change):
    def damage(folder, rng):
        fields = json.loads((folder / CONFIG).read_text())
        change(fields, rng)
        (folder / CONFIG).write_text(json.dumps(fields))

    return damage


VALUES = (
    None, True, False, 0, 1, 2, 3, 4, -1, 257, 10**30, 10**400, 0.5, 1e39, float("nan"), "", "q", "(", "none", "all",
    [], ["q"], ["head"], [3], [None], {}, {"q": 2}, {"q": "2"}, {"(": 1}, {"0.q": 4, "q": 1},
)  # fmt: skip


def any_field(fields, rng):
    fields[rng.choice(sorted(fields))] = rng.choice(VALUES)


def drop_field(fields, rng):
    del fields[rng.choice(sorted(fields))]


def field(name, value):
    def change(fields, rng):
        fields[name] = value

    return config_damage(change)


# name -> damage(folder, rng). Those of weights go to random tensors, of which the test sees every one in the long run.
DAMAGES = {
    "nothing": lambda folder, rng: None,
    "cut": cut(WEIGHTS),
    "empty": write(WEIGHTS, b""),
    "no weights": remove(WEIGHTS),
    "folder": folder_instead,
    "length of the header": flip(WEIGHTS, 0, 8),
    "header": flip_header,
    "data": flip_data,
    "dropped": weights_damage(lambda tensors, key, rng: {k: t for k, t in tensors.items() if k != key}),
    "no tensors": weights_damage(lambda tensors, key, rng: {"x": torch.zeros(1)}),
    "renamed without prefix": rename(lambda key, rng: key.removeprefix(WRAPPER)),
    "renamed to the end": rename(lambda key, rng: ".".join(key.rsplit(".", 2)[1:])),
    "renamed with a part more": rename(lambda key, rng: key.replace("model.", "model.x.", 1)),
    "renamed at random": rename(lambda key, rng: key[: rng.randrange(len(key))] + "x" + key[rng.randrange(99) :]),
    "renamed to another adapter's": rename(lambda key, rng: ".default.".join(key.rsplit(".", 1))),
    "renamed to nothing": rename(lambda key, rng: ""),
    "base weight": add("blocks.0.q.base_layer.weight", 8, 8),
    "base weight by its name": add("blocks.1.q.weight", 8, 8),
    "original head": add("head.original_module.weight", 3, 8),
    "head of an adapter": add("head.modules_to_save.default.weight", 3, 8),
    "foreign": add("blocks.0.q.lora_A.weight", 2, 8),
    "other type": replace(lambda t, rng: t.to(rng.choice([torch.float16, torch.bfloat16, torch.float64]))),
    "integers": replace(lambda t, rng: t.nan_to_num(0, 0, 0).to(rng.choice([torch.int64, torch.uint8, torch.bool]))),
    "fp8": replace(lambda t, rng: t.to(rng.choice([torch.float8_e4m3fn, torch.float8_e5m2]))),
    "complex": replace(lambda t, rng: t.to(torch.complex64)),
    "flat": replace(lambda t, rng: t.reshape(-1)),
    "transposed": replace(lambda t, rng: t.t() if t.dim() == 2 else t.reshape(1, -1)),
    "longer": replace(lambda t, rng: torch.cat([t, t]) if t.dim() else t.reshape(1)),
    "shorter": replace(lambda t, rng: t[:-1] if t.dim() else t.reshape(1)),
    "without elements": replace(lambda t, rng: t.reshape(-1)[:0]),
    "nan": replace(spoiled(torch.nan)),
    "infinite": replace(spoiled(-torch.inf)),
    "huge": replace(spoiled(3e38)),
    "list": pickled(lambda tensors, key: list(tensors.values())),
    "none": pickled(lambda tensors, key: None),
    "number": pickled(lambda tensors, key: 3),
    "tensor": pickled(lambda tensors, key: tensors[key]),
    "no pickled tensors": pickled(lambda tensors, key: {}),
    "nested": pickled(lambda tensors, key: {"state_dict": tensors}),
    "key that is no name": pickled(lambda tensors, key: {**tensors, 3: tensors[key]}),
    "key that is a tuple": pickled(lambda tensors, key: {**tensors, (key,): tensors[key]}),
    "pickled": pickled(lambda tensors, key: tensors),
    "pickled parameter": with_value(lambda t: nn.Parameter(t, requires_grad=t.is_floating_point())),
    "pickled none": with_value(lambda t: None),
    "pickled number": with_value(lambda t: 1.5),
    "pickled list": with_value(lambda t: t.tolist()),
    "pickled sparse": with_value(sparse_rows),
    "pickled meta": with_value(lambda t: t.to("meta")),
    "pickled quantised": with_value(lambda t: torch.quantize_per_tensor(torch.zeros(4), 0.1, 0, torch.qint8)),
    "pickled fp8": with_value(lambda t: t.to(torch.float8_e4m3fn)),
    "pickled complex": with_value(lambda t: t.to(torch.complex64)),
    "pickled expanded": with_value(lambda t: t.reshape(-1)[:1].expand(t.numel()).reshape(t.shape)),
    "pickled as of old": legacy,
    "pickle that acts": evil,
    "no config": remove(CONFIG),
    "config cut": cut(CONFIG),
    "config empty": write(CONFIG, b""),
    "config bytes": write(CONFIG, b"\xff\xfe\x00{}"),
    "config list": write(CONFIG, b"[1, 2]"),
    "config null": write(CONFIG, b"null"),
    "config without fields": write(CONFIG, b"{}"),
    "config flipped": flip(CONFIG, 0),
    "config field": config_damage(any_field),
    "config without a field": config_damage(drop_field),
    "config with a field": field("more", 3),
    "config of nothing": field("peft_type", "NOPE"),
    "config of other modules": field("target_modules", ["q"]),
    "config of no modules": field("target_modules", ["nope"]),
    "config of the head": field("target_modules", ["q", "out", "head"]),
    "config saves a string": field("modules_to_save", "head"),
    "config saves nothing": field("modules_to_save", None),
    "config saves more": field("modules_to_save", ["head", "blocks"]),
    "config of no bias": field("bias", "none"),
    "config of all biases": field("bias", "all"),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the loads


def load(kind, model, folder):
    """(model with it, name of the adapter)"""
    if kind == "fresh":
        return PeftModel.from_pretrained(model, folder), "default"
    if kind == "fresh, trainable":
        return PeftModel.from_pretrained(model, folder, is_trainable=True), "default"
    if kind == "fresh, on meta":
        return PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True), "default"
    name = "second" if kind == "second" else "default"
    model.load_adapter(folder, name)
    return model, name


KINDS = ("fresh", "fresh, trainable", "fresh, on meta", "second", "same")
OURS = str(Path(peft_fused.__file__).parent)
NAMED = (
    CONFIG,
    WEIGHTS,
    PICKLED,
    "the checkpoint",
    "must",
    "bias",
    "_modules",
    "arget modules",
    "target module '",
    " is an option of ",
    "task type",
)


def refusal(error, kind):
    """How a load was refused: "by name", or "by PEFT" in its own words, before it asked for anything of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    names = [frame.name for frame in frames]
    if any(frame.filename.startswith(OURS) for frame in frames):
        assert isinstance(error, ValueError | TypeError | RuntimeError), error
        assert any(part in str(error) for part in NAMED), error
        return "by name"
    # It reads a configuration's type by itself; and the weights, without the configuration, for an adapter that exists.
    of_type = "_get_peft_type" in names or (
        isinstance(error, KeyError | TypeError) and names[-1] in ("from_pretrained", "load_adapter")
    )
    assert of_type or (kind == "same" and {"load_peft_weights", "set_peft_model_state_dict"} & {*names}), error
    return "by PEFT"


def attempt(kind, model, folder, what):
    """What became of a load: "loaded", or how it was refused. The model is the one to go on with."""
    before = state(model)
    try:
        loaded, name = load(kind, model, folder)
    except Exception as error:
        how = refusal(error, kind)
        found = differences(before, state(model))
        assert not found, f"{kind} {what}: {error!r} changed {found}"
        return how, model
    try:
        assert_as_stored(loaded, name, folder)
    except Exception as error:
        raise AssertionError(f"{kind} {what}: loaded, but {error!r}") from error
    return "loaded", None


def test_damaged_checkpoints(saved, tmp_path):
    method, folder = saved
    rng = random.Random(f"checkpoints {method}")
    outcomes = collections.Counter()
    models = dict.fromkeys(KINDS)
    cases = [(what, rng.choice(KINDS)) for what in DAMAGES]
    cases += [(rng.choice(sorted(DAMAGES)), rng.choice(KINDS)) for _ in range(CASES)]
    for what, kind in cases:
        damaged = tmp_path / "damaged"
        shutil.copytree(folder, damaged)
        DAMAGES[what](damaged, rng)
        if models[kind] is None:
            torch.manual_seed(2)
            # PEFT allows biases to one adapter only.
            fresh = kind.startswith("fresh")
            models[kind] = base() if fresh else trained(method, bias=kind == "same").eval()
        outcome, models[kind] = attempt(kind, models[kind], damaged, what)
        outcomes[outcome] += 1
        shutil.rmtree(damaged)
        if what == "nothing":
            assert outcome == "loaded"
    assert not (Path(__file__).parent / "executed").exists()
    print(f"\n{method}: {len(cases)} damaged checkpoints: {dict(outcomes)}", end="")
    assert outcomes["loaded"] and outcomes["by name"]
