"""One compute thread: the tests' tensors are tiny, and threads that wait for each other are slower."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
