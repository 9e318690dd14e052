"""A headless Chromium and a scripted server for each file of tests, a page for each test."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect
from scripted_page_server import ScriptedServer, serving
from watched import TIMEOUT_MS, opened

from scripts.chromium import chromium, find_chromium

expect.set_options(timeout=TIMEOUT_MS)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium is installed; scripts/install_chromium installs one")
    with chromium(executable) as browser:
        yield browser


@pytest.fixture(scope="module")
def running() -> Iterator[ScriptedServer]:
    with serving(ScriptedServer()) as scripted:
        yield scripted


@pytest.fixture
def server(running: ScriptedServer) -> ScriptedServer:
    """As it is in the beginning, whatever the test before made of it."""
    running.__dict__.update(ScriptedServer(url=running.url).__dict__)
    return running


@pytest.fixture
def page(browser: Browser, server: ScriptedServer) -> Iterator[Page]:
    with opened(browser, server.url) as watched:
        yield watched.page
