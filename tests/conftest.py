"""What every test file shares."""

import gc
import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined: Triton's kernels are then run by its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-layouts", action="store_true", help="every family on every layout over gloo too: 3 minutes")


def pytest_collection_finish() -> None:
    """An engine that is closed looks for cycles among all objects: half a second for the million that all test modules
    and their libraries have. Those stay for good, and need not be looked at again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries say so on standard error if what they made outlives the interpreter."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a user has tuned changes no test, and no test what a user has tuned."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def calm_torch() -> Iterator[None]:
    """One thread, as for models this small a second one costs more than it saves, and a fixed seed.

    An engine sets the thread count of the whole process: restored here.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """What torch.empty gives holds NaN, or the largest integer: an element that a kernel leaves out is seen.

    Of ops that have no deterministic implementation on a GPU torch only warns: this is not about those.
    """
    before, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before, warn_only=warned)
