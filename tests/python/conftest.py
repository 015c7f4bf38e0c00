import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Run every test on one thread: in small problems, waiting for other threads would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
