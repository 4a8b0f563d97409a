"""Builds the native extension `peft_fused._C` where that is possible; the metadata is in pyproject.toml.

PEFT_FUSED_BUILD chooses: auto (default: the C++ extension when torch is importable, with CUDA kernels when torch is a
CUDA build and nvcc is there), cpu (never CUDA), cuda (CUDA kernels even beside a CPU-only torch), off (pure Python),
force (auto, but anything that prevents a build is an error). torch is no build requirement: an isolated build would
fetch another torch than the one that will load the extension, so native builds need --no-build-isolation.
"""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
STAMP = "_build_info"
# Packages that lie elsewhere, by package-dir in pyproject.toml.
MAPPED = ("peft_fused.bench", "peft_fused.bench.evidence", "peft_fused.triton_kernels")
MODES = ("auto", "off", "cpu", "cuda", "force")
# sm_90a brings wgmma; PTX of the oldest supported architecture serves whatever comes later.
CUDA_ARCHITECTURES = ("-gencode=arch=compute_80,code=[sm_80,compute_80]", "-gencode=arch=compute_90a,code=sm_90a")


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.exists() else None)


def cuda_include(nvcc):
    """Include and library folders of the toolkit, from nvcc itself: its path may be a link or a wrapper."""
    out = subprocess.run([nvcc, "-dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = next((line.split("=", 1)[1].strip() for line in out.splitlines() if "TOP=" in line), None)
    top = Path(top) if top else Path(nvcc).resolve().parent.parent
    lib = next((d for d in (top / "lib64", top / "lib", top / "targets" / "x86_64-linux" / "lib") if d.is_dir()), top)
    return str(top / "include"), str(lib)


def stop(mode, reason):
    if mode in ("cuda", "force", "cpu"):
        sys.exit(f"PEFT_FUSED_BUILD={mode}: {reason}")
    print(f"peft_fused: pure Python install: {reason}", file=sys.stderr)


def openmp_flags():
    """at::parallel_for is a template, which without this flag compiles to a loop on one thread. Of GCC alone: its code
    is served by the OpenMP library that torch has loaded, so that the extension need not link one."""
    compiler = os.environ.get("CXX") or (shutil.which("c++") and "c++") or "g++"
    command = [*compiler.split(), "-fopenmp", "-include", "omp.h", "-dM", "-E", "-x", "c++", os.devnull]
    try:
        macros = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return []
    is_gcc = macros.returncode == 0 and "__GNUC__" in macros.stdout and "__clang__" not in macros.stdout
    return ["-fopenmp"] if is_gcc and sys.platform.startswith("linux") else []


def native_extension(mode):
    """(extensions, build command) or None when this is to be a pure Python package."""
    if mode == "off":
        return None
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except (ImportError, OSError) as error:  # OSError: one of torch's libraries is missing
        stop(mode, f"torch cannot be imported in this build environment ({error}); use --no-build-isolation")
        return None
    if not (shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")):
        stop(mode, "there is no C++ compiler")
        return None

    nvcc = find_nvcc()
    if mode == "cuda" and nvcc is None:
        stop(mode, "nvcc was not found (set CUDA_HOME)")
    with_cuda = nvcc is not None and (mode == "cuda" or (mode != "cpu" and torch.version.cuda is not None))
    if mode == "force" and torch.version.cuda is not None and nvcc is None:
        stop(mode, "torch is a CUDA build but nvcc was not found (set CUDA_HOME)")

    extension = CppExtension(
        "peft_fused._C",
        ["csrc/extension.cpp"],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", *openmp_flags()],
    )

    class Build(BuildExtension):
        """Compiles the .cu files with nvcc directly: torch's own CUDA build needs a CUDA torch."""

        def finalize_options(self):
            super().finalize_options()
            # setuptools compares the dates of sources only: it would keep a library built for another torch or mode.
            self.force = True

        def build_extensions(self):
            try:
                self.build_native()
            except Exception as error:
                if mode != "auto":
                    raise
                stop(mode, f"the extension does not build ({error})")
                for earlier in (ROOT, Path(self.build_lib)):
                    remove_native(earlier / "peft_fused")
                self.extensions = []

        def build_native(self):
            if with_cuda:
                try:
                    self.add_cuda_objects()
                except (subprocess.CalledProcessError, OSError) as error:
                    if mode in ("cuda", "force"):
                        raise
                    print(f"peft_fused: CUDA kernels are left out, nvcc failed: {error}", file=sys.stderr)
            super().build_extensions()
            self.write_stamp(Path(self.get_ext_fullpath("peft_fused._C")).parent)

        def copy_extensions_to_source(self):
            super().copy_extensions_to_source()
            if self.extensions:
                self.write_stamp(ROOT / "peft_fused")

        def add_cuda_objects(self):
            include, lib = cuda_include(nvcc)
            build = Path(self.build_temp)
            build.mkdir(parents=True, exist_ok=True)
            flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]

            def compiled(source):
                target = build / f"{source.stem}.cu.o"
                subprocess.run([nvcc, *flags, *CUDA_ARCHITECTURES, "-c", str(source), "-o", str(target)], check=True)
                return str(target)

            with ThreadPoolExecutor() as pool:
                extension.extra_objects = list(pool.map(compiled, sorted((ROOT / "csrc" / "kernels").glob("*.cu"))))
            extension.define_macros.append(("PEFT_FUSED_CUDA", "1"))
            extension.include_dirs.append(include)
            extension.library_dirs.append(lib)
            extension.libraries += ["cudart_static", "dl", "rt", "pthread"]

        def write_stamp(self, folder):
            build = {
                "torch": torch.__version__,
                "torch_cuda": torch.version.cuda,
                "cuda_kernels": bool(extension.extra_objects),
                "architectures": ["sm_80", "sm_90a"] if extension.extra_objects else [],
            }
            stamp = "# Written by setup.py. Compared with the running torch before the extension is loaded.\n"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{STAMP}.py").write_text(f"{stamp}BUILD = {build!r}\n")

    return [extension], Build


class BuildPython(build_py):
    """Leaves out what an earlier native build put into the source tree."""

    def run(self):
        super().run()
        if self.editable_mode and "build_ext" not in self.distribution.cmdclass:
            remove_native(ROOT / "peft_fused")

    def find_package_modules(self, package, package_dir):
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != STAMP]


def remove_native(folder):
    for path in (folder / f"{STAMP}.py", *folder.glob("_C*.so")):
        path.unlink(missing_ok=True)


def main():
    mode = os.environ.get("PEFT_FUSED_BUILD") or "auto"
    if mode not in MODES:
        sys.exit(f"PEFT_FUSED_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    native = native_extension(mode)
    packages = [*find_packages(str(ROOT), include=["peft_fused", "peft_fused.*"]), *MAPPED]
    if native is None:
        setup(packages=packages, cmdclass={"build_py": BuildPython})
    else:
        extensions, build = native
        setup(packages=packages, ext_modules=extensions, cmdclass={"build_py": BuildPython, "build_ext": build})


main()
