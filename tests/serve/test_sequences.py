"""The sequence batcher: its rules in simulated time, and whole servers with controls and state."""

from __future__ import annotations

import queue
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.utils import InferenceServerException

import venturi as vt
from tests.serve.running import add_engine, serving
from tests.serve.test_python_models import add_python
from venturi.serve.errors import ServeError
from venturi.serve.request import InferRequest, Tensor
from venturi.serve.schedulers.batcher import BatchingRules
from venturi.serve.schedulers.policy import Run, Wait
from venturi.serve.schedulers.sequences import DirectSequences, OldestSequences, SequenceRules

US = 1000


def step(sequence: int | str, flags: str = "", timeout_us: int = 0) -> InferRequest:
    """flags: s for START, e for END."""
    made = InferRequest("m", "", {"x": Tensor("x", "FP32", np.zeros((1, 1), np.float32))}, sequence=sequence)
    made.sequence_start, made.sequence_end, made.timeout_us = "s" in flags, "e" in flags, timeout_us
    return made


def direct(slots: int = 2, instances: int = 1, **rules) -> DirectSequences:
    return DirectSequences(SequenceRules("m", instances, slots, **rules))


def oldest(candidates: int = 2, batch: int = 2) -> OldestSequences:
    return OldestSequences(SequenceRules("m", 1, candidates), BatchingRules(batch, (batch,), 0))


def ids(decision: Run | Wait) -> list:
    assert isinstance(decision, Run), decision
    return [None if r.is_null else r.sequence for r in decision.requests]


def test_rows_stay_and_silent_rows_run_as_null_requests() -> None:
    line = direct(slots=3)
    for sequence in (7, 8, 9):
        line.add(step(sequence, "s"), 0)
    first = line.take(0, 0)
    assert ids(first) == [7, 8, 9]
    line.done(first.requests, 10)
    line.add(step(9), 20)
    second = line.take(20, 0)
    assert ids(second) == [None, None, 9]
    line.done(second.requests, 30)
    line.add(step(7), 40)
    assert ids(line.take(40, 0)) == [7]


def test_sequences_spread_over_instances_before_rows_fill() -> None:
    line = direct(slots=2, instances=2)
    for sequence in (1, 2, 3):
        line.add(step(sequence, "s"), 0)
    assert ids(line.take(0, 0)) == [1, 3]
    assert ids(line.take(0, 1)) == [2]


def test_the_backlog_gets_a_slot_when_a_sequence_has_ended() -> None:
    line = direct(slots=1)
    line.add(step(1, "s"), 0)
    line.add(step(2, "se"), 1)
    line.add(step(1, "e"), 2)
    order = []
    for now in range(3, 8):
        decision = line.take(now, 0)
        if isinstance(decision, Run):
            order += ids(decision)
            line.done(decision.requests, now)
    assert order == [1, 1, 2]
    assert not len(line)


def test_idle_sequences_lose_their_slot() -> None:
    line = direct(slots=1, idle_us=100)
    line.add(step(1, "s"), 0)
    line.done(line.take(0, 0).requests, 10 * US)
    line.add(step(2, "s"), 20 * US)
    assert line.next_deadline() == 110 * US
    assert line.take(109 * US, 0) == Wait()
    assert line.expire(110 * US) == []
    assert ids(line.take(110 * US, 0)) == [2]
    with pytest.raises(ServeError, match="START flag on the first request"):
        line.add(step(1), 120 * US)


def test_a_new_start_ends_the_old_sequence_after_its_work() -> None:
    line = direct(slots=1)
    line.add(step(1, "s"), 0)
    line.add(step(1), 0)
    line.add(step(1, "s"), 0)
    seen = []
    for now in range(1, 5):
        decision = line.take(now, 0)
        if isinstance(decision, Run):
            seen.append(decision.requests[0].sequence_start)
            line.done(decision.requests, now)
    assert seen == [True, False, True]


def test_too_few_ready_rows_wait_for_the_delay() -> None:
    line = direct(slots=4, delay_us=100, least_share=0.5)
    line.add(step(1, "s"), 5 * US)
    assert line.take(6 * US, 0) == Wait(105 * US)
    line.add(step(2, "s"), 7 * US)
    assert ids(line.take(7 * US, 0)) == [1, 2]
    alone = direct(slots=4, delay_us=100, least_share=0.5)
    alone.add(step(1, "s"), 0)
    assert ids(alone.take(100 * US, 0)) == [1]


def test_late_sequences_in_the_backlog_are_refused_whole() -> None:
    line = direct(slots=1)
    line.add(step(1, "s"), 0)
    waiting = [step(2, "s", timeout_us=50), step(2)]
    for request in waiting:
        line.add(request, 0)
    assert line.next_deadline() == 50 * US
    assert line.expire(49 * US) == []
    assert line.expire(50 * US) == waiting


def test_cancelling_takes_the_sequence() -> None:
    line = direct(slots=1)
    parts = [step(1, "s"), step(1), step(1, "e")]
    for request in parts:
        line.add(request, 0)
    line.add(step(2, "s"), 0)
    assert line.cancel(parts[1]) == parts
    assert line.cancel(parts[1]) == []
    assert ids(line.take(1, 0)) == [2]


@pytest.mark.parametrize("make", [direct, oldest])
def test_requests_that_make_no_sense(make) -> None:
    line = make()
    for bad, says in ((step(0, "s"), "correlation ID"), (step("", "s"), "correlation ID"), (step(5), "START")):
        with pytest.raises(ServeError, match=says):
            line.add(bad, 0)
    wide = step(1, "s")
    wide.rows = 2
    with pytest.raises(ServeError, match="batch-size"):
        line.add(wide, 0)
    assert not len(line)


def test_oldest_runs_one_request_of_a_sequence_at_a_time() -> None:
    line = oldest(candidates=2, batch=2)
    for request in (step("a", "s"), step("a"), step("b", "s"), step("c", "s"), step("b", "e")):
        line.add(request, 0)
    first = line.take(0, 0)
    assert ids(first) == ["a", "b"]
    assert line.take(0, 0) == Wait()
    line.done(first.requests, 1)
    second = line.take(1, 0)
    assert ids(second) == ["a", "b"]
    line.done(second.requests, 2)
    assert ids(line.take(2, 0)) == ["c"]


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_no_request_is_lost_reordered_or_run_twice(seed: int, is_direct: bool) -> None:
    rng = random.Random(seed)
    instances = rng.randint(1, 3) if is_direct else 1
    slots = rng.randint(1, 3)
    line = direct(slots, instances, idle_us=10**9) if is_direct else oldest(slots, rng.randint(1, 3))
    live: set[int] = set()
    added: list[InferRequest] = []
    left: list[InferRequest] = []
    busy: dict[int, list[InferRequest]] = {}
    for now in range(120):
        if rng.random() < 0.6 and now < 100:
            sequence = rng.randint(1, 6)
            flags = ("" if sequence in live and rng.random() < 0.8 else "s") + ("e" if rng.random() < 0.25 else "")
            (live.discard if "e" in flags else live.add)(sequence)
            added.append(step(sequence, flags))
            line.add(added[-1], now)
        for i in range(instances):
            if i in busy and rng.random() < 0.7:
                line.done(busy.pop(i), now)
            if i not in busy and isinstance(decision := line.take(now, i), Run):
                busy[i] = decision.requests
                left += [r for r in decision.requests if not r.is_null]
                taken = [r.slot for r in decision.requests if not r.is_null]
                assert len({id(s) for s in taken}) == len(taken)
    for now in range(120, 2000):
        for i in range(instances):
            if i in busy:
                line.done(busy.pop(i), now)
            if isinstance(decision := line.take(now, i), Run):
                busy[i] = decision.requests
                left += [r for r in decision.requests if not r.is_null]
    holding = {id(s) for s in line._held.values()}
    waits = [r for r in added if not any(r is x for x in left)]
    assert all(r.slot in line._backlog for r in waits), "only sequences without a slot still wait"
    assert not waits or len(holding) == slots * instances
    for sequence in {id(r.slot) for r in added}:
        assert [r for r in left if id(r.slot) == sequence] == [r for r in added if id(r.slot) == sequence][
            : sum(id(r.slot) == sequence for r in left)
        ]


# ---- whole servers


def accumulator() -> vt.Network:
    """total = (start ? 0 : kept) + x, where ready."""
    net = vt.Network("accumulator")
    x, kept = net.input("x", ("n", 1)), net.input("kept", ("n", 1))
    start, ready = net.input("start", ("n", 1)), net.input("ready", ("n", 1))
    total = (kept * (np.float32(1.0) - start) + x) * ready
    net.output("total", total)
    net.output("next", total + np.float32(0.0))
    return net


CONFIG = """
max_batch_size: 4 input { name: "x" data_type: TYPE_FP32 dims: [1] } output { name: "total" data_type: TYPE_FP32 dims: [1] }
sequence_batching {
  %s
  control_input { name: "start" control { kind: CONTROL_SEQUENCE_START fp32_false_true: [0, 1] } }
  control_input { name: "ready" control { kind: CONTROL_SEQUENCE_READY fp32_false_true: [0, 1] } }
  state { input_name: "kept" output_name: "next" data_type: TYPE_FP32 dims: [1] }
}
"""
TELLER = """
    import numpy as np
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        def execute(self, requests):
            found = []
            for r in requests:
                names = sorted(t.name() for t in r.inputs())
                said = f"{r.correlation_id()} {r.flags()} " + " ".join(
                    f"{n}={pb_utils.get_input_tensor_by_name(r, n).as_numpy().tolist()}" for n in names)
                found.append(pb_utils.InferenceResponse([pb_utils.Tensor("said", np.array([said], dtype=object))]))
            return found
"""
TELLER_CONFIG = """
backend: "python" input { name: "x" data_type: TYPE_FP32 dims: [1] } output { name: "said" data_type: TYPE_STRING dims: [1] }
sequence_batching {
  control_input { name: "end" control { kind: CONTROL_SEQUENCE_END bool_false_true: [false, true] } }
  control_input { name: "id" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_STRING } }
}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("sequences")
    add_engine(root, "direct", accumulator(), CONFIG % "direct {}")
    add_engine(root, "oldest", accumulator(), CONFIG % "oldest { max_candidate_sequences: 8 }")
    add_python(root, "teller", TELLER, TELLER_CONFIG)
    with serving(root) as running:
        yield running


def say(client, model: str, value: float, sequence, start=False, end=False, shape=(1, 1)):
    given_ = client.module.InferInput("x", list(shape), "FP32")
    given_.set_data_from_numpy(np.full(shape, value, np.float32))
    return client.infer(model, [given_], sequence_id=sequence, sequence_start=start, sequence_end=end)


@pytest.mark.parametrize("model", ["direct", "oldest"])
def test_state_follows_its_sequence(client, model) -> None:
    totals = {}
    for i, value in enumerate([1.0, 2.0, 4.0]):
        for sequence in (11, 12, "named"):
            scale = 10.0 if sequence == 12 else 1.0
            got = say(client, model, value * scale, sequence, start=i == 0, end=i == 2)
            totals[sequence] = float(got.as_numpy("total")[0, 0])
            assert got.as_numpy("next") is None
    assert totals == {11: 7.0, 12: 70.0, "named": 7.0}


@pytest.mark.parametrize("model", ["direct", "oldest"])
def test_many_sequences_at_once(server, model) -> None:
    def run(sequence: int) -> float:
        with grpc_client.InferenceServerClient(server.url("grpc")) as own:
            own.module = grpc_client
            rng = random.Random(sequence)
            values = [rng.randint(1, 9) for _ in range(rng.randint(1, 20))]
            for i, value in enumerate(values):
                got = say(own, model, value, sequence, start=i == 0, end=i == len(values) - 1)
                assert float(got.as_numpy("total")[0, 0]) == sum(values[: i + 1])
            return sequence

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(run, range(100, 140))) == list(range(100, 140))


def test_sequences_on_a_stream(server) -> None:
    found: queue.Queue = queue.Queue()
    with grpc_client.InferenceServerClient(server.url("grpc")) as own:
        own.start_stream(lambda result, error: found.put((result, error)))
        for i in range(10):
            for sequence in (501, 502):
                given_ = grpc_client.InferInput("x", [1, 1], "FP32")
                given_.set_data_from_numpy(np.full((1, 1), sequence - 500, np.float32))
                own.async_stream_infer(
                    "oldest", [given_], sequence_id=sequence, sequence_start=i == 0, sequence_end=i == 9
                )
        answers = [found.get(timeout=10) for _ in range(20)]
    assert not any(error for _, error in answers)
    assert [float(r.as_numpy("total")[0, 0]) for r, _ in answers] == [x * (i + 1) for i in range(10) for x in (1, 2)]


def test_python_models_see_ids_flags_and_controls(client) -> None:
    first = say(client, "teller", 1.0, "abc", start=True, shape=(1,)).as_numpy("said")[0].decode()
    last = say(client, "teller", 2.0, "abc", end=True, shape=(1,)).as_numpy("said")[0].decode()
    assert first == "abc 1 end=[False] id=[b'abc'] x=[1.0]"
    assert last == "abc 2 end=[True] id=[b'abc'] x=[2.0]"


def test_bad_sequences_are_refused(client) -> None:
    with pytest.raises(InferenceServerException, match="START flag"):
        say(client, "direct", 1.0, 999)
    with pytest.raises(InferenceServerException, match="correlation ID"):
        say(client, "direct", 1.0, 0, start=True)
    with pytest.raises(InferenceServerException, match="batch-size equal to 1"):
        say(client, "direct", 1.0, 3, start=True, shape=(2, 1))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("sequence_batching {} dynamic_batching {}", "another member of oneof"),
        ("sequence_batching { direct { minimum_slot_utilization: 2 } }", "must be in range"),
        ("sequence_batching { oldest {} }", "max_candidate_sequences"),
        (
            'sequence_batching { control_input { name: "start" control { kind: CONTROL_SEQUENCE_START } } }',
            "two values",
        ),
        ('sequence_batching { control_input { name: "x" control { kind: CONTROL_SEQUENCE_START } } }', "both controls"),
        (
            'sequence_batching { state { input_name: "kept" output_name: "next" data_type: TYPE_FP32 dims: [1] '
            'initial_state { name: "i" data_type: TYPE_FP32 dims: [1] data_file: "../../../etc/passwd" } } }',
            "leaves",
        ),
    ],
)
def test_configurations_that_contradict_themselves(tmp_path, config, says) -> None:
    ports = CONFIG.split("sequence_batching")[0]
    extra = "".join(
        f'input {{ name: "{n}" data_type: TYPE_FP32 dims: [1] }} '
        for n in ("kept", "start", "ready")
        if f'"{n}"' not in config
    )
    add_engine(tmp_path, "m", accumulator(), ports + extra + config)
    with pytest.raises(ServeError, match=says), serving(tmp_path):
        pass
