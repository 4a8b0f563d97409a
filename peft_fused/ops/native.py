"""Loads the C++ extension `peft_fused._C`, or says why it is not used. Importing this never fails.

The extension is bound to the torch it was built with. A stamp written at build time is compared first: loading it
against another torch would end in missing symbols or, worse, in none.
"""

import importlib
import importlib.util
import logging

import torch

logger = logging.getLogger("peft_fused")

# What it means to be without the extension, and what to do about it, for whoever has to be told.
COST = (
    "a Python autograd node per layer instead of the C++ one, and dropout masks made by many tensor operations: small "
    "layers take about twice PEFT's time instead of less than it, and there is no CUDA backend"
)
REMEDY = (
    "`pip install --no-build-isolation .` in the source folder builds it, where torch, setuptools >= 77 and a C++ "
    "compiler are installed"
)


def _stamp() -> dict | None:
    """What setup.py wrote, None if it built no extension; a stamp that cannot be read fits no torch."""
    if importlib.util.find_spec("peft_fused._build_info") is None:
        return None
    try:
        return importlib.import_module("peft_fused._build_info").BUILD
    except (SyntaxError, AttributeError):
        return {"torch": "unknown", "torch_cuda": "unknown", "cuda_kernels": False, "architectures": []}


def _load():
    """(module or None, reason for None, build stamp)."""
    stamp = _stamp()
    if stamp is None:
        return None, "not built: the package was installed as pure Python", {}
    if stamp["torch"] != torch.__version__ or stamp["torch_cuda"] != torch.version.cuda:
        reason = (
            f"built for torch {stamp['torch']} (CUDA {stamp['torch_cuda']}) but this is torch {torch.__version__} "
            f"(CUDA {torch.version.cuda}); reinstall peft_fused with --no-build-isolation"
        )
        logger.warning("peft_fused: the C++ extension is skipped: %s", reason)
        return None, reason, stamp
    try:
        return importlib.import_module("peft_fused._C"), "", stamp
    except ImportError as error:
        reason = f"the extension does not load: {error}"
        logger.warning("peft_fused: the C++ extension is skipped: %s", reason)
        return None, reason, stamp


module, why_missing, stamp = _load()
not_built = module is None and not stamp


def has_cuda() -> bool:
    """Whether the extension carries the CUDA kernels and this torch can launch them."""
    return module is not None and module.has_cuda() and torch.version.cuda is not None
