"""Two processes with a gloo group, started once: importing torch and transformers takes them longer than any test."""

import subprocess
import sys
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path

import pytest

WORLD = 2
SECONDS = 100
HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parent)]


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.distributed)


class Processes:
    """Calls a function of cases.py in both processes, with the same arguments."""

    def __init__(self, folder: Path):
        self.folder, self.started = folder, 0
        self.start()

    def start(self) -> None:
        self.started += 1
        store, address = (str(self.folder / f"{name}{self.started}") for name in ("store", "socket"))
        with Listener(address) as listener:
            self.workers = [
                subprocess.Popen([sys.executable, HERE / "worker.py", address, store, str(rank), str(WORLD)])
                for rank in range(WORLD)
            ]
            # They call in whatever order they come up.
            found = dict(self._greeted(listener.accept()) for _ in range(WORLD))
        self.pipes = [found[rank] for rank in range(WORLD)]

    @staticmethod
    def _greeted(pipe: Connection) -> tuple[int, Connection]:
        return pipe.recv(), pipe

    def __call__(self, name: str, **options) -> list:
        """Results of both, process 0's first. AssertionError with the traceback of every one that raised."""
        for pipe in self.pipes:
            pipe.send((name, options))
        answers, patience = [(None, "no answer in time")] * WORLD, SECONDS
        pending = set(self.pipes)
        while pending and (ready := wait(pending, patience)):
            for pipe in ready:
                try:
                    answer = pipe.recv()
                except EOFError:
                    answer = (None, "it died")
                answers[self.pipes.index(pipe)] = answer
                pending.remove(pipe)
                # Where one has failed, the other may wait for it for good.
                patience = 3 if answer[1] else patience
        errors = [f"process {rank}:\n{error}" for rank, (_, error) in enumerate(answers) if error]
        if errors:
            # Whatever was under way between them is lost: later tests get new ones.
            self.stop()
            self.start()
            raise AssertionError("\n".join(errors))
        return [value for value, _ in answers]

    def stop(self) -> None:
        for worker in self.workers:
            worker.kill()
            worker.wait()


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    found = Processes(tmp_path_factory.mktemp("processes"))
    yield found
    found.stop()
