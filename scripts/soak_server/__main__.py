"""See the package."""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from typing import Any

import psutil

from headrace.demo_model import demo_model_path
from scripts.soak_server.clients import Tally, run_client

_WARM_SHARE = 0.25
"""Of the time, in which memory may still grow: buffers, connections, and the cache's tree fill up."""

_MAX_GROWTH = 0.05
_NUM_BLOCKS, _MAX_WAITING = 256, 200
"""So few that running requests must be preempted."""


def main() -> None:
    parser = argparse.ArgumentParser(description="a server under many clients of which some leave")
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--kills", type=int, default=0, help="of a rank, spread over the time")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    command = [sys.executable, "-m", "scripts.soak_server.served", str(demo_model_path())]
    server = subprocess.Popen(
        [*command, str(_NUM_BLOCKS), str(_MAX_WAITING), str(2 if args.kills else 1)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        result = asyncio.run(_soak(server, args.clients, 60 * args.minutes, args.kills))
    finally:
        server.stdin.close()
        server.terminate()
    result["exit_code"] = server.wait(60)
    if result["exit_code"] != 0:
        result["problems"].append(f"the server ended with {result['exit_code']}")
    _show(result, as_json=args.json)
    sys.exit(bool(result["problems"]))


async def _soak(server: "subprocess.Popen[str]", num_clients: int, seconds: float, num_kills: int) -> dict[str, Any]:
    port = json.loads(await asyncio.to_thread(server.stdout.readline))["port"]
    process, tally = psutil.Process(server.pid), Tally()
    loop = asyncio.get_running_loop()
    start_s = loop.time()
    clients = [
        asyncio.create_task(run_client(seed, port, start_s + seconds, tally, may_be_lost=num_kills > 0))
        for seed in range(num_clients)
    ]
    killer = asyncio.create_task(_kill_now_and_then(process, num_kills, seconds / (num_kills + 1)))
    rss_bytes: list[tuple[float, int]] = []
    while loop.time() < start_s + seconds:
        await asyncio.sleep(1.0)
        rss_bytes.append((loop.time() - start_s, process.memory_info().rss))
        print(
            f"\r{rss_bytes[-1][0]:4.0f} s  {rss_bytes[-1][1] / 1e6:6.0f} MB  {dict(tally.kinds)}   ",
            end="",
            file=sys.stderr,
        )
    print(file=sys.stderr)
    await asyncio.gather(*clients, killer)
    end = await _settled(server)
    warm = [size for at_s, size in rss_bytes if at_s >= _WARM_SHARE * seconds] or [rss_bytes[-1][1]]
    half = len(warm) // 2 or 1
    first_mean, last_mean = sum(warm[:half]) / half, sum(warm[-half:]) / half
    growth = last_mean / first_mean - 1
    problems = tally.problems
    if growth > _MAX_GROWTH and not num_kills:
        problems.append(f"memory grew by {growth:.1%} after the first quarter")
    if end.get("broken") or end["running"] or end["waiting"] or end["kv_cache_usage"] or end["open"] or end["admitted"]:
        problems.append(f"something was left behind: {end}")
    return {
        "clients": num_clients,
        "seconds": seconds,
        "requests": dict(tally.kinds),
        "events": tally.num_events,
        "rss_mean_first_bytes": int(first_mean),
        "rss_mean_last_bytes": int(last_mean),
        "rss_growth": growth,
        "num_fds": process.num_fds(),
        "end": end,
        "problems": problems[:20],
        "num_problems": len(problems),
    }


async def _kill_now_and_then(server: psutil.Process, num_kills: int, interval_s: float) -> None:
    for _ in range(num_kills):
        await asyncio.sleep(interval_s)
        while not (ranks := server.children(recursive=True)):
            await asyncio.sleep(0.1)
        ranks[-1].kill()


async def _settled(server: "subprocess.Popen[str]") -> dict[str, Any]:
    """How the engine is once those who left are gone from it."""
    deadline_s = time.monotonic() + 30
    while True:
        server.stdin.write("?\n")
        server.stdin.flush()
        found: dict[str, Any] = json.loads(await asyncio.to_thread(server.stdout.readline))
        if (
            "broken" in found
            or not found["running"] + found["waiting"] + found["open"] + found["admitted"]
            or time.monotonic() > deadline_s
        ):
            return found
        await asyncio.sleep(0.2)


def _show(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result, indent=2))
        return
    for name, value in result.items():
        print(f"{name:<22} {value}")
    print("no problem" if not result["num_problems"] else "PROBLEMS")


if __name__ == "__main__":
    main()
