"""What a user installs: the sdist, a pure wheel and a native wheel built from it, each in a fresh environment."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging
ROOT = Path(__file__).parent.parent
# Fresh environments see the dependencies of this one, but not its editable install: that hangs on a .pth file, which
# PYTHONPATH does not read.
DEPENDENCIES = sysconfig.get_path("purelib")


def streams(command, *, env=None, cwd=None, status=0):
    """(standard output, standard error) of a command."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True
    )
    assert (done.returncode == 0) == (status == 0), done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, done.stderr


def run(command, **options):
    return "".join(streams(command, **options))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    run(
        [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", out, ROOT],
        env={"PEFT_FUSED_BUILD": "off"},
    )
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = [name.split("/", 1)[1] for name in file.getnames() if "/" in name]
        file.extractall(out, filter="data")
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    return folder, names


def wheel_of(folder, mode, out, **env):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", out, folder]
    log = run(command, env={"PEFT_FUSED_BUILD": mode, **env})
    (path,) = Path(out).glob("*.whl")
    return path, log


@pytest.fixture(scope="module")
def pure_wheel(sdist, tmp_path_factory):
    return wheel_of(sdist[0], "off", tmp_path_factory.mktemp("pure"))[0]


def fresh(wheel, where):
    """Python of a new environment with the wheel in it."""
    venv.create(where, with_pip=False)
    python = where / "bin" / "python"
    run([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel])
    return python


def ask(python, code, tmp_path, env=None):
    """(last line of what the code prints, what it says on standard error)."""
    out, err = streams([python, "-P", "-c", code], env={"PYTHONPATH": DEPENDENCIES, **(env or {})}, cwd=tmp_path)
    return out.strip().splitlines()[-1], err


def test_sdist_carries_the_sources(sdist):
    _, names = sdist
    for name in ("csrc/bindings.cpp", "csrc/autograd/lowrank.cpp", "csrc/kernels/lowrank.cu", "csrc/kernels/philox.h"):
        assert name in names
    assert "triton_kernels/lowrank.py" in names and "bench/run.py" in names and "setup.py" in names
    assert not [n for n in names if n.endswith((".so", ".o"))]


def test_pure_wheel(pure_wheel, tmp_path):
    wheel = pure_wheel
    assert wheel.name.endswith("py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "peft_fused/triton_kernels/lowrank.py" in names and "peft_fused/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"peft_fused", wheel.name.rsplit("-py3", 1)[0] + ".dist-info"}
    python = fresh(wheel, tmp_path / "env")
    code = (
        "import importlib.util, peft_fused, torch; from peft_fused.ops import lowrank_adapter;"
        "assert importlib.util.find_spec('triton_kernels') is None;"
        "x = torch.randn(2, 4); y = lowrank_adapter(x, torch.randn(3, 4), torch.randn(5, 3));"
        "import peft_fused.layers; print(tuple(y.shape), peft_fused.build_info()['why_not'])"
    )
    found, told = ask(python, code, tmp_path)
    assert found == "(2, 5) not built: the package was installed as pure Python"
    assert told.count("UserWarning: peft_fused has no C++ extension") == 1
    assert told.count("pip install --no-build-isolation .") == 1
    again, told = ask(python, code, tmp_path, {"PEFT_FUSED_BUILD": "off"})
    assert again == found and "peft_fused" not in told  # bitsandbytes, for one, says something


def test_native_wheel(sdist, tmp_path):
    """With nvcc at hand the CUDA kernels are built in, even beside a torch without CUDA."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    hasty = tmp_path / "c++"  # half of the time is the optimiser's, and the code runs once
    hasty.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
    hasty.chmod(0o755)
    nvcc = shutil.which("nvcc")
    wheel, _ = wheel_of(sdist[0], "cuda" if nvcc else "force", tmp_path / "dist", CXX=str(hasty))
    assert "none-any" not in wheel.name
    python = fresh(wheel, tmp_path / "env")
    found, told = ask(
        python,
        "import torch, peft_fused; from peft_fused.ops import lowrank_adapter, native;"
        "x = torch.randn(2, 4); y = lowrank_adapter(x, torch.randn(3, 4), torch.randn(5, 3, requires_grad=True));"
        "print(type(y.grad_fn).__name__, native.module.has_cuda(), native.stamp['architectures'])",
        tmp_path,
    )
    assert found == ("CppFunction True ['sm_80', 'sm_90a']" if nvcc else "CppFunction False []")
    assert "C++ extension" not in told


def test_what_an_earlier_build_left_is_not_packed(sdist, tmp_path):
    folder = shutil.copytree(sdist[0], tmp_path / "tree")
    (folder / "peft_fused" / "_build_info.py").write_text("BUILD = {}\n")
    (folder / "peft_fused" / "_C.so").touch()
    wheel, _ = wheel_of(folder, "off", tmp_path / "off")
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if "_C" in n or "_build_info" in n]


def test_a_compiler_that_fails_is_no_obstacle_to_auto(sdist, tmp_path):
    folder, broken = shutil.copytree(sdist[0], tmp_path / "tree"), tmp_path / "bin"
    broken.mkdir()
    for name in ("c++", "g++"):
        (broken / name).write_text("#!/bin/sh\nexit 1\n")
        (broken / name).chmod(0o755)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, folder]
    env = {"PATH": f"{broken}{os.pathsep}{os.environ['PATH']}", "PEFT_FUSED_BUILD": "auto"}
    run(command, env=env)
    (wheel,) = tmp_path.glob("*.whl")
    assert not [n for n in zipfile.ZipFile(wheel).namelist() if "_C" in n or "_build_info" in n]
    run(command, env=env | {"PEFT_FUSED_BUILD": "force"}, status=1)


def test_an_extension_for_another_torch_is_skipped(pure_wheel, tmp_path):
    python = fresh(pure_wheel, tmp_path / "env")
    (package,) = (tmp_path / "env").glob("lib/python*/site-packages/peft_fused")
    (package / "_build_info.py").write_text("BUILD = {'torch': '1.0', 'torch_cuda': None}\n")
    found, told = ask(python, "import peft_fused; print(peft_fused.build_info()['why_not'])", tmp_path)
    assert "the C++ extension is skipped: built for torch 1.0" in told and "UserWarning" not in told
    assert "built for torch 1.0" in found and "reinstall peft_fused with --no-build-isolation" in found


def test_build_modes_that_cannot_be_met_say_so(tmp_path):
    assert "PEFT_FUSED_BUILD must be one of auto, off" in run(
        [sys.executable, "setup.py", "--version"], env={"PEFT_FUSED_BUILD": "gpu"}, cwd=ROOT, status=1
    )
    venv.create(tmp_path / "bare", with_pip=False)
    command = [tmp_path / "bare" / "bin" / "python", "-P", "setup.py", "--version"]
    setuptools_only = tmp_path / "path"
    setuptools_only.mkdir()
    for name in ("setuptools", "_distutils_hack"):
        (setuptools_only / name).symlink_to(Path(DEPENDENCIES) / name)
    env = {"PYTHONPATH": str(setuptools_only), "PEFT_FUSED_BUILD": "force"}
    assert "torch cannot be imported in this build environment" in run(command, env=env, cwd=ROOT, status=1)
    for auto in ("auto", ""):
        env["PEFT_FUSED_BUILD"] = auto
        assert "pure Python install: torch cannot be imported" in run(command, env=env, cwd=ROOT)
