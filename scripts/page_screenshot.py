"""Makes docs/page.png and docs/page-dark.png: the page, before a real server under load, after real questions.

    scripts/install_chromium
    python -m scripts.page_screenshot

It looks as its reader's own fonts make it look; with the package fonts-inter it looks like the pictures in docs/.
"""

import argparse
import json
import math
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page, ViewportSize, expect

from scripts.chromium import chromium, find_chromium
from scripts.served_demo import served_demo

QUESTIONS = ("What is a KV cache?", "What is tensor parallelism?", "Tell me a short story.")
OTHERS = ("Tell me a short story.", "What is the largest ocean?", "What is 17 + 25?", "What is flat GEMM?")
VIEWPORT = ViewportSize(width=1360, height=1190)
MOST_AT_A_TIME = 6
WAVE_S = 23.0
"""The load swells and ebbs with this period, so that the figures have something to show."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=125.0, help="of load before the picture (default: %(default)g)"
    )
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent.parent / "docs")
    args = parser.parse_args()
    executable = find_chromium()
    if executable is None:
        parser.error("no Chromium is installed; scripts/install_chromium installs one")
    with (
        served_demo("--tp", "2", "--kv-cache-bytes", "2MiB") as demo,
        chromium(executable) as browser,
        ExitStack() as stack,
    ):
        pages = {scheme: stack.enter_context(opened(browser, demo.url, scheme)) for scheme in ("light", "dark")}
        stack.enter_context(load(demo.url))
        time.sleep(args.seconds)
        for scheme, page in pages.items():
            for question in QUESTIONS:
                ask(page, question)
            path = args.folder / ("page.png" if scheme == "light" else f"page-{scheme}.png")
            expect(page.locator("#running")).to_have_text(re.compile("^[3-9]"), timeout=2 * WAVE_S * 1000)
            page.screenshot(path=path)
            print(path)


@contextmanager
def opened(browser: Browser, url: str, scheme: str) -> Iterator[Page]:
    context = browser.new_context(viewport=VIEWPORT, color_scheme="dark" if scheme == "dark" else "light")
    page = context.new_page()
    page.goto(url)
    expect(page.get_by_role("status")).to_have_text("Ready")
    yield page
    context.close()


def ask(page: Page, question: str) -> None:
    page.get_by_label("Message", exact=True).fill(question)
    page.keyboard.press("Enter")
    expect(page.locator(".turn").last).to_have_attribute("data-state", "done", timeout=60_000)


@contextmanager
def load(url: str) -> Iterator[None]:
    """Clients that ask one question after another, now more of them and now fewer."""
    is_over = threading.Event()
    began_s = time.monotonic()

    def wanted() -> float:
        wave = math.sin((time.monotonic() - began_s) * 2 * math.pi / WAVE_S)
        return (0.5 + 0.5 * wave) * MOST_AT_A_TIME

    def client(index: int) -> None:
        turn = index
        while not is_over.is_set():
            if index < wanted():
                complete(url, OTHERS[turn % len(OTHERS)], seed=turn)
                turn += 1
            is_over.wait(0.1)

    clients = [threading.Thread(target=client, args=(index,)) for index in range(MOST_AT_A_TIME)]
    for thread in clients:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in clients:
            thread.join()


def complete(url: str, question: str, seed: int) -> None:
    body = {"model": "demo", "messages": [{"role": "user", "content": question}], "seed": seed, "max_tokens": 160}
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.read()


if __name__ == "__main__":
    main()
