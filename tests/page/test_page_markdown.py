"""An answer's text as elements: the same wherever its stream is cut, bounded, and never markup."""

from playwright.sync_api import Page
from scripted_page_server import ScriptedServer
from watched import ask, done


def test_markdown_becomes_elements_wherever_the_stream_is_cut(page: Page, server: ScriptedServer) -> None:
    text = (
        "# Title\nA **strong** `word`\nand more.\n\n1. one\n2. two\n   - three\n\n"
        "```py\na = '**'\n\n# b\n```\nEnd * `open."
    )
    expected = [
        ("P", "heading", "Title"),
        ("P", "text", "A strong word\nand more."),
        ("OL", None, "onetwothree"),
        ("PRE", None, "a = '**'\n\n# b\n"),
        ("P", "text", "End * `open."),
    ]
    script = """([text, size]) => import("./page/markdown.js").then(({MarkdownStream}) => {
        const root = document.createElement("div"), blocks = [];
        const stream = new MarkdownStream(root, (block) => blocks.push(block));
        for (let at = 0; at < text.length; at += size) stream.append(text.slice(at, at + size));
        stream.end();
        const marks = [...root.querySelectorAll("strong, p code")].map((e) => e.localName + " " + e.textContent);
        return [[...root.children].map((e) => [e.tagName, e.dataset.kind ?? null, e.textContent]), marks, blocks];
    })"""
    for size in (1, 2, 3, 5, 7, 1000):
        blocks, marks, announced = page.evaluate(script, [text, size])
        assert [tuple(block) for block in blocks] == expected, size
        assert marks == ["strong strong", "code word"], size
        assert announced == [
            "Title", "A strong word\nand more.", "one", "two", "three", "Code, 3 lines.", "End * `open.",
        ]  # fmt: skip


def test_a_list_in_a_list_is_one_of_its_own(page: Page) -> None:
    text = "3. c\n   - x\n   - y\n      1. deep\n4. d\n- other\n  continued"
    markup = page.evaluate(
        """(text) => import("./page/markdown.js").then(({ MarkdownStream }) => {
            const root = document.createElement("div"), stream = new MarkdownStream(root);
            for (const character of text) stream.append(character);
            stream.end();
            const outline = (list) => [list.localName + (list.start ?? ""), ...[...list.children].map((item) =>
                [item.firstChild.data, ...[...item.children].map(outline)])];
            return [...root.children].map(outline);
        })""",
        text,
    )
    deep = ["ol1", ["deep"]]
    assert markup == [["ol3", ["c", ["ul", ["x"], ["y", deep]]], ["d"]], ["ul", ["other\ncontinued"]]]


def test_a_long_answer_is_whole_and_no_element_of_it_grows_without_bound(page: Page, server: ScriptedServer) -> None:
    words = " ".join(f"word{index}" for index in range(6_000))
    code = "".join(f"line {index}\n" for index in range(3_000))
    server.answer = [*(words[at : at + 500] for at in range(0, len(words), 500)), "\n```\n", code, "```\n", "end"]
    ask(page)
    done(page)
    texts = page.locator(".prose p").all_text_contents()
    assert "".join(texts[:-1]) == words
    assert texts[-1] == "end"
    assert max(map(len, texts)) <= 4000
    assert page.locator(".prose pre").text_content() == code
    assert max(text.count("\n") for text in page.locator(".prose pre span").all_text_contents()) <= 64
