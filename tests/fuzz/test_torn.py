"""Exports and checkpoints whose writing is cut short, by kill -9 or a full disk: what is left is whole or is refused.

PEFT_FUSED_FUZZ multiplies the number of kills; -s shows what they left.
"""

import collections
import contextlib
import ctypes
import json
import os
import random
import resource
import signal
import time
import traceback

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from unchanged import MULTIPLIER

from peft_fused import DyLoraConfig, export_lora

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
    pytest.mark.usefixtures("one_thread"),  # threads do not survive a fork: work shared with them never ends
]
KILLS = max(1, int(5 * MULTIPLIER))
CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
SIZE, R = 128, 32


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE, SIZE), nn.Tanh(), nn.Linear(SIZE, SIZE)).eval()


def adapted(alpha, seed):
    model, config = base(), DyLoraConfig(r=R, lora_alpha=alpha, target_modules=["0", "2"], init_weights=False)
    torch.manual_seed(seed)
    return get_peft_model(model, config).eval()


@torch.no_grad()
def outputs(model):
    return model(torch.linspace(-1, 1, 4 * SIZE).reshape(4, SIZE))


def left(folder, models):
    """What a folder holds: the index of the model that loads from it, or "refused"."""
    try:
        found = outputs(PeftModel.from_pretrained(base(), folder))
    except ValueError as error:
        assert "adapter_config.json" in str(error) or "adapter_model.safetensors" in str(error), error
        return "refused"
    equal = [i for i, model in enumerate(models) if torch.allclose(found, outputs(model), rtol=1e-4, atol=1e-4)]
    assert equal, f"{folder} holds neither: {sorted(os.listdir(folder))}"
    return equal[0]


@contextlib.contextmanager
def child(work):
    """A forked process that does work(); its id. It is killed in the end, should it still run."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def write_in_turn(write, models):
    while True:
        for model in models:
            write(model)


@pytest.mark.parametrize("what", ["export", "checkpoint"])
def test_kill_9_leaves_nothing_torn(tmp_path, what):
    # PEFT writes the weights of a checkpoint, and the configuration, which is ours, after them: of equal ones here.
    models = [adapted(1.0, 1), adapted(64.0 if what == "export" else 1.0, 2)]
    write = (lambda m: export_lora(m, tmp_path)) if what == "export" else (lambda m: m.save_pretrained(tmp_path))
    write(models[0])
    start = time.perf_counter()
    write(models[0])
    once = time.perf_counter() - start
    rng, found = random.Random(what), collections.Counter()
    for _ in range(KILLS):
        write(models[0])
        with child(lambda: write_in_turn(write, models)) as pid:
            time.sleep(rng.uniform(0, 8 * once))
            os.kill(pid, signal.SIGKILL)
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL  # it has not ended by itself
        outcome = left(tmp_path, models)
        found[outcome] += 1
        if what == "checkpoint" and outcome != "refused":
            assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == R
    print(f"\n{what}: {KILLS} kills left {dict(found)}", end="")
    assert sum(found.values()) == KILLS
    write(models[1])
    assert left(tmp_path, models) == 1


def small_files(size):
    """Files of this process may not grow beyond size bytes: writing fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("size", [0, 100, 4096])
def test_what_cannot_be_written_leaves_the_old_export(tmp_path, size):
    models = [adapted(1.0, 1), adapted(64.0, 2)]
    export_lora(models[0], tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fails():
        small_files(size)
        with pytest.raises(Exception, match=r"[Ff]ile too large"):
            export_lora(models[1], tmp_path)

    with child(fails) as pid:
        assert os.waitpid(pid, 0)[1] == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old
    assert left(tmp_path, models) == 0


def mount_small_disk(folder, size):
    """A file system of size bytes in a folder, that this process alone sees. OSError where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()

    def call(function, *arguments):
        if getattr(libc, function)(*arguments) != 0:
            raise OSError(ctypes.get_errno(), f"{function} is not allowed here")

    call("unshare", CLONE_NEWNS if user == 0 else CLONE_NEWNS | CLONE_NEWUSER)
    if user != 0:
        for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    call("mount", b"none", b"/", None, 1 << 14 | 1 << 18, None)  # MS_REC | MS_PRIVATE
    call("mount", b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode())


NOT_ALLOWED = 77


def test_a_full_disk_leaves_the_old_export(tmp_path):
    models = [adapted(1.0, 1), adapted(64.0, 2)]
    export_lora(models[0], tmp_path / "elsewhere")
    needed = sum(path.stat().st_size for path in (tmp_path / "elsewhere").iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()

    def fails():
        try:
            mount_small_disk(disk, needed + needed // 2)
        except OSError as error:
            print(error)
            os._exit(NOT_ALLOWED)
        export_lora(models[0], disk / "lora")
        old = {path.name: path.read_bytes() for path in (disk / "lora").iterdir()}
        for _ in range(3):
            with pytest.raises(Exception, match="No space left on device"):
                export_lora(models[1], disk / "lora")
            assert {path.name: path.read_bytes() for path in (disk / "lora").iterdir()} == old
            assert left(disk / "lora", models) == 0

    with child(fails) as pid:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status == NOT_ALLOWED:
        pytest.skip("this system does not let the test mount a small file system")
    assert status == 0
