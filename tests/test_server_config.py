"""What a server's settings may be."""

import math
import socket

import pytest

from headrace.config.server import MAX_S, ServerConfig
from headrace.errors import ConfigError
from headrace.server.serve import listen

TIMES = ["queue_timeout_s", "request_timeout_s", "body_timeout_s", "slow_reader_s", "restart_window_s", "drain_s"]


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("value", [math.inf, math.nan, 1e12, -1.0])
def test_a_time_that_no_timer_knows_is_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is .*allowed: .*1000000"):
        ServerConfig(**{name: value})


@pytest.mark.parametrize(("given_s", "timeout_ms"), [(1e-5, 1), (0.25, 250), (MAX_S, 1_000_000_000)])
def test_a_listener_gives_slow_readers_the_time_that_was_said(given_s: float, timeout_ms: int) -> None:
    with listen(ServerConfig(port=0, slow_reader_s=given_s)) as listener:
        assert listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == timeout_ms


def test_all_bodies_together_may_not_have_less_than_one() -> None:
    with pytest.raises(ConfigError, match=r"max_body_bytes is 11, .*10 \(max_bodies_bytes\)"):
        ServerConfig(max_body_bytes=11, max_bodies_bytes=10)
    assert ServerConfig(max_body_bytes=10, max_bodies_bytes=10)
