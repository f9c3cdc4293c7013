"""`venturi analyze`: which configurations it tries, when it stops, what it calls best, and a whole run."""

from __future__ import annotations

import json
import random
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.cli.test_cli import venturi
from tests.serve.running import DIGITS, add_engine, scaled
from venturi.serve.analyze.report import html
from venturi.serve.analyze.search import Result, Variant, best, frontier, is_enough, variants
from venturi.serve.config import parse_config

PLAIN = Variant(1, 4, 0)


def result(per_s: float, latency: float, concurrency: int = 1, variant: Variant = PLAIN) -> Result:
    return Result(variant, concurrency, per_s, latency, latency / 2, 1.0)


def test_variants_differ_and_fit_the_model() -> None:
    assert variants([1, 2], [1, 4, 16], [0], 8) == [Variant(i, b, 0) for i in (1, 2) for b in (1, 4)]
    assert variants([1], [1, 2], [0, 100], 8) == [Variant(1, 1, 0), Variant(1, 2, 0), Variant(1, 2, 100)]
    assert variants([1, 3], [1, 2, 4], [0, 50], 0) == [Variant(1, 0, 0), Variant(3, 0, 0)]


def test_a_variant_changes_only_what_it_is_about() -> None:
    config = {
        "name": "m", "max_batch_size": 8, "instance_group": [{"kind": "KIND_GPU", "gpus": [0], "count": 1}],
        "dynamic_batching": {"preferred_batch_size": [8]}, "parameters": {"a": {"string_value": "b"}},
    }  # fmt: skip
    out = Variant(3, 4, 100).apply(config)
    assert out["instance_group"] == [{"kind": "KIND_GPU", "gpus": [0], "count": 3}]
    assert out["dynamic_batching"] == {"max_queue_delay_microseconds": 100}
    assert (out["max_batch_size"], out["parameters"]) == (4, config["parameters"])
    assert "dynamic_batching" not in Variant(1, 1, 0).apply(config)
    assert config["max_batch_size"] == 8


def test_load_rises_until_it_brings_nothing() -> None:
    assert not is_enough([], None)
    assert not is_enough([result(100, 1)], None)
    assert not is_enough([result(100, 1), result(106, 2)], None)
    assert is_enough([result(100, 1), result(104, 2)], None)
    assert is_enough([result(100, 1), result(200, 11)], 10)
    assert is_enough([result(100, 11)], 10)


def test_the_best_is_within_the_budget() -> None:
    found = [result(100, 5), result(300, 20), result(200, 9)]
    assert best(found, "throughput", None) is found[1]
    assert best(found, "throughput", 10) is found[2]
    assert best(found, "latency", None) is found[0]
    assert best(found, "throughput", 1) is None


def test_the_frontier_is_what_nothing_beats() -> None:
    rng = random.Random(3)
    for _ in range(50):
        found = [result(rng.randint(1, 20), rng.randint(1, 20)) for _ in range(rng.randint(1, 15))]
        expected = {
            (r.latency_us, r.infer_per_s) for r in found
            if not any(o.latency_us <= r.latency_us and o.infer_per_s >= r.infer_per_s and (o.latency_us, o.infer_per_s) != (r.latency_us, r.infer_per_s) for o in found)
        }  # fmt: skip
        ours = [(r.latency_us, r.infer_per_s) for r in frontier(found)]
        assert set(ours) == expected
        assert ours == sorted(ours)


def test_the_page_is_well_formed_and_escapes_names() -> None:
    class Names(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: list[str] = []

        def handle_starttag(self, tag: str, attrs: object) -> None:
            self.tags.append(tag)

    found = [result(100, 5), result(300, 20, 2), result(200, 9, 1, Variant(2, 8, 50))]
    page = html("<script>x</script>", found, found[1], 10_000.0, "p99")
    names = Names()
    names.feed(page)
    assert "script" not in names.tags
    assert names.tags.count("circle") == 3
    assert names.tags.count("tr") == 4
    assert "best: 1 instance, batch 4 at concurrency 2" in page
    assert "nothing is within the budget" in html("m", found, None, 1.0, "p99")
    assert html("m", [], None, None, "p99")


SHORT = ["--instances", "1", "--batches", "1,4", "--max-concurrency", "2", "--window-ms", "60"]


def test_a_run_writes_a_report_and_a_configuration_that_loads(tmp_path: Path) -> None:
    out = venturi("analyze", str(DIGITS), *SHORT, "-o", "r.html", "--config", "best.pbtxt", "--json", cwd=tmp_path)
    found = json.loads(out)
    assert {(r["max_batch"], r["concurrency"]) for r in found["results"]} == {(b, c) for b in (1, 4) for c in (1, 2)}
    assert found["best"]["infer_per_s"] == max(r["infer_per_s"] for r in found["results"])
    assert "<svg" in (tmp_path / "r.html").read_text()
    config = parse_config((tmp_path / "best.pbtxt").read_text(), "best.pbtxt")
    assert config.max_batch_size == found["best"]["max_batch"]
    assert config.instance_group[0].count == 1


def test_a_budget_that_nothing_keeps(tmp_path: Path) -> None:
    add_engine(tmp_path / "repository", "a", scaled(2.0))
    add_engine(tmp_path / "repository", "b", scaled(3.0))
    out = venturi("analyze", "repository", "-m", "b", *SHORT, "--latency-ms", "0.0001", cwd=tmp_path, expect=1)
    assert "no configuration keeps p99 within 0.0001 ms" in " ".join(out.split())


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["repository"], "holds 2 models, choose one with -m: a, b"),
        (["repository", "-m", "c"], "no model 'c'"),
        (["nowhere"], "does not exist"),
        (["repository", "-m", "a", "--instances", "0"], "--instances must be numbers from 1 on"),
        (["repository", "-m", "a", "--objective", "fame"], "--objective must be"),
        (["repository", "-m", "a", "--percentile", "42"], "--percentile must be"),
    ],
)
def test_bad_requests_are_named(tmp_path: Path, args: list[str], says: str) -> None:
    for name in ("a", "b"):
        add_engine(tmp_path / "repository", name, scaled(2.0))
    out = venturi("analyze", *args, cwd=tmp_path, expect=1)
    assert says in " ".join(out.split())
