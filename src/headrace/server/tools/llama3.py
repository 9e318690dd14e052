"""Llama 3.1 and 3.2: the whole answer is {"name": ..., "parameters": {...}}, or several with ";" between them.

<|python_tag|> may stand before them, and only with it may text. An answer in JSON that has other keys is content.
"""

from headrace.server.tools.json_calls import JsonCallParser
from headrace.server.tools.parser import Reading


class Llama3Parser(JsonCallParser):
    def _read(self) -> Reading[None]:
        self._next = yield
        yield from self._spaces()
        yield from self._calls()
        while self._next:
            if self._next != "<":
                yield from self._advance()
            elif (yield from self._literal("<|python_tag|>")):
                yield from self._calls()
            self._give_back()
        self._give_back()

    def _calls(self) -> Reading[None]:
        """Read calls for as long as there are some; what follows them is left in `taken`."""
        yield from self._spaces()
        while self._next == "{" and (yield from self._call_object(needs_arguments=True)):
            yield from self._spaces()
            if self._next == ";":
                yield from self._advance()
            yield from self._spaces()
            if not self._next:
                self._drop()
