"""A plain HTTP request, whatever it is answered with."""

from dataclasses import dataclass
from email.message import Message
from urllib.error import HTTPError
from urllib.request import Request, urlopen


@dataclass(frozen=True)
class Answer:
    status: int
    text: str
    headers: Message


def get(url: str, **headers: str) -> Answer:
    """Underscores in the names of headers are hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urlopen(Request(url, headers=named), timeout=30) as answer:
            return Answer(answer.status, answer.read().decode(), answer.headers)
    except HTTPError as error:
        with error:
            return Answer(error.code, error.read().decode(), error.headers)
