"""`venturi perf`: its arithmetic, and its figures against real and lying servers."""

from __future__ import annotations

import asyncio
import csv
import json
import socketserver
import threading
import time
from pathlib import Path

import pytest

from tests.cli.test_cli import venturi
from tests.serve.running import DIGITS, add_engine, scaled, serving
from tests.serve.test_python_models import REPEAT, add_python
from venturi.core.errors import RequestError
from venturi.serve.perf.load import Rules, at_concurrency, at_rate
from venturi.serve.perf.windows import Window, breakdown, figure, is_stable, quantile, sweep


def windows(*rows: tuple[int, float]) -> list[Window]:
    return [Window(1.0, [us] * count) for count, us in rows]


def test_quantiles_are_values_that_occurred() -> None:
    values = [float(i) for i in range(1, 101)]
    assert [quantile(values, p) for p in (1, 50, 90, 99)] == [1, 50, 90, 99]
    assert [quantile([7.0], p) for p in (1, 99)] == [7, 7]
    assert quantile([1.0, 2.0, 3.0], 50) == 2


def test_three_windows_must_agree_in_both() -> None:
    assert not is_stable(windows((100, 5), (100, 5)), 0.1, None)
    assert is_stable(windows((10, 50), (100, 5), (105, 5), (95, 5)), 0.1, None)
    assert not is_stable(windows((100, 5), (100, 5), (130, 5)), 0.1, None)
    assert not is_stable(windows((100, 5), (100, 5), (100, 7)), 0.1, None)
    assert not is_stable(windows((100, 5), (100, 5), (0, 0)), 0.1, None)
    spread = [Window(1.0, [1.0] * 99 + [tail]) for tail in (10.0, 1000.0, 10.0)]
    assert is_stable(spread, 0.1, 90)
    assert not is_stable(spread, 0.1, None)


def test_the_figure_joins_the_last_three_windows() -> None:
    found = figure({"concurrency": 2}, windows((1, 1), (100, 10), (100, 20), (100, 30)), 4, True, {"server_batch": 2.0})
    assert found.infer_per_s == 400
    assert (found.requests, found.mean_us, found.percentiles_us[50]) == (300, 20, 20)
    assert found.to_json()["server_batch"] == 2


@pytest.mark.parametrize(
    ("text", "levels"), [("4", [4]), ("1:4", [1, 2, 3, 4]), ("1:9:4", [1, 5, 9]), ("0.5:1:0.25", [0.5, 0.75, 1.0])]
)
def test_sweeps(text: str, levels: list[float]) -> None:
    assert sweep(text, "--x") == levels


@pytest.mark.parametrize("text", ["", "a", "0", "-1", "4:1", "1:2:0", "1:2:3:4", "1:"])
def test_bad_sweeps(text: str) -> None:
    with pytest.raises(ValueError, match="START"):
        sweep(text, "--x")


def test_the_breakdown_is_of_the_time_between() -> None:
    def stat(count: int, ns: int, runs: int) -> dict:
        phases = {p: {"count": count, "ns": ns} for p in ("queue", "compute_input", "compute_infer", "compute_output")}
        return {"inference_stats": phases, "execution_count": runs, "inference_count": 3 * count}

    found = breakdown(stat(10, 1000, 5), stat(30, 101_000, 15))
    assert found["server_queue_us"] == 5
    assert found["server_batch"] == 6
    assert breakdown(stat(1, 1, 1), stat(1, 1, 1)) == {}


class Fake:
    """Answers after `delay_s`; every `fails`-th call is an error."""

    def __init__(self, delay_s: float, fails: int = 0) -> None:
        self.delay_s, self.fails, self.calls = delay_s, fails, 0

    async def connect(self):
        async def call() -> None:
            self.calls += 1
            await asyncio.sleep(self.delay_s)
            if self.fails and self.calls % self.fails == 0:
                raise RequestError("no")

        return call

    async def statistics(self):
        return None

    async def close(self) -> None:
        pass


def test_concurrency_multiplies_throughput() -> None:
    rules = Rules(0.1, 10.0, 3)
    found = asyncio.run(at_concurrency(Fake(0.01), 4, 2, rules))
    assert found.is_stable
    assert 200 < found.infer_per_s <= 4 * 2 / 0.01
    assert found.mean_us >= 10_000


def test_a_slow_server_makes_a_rate_wait_and_says_so() -> None:
    found = asyncio.run(at_rate(Fake(0.05), 200, 1, Rules(0.2, 10.0, 3), poisson=True))
    assert found.mean_us >= 50_000
    assert found.requests > 0


def test_errors_are_counted_and_all_errors_are_raised() -> None:
    found = asyncio.run(at_concurrency(Fake(0.001, fails=3), 1, 1, Rules(0.1, 100.0, 3)))
    assert found.errors > 0
    assert found.requests > found.errors
    with pytest.raises(RequestError, match="no"):
        asyncio.run(at_concurrency(Fake(0.001, fails=1), 1, 1, Rules(0.1, 100.0, 3)))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("perf")
    add_engine(root, "scaled", scaled(2.0))
    add_engine(root, "wide", scaled(2.0, width="k"))
    add_python(root, "repeat", REPEAT)
    with serving(root) as running:
        yield running


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_figures_of_a_real_server(server, tmp_path: Path, protocol: str) -> None:
    short = ["--window-ms", "100", "--max-windows", "3", "--json"]
    out = venturi(
        "perf", "scaled", "-i", protocol, "-u", server.url(protocol), "--concurrency", "1:2", "-b", "2",
        "-f", "rows.csv", *short, cwd=tmp_path,
    )  # fmt: skip
    levels = json.loads(out)["levels"]
    assert [level["concurrency"] for level in levels] == [1, 2]
    assert all(level["infer_per_s"] > 0 and level["errors"] == 0 for level in levels)
    assert all(2 <= level["server_batch"] <= 4 for level in levels)
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [float(r["p99_us"]) for r in rows] == [level["p99_us"] for level in levels]
    out = venturi("perf", "wide", "-i", protocol, "-u", server.url(protocol), "--shape", "x:7", "--request-rate", "50",
                  "--window-ms", "200", "--max-windows", "3", cwd=tmp_path)  # fmt: skip
    assert "request rate" in out


def test_in_process(tmp_path: Path) -> None:
    out = venturi(
        "perf", str(DIGITS), "-i", "inprocess", "--window-ms", "100", "--max-windows", "3", "--json", cwd=tmp_path
    )
    (level,) = json.loads(out)["levels"]
    assert level["infer_per_s"] > 0
    assert "server_batch" not in level


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nothing"], "unknown model: 'nothing'"),
        (["wide"], "give its sizes with --shape x:"),
        (["wide", "--shape", "x:a"], "--shape must be"),
        (["scaled", "--shape", "z:1"], "the model's inputs are"),
        (["scaled", "-b", "99"], "takes at most 4 rows"),
        (["repeat"], "decoupled transaction policy"),
        (["scaled", "--concurrency", "0"], "START"),
        (["scaled", "-i", "carrier-pigeon"], "one of http, grpc, inprocess"),
    ],
)
def test_bad_requests_are_named(server, tmp_path: Path, args: list[str], says: str) -> None:
    out = venturi("perf", *args, "-u", server.url("http"), "--window-ms", "50", cwd=tmp_path, expect=1)
    assert says in " ".join(out.split())


def test_no_server_and_a_server_that_hangs_up(tmp_path: Path) -> None:
    out = venturi("perf", "m", "-u", "127.0.0.1:9", cwd=tmp_path, expect=1)
    assert "no server at 127.0.0.1:9" in " ".join(out.split())

    class HangUp(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(100)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), HangUp) as lying:
        threading.Thread(target=lying.serve_forever, daemon=True).start()
        started = time.monotonic()
        out = venturi("perf", "m", "-u", f"127.0.0.1:{lying.server_address[1]}", cwd=tmp_path, expect=1)
        assert "closed the connection" in " ".join(out.split())
        assert time.monotonic() - started < 60
        lying.shutdown()
