"""Batching towards a latency target, in simulated time with one instance."""

from __future__ import annotations

import random

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from venturi.serve.config import latency_target_us, normalise
from venturi.serve.errors import ServeError
from venturi.serve.request import InferRequest, Tensor
from venturi.serve.schedulers.batcher import BatchingRules, DynamicBatcher
from venturi.serve.schedulers.deadline import DeadlineBatcher, LatencyTable
from venturi.serve.schedulers.policy import Run, Wait
from venturi.serve.served import make_policy

MS = 1_000_000


def request(rows=1):
    return InferRequest("m", "", {"x": Tensor("x", "FP32", np.zeros((rows, 4), np.float32))}, rows=rows)


def simulate(policy, arrivals, cost):
    """Latencies in the order of arrival and the batch sizes; `cost(rows)` nanoseconds a batch."""
    waiting, began, answers, batches = list(arrivals), {}, {}, []
    now, busy_until, running, alarm = 0, None, None, None
    while waiting or began:
        times = [t for t in (waiting[0] if waiting else None, busy_until, alarm) if t is not None]
        now = max(now, min(times))
        if busy_until is not None and now >= busy_until:
            policy.done(running, now)
            for r in running:
                answers[r] = now - began.pop(r)
            busy_until = None
        while waiting and waiting[0] <= now:
            r = request()
            began[r] = waiting.pop(0)
            policy.add(r, now)
        alarm = None
        if busy_until is None:
            decision = policy.take(now)
            if isinstance(decision, Run):
                running, busy_until = decision.requests, now + cost(len(decision.requests))
                batches.append(len(running))
            elif decision.until_ns is not None:
                assert decision.until_ns > now, "an alarm in the past would spin"
                alarm = decision.until_ns
    return list(answers.values()), batches


def steady(count, gap_ns, seed=0):
    rng, now, found = random.Random(seed), 0, []
    for _ in range(count):
        now += int(rng.expovariate(1 / gap_ns))
        found.append(now)
    return found


def cost(rows):
    return int(5 * MS + 0.5 * MS * rows)


def test_nothing_waits_before_anything_is_known():
    policy = DeadlineBatcher(8, 20_000)
    policy.add(request(), 0)
    assert isinstance(policy.take(0), Run)


def test_under_light_load_nobody_waits():
    """Arrivals 100 ms apart: a request is served alone, in the time of a batch of one."""
    latencies, batches = simulate(DeadlineBatcher(16, 40_000), [i * 100 * MS for i in range(1, 50)], cost)
    assert set(batches) == {1}
    late = latencies[3:]
    assert max(late) <= cost(1) + 30 * MS
    assert np.median(late) <= 40 * MS


@pytest.mark.parametrize("gap_us", [800, 1100, 1500])
def test_the_target_is_met_where_the_load_allows_it(gap_us):
    """Batches of one serve a request in 5.5 ms; these loads need batches of 5 to 17."""
    arrivals = steady(3000, gap_us * 1000)
    latencies, batches = simulate(DeadlineBatcher(64, 40_000), arrivals, cost)
    settled = latencies[200:]
    assert np.mean([x > 40 * MS for x in settled]) < 0.02
    assert max(batches) > 1


def test_batches_are_larger_than_without_a_delay_and_the_machine_less_busy():
    arrivals = steady(3000, 2 * MS)
    eager, eager_batches = simulate(DynamicBatcher(BatchingRules(64)), arrivals, cost)
    latencies, batches = simulate(DeadlineBatcher(64, 40_000), arrivals, cost)
    assert sum(cost(b) for b in batches) < 0.8 * sum(cost(b) for b in eager_batches)
    assert np.percentile(latencies[200:], 99) <= 40 * MS
    assert len(eager) == len(latencies) == 3000


def test_sizes_keep_the_target_for_who_comes_just_too_late():
    policy = DeadlineBatcher(64, 20_000)
    _, batches = simulate(policy, steady(4000, 2 * MS), cost)
    assert np.percentile(batches[100:], 99) <= 7, "two batches of 7 take 17 of 20 ms, two of 8 with slack more than 20"


def test_overload_is_cleared_in_the_largest_batches():
    """A request every 0.4 ms, 0.5 ms each in the largest batch: nothing meets the target, throughput is what is left."""
    arrivals = steady(4000, 4 * MS // 10)
    _, batches = simulate(DeadlineBatcher(64, 40_000), arrivals, cost)
    _, eager = simulate(DynamicBatcher(BatchingRules(64)), arrivals, cost)
    assert max(batches) == 64
    assert sum(cost(b) for b in batches) <= 1.05 * sum(cost(b) for b in eager)


def test_a_request_larger_than_the_bound_still_runs():
    policy = DeadlineBatcher(64, 1000)
    simulate(policy, [0, MS, 2 * MS], cost)
    policy.add(request(32), 10**12)
    assert isinstance(policy.take(10**12), Run)


def test_estimates_between_and_beyond_what_was_measured():
    table = LatencyTable()
    for rows, took in ((2, 100), (6, 300)):
        table.record(rows, took)
    assert [table.estimate(n) for n in (1, 2, 4, 6, 12)] == [100, 100, 200, 300, 600]
    assert table.largest_within(250, 64) == 5
    assert table.largest_within(10**9, 64) == 12, "nothing is known beyond twice the largest"
    assert table.largest_within(10, 64) == 1


def config(text):
    made = pb.ModelConfig()
    text_format.Parse('name: "m" backend: "python" max_batch_size: 8 ' + text, made)
    return made


def parameter(key, value):
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }} '


AUTO = parameter("max_queue_delay", "auto")


def test_configurations():
    good = normalise(
        config("dynamic_batching { } " + AUTO + parameter("latency_target_us", 5000)), "m", backend="python"
    )
    assert latency_target_us(good) == 5000
    assert isinstance(make_policy(good), DeadlineBatcher)
    assert latency_target_us(config("dynamic_batching { }")) is None


@pytest.mark.parametrize(
    "text, message",
    [
        ("dynamic_batching { } " + AUTO, "latency_target_us must be positive microseconds, got ''"),
        ("dynamic_batching { } " + AUTO + parameter("latency_target_us", "-5"), "positive microseconds, got '-5'"),
        ("dynamic_batching { } " + parameter("latency_target_us", 5), "must be 'auto'"),
        ("dynamic_batching { } " + parameter("max_queue_delay", "5"), "must be 'auto'"),
        (AUTO + parameter("latency_target_us", 5), "needs dynamic_batching"),
        ("dynamic_batching { max_queue_delay_microseconds: 5 } " + AUTO + parameter("latency_target_us", 5), "without"),
    ],
)
def test_contradictions_are_refused(text, message):
    with pytest.raises(ServeError, match=message):
        normalise(config(text), "m", backend="python")


def test_waiting_is_bounded_by_the_target():
    policy = DeadlineBatcher(8, 20_000)
    simulate(policy, [i * 3 * MS for i in range(60)], cost)
    start = 10**11
    policy.add(request(), start)
    policy._gap_ns = 10.0**12
    decision = policy.take(start)
    assert isinstance(decision, Wait)
    assert decision.until_ns <= start + 20 * MS - cost(2)
