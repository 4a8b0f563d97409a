"""A run of kernels and, on a GPU, a second one that must not differ."""

import os

import torch


def repeated(run):
    """The tensors by name that run() gives, the same bits every time. Only once under the interpreter, which runs the
    programs of a grid in order: there the second run is the first."""
    found = run()
    if os.environ.get("TRITON_INTERPRET") != "1":
        again = run()
        assert all(torch.equal(found[name], again[name]) for name in found), "two runs differ"
    return found
