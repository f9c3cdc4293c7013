"""Iterative sequences: a request that its model reschedules runs again, first of its sequence, until it is released."""

from __future__ import annotations

import queue
import time

import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException

from tests.serve.running import serving
from tests.serve.test_python_models import add_python
from tests.serve.test_sequences import ids, step
from venturi.serve.errors import ServeError
from venturi.serve.schedulers.batcher import BatchingRules, OneByOne
from venturi.serve.schedulers.policy import Run
from venturi.serve.schedulers.sequences import DirectSequences, OldestSequences, SequenceLine, SequenceRules

US = 1000


def line(kind: str, slots: int = 2) -> SequenceLine:
    rules = SequenceRules("m", 1, slots, iterative=True)
    return DirectSequences(rules) if kind == "direct" else OldestSequences(rules, BatchingRules(2, (1,), 0))


@pytest.mark.parametrize("kind", ["direct", "oldest"])
def test_requests_without_an_id_are_sequences_of_their_own(kind: str) -> None:
    found, now = line(kind, slots=1), 0
    first, second = step(0), step("")
    found.add(first, now)
    found.add(second, now)
    assert first.sequence != second.sequence
    starts = []
    for _ in range(3):
        now += US
        decision = found.take(now, 0)
        assert isinstance(decision, Run)
        assert decision.requests == [first], "it holds the only slot"
        starts.append(first.sequence_start)
        assert found.again(first, now)
        found.done(decision.requests, now)
    assert starts == [True, False, False]
    decision = found.take(now, 0)
    assert decision.requests == [first]
    found.done(decision.requests, now)
    assert found.take(now, 0).requests == [second], "the slot is free again"
    assert second.sequence_start


@pytest.mark.parametrize("kind", ["direct", "oldest"])
def test_a_request_goes_in_front_of_those_behind_it(kind: str) -> None:
    found = line(kind)
    one, two = step(5, "s"), step(5, "e")
    found.add(one, 0)
    found.add(two, 0)
    decision = found.take(0, 0)
    assert decision.requests == [one]
    found.again(one, US)
    found.done([one], US)
    assert found.take(US, 0).requests == [one]
    found.done([one], US)
    assert found.take(US, 0).requests == [two]
    assert two.sequence_end
    found.again(two, US)
    found.done([two], US)
    assert not two.sequence_end, "it ended the sequence once"
    assert found.take(US, 0).requests == [two]
    found.done([two], US)
    assert len(found) == 0
    with pytest.raises(ServeError, match="START flag"):
        found.add(step(5), US)


def test_a_rescheduled_request_that_is_cancelled_frees_its_slot() -> None:
    found = line("direct", slots=1)
    one, two = step(0), step(0)
    found.add(one, 0)
    found.add(two, 0)
    found.take(0, 0)
    found.again(one, US)
    found.done([one], US)
    assert found.cancel(one) == [one]
    assert ids(found.take(US, 0)) == [two.sequence]


def test_other_policies_do_not_run_requests_again() -> None:
    assert not OneByOne().again(step(0), 0)
    plain = DirectSequences(SequenceRules("m"))
    request = step(3, "s")
    plain.add(request, 0)
    plain.take(0, 0)
    assert not plain.again(request, 0)


COUNT_DOWN = """
    import numpy as np
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        def initialize(self, args):
            self.left = {}

        def execute(self, requests):
            for request in requests:
                sender, key = request.get_response_sender(), request.correlation_id()
                if request.flags() & pb_utils.TRITONSERVER_REQUEST_FLAG_SEQUENCE_START:
                    self.left[key] = int(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()[0])
                left = self.left[key] = self.left[key] - 1
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", np.array([left], np.int32))]))
                if left > 0:
                    request.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
                else:
                    sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            return None
"""
SUM_UP = """
    import numpy as np
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        def initialize(self, args):
            self.runs = {}

        def execute(self, requests):
            responses = []
            for request in requests:
                key = request.correlation_id()
                wanted = int(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()[0])
                self.runs[key] = self.runs.get(key, 0) + 1
                if self.runs[key] < abs(wanted):
                    request.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
                    responses.append(None if wanted > 0 else pb_utils.InferenceResponse([]))
                    continue
                out = np.array([self.runs.pop(key)], np.int32)
                responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", out)]))
            return responses
"""
PORTS = """backend: "python" input { name: "IN" data_type: TYPE_INT32 dims: [1] }
output { name: "OUT" data_type: TYPE_INT32 dims: [1] } """
ITERATIVE = "sequence_batching { iterative_sequence: true max_sequence_idle_microseconds: 5000000 }"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("iterative")
    add_python(root, "count", COUNT_DOWN, PORTS + ITERATIVE + " model_transaction_policy { decoupled: true }")
    add_python(root, "sum", SUM_UP, PORTS + ITERATIVE)
    add_python(root, "plain", SUM_UP, PORTS)
    with serving(root) as running:
        yield running


def given(module, value: int):
    tensor = module.InferInput("IN", [1], "INT32")
    tensor.set_data_from_numpy(np.array([value], np.int32))
    return [tensor]


def test_a_decoupled_model_answers_at_every_turn(server) -> None:
    found: queue.Queue = queue.Queue()
    with grpc_client.InferenceServerClient(server.url("grpc")) as client:
        client.start_stream(lambda result, error: found.put((result, error)))
        for i, count in enumerate((3, 1, 4)):
            client.async_stream_infer("count", given(grpc_client, count), request_id=str(i))
        answers: dict[str, list[int]] = {"0": [], "1": [], "2": []}
        deadline = time.monotonic() + 30
        while sum(map(len, answers.values())) < 8 and time.monotonic() < deadline:
            result, error = found.get(timeout=30)
            assert error is None, error
            answers[result.get_response().id].append(int(result.as_numpy("OUT")[0]))
        client.stop_stream()
    assert answers == {"0": [2, 1, 0], "1": [0], "2": [3, 2, 1, 0]}


@pytest.mark.parametrize("module", [http_client, grpc_client], ids=["http", "grpc"])
def test_a_model_with_one_answer_gives_it_at_the_end(server, module) -> None:
    with module.InferenceServerClient(server.url(module.__name__.split(".")[1])) as client:
        for count in (1, 3, 6):
            assert client.infer("sum", given(module, count)).as_numpy("OUT") == [count]
        with pytest.raises(InferenceServerException, match="a rescheduled request must have None"):
            client.infer("sum", given(module, -2))
        with pytest.raises(InferenceServerException, match="is no iterative_sequence"):
            client.infer("plain", given(module, 2))
        assert client.infer("plain", given(module, 1)).as_numpy("OUT") == [2], "the run before counted"
