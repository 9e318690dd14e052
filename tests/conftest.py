"""What every test file shares."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def calm_torch() -> Iterator[None]:
    """One thread, as for models this small a second one costs more than it saves, and a fixed seed.

    An engine sets the thread count of the whole process: restored here.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)
