"""A server with the demo model, the official client of whichever server a file has, and the engine without a server.

A file takes them with `pytest_plugins = ["tests.server_fixtures"]`, and makes its own of those it needs in another way.
"""

from collections.abc import Iterator

import openai
import pytest

from headrace import LLM
from headrace.demo_model import demo_model_path
from tests.serving import RunningServer, running_server


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(demo_model_path(), num_threads=1, dataflow="default") as made:
        yield made
