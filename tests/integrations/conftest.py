import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Threads only slow down models as small as those of these tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
