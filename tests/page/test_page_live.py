"""The page before the real server: a question, an answer that is stopped, and a server that dies and comes back."""

import json
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect
from watched import ask, done, opened

from scripts.served_demo import ServedDemo, served_demo


@pytest.fixture(scope="module")
def demo(browser: Browser) -> Iterator[ServedDemo]:
    """Started only where there is a browser."""
    with served_demo() as demo:
        yield demo


def stats(demo: ServedDemo) -> Any:
    with urllib.request.urlopen(f"{demo.url}/stats", timeout=10) as answer:
        return json.load(answer)


def ask_for_much(page: Page) -> None:
    """With this seed the model finds no end before the context's own."""
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Temperature").fill("5")
    page.get_by_label("Seed").fill("9")
    ask(page, "Tell me a story.")
    page.wait_for_function("() => document.querySelector('.prose')?.textContent.length > 20")


def test_a_question_is_answered_and_the_figures_move(browser: Browser, demo: ServedDemo) -> None:
    with opened(browser, demo.url) as watched:
        page = watched.page
        expect(page.get_by_role("status")).to_have_text("Ready")
        ask(page, "What is the largest ocean?")
        done(page)
        expect(page.locator(".prose")).to_contain_text("Pacific")
        expect(page.locator(".turn .note")).to_contain_text("first text after")
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        expect(page.locator("#latency tbody tr").first).not_to_contain_text("–")
        expect(page.locator("#communication-note")).to_have_text("One rank: nothing is exchanged.")
        assert page.locator("#dataflow tbody tr").count() >= 4
        assert page.locator("#layout").inner_text().startswith("TP 1 × PP 1 on cpu")


def test_an_answer_that_is_stopped_is_kept_and_ended_in_the_engine(browser: Browser, demo: ServedDemo) -> None:
    before = stats(demo)
    with opened(browser, demo.url) as watched:
        page = watched.page
        ask_for_much(page)
        page.keyboard.press("Escape")
        expect(page.locator(".turn")).to_have_attribute("data-state", "stopped")
        kept = page.locator(".prose").inner_text()
        assert len(kept) > 20
        deadline_s = time.monotonic() + 20
        while stats(demo)["num_running"] and time.monotonic() < deadline_s:
            time.sleep(0.05)
        after = stats(demo)
        assert after["num_running"] == 0
        assert after["tokens"]["generation"] - before["tokens"]["generation"] < after["max_model_len"] - 50
        ask(page, "What is the largest ocean?")
        expect(page.locator(".turn[data-state=streaming]")).to_have_count(0)
        assert page.locator(".prose").first.inner_text() == kept


def test_a_server_that_dies_is_said_at_once_and_used_again_when_it_is_back(browser: Browser, demo: ServedDemo) -> None:
    with opened(browser, demo.url) as watched:
        page, watched.may_fail = watched.page, True
        expect(page.get_by_role("status")).to_have_text("Ready")
        ask_for_much(page)
        demo.kill()
        expect(page.get_by_role("alert")).to_contain_text("The connection broke before the answer was complete")
        expect(page.get_by_role("status")).to_have_text("The server does not answer. Trying again every second")
        expect(page.locator("#figures-note")).to_contain_text("As they were at")
        assert len(page.locator(".prose").inner_text()) > 20
        ask(page, "Anybody?")
        expect(page.get_by_role("alert").last).to_have_text("The server does not answer.")
        with served_demo(port=demo.port):
            expect(page.get_by_role("status")).to_have_text("Ready")
            expect(page.locator("#figures-note")).to_be_hidden()
            page.get_by_label("Temperature").fill("0")
            page.get_by_role("button", name="New conversation").click()
            ask(page, "What is the largest ocean?")
            done(page)
            expect(page.locator(".prose")).to_contain_text("Pacific")
