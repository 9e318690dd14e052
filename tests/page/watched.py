"""A page in headless Chromium, and what must hold of every one: no errors, and no request to another place."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from playwright.sync_api import Browser, Page, expect

TIMEOUT_MS = 20_000


@dataclass
class Watched:
    """A page, and what went wrong on it: errors of its scripts and its console, requests to anywhere but its server.

    may_fail: a server that dies or refuses is reported by the browser's console too, and is meant to be.
    """

    page: Page
    may_fail: bool = False
    errors: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def watch(self, url: str) -> None:
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self._hear(message.type, message.text))
        self.page.on("request", lambda request: self._see(request.url, url))

    def _hear(self, kind: str, text: str) -> None:
        is_network = text.startswith("Failed to load resource")
        if kind in ("error", "warning") and not (self.may_fail and is_network):
            self.errors.append(text)

    def _see(self, requested: str, url: str) -> None:
        if not requested.startswith(url):
            self.elsewhere.append(requested)


@contextmanager
def opened(browser: Browser, url: str, **options: object) -> Iterator[Watched]:
    """The page at this address, in a browser context of its own; checked once the test has passed."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)  # type: ignore[arg-type]
    context.set_default_timeout(TIMEOUT_MS)
    try:
        watched = Watched(context.new_page())
        watched.watch(url)
        watched.page.goto(url)
        yield watched
        assert watched.errors == []
        assert watched.elsewhere == []
    finally:
        context.close()


def ask(page: Page, question: str = "Why?") -> None:
    page.get_by_label("Message", exact=True).fill(question)
    page.keyboard.press("Enter")


def done(page: Page) -> None:
    expect(page.locator(".turn").last).to_have_attribute("data-state", "done")
