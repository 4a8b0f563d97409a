"""Files that are whole or not there, whatever interrupts their writing."""

import contextlib
import os
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def whole_files(path: str | os.PathLike, *names: str) -> Iterator[str]:
    """A folder to write these files to. They take the place of those in `path`, in this order, once all are written."""
    os.makedirs(path, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".writing-") as folder:
        yield folder
        for name in names:
            os.replace(os.path.join(folder, name), os.path.join(path, name))
