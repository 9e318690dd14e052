"""Hosts played by network namespaces: each has an interface `eth0`, and all of them meet on a bridge."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERFACE = "eth0"
_MIN_BURST_BYTES = 2 * 1514
_BURST_S = 100e-6
"""What a host that has been silent may send at once, beyond its rate: what a timer needs to keep up with that."""
_MAX_QUEUE_S = "200ms"


class CommandError(Exception):
    """A command of the system's failed; says which, and what it said."""


@dataclass(frozen=True, kw_only=True)
class Counters:
    """What an interface has sent since it was made: frames with their Ethernet headers, but no preamble or checksum."""

    tx_bytes: int
    tx_packets: int

    def __sub__(self, earlier: Counters) -> Counters:
        return Counters(tx_bytes=self.tx_bytes - earlier.tx_bytes, tx_packets=self.tx_packets - earlier.tx_packets)


@dataclass(frozen=True)
class Network:
    """namespaces: of the hosts, rank 0's first; addresses: of their interfaces."""

    namespaces: tuple[str, ...]
    addresses: tuple[str, ...]

    def limit(self, mbit_per_s: int) -> None:
        """Let no host send faster than this; 0 for no limit."""
        for namespace in self.namespaces:
            with suppress(CommandError):
                _run("tc", "-n", namespace, "qdisc", "del", "dev", INTERFACE, "root")
            if mbit_per_s:
                burst_bytes = max(_MIN_BURST_BYTES, int(mbit_per_s * 1e6 / 8 * _BURST_S))
                bucket = ["tbf", "rate", f"{mbit_per_s}mbit", "burst", str(burst_bytes), "latency", _MAX_QUEUE_S]
                _run("tc", "-n", namespace, "qdisc", "add", "dev", INTERFACE, "root", *bucket)

    def counters(self) -> list[Counters]:
        return [read_counters(namespace) for namespace in self.namespaces]


def why_not() -> str | None:
    """Why this machine cannot make namespaces; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "tc", "ss") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not found; install iproute2"
    if not Path("/proc/self/ns/net").exists():
        return "this kernel has no network namespaces"
    trial = f"headrace-{os.getpid()}-trial"
    try:
        _run("ip", "netns", "add", trial)
        _run("ip", "netns", "del", trial)
    except CommandError as error:
        return f"no network namespace can be made here: {error}"
    return None


@contextmanager
def network(num_hosts: int, mbit_per_s: int = 0) -> Iterator[Network]:
    """A network of so many hosts, which is gone afterwards, with every process that runs on it.

    SIGTERM and Ctrl-C end the program by an exception, so that this holds then too.

    Raises:
        CommandError: something could not be set up; what had been is removed.
    """
    _remove_left_behind()
    prefix = f"headrace-{os.getpid()}"
    hosts = tuple(f"{prefix}-{i}" for i in range(num_hosts))
    made = Network(hosts, tuple(f"10.77.0.{i + 1}" for i in range(num_hosts)))
    switch = f"{prefix}-switch"
    # SIGINT too: a shell starts background jobs with it ignored.
    before = {number: signal.signal(number, _end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        _make(made, switch)
        made.limit(mbit_per_s)
        yield made
    finally:
        for namespace in (*hosts, switch):
            _remove(namespace)
        for number, handler in before.items():
            signal.signal(number, handler)


def read_counters(namespace: str) -> Counters:
    [link] = json.loads(_run("ip", "-n", namespace, "-s", "-j", "link", "show", INTERFACE))
    sent: dict[str, Any] = link["stats64"]["tx"]
    return Counters(tx_bytes=sent["bytes"], tx_packets=sent["packets"])


def _make(made: Network, switch: str) -> None:
    _run("ip", "netns", "add", switch)
    _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
    _run("ip", "-n", switch, "link", "set", "bridge", "up")
    for i, (namespace, address) in enumerate(zip(made.namespaces, made.addresses, strict=True)):
        port = f"port{i}"
        _run("ip", "netns", "add", namespace)
        # Without IPv6 there are no messages but those of the ranks.
        with suppress(CommandError):
            _run(*in_namespace(namespace, ["sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6"]))
        _run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", namespace)
        _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
        _run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", INTERFACE)
        _run("ip", "-n", namespace, "link", "set", INTERFACE, "up")
        _run("ip", "-n", namespace, "link", "set", "lo", "up")


def _remove_left_behind() -> None:
    """What programs have left that were killed."""
    for line in _run("ip", "netns", "list").splitlines():
        if (found := re.match(r"headrace-(\d+)-", line)) and not Path("/proc", found[1]).exists():
            _remove(line.split()[0])


def _remove(namespace: str) -> None:
    """With its processes: a namespace whose processes live on would live on, too."""
    with suppress(CommandError):
        for pid in _run("ip", "netns", "pids", namespace).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    with suppress(CommandError):
        _run("ip", "netns", "del", namespace)


def _end(number: int, frame: object) -> None:  # noqa: ARG001
    raise KeyboardInterrupt


def _run(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise CommandError(f"`{' '.join(command)}` failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


def in_namespace(namespace: str, command: Sequence[str]) -> list[str]:
    return ["ip", "netns", "exec", namespace, *command]
