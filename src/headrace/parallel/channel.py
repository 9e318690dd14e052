"""Messages between two processes over a stream socket: step plans, results, signs of life. No tensors."""

import select
import socket
import struct
import time
from contextlib import suppress

_HEADER = struct.Struct("<I")
_READ_BYTES = 2**16


class ChannelClosed(Exception):
    """The other end is gone, or this one was closed."""


class Channel:
    """Whole messages of bytes, in order, over a connected stream socket. Blocks, and so takes no CPU while it waits.

    One thread at a time sends and receives; `close` may come from any thread and ends both.

    Raises:
        ChannelClosed: from `send` and `receive`, once the other end is gone or this one closed.
    """

    def __init__(self, stream: socket.socket) -> None:
        self._stream = stream
        self._unread = bytearray()

    def fileno(self) -> int:
        return self._stream.fileno()

    def send(self, message: bytes) -> None:
        rest = memoryview(_HEADER.pack(len(message)) + message)
        try:
            while rest:
                try:
                    rest = rest[self._stream.send(rest, socket.MSG_DONTWAIT) :]
                except BlockingIOError:
                    self._wait_to_send()
        except OSError as error:
            raise ChannelClosed(str(error)) from None

    def receive(self) -> bytes:
        """The next message, however long it takes to come."""
        while (message := self._take()) is None:
            self._read()
        return message

    def receive_ready(self) -> list[bytes]:
        """What has come by now, after a poll has said that there is something."""
        self._read()
        messages = []
        while (message := self._take()) is not None:
            messages.append(message)
        return messages

    def wait_for_end(self, timeout_s: float) -> None:
        """Until the other end has closed, or for so long; what it still says is passed over."""
        deadline_s = time.monotonic() + timeout_s
        poller = select.poll()
        with suppress(ChannelClosed, OSError, ValueError):
            poller.register(self.fileno(), select.POLLIN)
            while (left_s := deadline_s - time.monotonic()) > 0:
                if poller.poll(left_s * 1000):
                    self.receive_ready()

    def close(self) -> None:
        with suppress(OSError):
            # Wakes a thread that waits in recv or sendall, which closing the descriptor would not.
            self._stream.shutdown(socket.SHUT_RDWR)
        self._stream.close()

    def _wait_to_send(self) -> None:
        """Until there is room, taking in what comes: two ends that both send much would else wait for ever."""
        poller = select.poll()
        poller.register(self._stream.fileno(), select.POLLIN | select.POLLOUT)
        [(_, events)] = poller.poll()
        if events & select.POLLIN:
            self._read()

    def _read(self) -> None:
        try:
            data = self._stream.recv(_READ_BYTES)
        except OSError as error:
            raise ChannelClosed(str(error)) from None
        if not data:
            raise ChannelClosed("the other end has closed it")
        self._unread += data

    def _take(self) -> bytes | None:
        if len(self._unread) < _HEADER.size:
            return None
        [size] = _HEADER.unpack_from(self._unread)
        end = _HEADER.size + size
        if len(self._unread) < end:
            return None
        message = bytes(self._unread[_HEADER.size : end])
        del self._unread[:end]
        return message


def channel_pair() -> tuple[Channel, socket.socket]:
    """This process's end as a channel, and the other one as a socket to hand on."""
    ours, theirs = socket.socketpair()
    return Channel(ours), theirs
