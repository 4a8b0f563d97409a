"""One of the two processes: `worker.py address store rank world` calls functions of cases.py and answers."""

import sys
import traceback
from datetime import timedelta
from multiprocessing.connection import Client
from pathlib import Path

import torch
import torch.distributed as dist

# A collective that the other process never joins ends after this long.
SECONDS = 60


def main(address: str, store: str, rank: str, world: str) -> None:
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world), timeout=timedelta(seconds=SECONDS)
    )
    sys.path.append(str(Path(__file__).parents[1]))  # of contract.py
    import cases

    pipe = Client(address)
    pipe.send(int(rank))
    while True:
        name, options = pipe.recv()
        try:
            torch.manual_seed(0)
            pipe.send((getattr(cases, name)(**options), None))
        except BaseException:
            pipe.send((None, traceback.format_exc()))


if __name__ == "__main__":
    main(*sys.argv[1:])
