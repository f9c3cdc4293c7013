"""Python models' own metrics: kinds, errors, several processes, what is left when one dies; and the rules alone."""

from __future__ import annotations

import textwrap
import urllib.request

import numpy as np
import pytest
import tritonclient.http as http_client
from tritonclient.utils import InferenceServerException

from tests.serve.running import serving, wait_for
from venturi.serve.custom_metrics import CustomMetrics, Share
from venturi.serve.errors import ServeError

MODEL = """
    import os
    import numpy as np
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        def initialize(self, args):
            self.family = pb_utils.MetricFamily("words", "what was said", pb_utils.MetricFamily.COUNTER)
            self.said = self.family.Metric({"model": "m", "quote": 'a"b'})
            level = pb_utils.MetricFamily(name="level", description="how much", kind=pb_utils.MetricFamily.GAUGE)
            self.level = level.Metric(labels={"model": "m"})
            sizes = pb_utils.MetricFamily("sizes", "how large", pb_utils.MetricFamily.HISTOGRAM)
            self.sizes = sizes.Metric({}, [1, 2.5])

        def execute(self, requests):
            x = float(requests[0].inputs()[0].as_numpy()[0])
            if x == -1:
                os._exit(3)
            if x == -2:
                self.level.observe(1.0)
            if x == -3:
                pb_utils.MetricFamily("words", "else", pb_utils.MetricFamily.GAUGE)
            if x == -4:
                self.said.increment(-1)
            self.said.increment(x)
            self.level.set(10)
            self.level.increment(-x)
            self.sizes.observe(x)
            out = np.array([self.said.value(), self.level.value()], np.float32)
            return [pb_utils.InferenceResponse([pb_utils.Tensor("y", out)])]
"""
CONFIG = """
backend: "python"
input { name: "x" data_type: TYPE_FP32 dims: 1 }
output { name: "y" data_type: TYPE_FP32 dims: 2 }
instance_group { count: COUNT kind: KIND_CPU }
"""


def put(root, count):
    folder = root / "m" / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(textwrap.dedent(MODEL))
    (root / "m/config.pbtxt").write_text(CONFIG.replace("COUNT", str(count)))


@pytest.fixture(params=[1, 2], ids=["one process", "two"])
def running(request, tmp_path):
    put(tmp_path, request.param)
    with serving(tmp_path) as made:
        made.count = request.param
        yield made


def say(running, x):
    given = http_client.InferInput("x", [1], "FP32")
    given.set_data_from_numpy(np.array([x], np.float32))
    with http_client.InferenceServerClient(running.url("http")) as client:
        return client.infer("m", [given]).as_numpy("y").tolist()


def page(running):
    with urllib.request.urlopen(f"http://{running.url('metrics')}/metrics") as answer:
        return answer.read().decode()


def test_models_count_together(running):
    assert [say(running, x) for x in (1, 2, 4)] == [[1, 9], [3, 8], [7, 6]]
    text = page(running)
    for line in (
        "# HELP words what was said", "# TYPE words counter", r'words{model="m",quote="a\"b"} 7', "# TYPE level gauge",
        'level{model="m"} 6', "# TYPE sizes histogram", 'sizes_bucket{le="1"} 1', 'sizes_bucket{le="2.5"} 2',
        'sizes_bucket{le="+Inf"} 3', "sizes_sum{} 7", "sizes_count{} 3",
    ):  # fmt: skip
        assert line in text.splitlines(), line
    assert "nv_inference_count" in text


@pytest.mark.parametrize(
    "x, text",
    [
        (-2, "'observe' is for a histogram, 'level' is a gauge"),
        (-3, "metric family 'words' is a counter already, 'what was said'"),
        (-4, "a counter cannot be incremented by -1"),
    ],
)
def test_mistakes_are_the_model_s(running, x, text):
    with pytest.raises(InferenceServerException, match=text):
        say(running, x)
    assert say(running, 1)[0] == 1


def test_what_a_dead_process_made_goes_unless_another_holds_it(running):
    say(running, 5)
    with pytest.raises(InferenceServerException, match="died"):
        say(running, -1)
    if running.count == 1:
        wait_for(lambda: "words" not in page(running))
        assert say(running, 2)[0] == 2
    else:
        assert 'words{model="m"' in page(running)
        assert say(running, 2)[0] == 7


def test_unloading_takes_them_away(tmp_path):
    put(tmp_path, 2)
    with serving(tmp_path) as made:
        say(made, 1)
        metrics = made.running.core.custom_metrics
        assert "words" in metrics.render()
    assert metrics.render() == ""


@pytest.mark.parametrize(
    "head, text",
    [
        ({"do": "family", "name": "a b", "kind": "gauge", "text": ""}, "a name has letters"),
        ({"do": "family", "name": "nv_x", "kind": "gauge", "text": ""}, "begins with none of nv_"),
        ({"do": "family", "name": "a", "kind": "summary", "text": ""}, "expected one of counter"),
        ({"do": "metric", "name": "g", "labels": {"le": "1"}, "buckets": []}, "'le' is no name of a label"),
        ({"do": "metric", "name": "g", "labels": {"a-b": "1"}, "buckets": []}, "'a-b' is no name of a label"),
        ({"do": "metric", "name": "g", "labels": {}, "buckets": [1]}, "a histogram, and nothing else"),
        ({"do": "metric", "name": "h", "labels": {}, "buckets": []}, "has rising buckets"),
        ({"do": "metric", "name": "h", "labels": {}, "buckets": [1, 1]}, "has rising buckets"),
        ({"do": "metric", "name": "h", "labels": {"k": "v"}, "buckets": [2]}, r"have the buckets \[1.0\] already"),
        ({"do": "metric", "name": "x", "labels": {}, "buckets": []}, "no metric family 'x'"),
        ({"do": "increment", "name": "g", "labels": {}, "value": 1}, "no metric of 'g' with the labels {}"),
    ],
)
def test_what_is_refused(head, text):
    share = Share(CustomMetrics())
    for name, kind in (("g", "gauge"), ("h", "histogram")):
        share.do({"do": "family", "name": name, "kind": kind, "text": ""})
    share.do({"do": "metric", "name": "h", "labels": {"k": "v"}, "buckets": [1]})
    with pytest.raises(ServeError, match=text):
        share.do(head)


def test_holders_are_counted():
    metrics = CustomMetrics()
    one, two = Share(metrics), Share(metrics)
    for share in (one, two, two):
        share.do({"do": "family", "name": "c", "kind": "counter", "text": "t"})
        share.do({"do": "metric", "name": "c", "labels": {"k": "v"}, "buckets": []})
    one.do({"do": "increment", "name": "c", "labels": {"k": "v"}, "value": float("inf")})
    one.close()
    one.do({"do": "drop", "name": "c", "labels": {"k": "v"}})
    two.do({"do": "drop", "name": "c"})
    assert 'c{k="v"} +Inf' in metrics.render()
    two.do({"do": "drop", "name": "c", "labels": {"k": "v"}})
    two.do({"do": "drop", "name": "c", "labels": {"k": "v"}})
    assert metrics.render() == "# HELP c t\n# TYPE c counter\n"
    two.do({"do": "metric", "name": "c", "labels": {}, "buckets": []})
    two.do({"do": "drop", "name": "c"})
    assert metrics.render().endswith("c{} 0\n"), "the family is as long there as a metric of it"
    two.close()
    assert metrics.render() == ""
    one.do({"do": "family", "name": "c", "kind": "gauge", "text": "other"})
