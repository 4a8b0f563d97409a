"""Peak memory of a call, as PyTorch's allocators saw it."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator

import torch


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what C++ writes to standard error."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most bytes that a call held at once beyond what was allocated before it, temporaries of C++ included.

    What native libraries allocate for themselves, past PyTorch, is not seen.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    profile = torch.autograd.profiler.profile(profile_memory=True)
    with contextlib.ExitStack() as stack:
        with _silent():  # the profiler announces its start and its end
            stack.enter_context(profile)
        call()
        with _silent():
            stack.close()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
