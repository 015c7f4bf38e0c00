import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Small problems on a shared machine: threads that wait for each other would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
