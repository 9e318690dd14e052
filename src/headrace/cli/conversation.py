"""The messages of a chat, kept within the model's length. Knows nothing about models or terminals."""

from collections.abc import Callable, Sequence

Message = dict[str, str]


class Conversation:
    """A system message, if any, and the turns since; each turn is a user message and its answer.

    Invariant: between turns, user and assistant messages alternate, as most chat templates demand.
    """

    def __init__(self, system: str | None = None) -> None:
        self._system: list[Message] = [{"role": "system", "content": system}] if system else []
        self._turns: list[Message] = []

    @property
    def messages(self) -> list[Message]:
        return [*self._system, *self._turns]

    @property
    def num_turns(self) -> int:
        return (len(self._turns) + 1) // 2

    def ask(self, text: str) -> None:
        self._turns.append({"role": "user", "content": text})

    def answer(self, text: str) -> None:
        self._turns.append({"role": "assistant", "content": text})

    def take_back(self) -> None:
        """Forget a question that got no answer."""
        self._turns.pop()

    def reset(self) -> None:
        """Start over; the system message stays."""
        self._turns.clear()

    def drop_oldest(self, max_tokens: int, count_tokens: Callable[[Sequence[Message]], int]) -> int:
        """Drop turns from the front until what is left has at most `max_tokens` tokens; returns how many went.

        The last question always stays, however long it is.
        """
        num_dropped = 0
        while len(self._turns) > 2 and count_tokens(self.messages) > max_tokens:
            del self._turns[:2]
            num_dropped += 1
        return num_dropped
