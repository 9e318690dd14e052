"""The figures beside the chat: what /stats says and what follows from two answers of it."""

from typing import Any

from playwright.sync_api import Browser, Page, expect
from scripted_page_server import ScriptedServer
from watched import opened

SECOND = {"generation": 50, "prompt": 30, "compute": 0.6, "communication": 0.3, "waiting": 0.1}


def show(page: Page, server: ScriptedServer, **changed: Any) -> None:
    """New figures, and a page that asks for them now and not within a second."""
    server.stats = server.stats | changed
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")


def pass_a_second(page: Page, server: ScriptedServer) -> None:
    """The counters as they would stand one second later."""
    stats = server.stats
    tokens = {key: value + SECOND[key] for key, value in stats["tokens"].items()}
    time_s = {key: value + SECOND[key] for key, value in stats["time_s"].items()}
    show(page, server, uptime_s=stats["uptime_s"] + 1, tokens=tokens, time_s=time_s)


def column(page: Page, table: str, index: int) -> list[str]:
    return page.locator(f"#{table} tbody tr > :nth-child({index})").all_text_contents()


def test_what_the_server_counts_is_shown_in_its_units(page: Page, server: ScriptedServer) -> None:
    expect(page.locator("#running")).to_have_text("3 of 64")
    expect(page.locator("#waiting")).to_have_text("1")
    expect(page.locator("#preemptions")).to_have_text("2")
    expect(page.locator("#prefix")).to_have_text("25 %")
    expect(page.locator("#blocks")).to_have_text("250 of 1,000, 16 tokens each")
    expect(page.get_by_role("meter", name="KV blocks")).to_have_attribute("aria-valuenow", "250")
    assert page.locator("#latency td:not(:empty)").all_text_contents() == [
        "42.1 ms", "35.0 ms", "1.25 s", "12.3 ms", "12.0 ms", "20.0 ms",
    ]  # fmt: skip
    expect(page.locator("#softmax-schemes")).to_have_text("synchronized in 22 layers")
    expect(page.locator("#softmax-recomputed")).to_have_text("7")
    expect(page.locator("#layout")).to_have_text("TP 1 × PP 1 on cpu, 2 threads")
    expect(page.locator("#uptime")).to_have_text("up 1 h 23 min")
    expect(page.locator("#model")).to_have_text("scripted")


def test_rates_and_shares_are_of_the_last_interval_alone(page: Page, server: ScriptedServer) -> None:
    expect(page.locator("#running")).to_have_text("3 of 64")
    expect(page.locator("#generation-rate")).to_have_text("–")
    pass_a_second(page, server)
    expect(page.locator("#generation-rate")).to_have_text("50.0")
    expect(page.locator("#prompt-rate")).to_have_text("30.0")
    expect(page.get_by_role("img", name="compute 60 %, communication 30 %, waiting 10 %")).to_be_visible()
    widths = page.locator("#time-bar .part").evaluate_all("parts => parts.map((part) => part.style.inlineSize)")
    assert widths == ["60%", "30%", "10%"]


def test_figures_that_the_server_repeats_are_no_second_without_tokens(page: Page, server: ScriptedServer) -> None:
    expect(page.locator("#running")).to_have_text("3 of 64")
    pass_a_second(page, server)
    expect(page.locator("#generation-rate")).to_have_text("50.0")
    show(page, server, uptime_s=server.stats["uptime_s"] + 1, num_waiting=8)
    expect(page.locator("#waiting")).to_have_text("8")
    expect(page.locator("#generation-rate")).to_have_text("50.0")


def test_a_server_that_started_again_is_not_taken_for_one_that_went_backwards(
    page: Page, server: ScriptedServer
) -> None:
    expect(page.locator("#running")).to_have_text("3 of 64")
    pass_a_second(page, server)
    expect(page.locator("#generation-rate")).to_have_text("50.0")
    time_s = dict.fromkeys(("compute", "communication", "waiting"), 0)
    show(page, server, uptime_s=1.0, tokens={"generation": 0, "prompt": 0}, time_s=time_s, num_running=0)
    expect(page.locator("#running")).to_have_text("0 of 64")
    expect(page.locator("#generation-rate")).to_have_text("–")
    pass_a_second(page, server)
    expect(page.locator("#generation-rate")).to_have_text("50.0")


def test_counters_that_began_anew_give_no_negative_rate(page: Page, server: ScriptedServer) -> None:
    expect(page.locator("#running")).to_have_text("3 of 64")
    time_s = server.stats["time_s"] | {"waiting": 1000}
    show(page, server, tokens={"generation": 0, "prompt": 0}, time_s=time_s, num_running=0)
    expect(page.locator("#running")).to_have_text("0 of 64")
    expect(page.locator("#generation-rate")).to_have_text("–")


def exchange(operation: str, phase: str, wire_bytes: int, predicted: int, calls: int = 4) -> dict[str, Any]:
    return {
        "group": "tp",
        "operation": operation,
        "phase": phase,
        "calls": calls,
        "wire_bytes": wire_bytes,
        "predicted_calls": 4,
        "predicted_wire_bytes": predicted,
    }


def test_bytes_that_were_counted_stand_beside_those_predicted(page: Page, server: ScriptedServer) -> None:
    expect(page.locator("#communication-note")).to_have_text("One rank: nothing is exchanged.")
    layout = server.stats["layout"] | {"tensor_parallel_size": 2, "transport": "shm"}
    show(page, server, layout=layout)
    expect(page.locator("#communication-note")).to_have_text("Nothing has been exchanged yet.")
    lines = [exchange("all_reduce", "prefill", 1_000_000, 1_000_000), exchange("all_gather", "decode", 7_999, 7_999)]
    show(page, server, communication=lines)
    expect(page.locator("#communication-note")).to_contain_text("to the byte")
    assert column(page, "communication", 1) == ["tp all-reduce, prefill", "tp all-gather, decode"]
    assert column(page, "communication", 3) == column(page, "communication", 5) == ["1,000,000", "7,999"]
    assert column(page, "communication", 4) == ["=", "="]
    show(page, server, communication=[lines[0], exchange("all_gather", "decode", 8_000, 7_999)])
    expect(page.locator("#communication-note")).to_contain_text("1 of 2 lines differ")
    assert column(page, "communication", 4) == ["=", "≠"]
    show(page, server, communication=[exchange("send", "decode", 10, 10, calls=5)])
    expect(page.locator("#communication tbody tr")).to_have_count(1)
    assert column(page, "communication", 2) == ["5 of 4"]
    assert column(page, "communication", 4) == ["≠"]


def test_the_dataflow_names_the_rows_of_each_implementation_and_marks_those_of_now(
    page: Page, server: ScriptedServer
) -> None:
    expect(page.locator("#dataflow tbody tr")).to_have_count(1)
    cells = page.locator("#dataflow tbody tr > *")
    assert cells.all_text_contents() == ["q + k + v", "2560 × 2048", "int4", "1", "2–95", "96+"]
    expect(page.locator("#dataflow .now")).to_have_text(["2–95"])
    expect(page.locator("#dataflow-note")).to_contain_text("Measured on this machine.")
    first = server.stats["dataflow"]["shapes"][0]
    shapes = [first | {"source": "measured"}, first | {"name": "down_proj", "source": "default"}]
    show(page, server, dataflow={"source": "partly measured", "shapes": shapes})
    expect(page.locator("#dataflow-note")).to_contain_text("but for the default points of down.")
    show(page, server, num_running=0, dataflow=server.stats["dataflow"] | {"source": "default"})
    expect(page.locator("#dataflow .now")).to_have_count(0)
    expect(page.locator("#dataflow-note")).to_have_text("Default points, not measured on this machine.")


def test_a_server_that_is_not_ready_is_said_to_be_what_it_is(page: Page, server: ScriptedServer) -> None:
    status = page.get_by_role("status")
    for state in ("recovering", "draining", "failed", "starting", "ready"):
        show(page, server, state=state)
        expect(status).to_contain_text(state.capitalize())


def test_the_line_of_two_minutes_has_a_gap_where_nothing_is_known(page: Page, server: ScriptedServer) -> None:
    path = page.evaluate("""() => import("./page/sparkline.js").then(({ drawSparkline }) => {
        const svg = document.getElementById("sparkline");
        const rates = [10, 20, 40, null, 30, 0];
        drawSparkline(svg, rates.map((generation, index) => ({ at_s: 100 + index, generation })));
        return svg.querySelector(".line").getAttribute("d");
    })""")
    runs = [[tuple(map(float, point.split())) for point in run.split("L")] for run in path.split("M")[1:]]
    assert [y for run in runs for _, y in run] == [36.75, 25.5, 3, 14.25, 48]  # of 48, the highest 3 below the top
    assert [x for run in runs for x, _ in run] == [230, 232, 234, 238, 240]  # two units a second, now at 240
    assert [len(run) for run in runs] == [3, 2]


def test_an_engine_that_is_not_there_yet_shows_dashes_and_no_error(browser: Browser, server: ScriptedServer) -> None:
    known = {"model", "version", "uptime_s", "state"}
    latencies = dict.fromkeys(("ttft_s", "tpot_s"), dict.fromkeys(("last", "p50", "p95")))
    server.stats = {key: value if key in known else None for key, value in server.stats.items()} | latencies
    server.stats |= {"state": "starting", "trouble": "the engine is not ready"}
    with opened(browser, server.url) as watched:
        page = watched.page
        expect(page.get_by_role("status")).to_have_text("Starting")
        assert page.locator("#latency td:not(:empty)").all_text_contents() == ["–"] * 6
        for figure in ("running", "waiting", "preemptions", "prefix", "blocks", "generation-rate"):
            expect(page.locator(f"#{figure}")).to_have_text("–")
        expect(page.locator("#communication-note")).to_have_text("Not known yet.")
        expect(page.locator("#dataflow-note")).to_have_text("Not known yet.")
        show(page, server, state="failed", trouble="rank 1 was lost")
        expect(page.get_by_role("status")).to_contain_text("(rank 1 was lost)")


def test_what_has_no_choice_and_no_request_says_so(page: Page, server: ScriptedServer) -> None:
    expect(page.locator("#prefix")).to_have_text("25 %")
    nothing = {"source": "none", "shapes": []}
    show(page, server, prefix_cache={"queried": 0, "hit": 0}, dataflow=nothing)
    expect(page.locator("#prefix")).to_have_text("–")
    expect(page.locator("#dataflow-note")).to_contain_text("but one implementation")


def test_a_hidden_page_asks_nothing_and_one_that_is_seen_again_asks_at_once(page: Page, server: ScriptedServer) -> None:
    running = page.locator("#running")
    hide = """(hidden) => {
        Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page.clock.install()
    page.reload()
    expect(running).to_have_text("3 of 64")
    server.stats = server.stats | {"num_running": 4}
    page.clock.run_for(1000)
    expect(running).to_have_text("4 of 64")
    page.evaluate(hide, True)
    asked = server.num_stats
    page.clock.run_for(10_000)
    assert server.num_stats == asked
    server.stats = server.stats | {"num_running": 9}
    page.evaluate(hide, False)
    expect(running).to_have_text("9 of 64")
