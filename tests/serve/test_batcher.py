"""The dynamic batcher's rules in simulated time: which requests run together, and when."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from venturi.serve.errors import ServeError, Status
from venturi.serve.request import InferRequest, Tensor
from venturi.serve.schedulers.batcher import BatchingRules, DynamicBatcher, OneByOne
from venturi.serve.schedulers.policy import Run, Wait
from venturi.serve.schedulers.queues import QueuePolicy, WaitingLine

US = 1000


def request(rows=1, width=4, priority=0, timeout_us=0, name="x"):
    data = np.zeros((rows, width), np.float32)
    made = InferRequest("m", "", {name: Tensor(name, "FP32", data)}, rows=rows)
    made.priority, made.timeout_us = priority, timeout_us
    return made


def filled(batcher, *requests, at=0):
    for r in requests:
        batcher.add(r, at)
    return batcher


def sizes(decision):
    assert isinstance(decision, Run), decision
    return [r.rows for r in decision.requests]


def rules(max_batch=8, preferred=(), delay_us=0):
    return DynamicBatcher(BatchingRules(max_batch, preferred, delay_us))


def test_without_delay_what_is_there_goes():
    assert sizes(filled(rules(), request(), request(2)).take(0)) == [1, 2]
    assert rules().take(0) == Wait()


def test_a_batch_never_exceeds_the_maximum_and_requests_are_not_split():
    batcher = filled(rules(4), request(3), request(2), request(4))
    assert [sizes(batcher.take(0)) for _ in range(3)] == [[3], [2], [4]]


def test_a_preferred_prefix_goes_at_once_and_the_rest_waits():
    batcher = filled(rules(8, (4,), delay_us=100), request(), request(3), request(2))
    assert sizes(batcher.take(10)) == [1, 3]
    assert batcher.take(10) == Wait(100 * US)
    assert sizes(batcher.take(100 * US)) == [2]


def test_the_largest_preferred_prefix_wins():
    batcher = filled(rules(8, (2, 4), delay_us=100), *(request() for _ in range(5)))
    assert sizes(batcher.take(0)) == [1, 1, 1, 1]


def test_beyond_the_largest_preferred_size_everything_goes():
    batcher = filled(rules(8, (3,), delay_us=100), request(2), request(2))
    assert sizes(batcher.take(0)) == [2, 2]


def test_after_the_delay_everything_goes_even_past_a_preferred_size():
    batcher = filled(rules(8, (2,), delay_us=100), request(), request(), request())
    assert sizes(batcher.take(100 * US)) == [1, 1, 1]


def test_the_oldest_request_sets_the_delay():
    batcher = rules(8, (8,), delay_us=100)
    batcher.add(request(), 0)
    batcher.add(request(), 90 * US)
    assert batcher.take(95 * US) == Wait(100 * US)
    assert sizes(batcher.take(100 * US)) == [1, 1]


@pytest.mark.parametrize("other", [request(width=5), request(name="z")], ids=["shape", "inputs"])
def test_other_rows_do_not_join_and_release_what_is_in_front(other):
    batcher = filled(rules(8, (8,), delay_us=100), request(), request(), other, request())
    assert sizes(batcher.take(0)) == [1, 1]
    assert batcher.take(0).requests == [other]
    assert batcher.take(0) == Wait(100 * US)


def test_priorities_go_first_and_unknown_levels_are_the_default():
    line = WaitingLine(3, 2)
    low, middle, high, unknown = request(priority=3), request(priority=2), request(priority=1), request(priority=9)
    one = filled(OneByOne(line), low, middle, unknown, high)
    assert [one.take(0).requests[0] for _ in range(4)] == [high, middle, unknown, low]
    line.check_integrity()


def test_a_full_queue_refuses_and_other_levels_are_not_full():
    line = WaitingLine(2, 1, QueuePolicy(max_size=1))
    line.add(request(priority=1), 0)
    with pytest.raises(ServeError, match="Exceeds maximum queue size") as error:
        line.add(request(priority=1), 0)
    assert error.value.status == Status.UNAVAILABLE
    line.add(request(priority=2), 0)
    assert len(line) == 2


def test_timeouts_reject_at_the_deadline_not_before():
    line = WaitingLine(default=QueuePolicy(timeout_us=50))
    first = request()
    line.add(first, 0)
    assert line.next_deadline() == 50 * US
    assert not line.expire(50 * US - 1)
    assert line.expire(50 * US) == [first]
    assert len(line) == 0
    assert line.next_deadline() is None


@pytest.mark.parametrize(
    "policy, given, deadline",
    [
        (QueuePolicy(timeout_us=50, allow_override=True), 20, 20),
        (QueuePolicy(timeout_us=50, allow_override=True), 80, 50),
        (QueuePolicy(timeout_us=50), 20, 50),
        (QueuePolicy(allow_override=True), 20, 20),
        (QueuePolicy(), 20, None),
    ],
)
def test_a_request_may_only_shorten_the_timeout_and_only_if_allowed(policy, given, deadline):
    line = WaitingLine(default=policy)
    line.add(request(timeout_us=given), 0)
    assert line.next_deadline() == (None if deadline is None else deadline * US)


def test_delayed_requests_run_after_all_fresh_ones():
    line = WaitingLine(2, 1, QueuePolicy(delays=True, timeout_us=50), {2: QueuePolicy()})
    late, fresh = request(priority=1), request(priority=2)
    line.add(late, 0)
    line.add(fresh, 0)
    assert not line.expire(60 * US)
    one = OneByOne(line)
    assert [one.take(60 * US).requests[0] for _ in range(2)] == [fresh, late]


def test_cancelled_requests_leave_without_running():
    line = WaitingLine()
    first, second = request(), request()
    line.add(first, 0)
    line.add(second, 0)
    assert line.cancel(first)
    assert not line.cancel(first)
    assert OneByOne(line).take(1).requests == [second]
    assert not line.cancel(second)
    line.check_integrity()


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_every_request_leaves_exactly_once_and_batches_obey_the_rules(seed):
    rng = random.Random(seed)
    max_batch, delay = rng.randint(1, 8), rng.choice([0, 50, 500])
    preferred = tuple(sorted({rng.randint(1, max_batch) for _ in range(rng.randint(0, 2))}))
    levels = rng.randint(1, 3)
    policy = QueuePolicy(rng.random() < 0.3, rng.choice([0, 100, 1000]), rng.random() < 0.5, rng.choice([0, 5]))
    line = WaitingLine(levels, 1, policy)
    batcher = DynamicBatcher(BatchingRules(max_batch, preferred, delay), line)
    now, left, added = 0, [], []
    arrived = {}
    for _ in range(60):
        now += rng.choice([0, 10, 200]) * US
        made = request(
            rng.randint(1, max_batch), rng.choice([4, 4, 4, 5]), rng.randint(0, levels + 1), rng.choice([0, 60])
        )
        try:
            batcher.add(made, now)
            added.append(made)
            arrived[id(made)] = now
        except ServeError:
            assert policy.max_size
        if added and rng.random() < 0.1:
            unlucky = rng.choice(added)
            assert bool(batcher.cancel(unlucky)) is (not any(unlucky is r for r in left))
            left += [unlucky] if not any(unlucky is r for r in left) else []
        expired = batcher.expire(now)
        left += expired
        assert not expired or policy.timeout_us or policy.allow_override
        line.check_integrity()
        if rng.random() < 0.5:
            decision = batcher.take(now)
            if isinstance(decision, Run):
                batch = decision.requests
                assert sum(r.rows for r in batch) <= max_batch
                assert len({r.inputs["x"].data.shape[1:] for r in batch}) == 1
                left += batch
            elif decision.until_ns is not None:
                assert decision.until_ns > now
                assert delay
    while len(batcher):
        now += 1000 * US
        left += batcher.expire(now)
        decision = batcher.take(now)
        left += decision.requests if isinstance(decision, Run) else []
    assert sorted(map(id, left)) == sorted(map(id, added))
