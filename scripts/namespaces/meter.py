"""What each host of a network has sent, between two readings: in all, and for the control channel."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from scripts.namespaces.network import read_counters

_HEADER_BYTES = 14 + 20 + 32
"""Of a segment: Ethernet, IPv4, and TCP with a time stamp."""
_SETTLE_S = 0.1
"""Longer than an acknowledgement waits for data to travel with."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """By one host. control_bytes: of all, those of the connections on the control port, with their headers."""

    all_bytes: int
    num_frames: int
    control_bytes: int

    def __sub__(self, earlier: Sent) -> Sent:
        return Sent(
            all_bytes=self.all_bytes - earlier.all_bytes,
            num_frames=self.num_frames - earlier.num_frames,
            control_bytes=self.control_bytes - earlier.control_bytes,
        )


@dataclass(frozen=True)
class Meter:
    """Reads interface counters of namespaces, from any process of this machine. control_port: of rank 0, 0 for none."""

    namespaces: Sequence[str]
    control_port: int = 0

    def read(self) -> list[Sent]:
        """By host, once nothing is under way."""
        time.sleep(_SETTLE_S)
        sent = []
        for namespace in self.namespaces:
            counters = read_counters(namespace)
            control_bytes = _socket_bytes(namespace, self.control_port) if self.control_port else 0
            sent.append(Sent(all_bytes=counters.tx_bytes, num_frames=counters.tx_packets, control_bytes=control_bytes))
        return sent


def _socket_bytes(namespace: str, port: int) -> int:
    """That the connections of a port have sent, as the kernel counts them: what was written, and headers of all
    segments, acknowledgements included."""
    command = ["ss", "-N", namespace, "-tinHO", f"sport = :{port} or dport = :{port}"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return _sum_of("bytes_sent", text) + _sum_of("segs_out", text) * _HEADER_BYTES


def _sum_of(field: str, text: str) -> int:
    return sum(int(value) for value in re.findall(rf"\b(?<!_){field}:(\d+)", text))
