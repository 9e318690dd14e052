"""How ranks that a launcher has started open the lines between them: rank 0 listens, the others call."""

import hmac
import json
import secrets
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import psutil

from headrace.errors import RankError
from headrace.parallel.channel import Channel

_CALL = struct.Struct("<16sIB")
"""A caller's token, rank, and which of its two lines this is."""

_CONNECT_S = 2.0
_ACCEPTED = b"\x06"
_KINDS = ("control", "line")


class Lines(NamedTuple):
    """By the rank at the other end."""

    control: dict[int, Channel]
    line: dict[int, Channel]


Broadcast = Callable[[bytes], bytes]
"""Hands rank 0's bytes to every rank; all ranks call it."""


def open_lines(rank: int, world_size: int, broadcast: Broadcast, timeout_s: float) -> Lines:
    """Two lines from rank 0 to each other rank, over TCP.

    Callers show a token that only ranks of this world have been told.

    Raises:
        RankError: a rank did not call, or rank 0 could not be reached, within timeout_s.
    """
    if rank == 0:
        with socket.create_server(("", 0), backlog=2 * world_size) as server:
            token = secrets.token_bytes(16)
            where = {"addresses": _own_addresses(), "port": server.getsockname()[1], "token": token.hex()}
            broadcast(json.dumps(where).encode())
            return _listen(server, token, world_size, timeout_s)
    where = json.loads(broadcast(b""))
    deadline_s = time.monotonic() + timeout_s
    control, line = (_call(where, rank, kind, deadline_s) for kind in range(len(_KINDS)))
    return Lines({0: control}, {0: line})


def _own_addresses() -> list[str]:
    """Where others may reach this host, on its own last."""
    found = [a.address for addresses in psutil.net_if_addrs().values() for a in addresses if a.family == socket.AF_INET]
    return sorted(set(found), key=lambda address: (address.startswith("127."), address))


def _listen(server: socket.socket, token: bytes, world_size: int, timeout_s: float) -> Lines:
    lines = Lines({}, {})
    deadline_s = time.monotonic() + timeout_s
    while len(lines.control) + len(lines.line) < 2 * (world_size - 1):
        server.settimeout(max(0.0, deadline_s - time.monotonic()) or 1e-3)
        try:
            stream, _ = server.accept()
        except TimeoutError:
            missing = sorted(set(range(1, world_size)) - (lines.control.keys() & lines.line.keys()))
            raise RankError(
                f"rank {', '.join(map(str, missing))} did not call rank 0 within {timeout_s:g} s; "
                "every rank must run the same command"
            ) from None
        _accept(stream, token, lines)
    return lines


def _accept(stream: socket.socket, token: bytes, lines: Lines) -> None:
    """Keep a line whose caller knows the token; hang up on anybody else."""
    stream.settimeout(_CONNECT_S)
    try:
        shown, rank, kind = _CALL.unpack(_receive_exactly(stream, _CALL.size))
        if hmac.compare_digest(shown, token) and kind < len(_KINDS):
            stream.sendall(_ACCEPTED)
            lines[kind][rank] = _as_channel(stream)
            return
    except (OSError, EOFError):
        pass
    stream.close()


def _call(where: dict[str, object], rank: int, kind: int, deadline_s: float) -> Channel:
    addresses, port, token = where["addresses"], where["port"], where["token"]
    assert isinstance(addresses, list)
    assert isinstance(port, int)
    while time.monotonic() < deadline_s:
        for address in addresses:
            with suppress(OSError, EOFError):
                stream = socket.create_connection((address, port), timeout=_CONNECT_S)
                stream.sendall(_CALL.pack(bytes.fromhex(str(token)), rank, kind))
                if _receive_exactly(stream, 1) == _ACCEPTED:
                    return _as_channel(stream)
                stream.close()
    raise RankError(
        f"rank {rank} cannot reach rank 0 at {', '.join(addresses)}, port {port}; is a firewall between them?"
    )


def _as_channel(stream: socket.socket) -> Channel:
    stream.settimeout(None)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Channel(stream)


def _receive_exactly(stream: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        part = stream.recv(num_bytes - len(data))
        if not part:
            raise EOFError("the caller has hung up")
        data += part
    return data
