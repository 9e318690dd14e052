"""The chat in headless Chromium, before a server whose answers are scripted."""

from playwright.sync_api import Browser, Page, expect
from scripted_page_server import ScriptedServer
from watched import ask, done, opened


def test_markup_in_an_answer_and_in_a_question_stays_text(page: Page, server: ScriptedServer) -> None:
    hostile = '<img src=x onerror="document.title=1"><script>document.title=2</script><a href="javascript:0">x</a>'
    server.answer = [hostile, f"\n\n- {hostile}\n\n```html\n{hostile}\n```\n# {hostile}\n**{hostile}** `{hostile}`"]
    ask(page, hostile)
    done(page)
    assert page.locator(".question").inner_text() == hostile
    assert page.locator(".prose").inner_text().count(hostile) == 6
    assert page.locator(".turn :is(img, script, a)").count() == 0
    assert page.title() == "Headrace"


def test_the_policy_refuses_markup_made_from_text(browser: Browser, server: ScriptedServer) -> None:
    with opened(browser, server.url) as watched:
        refused = watched.page.evaluate(
            "() => { try { document.body.innerHTML = '<b>'; } catch (e) { return e.name; } }"
        )
        assert refused == "TypeError"
        watched.errors.clear()  # the browser reports what it refused


def test_a_request_carries_the_conversation_and_only_the_settings_that_were_given(
    page: Page, server: ScriptedServer
) -> None:
    ask(page, "First?")
    done(page)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System message").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.25")
    page.get_by_label("Seed").fill("7")
    ask(page, "Second?")
    expect(page.locator(".turn[data-state=done]")).to_have_count(2)
    first, second = server.requests
    stream = {"model": "scripted", "stream": True, "stream_options": {"include_usage": True}}
    assert first == {"messages": [{"role": "user", "content": "First?"}], **stream}
    assert second == {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "First?"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Second?"},
        ],
        "temperature": 0.25,
        "seed": 7,
        **stream,
    }
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".turn")).to_have_count(0)
    ask(page, "Third?")
    done(page)
    assert [message["content"] for message in server.requests[2]["messages"]] == ["Be brief.", "Third?"]


def test_a_setting_that_is_no_number_of_its_range_is_not_sent(page: Page, server: ScriptedServer) -> None:
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Top p").fill("1.5")
    page.get_by_role("button", name="Settings").click()
    ask(page, "Kept?")
    expect(page.get_by_label("Top p")).to_be_focused()
    assert server.requests == []
    assert page.get_by_label("Message", exact=True).input_value() == "Kept?"


def test_an_example_is_asked_and_the_focus_goes_to_the_next_question(page: Page, server: ScriptedServer) -> None:
    page.get_by_role("button", name="What is a KV cache?").click()
    done(page)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    assert server.requests[0]["messages"] == [{"role": "user", "content": "What is a KV cache?"}]


def test_an_error_is_shown_in_the_words_of_the_server_and_can_be_tried_again(
    browser: Browser, server: ScriptedServer
) -> None:
    sentence = "the prompt has 4096 tokens; this model takes 2048"
    server.refusal = (400, sentence)
    with opened(browser, server.url) as watched:
        page = watched.page
        watched.may_fail = True
        ask(page)
        expect(page.get_by_role("alert")).to_have_text(sentence)
        expect(page.get_by_role("status")).to_have_text("Ready")
        server.refusal = None
        page.get_by_role("button", name="Try again").click()
        done(page)
        expect(page.locator(".turn")).to_have_count(1)
        assert [request["messages"] for request in server.requests] == [[{"role": "user", "content": "Why?"}]] * 2


def test_an_answer_that_breaks_off_is_kept_and_said_to_be_incomplete(page: Page, server: ScriptedServer) -> None:
    server.answer, server.cut = ["Half an"], True
    ask(page)
    expect(page.get_by_role("alert")).to_contain_text("The connection broke before the answer was complete")
    expect(page.locator(".prose")).to_have_text("Half an")


def test_what_broke_off_is_no_part_of_what_is_tried_again(page: Page, server: ScriptedServer) -> None:
    server.answer, server.cut = ["Half an"], True
    ask(page)
    page.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_be_visible()
    expect(page.locator(".turn")).to_have_count(1)
    assert [request["messages"] for request in server.requests] == [[{"role": "user", "content": "Why?"}]] * 2


def test_a_question_without_an_answer_is_left_out_of_later_requests(page: Page, server: ScriptedServer) -> None:
    server.answer, server.cut = [], True
    ask(page)
    expect(page.get_by_role("alert")).to_be_visible()
    server.answer, server.cut = ["Yes."], False
    ask(page, "And now?")
    done(page)
    assert server.requests[1]["messages"] == [{"role": "user", "content": "And now?"}]


def test_an_answer_at_the_largest_number_of_tokens_says_so(page: Page, server: ScriptedServer) -> None:
    server.finish_reason = "length"
    ask(page)
    done(page)
    expect(page.locator(".turn .note")).to_contain_text("Ended at the largest number of tokens.")
    expect(page.locator(".turn .note")).to_contain_text("1 token in ")


def test_a_server_with_keys_is_given_one_that_outlives_a_reload_but_not_the_tab(
    browser: Browser, server: ScriptedServer
) -> None:
    server.api_key = "sesame"
    with opened(browser, server.url) as watched:
        page, watched.may_fail = watched.page, True
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        expect(page.get_by_text("No API key was given, or a wrong one.")).to_be_visible()
        field.fill("wrong")
        page.keyboard.press("Enter")
        expect(field).to_have_value("")
        expect(field).to_be_visible()
        field.fill("sesame")
        page.keyboard.press("Enter")
        expect(page.get_by_role("status")).to_have_text("Ready")
        expect(field).to_be_hidden()
        page.reload()
        expect(page.get_by_role("status")).to_have_text("Ready")
        ask(page)
        done(page)
        assert page.evaluate("JSON.stringify(localStorage)").count("sesame") == 0
        other = page.context.new_page()
        other.goto(server.url)
        expect(other.get_by_label("API key")).to_be_visible()


def test_an_answer_is_stopped_where_it_is_and_the_server_sees_the_client_leave(
    page: Page, server: ScriptedServer
) -> None:
    server.answer, server.hold = ["As far ", "as this"], True
    ask(page)
    expect(page.locator(".prose")).to_have_text("As far as this")
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".turn")).to_have_attribute("data-state", "stopped")
    expect(page.locator(".prose")).to_have_text("As far as this")
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.get_by_label("Message", exact=True)).to_be_focused()  # and not lost with the button
    assert server.left.wait(10)
    server.hold = False
    ask(page, "Go on.")
    done(page)
    assert [m["content"] for m in server.requests[1]["messages"]] == ["Why?", "As far as this", "Go on."]


def test_a_new_conversation_ends_the_answer_that_is_being_written(page: Page, server: ScriptedServer) -> None:
    server.hold = True
    ask(page)
    expect(page.locator(".prose")).to_have_text("Yes.")
    page.get_by_role("button", name="New conversation").click()
    assert server.left.wait(10)
    expect(page.locator(".turn")).to_have_count(0)
    server.hold = False
    ask(page, "Anew?")
    done(page)
    assert [m["content"] for m in server.requests[1]["messages"]] == ["Anew?"]


AT_END = """() => {
    const { scrollHeight, scrollTop, clientHeight } = document.getElementById("log");
    return scrollHeight - scrollTop - clientHeight < 2;
}"""


def test_a_growing_answer_is_followed_until_the_reader_scrolls_away(page: Page, server: ScriptedServer) -> None:
    server.hold, server.answer, server.rest = True, ["line\n\n" * 200], ["more\n\n" * 50]
    ask(page)
    expect(page.locator(".prose p")).to_have_count(200)
    page.wait_for_function(AT_END)
    page.locator("#log").hover()
    page.mouse.wheel(0, -400)
    page.wait_for_function(f"() => !({AT_END})()")
    top = page.evaluate("document.getElementById('log').scrollTop")
    server.hold = False
    done(page)
    expect(page.locator(".prose p")).to_have_count(250)
    assert page.evaluate("document.getElementById('log').scrollTop") == top
    page.get_by_role("button", name="Show the latest").click()
    page.wait_for_function(AT_END)
    expect(page.get_by_role("button", name="Show the latest")).to_be_hidden()
