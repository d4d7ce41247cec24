"""One compute thread: the tests' tensors are tiny, and threads that wait for each other are slower."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when it is imported: without a GPU its kernels are interpreted, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
