"""Whom the page is for: keyboards, screen readers, narrow screens, the dark, eyes that need contrast."""

import re
from itertools import pairwise

import pytest
from playwright.sync_api import Browser, Page, expect
from scripted_page_server import ScriptedServer
from watched import ask, done, opened

NARROW = {"width": 360, "height": 640}
AA_CONTRAST = 4.5

CONTROLS = "button, input, textarea, select, a[href], [tabindex='0'], [role=meter], [role=img], [role=region]"

COLOURS = """() => [...document.querySelectorAll("body *")].filter((element) =>
    element.checkVisibility() && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())
    && getComputedStyle(element).clipPath === "none"
).map((element) => {
    const backgrounds = [];
    for (let at = element; at; at = at.parentElement) backgrounds.push(getComputedStyle(at).backgroundColor);
    return [element.textContent.trim().slice(0, 40), getComputedStyle(element).color, backgrounds];
})"""


def everything_shown(page: Page, server: ScriptedServer) -> None:
    """A page with an answer of every kind of block, an error, and the settings open."""
    server.answer = ["# Title\n**strong** `code`\n\n- item\n\n```py\nprint(1)\n```\n"]
    ask(page)
    done(page)
    server.cut = True
    ask(page)
    expect(page.get_by_role("alert")).to_be_visible()
    page.get_by_role("button", name="Settings").click()


def channels(colour: str) -> tuple[float, float, float, float]:
    numbers = [float(number) for number in re.findall(r"[\d.]+", colour)]
    return (numbers[0], numbers[1], numbers[2], numbers[3] if len(numbers) > 3 else 1.0)


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2.2, of an opaque colour."""
    linear = [c / 255 / 12.92 if c <= 0.04045 * 255 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(colour: str, backgrounds: list[str]) -> float:
    behind = next(background for background in backgrounds if channels(background)[3] > 0)
    light, dark = sorted((luminance(colour), luminance(behind)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_the_contrast_of_aa_in_both_schemes(
    browser: Browser, server: ScriptedServer, scheme: str
) -> None:
    with opened(browser, server.url, color_scheme=scheme) as watched:
        page = watched.page
        everything_shown(page, server)
        texts = page.evaluate(COLOURS)
        assert len(texts) > 60
        assert [text for text in texts if contrast(text[1], text[2]) < AA_CONTRAST] == []
        is_dark = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor")) < 0.5
        assert is_dark == (scheme == "dark")


def test_the_reader_may_choose_the_other_scheme_and_it_is_kept(page: Page, server: ScriptedServer) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.get_by_role("button", name="Dark colours").click()
    dark = page.evaluate(background)
    assert luminance(dark) < luminance(light)
    page.reload()
    assert page.evaluate(background) == dark
    page.get_by_role("button", name="Light colours").click()
    assert page.evaluate(background) == light


def test_every_control_has_a_name_and_every_label_a_control(page: Page, server: ScriptedServer) -> None:
    everything_shown(page, server)
    tree = page.locator("body").aria_snapshot()
    assert (
        re.findall(r"^\s*- (?:button|textbox|spinbutton|link|meter|img|region|group|table)(?::| \[|$).*", tree, re.M)
        == []
    )
    assert page.locator(CONTROLS).count() > 20
    assert page.evaluate("[...document.querySelectorAll('label')].filter((label) => !label.control).length") == 0
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((element) => element.id)")
    assert len(ids) == len(set(ids))


def test_the_page_can_be_used_with_the_keyboard_alone(page: Page, server: ScriptedServer) -> None:
    message = page.get_by_label("Message", exact=True)
    expect(message).to_be_focused()
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Control+Enter")
    done(page)
    expect(message).to_be_focused()
    assert server.requests[0]["messages"][0]["content"] == "One\ntwo"
    page.keyboard.type("Three")
    server.hold = True
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".turn").last).to_have_attribute("data-state", "stopped")
    assert server.left.wait(10)
    server.hold = False
    for name in ("Send", "Settings"):
        page.keyboard.press("Tab")
        expect(page.get_by_role("button", name=name)).to_be_focused()
    page.keyboard.press("Space")
    expect(page.get_by_label("System message")).to_be_focused()
    page.keyboard.type("Brief.")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Temperature")).to_be_focused()


def test_the_tab_key_goes_through_all_controls_in_the_order_that_they_are_seen_in(
    page: Page, server: ScriptedServer
) -> None:
    page.locator(".skip").focus()
    examples = page.locator(".example").all_text_contents()
    for name in ["theme", "log", *examples, "message", "send", "settings-toggle", "new", "figures"]:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id || document.activeElement.textContent") == name
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", name


def test_a_composed_character_is_not_sent_by_the_enter_that_ends_it(page: Page, server: ScriptedServer) -> None:
    page.get_by_label("Message", exact=True).fill("に")
    page.evaluate("""document.getElementById("message").dispatchEvent(
        new KeyboardEvent("keydown", { key: "Enter", isComposing: true, bubbles: true, cancelable: true }))""")
    expect(page.locator(".turn")).to_have_count(0)
    assert server.requests == []


def test_a_screen_reader_hears_blocks_not_tokens(page: Page, server: ScriptedServer) -> None:
    page.evaluate("""() => {
        window.heard = [];
        new MutationObserver(() => heard.push(document.getElementById("announcer").textContent))
            .observe(document.getElementById("announcer"), { childList: true });
    }""")
    server.answer = [*"The first.", "\n\n", *"The second."]
    ask(page)
    page.wait_for_function("() => heard.join(' ').includes('complete')")
    heard = page.evaluate("heard")
    assert " ".join(heard) == "Answering. The first. The second. The answer is complete."
    assert len(heard) <= 4
    live = page.evaluate("""[...document.querySelectorAll("[aria-live]:not([aria-live=off]), [role=status]")]
        .map((element) => element.id)""")
    assert sorted(live) == ["announcer", "status"]


@pytest.mark.parametrize("view", ["Chat", "Figures"])
def test_nothing_is_cut_off_at_360_pixels(browser: Browser, server: ScriptedServer, view: str) -> None:
    layout = server.stats["layout"] | {"tensor_parallel_size": 2}
    line = {"group": "tp", "operation": "all_reduce", "phase": "decode"}
    big = {"calls": 10**7, "wire_bytes": 10**13, "predicted_calls": 10**7, "predicted_wire_bytes": 10**13}
    server.stats = server.stats | {"layout": layout, "communication": [line | big]}
    with opened(browser, server.url, viewport=NARROW) as watched:
        page = watched.page
        server.answer = ["w" * 500 + "\n\n```\n" + "x" * 500 + "\n```\n"]
        ask(page, "q" * 300)
        done(page)
        page.get_by_role("button", name="Settings").click()
        page.get_by_role("button", name=view).click()
        expect(page.get_by_role("button", name=view)).to_have_attribute("aria-pressed", "true")
        shown, hidden = ("#figures", "#chat") if view == "Figures" else ("#chat", "#figures")
        expect(page.locator(shown)).to_be_visible()
        expect(page.locator(hidden)).to_be_hidden()
        assert page.evaluate("document.documentElement.scrollWidth") == NARROW["width"]
        scroller = "#log" if view == "Chat" else "#figures"
        box = page.locator(scroller)
        assert box.evaluate("(box) => box.scrollWidth <= box.clientWidth")
        outside = page.evaluate("""() => [...document.querySelectorAll("button, input, textarea")]
            .filter((e) => e.checkVisibility()).map((e) => [e.id, e.getBoundingClientRect()])
            .filter(([, box]) => box.left < 0 || box.right > 360).map(([id]) => id)""")
        assert outside == []


def test_nothing_moves_for_those_who_asked_for_that(browser: Browser, server: ScriptedServer) -> None:
    moves = """[...document.querySelectorAll("*")].filter((element) => {
        const style = getComputedStyle(element);
        return parseFloat(style.transitionDuration) > 0 || style.animationName !== "none";
    }).length"""
    for preference, expected in (("reduce", False), ("no-preference", True)):
        with opened(browser, server.url, reduced_motion=preference) as watched:
            assert (watched.page.evaluate(moves) > 0) == expected


def test_the_headings_skip_no_level(page: Page, server: ScriptedServer) -> None:
    server.answer = ["# Title\ntext"]
    ask(page)
    done(page)
    levels = page.evaluate("""[...document.querySelectorAll("h1, h2, h3, [role=heading]")]
        .filter((e) => e.checkVisibility()).map((e) => Number(e.ariaLevel ?? e.localName[1]))""")
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), levels
