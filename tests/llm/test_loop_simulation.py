"""Thousands of random requests through scheduler, cache and loop, with a model that checks every cache read."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.llm.simulator import RememberingRunner, next_token, random_prompt
from venturi.core.errors import InternalError
from venturi.llm.beam import BeamSearch
from venturi.llm.config import SchedulerConfig
from venturi.llm.kv.cache import KvCache
from venturi.llm.loop import EngineLoop
from venturi.llm.request import Request
from venturi.llm.sampling_params import SamplingParams
from venturi.llm.scheduler.scheduler import Scheduler


class Listener:
    def __init__(self) -> None:
        self.tokens = 0
        self.ends = 0

    def on_token(self, seq, token) -> None:
        assert not self.ends
        self.tokens += 1

    def on_end(self) -> None:
        self.ends += 1


def expected_output(request: Request, index: int) -> list[int]:
    tokens = list(request.prompt)
    for n in range(request.max_output):
        tokens.append(next_token(tokens, index))
        if tokens[-1] in request.stop_ids and n + 1 >= request.params.min_tokens:
            break
    return tokens[request.num_prompt :]


def random_request(rng: random.Random, shared: list[list[int]]) -> Request:
    prompt = random_prompt(rng, shared, 60)
    kind = rng.random()
    width = rng.choice([1, 1, 1, 2, 3])
    settings = {"max_tokens": rng.randrange(1, 25)}
    if kind < 0.1 and width > 1:
        settings |= {"use_beam_search": True, "n": width, "early_stopping": rng.random() < 0.5}
    elif kind < 0.2:
        settings |= {"repetition_penalty": 1.1, "n": width}
    elif kind < 0.25:
        settings |= {"prompt_logprobs": 0}
    else:
        settings |= {"n": width, "min_tokens": rng.randrange(settings["max_tokens"] + 1)}
    params = SamplingParams(**settings)
    stops = frozenset({7} if rng.random() < 0.5 else ())
    request = Request(prompt, params, params.max_tokens, stops, priority=rng.randrange(3), listener=Listener())
    if params.use_beam_search:
        request.beam = BeamSearch(request)
    return request


@pytest.mark.parametrize("overlap", [False, True], ids=["lockstep", "overlap"])
@pytest.mark.parametrize(
    ("capacity", "policy", "host_blocks", "reuse"),
    [
        ("GUARANTEED_NO_EVICT", "fcfs", 0, True),
        ("GUARANTEED_NO_EVICT", "longest-prefix", 0, True),
        ("MAX_UTILIZATION", "fcfs", 0, True),
        ("MAX_UTILIZATION", "priority", 12, True),
        ("MAX_UTILIZATION", "fcfs", 12, False),
    ],
)
def test_random_requests_lose_nothing(capacity: str, policy: str, host_blocks: int, reuse: bool, overlap: bool) -> None:
    rng = random.Random(f"{capacity}{policy}{host_blocks}{overlap}")
    num_blocks, size, count = 40, 8, 1000
    cache = KvCache(num_blocks, size, reuse=reuse, host_blocks=host_blocks)
    config = SchedulerConfig(capacity_scheduler_policy=capacity, policy=policy, max_batch_size=12, max_num_tokens=48)

    def fault(plan):
        if rng.random() < 0.004:
            return rng.choice(["launch", "result"]), RuntimeError("injected")
        return None

    runner = RememberingRunner(num_blocks, size, host_blocks, fault)
    loop = EngineLoop(Scheduler(config, cache), runner, overlap=overlap)
    shared = [[rng.randrange(50) for _ in range(60)] for _ in range(4)]
    requests = [random_request(rng, shared) for _ in range(count)]
    aborted, todo, open_ = set(), list(requests), []
    idle = 0
    while todo or any(not r.done for r in open_):
        for _ in range(rng.choice([0, 0, 1, 2, 6])):
            if todo:
                open_.append(todo.pop())
                loop.scheduler.check_fits(open_[-1])
                loop.add(open_[-1])
        if open_ and rng.random() < 0.03:
            victim = rng.choice(open_)
            if not victim.done:
                aborted.add(victim)
                loop.abort(victim)
        idle = 0 if loop.step() else idle + 1
        assert idle < 100, "the loop is stuck"
        loop.scheduler.check_integrity()
        open_ = [r for r in open_ if not r.done]
    while loop.step():
        pass

    assert cache.num_available == num_blocks
    assert cache.host.num_free + len(cache._host_leaving) == host_blocks
    assert loop.scheduler._promised == 0
    assert sorted(loop.scheduler._free_slots) == list(range(12))
    assert loop.scheduler._slots_used == 0
    assert runner.max_tokens <= 48
    assert runner.max_batch <= 12
    assert all(r.listener.ends == 1 for r in requests), "exactly one final reply"
    ends = Counter(type(r.error).__name__ if r.error else "fine" for r in requests)
    assert set(ends) == {"fine", "InternalError"}
    checked = 0
    for request in requests:
        if request in aborted or request.error is not None or request.beam is not None:
            continue
        assert len(request.sequences) == request.width
        for seq in request.sequences:
            assert seq.output == expected_output(request, seq.index)
            checked += 1
    assert checked > count / 2
    if reuse:
        assert sum(r.num_cached for r in requests) > 0
    if capacity == "MAX_UTILIZATION":
        assert loop.scheduler.num_pauses > 0
    cache.clear()
    assert cache.pool.num_free == num_blocks


def test_a_broken_count_is_found() -> None:
    cache = KvCache(4, 8)
    cache.pool.take()
    with pytest.raises(InternalError, match="neither|holders"):
        cache.check_integrity([])
