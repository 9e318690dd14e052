"""The load generator without a network: lengths, arrivals, prompts, event streams, the arithmetic of its figures."""

import asyncio
import json
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.bench.serve.address import Address
from headrace.bench.serve.arrivals import ClosedLoop, OpenLoop
from headrace.bench.serve.dataset import read_samples
from headrace.bench.serve.health import GeneratorHealth, remarks
from headrace.bench.serve.lengths import Length, RequestMix
from headrace.bench.serve.load import LoadRun
from headrace.bench.serve.metrics import Distribution, Goodput, full_decode, summarize
from headrace.bench.serve.prompts import TextPrompts, TokenIdPrompts
from headrace.bench.serve.records import Failure, FailureKind, RequestRecord
from headrace.bench.serve.session import LevelResult, best_level, is_saturated
from headrace.bench.serve.sse import EventTooLong, SseParser
from headrace.errors import ConfigError


def rng(seed=0):
    return np.random.default_rng(seed)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


class TestLengths:
    def test_fixed(self):
        assert {Length.parse("512", "x").sample(rng(seed)) for seed in range(9)} == {512}

    def test_uniform_covers_its_range_evenly(self):
        length, generator = Length.parse("3-7", "x"), rng()
        counts = np.bincount([length.sample(generator) for _ in range(5000)], minlength=8)
        assert counts[:3].sum() == 0
        assert counts[3:] == pytest.approx([1000] * 5, rel=0.15)

    def test_lognormal_has_its_median_and_spread(self):
        length, generator = Length.parse("400~0.5", "x"), rng()
        logs = np.log([length.sample(generator) for _ in range(20000)])
        assert np.median(logs) == pytest.approx(math.log(400), abs=0.02)
        # A standard normal within three deviations has a deviation of 0.9866.
        assert np.std(logs) == pytest.approx(0.5 * 0.9866, rel=0.03)
        assert math.exp(logs.max()) <= 400 * math.exp(1.5) + 1

    def test_lognormal_is_at_least_one_token(self):
        length, generator = Length.parse("1~2", "x"), rng()
        assert min(length.sample(generator) for _ in range(200)) == 1

    def test_a_mix_draws_by_weight(self):
        mix, generator = RequestMix.parse("512:128:3,32:256:1"), rng()
        found = [mix.sample(generator) for _ in range(4000)]
        assert set(found) == {(512, 128), (32, 256)}
        assert found.count((512, 128)) == pytest.approx(3000, rel=0.05)
        assert str(mix) == "512:128:0.75,32:256:0.25"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("512", "PROMPT:OUTPUT"),
            ("512:1:1:1", "PROMPT:OUTPUT"),
            ("", "PROMPT:OUTPUT"),
            ("0:1", "at least 1"),
            ("9-3:1", "upwards"),
            ("a:1", "has the length 'a'"),
            ("-1:1", "has the length"),
            ("5~x:1", "has the length"),
            ("1:1:0", "weight '0'"),
            ("1:1:nan", "weight 'nan'"),
            ("1:1:x", "weight 'x'"),
        ],
    )
    def test_what_is_no_mix_is_refused(self, text, message):
        with pytest.raises(ConfigError, match=message):
            RequestMix.parse(text)


class TestArrivals:
    def intervals(self, count=20000, **settings):
        times = take(OpenLoop(**settings).times_s(rng()), count)
        assert times[0] == 0
        return np.diff(times)

    def test_poisson(self):
        """Mean and deviation 1 / rate, and as many intervals beyond twice the mean as an exponential has."""
        found = self.intervals(rate_per_s=8.0)
        assert found.mean() == pytest.approx(1 / 8, rel=0.03)
        assert found.std() == pytest.approx(1 / 8, rel=0.05)
        assert (found > 2 / 8).mean() == pytest.approx(math.exp(-2), rel=0.08)

    def test_poisson_counts_have_the_variance_of_their_mean(self):
        times = np.cumsum(self.intervals(rate_per_s=8.0))
        counts = np.bincount(times.astype(int))[:-1]
        assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.1)

    @pytest.mark.parametrize("burstiness", [0.25, 4.0])
    def test_burstiness_is_the_shape_of_a_gamma(self, burstiness):
        found = self.intervals(rate_per_s=2.0, burstiness=burstiness)
        assert found.mean() == pytest.approx(0.5, rel=0.05)
        assert found.std() == pytest.approx(0.5 / math.sqrt(burstiness), rel=0.05)

    def test_bursts_keep_the_rate(self):
        times = take(OpenLoop(10.0, burst_size=5).times_s(rng()), 20000)
        bursts = np.array(times).reshape(-1, 5)
        assert (bursts == bursts[:, :1]).all()
        assert len(times) / times[-1] == pytest.approx(10, rel=0.05)

    def test_an_infinite_rate_is_all_at_once(self):
        assert take(OpenLoop(math.inf).times_s(rng()), 3) == [0, 0, 0]

    @pytest.mark.parametrize("settings", [(0.0,), (-1.0,), (math.nan,), (1.0, 0.0), (1.0, math.inf), (1.0, 1.0, 0)])
    def test_what_is_no_arrival_is_refused(self, settings):
        with pytest.raises(ConfigError):
            OpenLoop(*settings)

    def test_nobody_is_no_closed_loop(self):
        with pytest.raises(ConfigError, match="--concurrency is 0"):
            ClosedLoop(0)


class TestPrompts:
    def test_token_ids_have_their_length_and_their_own_beginning(self):
        prompts, generator = TokenIdPrompts.make(32000, 0, rng()), rng(1)
        found = [prompts.next(n, generator) for n in (1, 2, 17, 512)]
        assert [len(prompt) for prompt in found] == [1, 2, 17, 512]
        assert all(256 <= token < 32000 for prompt in found for token in prompt)
        assert len({prompt[0] for prompt in found}) == 4

    def test_a_shared_beginning_is_shared_and_the_rest_is_not(self):
        prompts, generator = TokenIdPrompts.make(32000, 8, rng()), rng(1)
        one, other = prompts.next(12, generator), prompts.next(12, generator)
        assert one[:8] == other[:8]
        assert one[8] != other[8]
        short = prompts.next(4, generator)
        assert (short[:3], len(short)) == (one[:3], 4)
        assert short[3] != one[3]

    def test_a_small_vocabulary(self):
        assert set(TokenIdPrompts.make(3, 0, rng()).next(99, rng())) == {0, 1, 2}

    def test_words_without_a_tokenizer_are_one_a_token(self):
        text = asyncio.run(TextPrompts().next(40, rng(), None))
        assert len(text.split()) == 40

    @pytest.mark.parametrize(("num_tokens", "shared"), [(1, 0), (2, 0), (7, 0), (100, 0), (100, 20)])
    def test_words_are_fitted_to_what_the_tokenizer_counts(self, num_tokens, shared):
        async def count(text):  # words of more than four letters are two tokens
            return sum(1 + (len(word) > 4) for word in text.split())

        async def fit():
            prompts = TextPrompts.make(shared, 0.7, rng())
            return [await prompts.next(num_tokens, rng(seed), count) for seed in range(20)]

        async def excesses():
            return [await count(text) - num_tokens for text in await fit()]

        found = asyncio.run(excesses())
        # A last word of two tokens may be one too many, or too few.
        assert all(abs(excess) <= 1 for excess in found)
        assert found.count(0) > (15 if num_tokens > 1 else 8)


class TestDataset:
    def test_lines(self, tmp_path):
        file = tmp_path / "prompts.jsonl"
        lines = [
            {"prompt": "Hi"},
            {"prompt": [1, 2], "output_tokens": 7},
            {"messages": [{"role": "user", "content": "x"}]},
        ]
        file.write_text("\n\n".join(map(json.dumps, lines)) + "\n")
        found = read_samples(file)
        assert [(s.prompt, s.messages, s.output_tokens) for s in found] == [
            ("Hi", None, None),
            ([1, 2], None, 7),
            (None, lines[2]["messages"], None),
        ]

    def test_share_gpt(self, tmp_path):
        file = tmp_path / "share.json"
        turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
        file.write_text(json.dumps([{"id": "a", "conversations": turns}, {"id": "b", "conversations": []}]))
        assert [sample.prompt for sample in read_samples(file)] == ["What?"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "no prompts"),
            ('{"prompt": "x"}\n{', "line 2: "),
            ("7", "line 1 is 7"),
            ('{"text": "x"}', "line 1: give a prompt or messages"),
            ('{"prompt": "x", "messages": []}', "give a prompt or messages"),
            ('{"prompt": ""}', "the prompt is ''"),
            ('{"prompt": [1, true]}', "list of token ids"),
            ('{"prompt": [-1]}', "list of token ids"),
            ('{"messages": []}', "messages are"),
            ('{"prompt": "x", "output_tokens": 0}', "output_tokens is 0"),
            ('[{"conversations": 3}]', "entry 1"),
            ("[" * 100000, "share|recursion|Expecting"),
        ],
    )
    def test_what_is_no_prompt_is_refused(self, tmp_path, text, message):
        file = tmp_path / "prompts.jsonl"
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_samples(file)

    def test_bytes_that_are_no_text_are_refused(self, tmp_path):
        file = tmp_path / "prompts.jsonl"
        file.write_bytes(b"\xff\xfe")
        with pytest.raises(ConfigError, match="UTF-8"):
            read_samples(file)


class TestAddress:
    @pytest.mark.parametrize(
        ("url", "text", "host", "port"),
        [
            ("http://127.0.0.1:8000", "http://127.0.0.1:8000", "127.0.0.1", 8000),
            ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000", "127.0.0.1", 8000),
            ("https://api.example.com/v1", "https://api.example.com", "api.example.com", 443),
            ("http://[::1]:81/proxy/v1", "http://[::1]:81/proxy", "::1", 81),
        ],
    )
    def test_urls(self, url, text, host, port):
        address = Address.parse(url)
        assert (str(address), address.host, address.port) == (text, host, port)

    @pytest.mark.parametrize(
        "url",
        [
            "localhost:8000",
            "ftp://x",
            "http://",
            "http://x:99999",
            "http://u:p@x",
            "http://x/?q",
            "http://x/ä",
            "http://x/ y",
        ],
    )
    def test_what_is_no_server_is_refused(self, url):
        with pytest.raises(ConfigError, match="--base-url is"):
            Address.parse(url)


def plain_events(text):
    """The standard's algorithm on a whole text, as plainly as it can be said."""
    text = text.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    events, data = [], []
    for line in [*text.split(b"\n"), b""]:
        name, colon, value = line.partition(b":")
        if not line:
            events += [b"\n".join(data)] if data else []
            data = []
        elif name == b"data":
            data.append(value[1:] if colon and value.startswith(b" ") else value)
    return events


LINES = st.sampled_from(
    [
        b"data: x",
        b"data:x",
        b"data:  x",
        b"data",
        b"data:",
        b": comment",
        b"event: y",
        b"id: 3",
        b"",
        b"",
        b"datax: 1",
        b"da",
    ]
)
STREAMS = st.lists(st.tuples(LINES, st.sampled_from([b"\n", b"\r", b"\r\n"])), max_size=12)


class TestSse:
    @settings(max_examples=300, deadline=None)
    @given(lines=STREAMS, mark=st.booleans(), cut=st.data())
    def test_pieces_do_not_matter(self, lines, mark, cut):
        text = (b"\xef\xbb\xbf" if mark else b"") + b"".join(line + end for line, end in lines)
        places = sorted(cut.draw(st.lists(st.integers(0, len(text)), max_size=8)))
        parser, found = SseParser(), []
        for start, end in zip([0, *places], [*places, len(text)], strict=True):
            found += parser.feed(text[start:end])
        assert found + parser.end() == plain_events(text)

    @pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
    def test_byte_by_byte_an_event_comes_with_its_last_byte(self, end):
        text = end.join([b"data: one", b"data: two", b"", b": still there", b"data: [DONE]", b"", b""])
        parser, found = SseParser(), []
        for i in range(len(text)):
            found += [(i, event) for event in parser.feed(text[i : i + 1])]
        assert [event for _, event in found] == [b"one\ntwo", b"[DONE]"]
        # Of a CRLF the CR is enough.
        assert found[-1][0] == len(text) - len(end)
        assert parser.end() == []

    def test_a_line_without_end_is_given_up(self):
        parser = SseParser(max_line_bytes=10)
        assert parser.feed(b"data: 4567") == []
        with pytest.raises(EventTooLong, match="more than 10 bytes"):
            parser.feed(b"8")


def record(*, start=0.0, chunks=(), end=None, late=0.0, output_tokens=None, failure=None, **fields):
    return RequestRecord(
        scheduled_s=start - late,
        started_s=start,
        asked_prompt_tokens=fields.pop("asked_prompt_tokens", 10),
        asked_output_tokens=fields.pop("asked_output_tokens", len(chunks)),
        chunk_s=list(chunks),
        ended_s=(chunks[-1] if end is None and chunks else end),
        output_tokens=output_tokens,
        failure=failure,
        **fields,
    )


FAILED = Failure(FailureKind.STATUS, "too many", 429)


class TestRecord:
    def test_times(self):
        found = record(start=1.0, chunks=[1.5, 1.75, 2.75], end=3.0, late=0.25)
        assert (found.ttft_s, found.tpot_s, found.e2e_s, found.lateness_s) == (0.5, 0.625, 2.0, 0.25)
        assert found.itl_s == [0.25, 1.0]

    def test_a_chunk_of_several_tokens_counts_as_the_server_says(self):
        found = record(chunks=[1.0, 2.0, 3.0], output_tokens=5)
        assert found.tpot_s == 0.5
        assert found.num_output_tokens == 5

    @pytest.mark.parametrize(("chunks", "tokens"), [([1.0], None), ([1.0], 3), ([1.0, 2.0], 1), ([], 0)])
    def test_one_token_has_no_interval(self, chunks, tokens):
        assert record(chunks=chunks, end=4.0, output_tokens=tokens).tpot_s is None

    def test_without_any_chunk_the_end_is_the_first_token(self):
        assert record(start=1.0, end=4.0).ttft_s == 3.0


class TestDistribution:
    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.floats(0, 1e3), min_size=2, max_size=40))
    def test_percentiles_are_inclusive_quantiles(self, values):
        """Of the standard library, which has its own arithmetic."""
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        found = Distribution.of(values)
        assert list(found.percentiles) == [50, 90, 95, 99]
        assert [found.percentiles[p] for p in (50, 90, 95, 99)] == pytest.approx(
            [cuts[p - 1] for p in (50, 90, 95, 99)]
        )
        assert found.mean == pytest.approx(statistics.fmean(values))
        assert (found.maximum, found.count) == (max(values), len(values))

    def test_of_nothing_is_nothing(self):
        assert Distribution.of([]) is None


class TestSummary:
    def test_by_hand(self):
        records = [
            record(start=0.0, late=0.5, chunks=[1.0, 2.0, 3.0], output_tokens=3, prompt_tokens=12, cached_tokens=4),
            record(start=1.0, chunks=[2.0, 6.0], output_tokens=2, prompt_tokens=8, cached_tokens=0),
            record(start=3.0, end=10.0, failure=FAILED),
            record(start=3.0, end=3.5, failure=FAILED),
            record(start=4.0, end=5.0, failure=Failure(FailureKind.TIMEOUT, "no end after 1 s")),
        ]
        found = summarize(records)
        assert (found.num_requests, found.num_completed, found.num_failed) == (5, 2, 3)
        assert [(f.kind, f.status, f.count) for f in found.failures] == [
            (FailureKind.STATUS, 429, 2),
            (FailureKind.TIMEOUT, None, 1),
        ]
        assert found.duration_s == 10.0
        assert (found.prompt_tokens, found.cached_tokens, found.output_tokens) == (20, 4, 5)
        assert (found.requests_per_s, found.output_tokens_per_s, found.prompt_tokens_per_s) == (0.2, 0.5, 2.0)
        # At 3 the first has ended and two have begun, beside the second.
        assert found.peak_concurrency == 3
        assert found.ttft.mean == 1.0
        assert found.tpot.mean == (1.0 + 4.0) / 2
        assert found.itl.count == 3
        assert found.e2e.maximum == 5.0
        assert found.tokens_per_chunk == 1.0
        assert found.has_server_counts
        assert (found.num_good, found.goodput_per_s, found.good_share) == (None, None, None)

    def test_chunks_stand_in_for_counts(self):
        found = summarize([record(chunks=[1.0, 2.0, 3.0], output_tokens=None)])
        assert (found.output_tokens, found.has_server_counts) == (3, False)

    def test_short_outputs_are_counted(self):
        found = summarize([record(chunks=[1.0, 2.0], asked_output_tokens=n) for n in (2, 3, 4)])
        assert found.num_short_outputs == 2

    def test_nothing(self):
        found = summarize([])
        assert (found.num_requests, found.duration_s, found.output_tokens_per_s, found.ttft) == (0, 0.0, 0.0, None)
        assert (found.decode_concurrency, found.decode_tokens_per_s, found.peak_concurrency) == (0, None, 0)

    @pytest.mark.parametrize(
        ("limits", "num_good"),
        [
            ({"ttft_s": 0.5}, 1),
            ({"ttft_s": 1.0}, 3),
            ({"ttft_s": 1.0, "tpot_s": 0.5}, 2),
            ({"e2el_s": 1.0}, 1),
            ({"ttft_s": 9.0, "tpot_s": 9.0, "e2el_s": 9.0}, 3),
        ],
    )
    def test_goodput(self, limits, num_good):
        records = [
            record(chunks=[0.5]),  # one token keeps every limit for tokens after the first
            record(chunks=[1.0, 1.5, 2.0]),
            record(chunks=[1.0, 2.0]),
            record(chunks=[0.1], failure=FAILED),
        ]
        found = summarize(records, Goodput(**limits))
        assert (found.num_good, found.good_share) == (num_good, num_good / 4)
        assert found.goodput_per_s == pytest.approx(num_good / 2.0)

    def test_as_numpy_says_for_many_requests(self):
        generator = rng()
        starts = np.sort(generator.uniform(0, 50, 200))
        chunks = starts[:, None] + np.cumsum(generator.exponential(0.1, (200, 30)), axis=1)
        found = summarize([record(start=s, chunks=list(c)) for s, c in zip(starts, chunks, strict=True)])
        assert found.ttft.percentiles[90] == pytest.approx(np.percentile(chunks[:, 0] - starts, 90))
        tpot = (chunks[:, -1] - chunks[:, 0]) / 29
        assert found.tpot.percentiles[99] == pytest.approx(np.percentile(tpot, 99))
        assert found.itl.mean == pytest.approx(np.diff(chunks, axis=1).mean())
        grid = np.linspace(0, 60, 20001)
        at_once = ((starts[:, None] <= grid) & (grid < chunks[:, -1:])).sum(axis=0)
        assert found.peak_concurrency >= at_once.max()
        assert found.peak_concurrency <= at_once.max() + 2  # between two points of the grid


class TestFullDecode:
    def test_only_the_time_when_all_decode_counts(self):
        slow_start = record(chunks=[0.0, 1.0, 2.0, 2.5, 3.0, 4.0], output_tokens=6)
        inside = record(chunks=[2.0, 2.5, 3.0], output_tokens=3)
        # From 2 to 3 both decode, and two chunks of each come.
        assert full_decode([slow_start, inside]) == (2, pytest.approx(4.0))

    def test_tokens_of_a_chunk_count(self):
        assert full_decode([record(chunks=[0.0, 1.0, 2.0], output_tokens=9)]) == (1, pytest.approx(4.0))

    def test_alone(self):
        assert full_decode([record(chunks=[0.0, 0.5, 1.0]), record(chunks=[5.0])]) == (1, pytest.approx(2.0))

    def test_of_nothing(self):
        assert full_decode([record(chunks=[5.0])]) == (0, None)

    def test_sixteen_streams_in_step(self):
        """A step of 16 tokens each 40 ms, whichever comes first in it: 400 tokens/s."""
        generator = rng()
        streams = [record(chunks=[0.04 * step + generator.uniform(0, 1e-4) for step in range(128)]) for _ in range(16)]
        concurrency, rate = full_decode(streams)
        assert concurrency == 16
        assert rate == pytest.approx(400, rel=0.01)


class TestRemarks:
    def run(self, records, **fields):
        return LoadRun(records=records, cpu_s=0.5, wall_s=10.0, **fields)

    def remarks(self, records, arrivals=OpenLoop(1.0), **fields):  # noqa: B008
        return list(remarks(self.run(records, **fields), summarize(records), arrivals))

    def test_nothing_to_say(self):
        sound = record(chunks=[1.0, 2.0], output_tokens=2, prompt_tokens=10)
        assert self.remarks([sound], tick_lag_s=[0.001]) == []

    def test_a_late_generator_says_so(self):
        late = [record(chunks=[1.0], output_tokens=1, late=0.02) for _ in range(3)]
        [remark] = self.remarks(late)
        assert "did not keep its schedule" in remark
        assert "20 ms" in remark
        assert self.remarks(late, ClosedLoop(1)) == []

    def test_a_starved_generator_says_so(self):
        [remark] = self.remarks([], tick_lag_s=[0.05] * 3)
        assert "50 ms late" in remark

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"output_tokens": None}, "did not count its tokens"),
            ({"asked_output_tokens": 3}, "1 answers were shorter"),
            ({"prompt_tokens": 12}, "prompts have 12.0 tokens on average"),
            ({"cached_tokens": 5}, "50.0% of the prompt tokens came from a prefix cache"),
            ({"is_reconnected": True}, "1 requests found their kept connection closed"),
            ({"failure": FAILED}, "1 of 1 requests failed"),
        ],
    )
    def test_each_is_said(self, fields, message):
        given = {"chunks": [1.0, 2.0], "output_tokens": 2, "prompt_tokens": 10} | fields
        [remark] = self.remarks([record(**given)])
        assert message in remark

    def test_what_was_cut_off_is_said(self):
        [remark] = self.remarks([], was_stopped=True, under_way={record(), record()})
        assert "2 requests were cut off" in remark

    def test_the_generators_share_of_a_cpu(self):
        health = GeneratorHealth.of(self.run([record(late=0.5)]))
        assert (health.cpu_share, health.lateness.maximum, health.tick_lag) == (0.05, 0.5, None)


class TestSaturation:
    def level(self, tokens_per_s, good=None):
        records = [record(chunks=[0.5, 1.0], output_tokens=tokens_per_s)]
        records += [record(chunks=[0.1], output_tokens=0) for _ in range(good or 0)]
        metrics = summarize(records, None if good is None else Goodput(ttft_s=0.2))
        return LevelResult(arrivals=ClosedLoop(1), run=LoadRun(), metrics=metrics)

    def test_without_limits_it_is_where_tokens_stop_growing(self):
        assert not is_saturated(self.level(100), self.level(106))
        assert is_saturated(self.level(100), self.level(104))

    def test_the_best_level_is_that_of_the_most_goodput_or_tokens(self):
        assert best_level([self.level(100), self.level(300), self.level(200)]) == 1
        assert best_level([self.level(100, good=3), self.level(300, good=2)]) == 0

    def test_with_limits_it_is_where_goodput_falls(self):
        assert not is_saturated(self.level(100, good=3), self.level(100, good=3))
        assert is_saturated(self.level(100, good=3), self.level(900, good=2))
