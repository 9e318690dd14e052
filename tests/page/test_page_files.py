"""The page's files as they are served: types, headers, caching, and nothing that points elsewhere."""

import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from headrace.server.page import page_routes

ASSETS = sorted(file.name for file in files("headrace.server.page").iterdir() if not file.name.startswith("__"))


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(Starlette(routes=page_routes()))


class References(HTMLParser):
    """What a document loads, and what the policy would refuse: scripts, styles and handlers within it."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        self.loaded += [value for name in ("src", "href") if (value := names.get(name)) and not value.startswith("#")]
        self.inline += [name for name in names if name == "style" or name.startswith("on")]
        if tag == "style" or (tag == "script" and "src" not in names):
            self.inline.append(tag)


def test_the_page_is_at_the_root_with_a_strict_policy(client: TestClient) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in answer.headers["content-security-policy"]


def test_the_page_loads_its_own_files_alone_and_holds_no_code(client: TestClient) -> None:
    references = References()
    references.feed(client.get("/").text)
    assert references.loaded
    assert references.inline == []
    for path in references.loaded:
        assert client.get("/" + path).status_code == 200, path


@pytest.mark.parametrize("name", [name for name in ASSETS if name != "index.html"])
def test_every_file_is_served_as_what_it_is(client: TestClient, name: str) -> None:
    types = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}
    answer = client.get(f"/page/{name}")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == types[name.rpartition(".")[2]]
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", [name for name in ASSETS if name.endswith(".js")])
def test_modules_import_files_that_are_served_and_write_no_markup(client: TestClient, name: str) -> None:
    text = client.get(f"/page/{name}").text
    for imported in re.findall(r'from "([^"]+)"', text):
        assert client.get(f"/page/{imported.removeprefix('./')}").status_code == 200, imported
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|https?://(?!www\.w3\.org/)", text
    )


def test_a_file_that_has_not_changed_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/page/style.css")
    assert first.headers["cache-control"] == "no-cache"
    again = client.get("/page/style.css", headers={"if-none-match": f'"other", W/{first.headers["etag"]}'})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    assert client.get("/page/style.css", headers={"if-none-match": '"other"'}).content == first.content


@pytest.mark.parametrize("path", ["/page/__init__.py", "/page/", "/page/../__init__.py", "/page/missing.js"])
def test_nothing_else_of_the_folder_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_the_page_answers_to_head_and_to_nothing_that_writes(client: TestClient) -> None:
    assert client.head("/").status_code == 200
    assert client.post("/").status_code == 405
